"""listeners.py: each line of metrics is told once, to a function and to trackers, also where a run is stopped."""

import json
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from helpers import exit_code
from run_helpers import (
    LSTM,
    assert_same_files,
    differing,
    extra,
    refused,
    run,
    run_in_parts,
    small_config,
    start,
    stopped,
)

from statemix.training.checkpoint import RunFolder


def config(**changes):
    """A line of metrics at each of 6 steps, and a validation and a checkpoint after 2, 4 and 6."""
    return small_config(**{"steps": 6, "eval_every": 2, "mixer": LSTM} | changes)


STEPS = [1, 2, 2, 3, 4, 4, 5, 6, 6]  # of the lines, of which a validation comes last


def numbers(line: dict) -> dict:
    return {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped and that nobody listened to."""
    return run(tmp_path_factory.mktemp("finished") / "run", config())


# a function of the caller


def test_on_log_gets_a_copy_of_each_line(finished, tmp_path):
    lines = []

    def on_log(line):
        lines.append(dict(line))
        if "valid_loss" in line:  # and by then its checkpoint is on the disk
            pointer = json.loads((tmp_path / "run" / "checkpoints.json").read_text())
            assert pointer["last"] == f"step-{line['step']}"
            line["valid_accuracy_by_position"].clear()
        line.clear()

    result = run(tmp_path / "run", config(), on_log=on_log)
    assert [line["step"] for line in lines] == STEPS
    assert [numbers(line) for line in lines] == [numbers(line) for line in result.metrics]
    assert_same_files(result.out, finished.out)


@pytest.mark.parametrize(("at", "last"), [(0, None), (2, 2), (6, 4), (8, 6)])
def test_an_exception_in_on_log_ends_the_run_and_loses_nothing(finished, tmp_path, at, last):
    on_log = mock.Mock(side_effect=[None] * at + [KeyError("mine")])
    kept = rf"The last checkpoint is '.*run/step-{last}'; the run resumes" if last else "There is no checkpoint yet"
    with pytest.raises(RuntimeError, match=rf"^train: `on_log` raised KeyError: 'mine'\. {kept}"):
        run(tmp_path / "run", config(), on_log=on_log)
    assert_same_files(run(tmp_path / "run", config()).out, finished.out)


def test_what_is_no_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^train: `on_log` must be a function of one line of metrics, got 3\.$"):
        run(tmp_path / "run", config(), on_log=3)
    assert not (tmp_path / "run").exists()


# trackers


class Fake:
    """A package of a tracker, as accelerate calls it: what it has been told, by the names of its series."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.told, self.begun, self.configs, self.ended = {}, [], [], 0
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        package.init = package.start_run = self.begin
        package.config = SimpleNamespace(update=lambda values, **_: self.configs.append(values))
        package.log_params = self.configs.append
        package.log_metrics, package.end_run = self.log, self.finish
        package.search_experiments, package.create_experiment = lambda **_: [], lambda **_: 1
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=999, MAX_PARAMS_TAGS_PER_BATCH=99)
        package.utils = SimpleNamespace(validation=limits)
        monkeypatch.setitem(sys.modules, name, package)
        self.key = {"mlflow": "run_id", "wandb": "id"}[name]

    def begin(self, **options):
        series = options[self.key] or f"series {len(self.begun)}"
        self.begun.append(series)
        self.lines = self.told.setdefault(series, [])
        info = SimpleNamespace(run_id=series)
        return SimpleNamespace(id=series, name=series, info=info, log=self.log, finish=self.finish)

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.ended += 1


def as_told(metrics: list[dict]) -> list[tuple[int, dict]]:
    return [(line["step"], numbers(line)) for line in metrics]


def without_speed(told: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    return [(step, {key: value for key, value in line.items() if key != "tokens_per_s"}) for step, line in told]


each_tracker = pytest.mark.parametrize("tracker", ["mlflow", "wandb"])


@each_tracker
def test_a_tracker_is_told_each_line(finished, monkeypatch, tmp_path, tracker):
    fake = Fake(monkeypatch, tracker)
    result = run(tmp_path / "run", config(), tracker=tracker)
    assert fake.told == {"series 0": as_told(result.metrics)}
    assert [one["steps"] for one in fake.configs] == [6]
    assert fake.ended == 1
    assert differing(tmp_path / "run", finished.out) == []
    assert extra(tmp_path / "run", finished.out) == ["tracker.json"]
    run(tmp_path / "run", config(), tracker=tracker)
    assert fake.begun == ["series 0"]


@each_tracker
def test_a_tracker_is_told_no_line_twice_where_a_run_resumes(finished, monkeypatch, tmp_path, tracker):
    """It is stopped before step 4, goes on from 2, is stopped before 3, and so on: less far than it had been."""
    fake = Fake(monkeypatch, tracker)
    result = run_in_parts(tmp_path / "run", config(), 3, 2, 5, tracker=tracker)
    assert set(fake.begun) == {"series 0"}
    assert without_speed(fake.told["series 0"]) == without_speed(as_told(result.metrics))
    assert len(fake.configs) == 1
    assert fake.ended == 4


def test_each_tracker_is_told_what_it_has_not_been_told(finished, monkeypatch, tmp_path):
    """One at first, none then, another one, which hears of the earlier lines, too, and at last the first again."""
    first, second = Fake(monkeypatch, "wandb"), Fake(monkeypatch, "mlflow")
    for tracker, step in (("wandb", 3), (None, 4), ("mlflow", 5)):
        stopped(tmp_path / "run", config(), step, tracker=tracker)
    result = run(tmp_path / "run", config())
    assert [step for step, _ in first.told["series 0"]] == [1, 2, 2, 3]
    assert [step for step, _ in second.told["series 0"]] == [1, 2, 2, 3, 4, 4, 5]
    for tracker, fake in (("wandb", first), ("mlflow", second)):
        assert run(tmp_path / "run", config(), tracker=tracker) == result  # it had ended
        assert without_speed(fake.told["series 0"]) == without_speed(as_told(result.metrics))


def test_a_run_that_starts_again_is_another_series(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, "wandb")
    for seed in (0, 1):
        result = run(tmp_path / "run", config(seed=seed), resume="never", tracker="wandb")
    assert fake.begun == ["series 0", "series 1"]
    assert fake.told["series 1"] == as_told(result.metrics)


@pytest.mark.parametrize("call", ["begin", "log", "finish"])
def test_a_tracker_that_fails_ends_the_run_and_loses_nothing(finished, monkeypatch, tmp_path, call):
    fake = Fake(monkeypatch, "wandb")
    with mock.patch.object(fake, call, side_effect=ConnectionError("no net")):
        monkeypatch.setattr(sys.modules["wandb"], "init", fake.begin)
        kept = "The last checkpoint is" if call == "finish" else "There is no checkpoint yet"
        with pytest.raises(RuntimeError, match=rf"^train: `tracker` 'wandb' raised ConnectionError: no net\. {kept}"):
            run(tmp_path / "run", config(), tracker="wandb")
    assert differing(run(tmp_path / "run", config()).out, finished.out) == []


def test_what_is_no_tracker_here_is_told_before_anything_is_done(monkeypatch, tmp_path):
    names = r"\['mlflow', 'tensorboard', 'wandb'\]"
    with refused(rf"^train: `tracker` must be one of {names}, got 'wand'\.$"):
        run(tmp_path / "run", config(), tracker="wand")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(r"^train: `tracker` 'wandb' needs its package: pip install wandb\.$"):
        run(tmp_path / "run", config(), tracker="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[]", '{"wandb": {"series": 3, "lines": 1, "step": 1}}', "{"])
def test_a_damaged_count_is_named(monkeypatch, tmp_path, content):
    fake = Fake(monkeypatch, "wandb")
    (stopped(tmp_path / "run", config(), 3, tracker="wandb") / "tracker.json").write_text(content)
    with refused(r"^train: '.*run/tracker\.json' is damaged: .*Delete that file\.$"):
        run(tmp_path / "run", config(), tracker="wandb")
    assert fake.begun == ["series 0"]


# TensorBoard itself

tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def curves(out) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: each curve's steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_curves(out, metrics: list[dict]) -> None:
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for key, value in numbers(line).items():
            expected.setdefault(key, []).append((line["step"], pytest.approx(value)))
    found = curves(out)
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"tokens_per_s"}:
        assert found[key] == expected[key], key
    assert [step for step, _ in found["tokens_per_s"]] == [1, 2, 3, 4, 5, 6]


@tensorboard
def test_tensorboard_shows_each_line_once(finished, tmp_path):
    result = run(tmp_path / "run", config(), tracker="tensorboard")
    check_curves(tmp_path / "run", result.metrics)
    assert differing(tmp_path / "run", finished.out) == []


def run_killed_at(step: int, out: Path) -> None:
    """As TensorBoard has been told of the first line of a step, and this has not been counted."""
    write_json = RunFolder.write_json

    def killing(self, name, value):
        if name == "tracker.json" and value["tensorboard"]["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(self, name, value)

    with mock.patch.object(RunFolder, "write_json", killing):
        run(out, config(), tracker="tensorboard")


@tensorboard
def test_tensorboard_goes_on_where_a_run_was_killed(finished, tmp_path):
    out = tmp_path / "run"
    assert exit_code(start(run_killed_at, 5, out)) == -signal.SIGKILL
    assert curves(out)["loss"][-1][0] == 5
    time.sleep(1)  # TensorBoard orders processes by the second of their start
    result = run(out, config(), tracker="tensorboard")
    check_curves(out, result.metrics)
    assert differing(out, finished.out) == []
    run(out, config(seed=1), resume="never", tracker="tensorboard")
    assert len(list((out / "tensorboard").iterdir())) == 1
    (out / "tensorboard" / "mine.txt").write_text("mine")
    assert extra(run(out, config(), resume="never").out, finished.out) == ["tensorboard", "tensorboard/mine.txt"]
