"""Mixers and tasks of one's own, by their paths: wherever a registered one is named, and never by a file alone."""

import json
import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import call
from run_helpers import run, small_config

from statemix import SequenceModel, TrainConfig, load_model
from statemix.mixers import Mixer, build_mixer
from statemix.runs.executors import _train_to_log
from statemix.runs.read import read_run
from statemix.runs.sweep import load_configs, run_name, sweep
from statemix.sizing import solve
from statemix.specs import NotImportedError
from statemix.tasks import Task, build_task

MIXER = """import torch
from statemix.mixers import Mixer

class Mean(Mixer):
    def __init__(self, d_model: int, decay: float = 0.5, **ignored):
        super().__init__()
        self.d_model, self.decay, self.state_shape = d_model, decay, (1, d_model)
        self.output = torch.nn.Linear(d_model, d_model)

    def mix(self, x, state, reset):
        h, means = torch.zeros_like(x[:, 0]) if state is None else state[:, 0], []
        for t in range(x.shape[1]):
            h = self.decay * (h if reset is None else h * ~reset[:, t, None]) + x[:, t]
            means.append(h)
        return self.output(torch.stack(means, 1)), h[:, None]
"""
TASK = """from dataclasses import dataclass
import numpy as np
from statemix.tasks import Task

@dataclass(frozen=True)
class Repeat(Task):
    vocab_size: int = 5
    seq_len: int = 8
    chance = property(lambda self: 1 / self.vocab_size)

    def generate(self, rng, count, split):
        return rng.integers(0, self.vocab_size, (count, self.seq_len))

    def oracle(self, tokens):
        return tokens
"""
SWEEP = """import own_layers, own_tasks
from statemix.training.config import ModelConfig, TrainConfig

configs = {"mine": TrainConfig(
    task={"name": "own_tasks:Repeat"}, mixer={"name": "own_layers:Mean", "decay": 0.25}, model=ModelConfig(d_model=8),
    steps=2, batch_size=4, eval_every=1, eval_sequences=4, log_every=1)}
"""
FLAGS = ["--steps=2", "--batch-size=4", "--eval-every=1", "--eval-sequences=4", "--log-every=1", "--model.d-model=8"]
# a module that leaves a file where it is imported
EVIL = "from pathlib import Path\nPath('imported').touch()\nfrom statemix.mixers import BDLRU as Mean\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a user's two files in `mine`, neither of them imported nor on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine").mkdir()
    for name, content in {"own_layers": MIXER, "own_tasks": TASK, "sweep": SWEEP}.items():
        (tmp_path / "mine" / f"{name}.py").write_text(content)
    yield tmp_path
    forget()


@pytest.fixture
def imported(folder):
    """That folder, with both files imported."""
    sys.path.append(str(folder / "mine"))
    __import__("own_layers")
    __import__("own_tasks")
    return folder


def forget() -> None:
    for name in ("own_layers", "own_tasks", "evil_layers"):
        sys.modules.pop(name, None)


def test_a_sweep_of_a_mixer_and_a_task_in_a_file_beside_it_and_its_report(folder, capsys):
    status, text, errors = call(capsys, "sweep", "mine/sweep.py", "--out", "out", "--jobs", "1")
    assert status == 0, errors
    [run_folder] = [path.parent for path in Path("out").rglob("result.json")]
    assert run_folder.name.startswith("own_tasks.Repeat-own_layers.Mean-")  # no colon: a folder on Windows, too
    assert "mine" in text
    forget()
    told = r"^error: TrainConfig: '.*config\.json' needs a module\. task: the module 'own_tasks' of 'own_tasks:Repeat'"
    for command in (("report", "out"), ("train", "--config", str(run_folder / "config.json"))):
        status, text, errors = call(capsys, *command)
        assert (status, text) == (2, "")
        assert re.search(told, errors), errors
    assert list(Path().glob("report")) == []
    imports = ("--import", "own_layers", "--import=own_tasks")
    status, text, errors = call(capsys, "report", "out", *imports)
    assert status == 0, errors
    assert "own_tasks:Repeat" in text
    assert {path.name for path in Path("report").iterdir()} >= {"report.html", "own_tasks.Repeat-loss.png"}


def test_train_generate_and_load(folder, capsys):
    Path("text.txt").write_text("to be or not to be, that is the question " * 50)
    sys.path.append(str(folder / "mine"))
    source = ["--text", "text.txt", "--task.seq-len", "8", "--mixer", "own_layers:Mean", "--mixer.decay", "0.75"]
    status, _, errors = call(capsys, "train", *source, *FLAGS, "--out", "run")
    assert status == 0, errors
    assert TrainConfig.load("run/config.json").mixer == {"name": "own_layers:Mean", "decay": 0.75}
    assert load_model("run/step-2").mixers[0].decay == 0.75
    forget()
    told = r"^SequenceModel\.load: 'run/step-2/model\.json' needs a module\. mixer: "
    with pytest.raises(NotImportedError, match=told):
        load_model("run/step-2")
    generate = ("generate", "run/step-2", "--prompt", "to be", "--max-new-tokens", "3")
    assert call(capsys, *generate)[0] == 2
    status, text, errors = call(capsys, *generate, "--import", "own_layers")
    assert status == 0, errors
    assert text.startswith("to be")


def test_a_mixer_of_ones_own_steps_resumes_and_is_solved_for(imported):
    config = small_config(mixer={"name": "own_layers:Mean"})
    assert config.modules == ("own_layers",)
    assert TrainConfig.from_json(config.to_json()) == config
    whole = run(imported / "whole", config)
    assert read_run(whole.out).config == config
    x, reset = torch.randn(2, 7, 6), torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 3] = True
    mixer = build_mixer({"name": "own_layers:Mean"}, 6)
    y, state = mixer(x, reset=reset)
    part, carried = mixer(x[:, :3])
    rest, last = mixer(x[:, 3:], carried * torch.tensor([1.0, 0.0])[:, None, None])
    torch.testing.assert_close((torch.cat([part, rest], 1), last), (y, state))
    with pytest.raises(ValueError, match=r"^solve: 'own_layers:Mean' must say in `width_option` which of its options"):
        solve("own_layers:Mean", 8, budget=100)


def test_a_task_that_says_no_name_has_its_path(imported):
    task = build_task({"name": "own_tasks:Repeat", "vocab_size": 3})
    assert task.name == "own_tasks:Repeat"
    assert task.with_seq_len(4).sample("train", 2).tokens.shape == (2, 4)
    assert {TrainConfig(task={"name": "own_tasks:Repeat"}).task["seq_len"], task.seq_len} == {8}


def test_a_worker_elsewhere_imports_what_the_config_names(imported):
    """As on Ray: a process that has nothing of this one's but what it is given."""
    config = small_config(task={"name": "own_tasks:Repeat"}, mixer={"name": "own_layers:Mean"}, steps=1)
    (imported / "there").mkdir()
    arguments = (config.to_json(), config.modules, str(imported / "there"), tuple(sys.path))
    sys.path.remove(str(imported / "mine"))  # which the new process would have from this one
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_train_to_log, arguments) == ""
    assert (imported / "there" / "result.json").exists()


@pytest.fixture
def foreign(folder):
    """A run from elsewhere whose mixer is a path: its module would be found, and would leave a file if it were run."""
    (folder / "evil_layers.py").write_text(EVIL)
    sys.path.append(str(folder))
    made = run(folder / "foreign", small_config())
    for path in (made.out / "config.json", *made.out.glob("step-*/model.json")):
        path.write_text(path.read_text().replace('"bd_lru"', '"evil_layers:Mean"'))
    for path in made.out.rglob("manifest.json"):  # whoever made it has made the manifest, too
        path.unlink()
    return made.out


def test_no_run_and_no_config_has_a_module_imported(foreign, folder, capsys):
    data = json.loads((foreign / "config.json").read_text())
    for read in (
        lambda: read_run(foreign),
        lambda: load_model(next(foreign.glob("step-*"))),
        lambda: SequenceModel.load(next(foreign.glob("step-*"))),
        lambda: TrainConfig.load(foreign / "config.json"),
        lambda: TrainConfig.from_json((foreign / "config.json").read_text()),
        lambda: build_mixer(data["mixer"], 8),
    ):
        with pytest.raises(NotImportedError, match=r"'evil_layers' of 'evil_layers:Mean' must be imported before"):
            read()
    done = sweep({"theirs": data}, folder / "out", progress=False)
    assert "evil_layers" in done.failed[0]["error"]
    for command in (
        ("report", str(foreign)),
        ("train", "--config", str(foreign / "config.json")),
        ("train", "--config", str(foreign / "config.json"), "--out", str(foreign)),
        ("generate", str(foreign), "--prompt", "a"),
    ):
        assert call(capsys, *command)[0] == 2
    assert "evil_layers" not in sys.modules
    assert not Path("imported").exists()


def test_that_an_import_would_have_been_seen(foreign, capsys):
    assert call(capsys, "info", "--import", "evil_layers")[0] == 0
    assert Path("imported").exists()


NAMES = {  # a name, and what is said of it
    "own_layers:None": "must name a class of 'own_layers', got 'None', which it has not",
    "own_layers:Mean.x": "must have the form 'package.module:Class', got 'own_layers:Mean.x'",
    ":Mean": "must have the form 'package.module:Class', got ':Mean'",
    "a b:Mean": "must have the form 'package.module:Class', got 'a b:Mean'",
    "own_layers:Mena": "must name a class of 'own_layers', got 'Mena', which it has not",
    "own_layers:torch": "must name a subclass of Mixer, got <module 'torch'",
    "own_layers:Mixer": "must name a subclass of Mixer, got <class 'statemix.mixers.base.Mixer'>",
    "own_tasks:Repeat": "must name a subclass of Mixer, got <class 'own_tasks.Repeat'>",
    "own_tasks:np": "must name a subclass of Mixer, got <module 'numpy'",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_no_mixer_is_refused(imported, name):
    with pytest.raises(ValueError, match=f"^{re.escape(f'mixer: `name` {name!r} {NAMES[name]}')}"):
        build_mixer({"name": name}, 8)


def test_a_mixer_or_task_that_lacks_what_each_has_is_refused(imported):
    module = sys.modules["own_layers"]
    module.Bare = type("Bare", (Mixer,), {"__init__": lambda self, d_model: Mixer.__init__(self)})
    module.Half = type("Half", (Task,), {"seq_len": 3})
    missing = re.escape("['d_model', 'state_shape', 'output', 'mix']")
    with pytest.raises(TypeError, match=rf"^mixer: 'own_layers:Bare' must have {missing}, see `Mixer`\.$"):
        build_mixer({"name": "own_layers:Bare"}, 8)
    missing = re.escape("['chance', 'generate', 'oracle', 'vocab_size']")
    with pytest.raises(ValueError, match=rf"^task: `name` 'own_layers:Half' must define {missing}, got none"):
        build_task({"name": "own_layers:Half"})


WRONG = {
    ("train", "--mixer", "none_such:Mixer"): r"train: 'none_such' cannot be imported: ModuleNotFoundError: No module",
    ("train", "--task", "broken:Task"): r"train: 'broken' cannot be imported: ZeroDivisionError: division by zero",
    ("info", "--import", "none_such"): r"statemix: 'none_such' cannot be imported: ModuleNotFoundError",
    ("info", "--import"): r"statemix: `--import` needs a value",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_call_says_what_is_wrong(folder, capsys, arguments):
    Path("broken.py").write_text("1 / 0")
    status, text, errors = call(capsys, *arguments)
    assert (status, text) == (2, "")
    assert re.match(f"error: {WRONG[arguments]}", errors), errors


def test_a_sweep_s_folder_comes_last_on_the_import_path(folder):
    (folder / "mine" / "json.py").write_text("raise RuntimeError")
    [config] = load_configs("mine/sweep.py").values()
    assert sys.path[-1] == str(folder / "mine")
    assert ":" not in run_name(config)
