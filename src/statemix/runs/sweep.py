"""Many runs, of which each is started once: sweep(configs, out), on this machine's processes or on a Ray cluster.

    out/sweep.json        the version of statemix that made it, the labels of the runs, and a sha256 of both
    out/RUN/              a run (see checkpoint.py), and log.txt: what it printed
    out/results.csv       one row per run; results.parquet too where pyarrow is installed

RUN is task-mixer-hash, the hash of the config and of the version. So a sweep that is started again does only what is
missing, wherever a config now stands in the list, and goes on from the last checkpoint of what was interrupted.
"""

import contextlib
import hashlib
import json
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import statemix
from statemix import records
from statemix.files import delete_partials, locked, make_folder, write_whole
from statemix.runs.executors import EXECUTORS, Executor, Job
from statemix.runs.read import (
    LOG_FILE,
    SWEEP_FILE,
    Row,
    check_label,
    flatten,
    read_run,
    read_sweep,
    row_of,
    sweep_json,
    write_table,
)
from statemix.specs import file_name
from statemix.training.checkpoint import METRICS_FILE, RESULT_FILE
from statemix.training.config import TrainConfig

TABLE_NAME = "results"
BUDGETS = ("quick", "full")
POLL_SECONDS = 0.2

Entries = Mapping[str, object]  # label -> TrainConfig, or its JSON form as a mapping


class SweepResult(NamedTuple):
    """What a sweep ends with: a row per run, also of one that failed, which has an "error", and the tables' files."""

    rows: list[Row]
    tables: list[Path]

    @property
    def failed(self) -> list[Row]:
        """The rows of the runs without a result."""
        return [row for row in self.rows if row["status"] != "done"]


def load_configs(path: str | Path, budget: str | None = None) -> dict[str, object]:
    """The configs that a Python file ends with, by label.

    `configs` in the file is a list, a dict {label: config}, or a function of the budget that returns one of them. A
    config is a TrainConfig or a mapping like its JSON; a wrong mapping is an error of that run alone.

    Args:
        path: of the file. It is run.
        budget: "quick" or "full", for a file whose `configs` is a function. None: "full".

    Raises:
        ValueError: there is no such file, it fails, it has no `configs`, or has no use for the budget.
    """
    path = Path(path)
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"sweep: `budget` must be one of {sorted(BUDGETS)}, got {budget!r}.")
    if not path.is_file():
        raise ValueError(f"sweep: `FILE` must be a Python file, but there is no '{path}'.")
    if (folder := str(path.parent.absolute())) not in sys.path:  # as Python does for a script, but after all else
        sys.path.append(folder)
    try:
        names = runpy.run_path(str(path), run_name="sweep")
        configs = names.get("configs")
        if callable(configs):
            configs = configs(budget or "full")
        elif budget is not None:
            raise ValueError("`budget` has no use: `configs` is not a function of it")
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"sweep: '{path}'{where}: {type(error).__name__}: {error}") from error
    if isinstance(configs, list | tuple):
        configs = {str(number): config for number, config in enumerate(configs)}
    if not isinstance(configs, Mapping) or not configs:
        got = "nothing in it" if configs == {} else "no such name" if configs is None else repr(configs)[:80]
        raise ValueError(
            f"sweep: '{path}' must end with `configs`, a list of at least one TrainConfig, a dict {{label: config}} or "
            f"a function of the budget that returns one; got {got}."
        )
    return {str(label): config for label, config in configs.items()}


def run_name(config: TrainConfig) -> str:
    """task-mixer-hash: the same for equal configs and one version, another for any other."""
    config = TrainConfig.from_json(config.to_json())  # where 0 and 0.0 of two equal configs are one
    content = f"{statemix.__version__}\n{config.to_json()}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return f"{file_name(config.task['name'])}-{file_name(config.mixer['name'])}-{digest}"


def sweep(
    entries: Entries,
    out: str | Path,
    *,
    jobs: int | None = None,
    executor: str = "local",
    address: str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train every config that has no result yet, each in a process of one thread, and write the table of all.

    A run that fails, or whose process is killed, leaves the others as they are and is told with its error; started
    again, it goes on from its last checkpoint. Equal configs run once, under the first label. If this process itself is
    killed, the runs at work end with it (those of "ray": Ray's own rule).

    Args:
        entries: label -> config; see `load_configs`.
        out: folder of the sweep.
        jobs: runs at a time. None: as many as this process, or the cluster, has cores.
        executor: "local": processes of this machine. "ray": a Ray cluster whose machines see `out` under the same path;
            its runs have no GPU.
        address: of the cluster, for "ray". None: a Ray of this machine's own, for this sweep.
        progress: show it on standard error.

    Raises:
        ValueError: an argument is wrong, a label has a control character, or `out` was made by another version, or
            another sweep is at work in it.
        RuntimeError: the executor is not installed.
        KeyboardInterrupt: it was stopped; all its processes are too, and the table holds what has ended.
    """
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"sweep: `jobs` must be an int of at least 1, got {jobs!r}.")
    if executor not in EXECUTORS:
        raise ValueError(f"sweep: `executor` must be one of {sorted(EXECUTORS)}, got {executor!r}.")
    if address is not None and executor != "ray":
        raise ValueError(f"sweep: `address` is of a Ray cluster: it needs executor='ray', got {executor!r}.")
    for label in entries:
        check_label(label)
    folder = make_folder(out, "sweep")
    with locked(folder, "sweep: `out`"):
        _check_version(folder)
        configs, labels, errors = _resolve(entries)
        delete_partials(folder, rf"{re.escape(SWEEP_FILE)}|{TABLE_NAME}\..+")
        write_whole(folder / SWEEP_FILE, sweep_json(labels))
        waiting = [name for name in configs if not (folder / name / RESULT_FILE).exists()]
        display = _Display(labels, errors, len(waiting), progress)
        try:
            if waiting:
                with _termination_as_interrupt(), EXECUTORS[executor](jobs, address) as machine, display:
                    _run_all(folder, {name: configs[name] for name in waiting}, machine, display, errors)
        finally:
            rows = _rows(folder, configs, labels, errors)
            rows.sort(key=lambda row: list(entries).index(row["label"]))
            tables = write_table(rows, folder, TABLE_NAME)
    return SweepResult(rows, tables)


def _check_version(folder: Path) -> None:
    """Raise ValueError if another version of statemix has made the folder."""
    try:
        version = read_sweep(folder, "sweep", "Delete it, or use another folder.")["version"]
    except FileNotFoundError:
        return
    if version != statemix.__version__:
        raise ValueError(
            f"sweep: `out` '{folder}' was made by statemix {version}, this is {statemix.__version__}: results of two "
            "versions are not one table. Use another folder, or that version."
        )


def _resolve(entries: Entries) -> tuple[dict[str, TrainConfig], dict[str, str], dict[str, str]]:
    """Configs by the names of their runs, labels by the same, and errors of entries that are no config by label."""
    configs: dict[str, TrainConfig] = {}
    labels: dict[str, str] = {}
    errors: dict[str, str] = {}
    for label, entry in entries.items():
        try:
            if isinstance(entry, Mapping):
                entry = TrainConfig.from_json(json.dumps(entry))
            if not isinstance(entry, TrainConfig):
                raise TypeError(f"a config must be a TrainConfig or a mapping, got {entry!r}.")
        except (TypeError, ValueError) as error:
            errors[label] = str(error)
            continue
        name = run_name(entry)
        configs[name] = entry
        labels.setdefault(name, label)
    return configs, labels, errors


def _run_all(
    out: Path, configs: Mapping[str, TrainConfig], machine: Executor, display: "_Display", errors: dict[str, str]
) -> None:
    """Run every config, as many at a time as the machine has slots, and add what failed to the errors, by name."""
    waiting, running = deque(configs), dict[str, Job]()
    try:
        while waiting or running:
            while waiting and len(running) < machine.slots:
                name = waiting.popleft()
                folder = make_folder(out / name, "sweep").absolute()
                running[name] = machine.start(configs[name], folder)
                display.start(name, configs[name].steps)
            time.sleep(POLL_SECONDS)
            for name, job in list(running.items()):
                error = job.poll()
                if error is None:
                    display.update(name, out / name / METRICS_FILE)
                    continue
                if not error and not (out / name / RESULT_FILE).exists():
                    error = f"it ended without {RESULT_FILE}"
                if error:
                    errors[name] = f"{error} (its log: {out / name / LOG_FILE})"
                del running[name]
                display.end(name, error)
    finally:
        for job in running.values():
            job.stop()


def _rows(
    out: Path, configs: Mapping[str, TrainConfig], labels: Mapping[str, str], errors: Mapping[str, str]
) -> list[Row]:
    """A row per run and per entry that is no config."""
    rows: list[Row] = []
    for name, config in configs.items():
        row: Row = {"label": labels[name], "status": "done", "error": errors.get(name)}
        try:
            rows.append(row | row_of(read_run(out / name)))
        except ValueError as error:
            waits = row["error"] is None and not (out / name / RESULT_FILE).exists()
            what = {
                "status": "unfinished" if waits else "failed",
                "error": row["error"] or (None if waits else str(error)),
            }
            rows.append(row | what | flatten(config) | {"folder": str(out / name)})
    bad = [label for label in errors if label not in configs]
    return rows + [{"label": label, "status": "failed", "error": errors[label]} for label in bad]


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: the runs must end with the sweep."""
    if threading.current_thread() is not threading.main_thread():  # only there can it be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Display:
    """On a terminal a bar for the sweep and one for each run at work; elsewhere a line per run that ends."""

    def __init__(self, labels: Mapping[str, str], errors: Mapping[str, str], missing: int, enabled: bool) -> None:
        self.labels, self.total, self.failed = labels, len(labels) + len(errors), len(errors)
        self.ended = self.total - missing
        self.console = Console(stderr=True, quiet=not enabled, soft_wrap=True)
        for label, error in errors.items():
            self._say(f"{label}: FAILED: {error}")
        if self.ended > self.failed:
            self._say(f"{self.ended - self.failed} of {self.total} are done already")
        terminal = enabled and self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, disable=not terminal)
        self.sweep = self.progress.add_task("sweep", total=self.total, completed=self.ended)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Display":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def start(self, name: str, steps: int) -> None:
        """A run begins."""
        self.tasks[name] = self.progress.add_task(f"  {self.labels[name]}: {name}", total=steps)

    def update(self, name: str, metrics: Path) -> None:
        """A run goes on."""
        if not self.progress.disable:
            self.progress.update(self.tasks[name], completed=_last_step(metrics))

    def end(self, name: str, error: str) -> None:
        """A run has ended: well, or with an error."""
        self.ended += 1
        self.failed += bool(error)
        said = f"FAILED: {error}" if error else "done"
        self._say(f"{self.ended} of {self.total}  {self.labels[name]} ({name}): {said}")
        failed = f", {self.failed} failed" if self.failed else ""
        self.progress.update(self.sweep, completed=self.ended, description=f"sweep{failed}")
        self.progress.remove_task(self.tasks[name])

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


def _last_step(metrics: Path) -> int:
    """The step of the last whole line of a metrics.jsonl, from its last bytes; 0 if there is none yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65_536))
            lines = file.read().splitlines(keepends=True)
        steps = [records.parse(line) for line in lines[1:] or lines if line.endswith(b"\n")]
        for line in steps:
            records.check(line, {"step": int})
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in steps), default=0)
