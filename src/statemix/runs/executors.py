"""Where the runs of a sweep go: processes of this machine, or the workers of a Ray cluster.

An executor is a context in which `start` begins a run and returns its job; it has room for `slots` of them at a time.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from statemix.runs.read import LOG_FILE
from statemix.specs import import_named
from statemix.training.config import TrainConfig
from statemix.training.loop import train

# what a run imports sooner or later: each is forked from a process that has it
PRELOADED = ("statemix.training.loop", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg")


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> str | None:
        """None while it runs; then "", or why it failed."""

    def stop(self) -> None:
        """End it now. Its checkpoints are whole: it can go on from the last."""


class Executor(Protocol):
    """See the module."""

    slots: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def start(self, config: TrainConfig, folder: Path) -> Job:
        """Train a config on one thread, in a folder that exists."""


class Local:
    """Processes of this machine, one per run: a crash is of that run only.

    Where the system can, they are forked from a server that has imported everything and runs no thread: a run then
    starts at once, and not after seconds of imports.
    """

    def __init__(self, jobs: int | None, address: str | None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.slots = jobs or cores or 1

    def __enter__(self) -> Self:
        fork = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
        if fork:
            self.context.set_forkserver_preload(list(PRELOADED))
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, config: TrainConfig, folder: Path) -> Job:
        """See `Executor`."""
        (folder / LOG_FILE).unlink(missing_ok=True)  # of an earlier try
        # daemon: ended with this process; see _end_with_parent
        arguments = (config.to_json(), config.modules, str(folder))
        process = self.context.Process(target=_train_in_process, args=arguments, daemon=True)
        process.start()
        return _Process(process, folder / LOG_FILE)


class _Process:
    """The job of `Local`."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log

    def poll(self) -> str | None:
        """See `Job`."""
        code = self.process.exitcode
        if not code:
            return code if code is None else ""
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return f"exit status {code} before it began; a script that sweeps needs `if __name__ == '__main__':`"
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return said[-1] if said else f"exit status {code}; its log ends with: {' / '.join(lines[-3:])}"

    def stop(self) -> None:
        """See `Job`."""
        self.process.terminate()
        self.process.join(10)
        self.process.kill()
        self.process.join()


class Ray:
    """Workers of a Ray cluster, a core each; a lost one fails its run only. They see the folder under the same path."""

    def __init__(self, jobs: int | None, address: str | None) -> None:
        self.jobs, self.address = jobs, address

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError("sweep: executor='ray' needs Ray: pip install statemix[ray].") from error
        self.ray = ray
        own = {"num_cpus": self.jobs, "include_dashboard": False} if self.address is None else {"address": self.address}
        ray.init(**own, log_to_driver=False, configure_logging=False)
        self.task = ray.remote(num_cpus=1, max_retries=0)(_train_to_log)
        self.slots = self.jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()

    def start(self, config: TrainConfig, folder: Path) -> Job:
        """See `Executor`."""
        task = self.task.remote(config.to_json(), config.modules, str(folder), tuple(sys.path))
        return _RayTask(self.ray, task)


class _RayTask:
    """The job of `Ray`."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def poll(self) -> str | None:
        """See `Job`."""
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            error: str = self.ray.get(self.reference)
        except self.ray.exceptions.RayError as lost:
            return f"its Ray worker was lost: {str(lost).splitlines()[0]}"
        return error

    def stop(self) -> None:
        """See `Job`."""
        self.ray.cancel(self.reference, force=True)


EXECUTORS: dict[str, type[Local] | type[Ray]] = {"local": Local, "ray": Ray}


def _train_in_process(config: str, modules: tuple[str, ...], folder: str) -> None:
    """A run in a process of its own; what C++ libraries print goes into the log too."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (Path(folder) / LOG_FILE).open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if error := _train(config, modules, folder):
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    """Wait for the end of the process of the sweep, which SIGKILL leaves no time to stop its runs, and end this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # as if killed: what is written is whole at any time


def _train_to_log(config: str, modules: tuple[str, ...], folder: str, path: tuple[str, ...]) -> str:
    """A run in a process that is used for others later, with the import path of the sweep. Returns "", or the error."""
    sys.path += [entry for entry in path if entry not in sys.path]
    with (
        (Path(folder) / LOG_FILE).open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return _train(config, modules, folder)


def _train(config: str, modules: tuple[str, ...], folder: str) -> str:
    """Returns "", or the error in one line; its traceback is printed."""
    torch.set_num_threads(1)
    try:
        for module in modules:  # which the sweep's own process has imported: its caller named them
            import_named("sweep", module)
        train(TrainConfig.from_json(config), folder)
    except KeyboardInterrupt:
        return "stopped"
    except Exception as error:  # whatever it is, it is of this run only
        traceback.print_exc()
        name = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        return f"{name}{' '.join(str(error).split())}"
    return ""
