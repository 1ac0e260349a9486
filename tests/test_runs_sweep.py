"""sweep.py: what fails or is killed is told and loses nothing else, and a sweep started again does what is missing."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from run_helpers import ENDLESS, LONG, NO_TEST, differing, read_csv, refused, run, tiny

import statemix
from statemix import TrainConfig, cli
from statemix.files import locked
from statemix.runs.executors import EXECUTORS, Local
from statemix.runs.sweep import load_configs, run_name, sweep
from statemix.training.config import OptimizerConfig


def assert_same_run(folder: Path, reference: Path) -> None:
    """`run` puts a stand-in for the picture into the reference."""
    assert differing(folder, reference) == ["curves.png"]


FILE = """
from run_helpers import LONG, tiny

configs = {f"seed {seed}": tiny(seed) for seed in range(10)} | {"wrong": {"steps": 0}, "long": LONG}
"""


class Killing(Local):
    """Kills the process of the long run as soon as it has a checkpoint that counts."""

    def start(self, config, folder):
        job = super().start(config, folder)

        def kill():
            wait_until((folder / "checkpoints.json").exists)
            os.kill(job.process.pid, signal.SIGKILL)

        if folder.name == run_name(LONG):
            threading.Thread(target=kill, daemon=True).start()
        return job


def test_a_sweep_with_a_killed_and_a_wrong_run_loses_nothing_and_goes_on(tmp_path, capsys, monkeypatch):
    """12 runs, of which one is killed and one is no config: 10 results, two errors; then 11."""
    monkeypatch.chdir(tmp_path)
    Path("many.py").write_text(FILE)
    with mock.patch.dict(EXECUTORS, local=Killing):
        assert cli.main(["sweep", "many.py", "--jobs", "2"]) == 1
    shown = capsys.readouterr()
    out = tmp_path / "runs" / "many"
    long = out / run_name(LONG)
    assert len(list(out.glob("*/result.json"))) == 10
    assert "10 of 12 runs have ended" in shown.out
    assert "error: sweep: 2 of 12 runs failed; the same command tries them again:\n" in shown.err
    wrong = r"wrong: TrainConfig: `steps` must be at least 1, got 0\."
    killed = rf"long: killed by SIGKILL, as when memory runs out \(its log: runs/many/{long.name}/log\.txt\)"
    assert re.search(rf"\n  {wrong}\n  {killed}\n$", shown.err)
    rows = read_csv(out / "results.csv")
    assert [row["label"] for row in rows] == [*(f"seed {seed}" for seed in range(10)), "wrong", "long"]
    assert [row["status"] for row in rows] == ["done"] * 10 + ["failed"] * 2
    assert rows[11]["steps"] == "200"
    assert rows[11]["error"].startswith("killed by SIGKILL")
    reached = json.loads((long / "checkpoints.json").read_text())["last"]

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.parent != long}
    assert cli.main(["sweep", "many.py", "--jobs", "2"]) == 1  # the wrong one is still wrong
    shown = capsys.readouterr()
    assert "11 of 12 runs have ended" in shown.out
    assert "10 of 12 are done already" in shown.err
    assert re.search(rf"error: sweep: 1 of 12 runs failed; .*\n  {wrong}\n$", shown.err)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.glob("*/result.json"))) == 11
    log = (long / "log.txt").read_text()
    assert int(re.search(r"step +(\d+)", log)[1]) > int(reached.removeprefix("step-"))  # it went on, not anew
    assert_same_run(long, run(tmp_path / "whole", LONG).out)
    [row] = [row for row in read_csv(out / "results.csv") if row["label"] == "long"]
    assert (row["status"], row["error"]) == ("done", "")


def test_the_runs_are_the_same_as_alone_in_one_thread_and_are_named_by_their_content(tmp_path, capfd):
    done = sweep({"a": tiny(1), "b": tiny(2)}, tmp_path / "out", jobs=1)
    for row, seed in zip(done.rows, (1, 2), strict=True):
        assert row["folder"] == str(tmp_path / "out" / run_name(tiny(seed)))
        assert row["threads"] == 1
        assert_same_run(Path(row["folder"]), run(tmp_path / str(seed), tiny(seed)).out)
    assert done.failed == []
    lines = capfd.readouterr().err.splitlines()  # a line a run, and what they print themselves is in their logs
    assert [line.split("(")[0] for line in lines] == ["1 of 2  a ", "2 of 2  b "]
    assert (Path(row["folder"]) / "log.txt").read_text().count("step") == 3


def test_a_name_is_of_the_config_and_the_version():
    name = run_name(tiny(0))
    assert re.fullmatch(r"permutation-lstm-[0-9a-f]{12}", name)
    assert run_name(TrainConfig.from_json(tiny(0).to_json())) == name
    assert run_name(tiny(1)) != name
    assert run_name(TrainConfig(accumulate=2)) != run_name(TrainConfig())
    with mock.patch.object(statemix, "__version__", "0.0.0"):
        assert run_name(tiny(0)) != name
    whole, real = (TrainConfig(optimizer=OptimizerConfig(weight_decay=decay)) for decay in (0, 0.0))
    assert whole == real
    assert run_name(whole) == run_name(real) == run_name(TrainConfig.from_json(whole.to_json()))


def test_a_run_that_fails_is_told_with_its_error_and_equal_configs_run_once(tmp_path):
    entries = {"no test": NO_TEST, "a": tiny(1), "same": tiny(1), "no config": 3, "typo": {"stepz": 1}}
    done = sweep(entries, tmp_path, jobs=2, progress=False)
    assert [row["label"] for row in done.rows] == ["no test", "a", "no config", "typo"]
    assert [row["status"] for row in done.rows] == ["failed", "done", "failed", "failed"]
    errors = {row["label"]: row["error"] for row in done.failed}
    told = r"sample: no sequence of length 2 belongs to split 'test': .*vocabulary\."
    assert re.fullmatch(rf"{told} \(its log: {tmp_path}/{run_name(NO_TEST)}/log\.txt\)", errors["no test"])
    assert "Traceback" in (tmp_path / run_name(NO_TEST) / "log.txt").read_text()
    assert errors["no config"] == "a config must be a TrainConfig or a mapping, got 3."
    assert errors["typo"].startswith("TrainConfig: unknown key `stepz`; there are [")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_stops_its_runs_and_says_how_to_go_on(
    tmp_path, capsys, monkeypatch, request, signal_number
):
    monkeypatch.chdir(tmp_path)
    Path("long.py").write_text("from run_helpers import ENDLESS, tiny\nconfigs = [tiny(0), ENDLESS]")
    pids, sleep = [], time.sleep
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, outside))

    class Noting(Local):
        def start(self, config, folder):
            job = super().start(config, folder)
            pids.append(job.process.pid)
            return job

    def stop_when_begun(seconds):
        sleep(seconds)
        if len(pids) == 2 and list(Path().glob(f"runs/long/{run_name(ENDLESS)}/checkpoints.json")):
            signal.raise_signal(signal_number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.dict(EXECUTORS, local=Noting), mock.patch("statemix.runs.sweep.time.sleep", stop_when_begun):
        assert cli.main(["sweep", "long.py", "--jobs", "1"]) == 130
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert capsys.readouterr().err.endswith("stopped: the same command goes on from the last checkpoint.\n")
    for pid in pids:
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.kill(pid, 0)
    rows = read_csv(Path("runs/long/results.csv"))
    assert [(row["status"], row["error"]) for row in rows] == [("done", ""), ("unfinished", "")]


def sweep_for_ever(out: Path) -> None:
    sweep({"long": ENDLESS}, out, jobs=1, progress=False)


def test_the_runs_of_a_killed_sweep_end_with_it(tmp_path):
    """If they went on, the next sweep would find their folders in use."""
    process = multiprocessing.get_context("spawn").Process(target=sweep_for_ever, args=(tmp_path,))
    process.start()
    folder = tmp_path / run_name(ENDLESS)
    wait_until((folder / "checkpoints.json").exists)
    assert not is_free(folder)
    process.kill()
    process.join()
    wait_until(lambda: is_free(folder))
    reached = json.loads((folder / "checkpoints.json").read_text())["last"]
    assert int(reached.removeprefix("step-")) < ENDLESS.steps


def is_free(folder: Path) -> bool:
    """Whether no process is at work there."""
    try:
        with locked(folder, "a run"):
            return True
    except ValueError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_sweep_of_another_version_is_refused(tmp_path):
    done = sweep({"a": tiny(1)}, tmp_path, jobs=1, progress=False)
    told = rf"^sweep: `out` '{tmp_path}' was made by statemix {re.escape(statemix.__version__)}, this is 9\.9\.9: "
    with mock.patch.object(statemix, "__version__", "9.9.9"), refused(told):
        sweep({"a": tiny(1)}, tmp_path)
    for content in ("[]", "{}", "{"):
        (tmp_path / "sweep.json").write_text(content)
        with refused(rf"^sweep: '{tmp_path}/sweep\.json' is damaged: .*Delete it, or use another"):
            sweep({"a": tiny(1)}, tmp_path)
    assert Path(done.rows[0]["folder"], "result.json").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    wrong = rf"^sweep: `out` must be a folder of its own, but another process is at work in '{tmp_path}'"
    with locked(tmp_path, "another sweep"), refused(wrong):
        sweep({"a": tiny(1)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


WRONG_ARGUMENTS = [
    ({"jobs": 0}, r"^sweep: `jobs` must be an int of at least 1, got 0\.$"),
    ({"jobs": True}, r"^sweep: `jobs` must be an int of at least 1, got True\.$"),
    ({"executor": "slurm"}, r"^sweep: `executor` must be one of \['local', 'ray'\], got 'slurm'\.$"),
    ({"address": "auto"}, r"^sweep: `address` is of a Ray cluster: it needs executor='ray', got 'local'\.$"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(tmp_path, arguments, message):
    with refused(message):
        sweep({"a": tiny(1)}, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, message in (("file", "must be a folder, but '.*file' is a file"), ("file/below", "cannot be made")):
        with refused(f"^sweep: `out` {message}|^sweep: `out` must .*{message}"):
            sweep({"a": tiny(1)}, tmp_path / out)


def test_ray_that_is_not_installed_is_named(tmp_path):
    with mock.patch.dict(sys.modules, ray=None), pytest.raises(RuntimeError, match=r"pip install statemix\[ray\]"):
        sweep({"a": tiny(1)}, tmp_path, executor="ray")


# ---- the file


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "sweep_file.py"
    path.write_text(f"from run_helpers import tiny\n{text}")
    return path


def test_configs_are_a_list_a_dict_or_a_function_of_the_budget(tmp_path):
    assert load_configs(written(tmp_path, "configs = [tiny(1), tiny(2)]")) == {"0": tiny(1), "1": tiny(2)}
    assert load_configs(written(tmp_path, "configs = {'one': tiny(1), 2: {}}")) == {"one": tiny(1), "2": {}}
    path = written(tmp_path, "def configs(budget):\n    return [tiny(1)] if budget == 'quick' else {'all': tiny(2)}")
    assert load_configs(path, "quick") == {"0": tiny(1)}
    assert load_configs(path, "full") == load_configs(path) == {"all": tiny(2)}
    # the file is not run as a program
    assert load_configs(written(tmp_path, "configs = [tiny(1)]\nif __name__ == '__main__':\n    configs = []"))


WRONG_FILES = {
    "config = []": r"must end with `configs`, a list of at least one TrainConfig, .*; got no such name\.",
    "configs = []": r"must end with `configs`.*; got nothing in it\.",
    "configs = 3": r"must end with `configs`.*; got 3\.",
    "def configs(budget): return None": r"must end with `configs`.*got no such name",
    "configs = [tiny(1)]\nimport no_such_module": r", line 3: ModuleNotFoundError: No module named 'no_such_module'",
    "configs = [tiny(1, steps=0)]": r", line 2: ValueError: TrainConfig: `steps` must be at least 1, got 0\.",
    "configs = [": r"SyntaxError: '\[' was never closed",
    "def configs():\n    return []": r"TypeError: configs\(\) takes 0 positional arguments",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text):
    path = written(tmp_path, text)
    with refused(rf"^sweep: '{path}'.*{WRONG_FILES[text]}"):
        load_configs(path)


def test_a_missing_file_and_a_budget_without_use_are_named(tmp_path):
    with refused(rf"^sweep: `FILE` must be a Python file, but there is no '{tmp_path}/no\.py'"):
        load_configs(tmp_path / "no.py")
    path = written(tmp_path, "configs = [tiny(1)]")
    with refused(r"`budget` has no use: `configs` is not a function of it"):
        load_configs(path, "quick")
    with refused(r"^sweep: `budget` must be one of \['full', 'quick'\], got 'half'"):
        load_configs(path, "half")


# ---- Ray

ON_RAY = """
import os, signal, sys, threading, time
from pathlib import Path
import psutil
from statemix.runs.sweep import run_name, sweep
from run_helpers import LONG, NO_TEST, tiny

def kill_the_worker(folder):
    while not (folder / "checkpoints.json").exists():
        time.sleep(0.02)
    for process in psutil.process_iter():
        try:
            if str(folder / "log.txt") in {file.path for file in process.open_files()}:
                process.kill()
        except psutil.Error:
            pass

if __name__ == "__main__":
    out = Path(sys.argv[1])
    entries = {"a": tiny(1), "no test": NO_TEST, "long": LONG, "b": tiny(2), "c": tiny(3)}
    threading.Thread(target=kill_the_worker, args=(out / run_name(LONG),), daemon=True).start()
    for row in sweep(entries, out, executor="ray", jobs=2).rows:
        print(row["label"], row["status"], row.get("threads"), row["error"], sep="|")
"""


def test_a_sweep_on_a_ray_of_two_workers(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install statemix[ray]")
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "on_ray.py", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
    labels, statuses, threads, errors = zip(*rows, strict=True)
    assert labels == ("a", "no test", "long", "b", "c")
    assert statuses == ("done", "failed", "failed", "done", "done")
    assert threads == ("1", "None", "None", "1", "1")
    assert "no sequence of length 2 belongs to split 'test'" in errors[1]
    assert errors[2].startswith("its Ray worker was lost: ")
    for seed in (1, 2, 3):
        assert_same_run(tmp_path / "out" / run_name(tiny(seed)), run(tmp_path / str(seed), tiny(seed)).out)


WITHOUT_GUARD = """
from statemix import TrainConfig
from statemix.runs.sweep import sweep
print(sweep({"a": TrainConfig(steps=1)}, "out", jobs=1))
"""


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """Its runs import it again and end before they begin; the others are not lost, and the message says what to do."""
    (tmp_path / "script.py").write_text(WITHOUT_GUARD)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "needs `if __name__ == '__main__':`" in done.stdout + done.stderr
    assert "FileNotFoundError" not in done.stderr


def test_what_a_killed_sweep_left_is_deleted_and_nothing_else(tmp_path):
    left = [".sweep.json.0123456789abcdef.partial", ".results.csv.0123456789abcdef.partial"]
    mine = [".notes.0123456789abcdef.partial", ".sweep.json.partial"]
    for name in (*left, *mine):
        (tmp_path / name).touch()
    sweep({}, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set(mine)


@pytest.mark.parametrize("label", ["a\nb", "\x1b[2J", "\x00", "\x7f", "\x9b", "\u2028", "\ud800"], ids=ascii)
def test_a_label_that_cannot_be_looked_at_is_refused_before_anything_is_made(tmp_path, label):
    with refused(re.escape(f"sweep: `label` must have no control characters, got {label!a} with ")):
        sweep({"good": tiny(0), label: tiny(1)}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
