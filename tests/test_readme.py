"""What the README shows runs as it is written, and the quickstart compares what it says it compares."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from statemix import SequenceModel
from statemix.cli import main
from statemix.tasks import build_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def shell_commands() -> list[list[str]]:
    """The indented lines of the README, continuation lines joined, without their comments."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_python_of_the_readme_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["y"].shape == (8, 1000, 64)
    assert names["state"].shape == (8, 4, 16)
    assert names["states"].shape == (8, 1000, 4, 16)


def test_statemix_commands_of_the_readme_run(tmp_path, capsys, monkeypatch):
    commands = [command[1:] for command in shell_commands() if command[0] == "statemix"]
    names = [command[0] for command in commands]
    assert names == [*("train", "train", "info", "bench", "train", "sweep", "report", "info", "train", "generate")]
    shown = (ROOT / "experiments" / "recall.py").read_text()
    monkeypatch.chdir(tmp_path)  # as written but shorter, and not into the reader's folder
    Path("experiments").mkdir()
    Path("experiments/recall.py").write_text(
        f"{shown}\nfrom dataclasses import replace\n"
        "configs = [replace(configs[m], steps=2, batch_size=2, eval_sequences=2) for m in ('LRU', 'Mamba-2')]\n"
    )
    Path("book.txt").write_text("Once upon a time there was a sequence that never ended. " * 400)
    monkeypatch.setenv("STATEMIX_CACHE", str(tmp_path / "cache"))
    for command in commands:
        short = []
        if command[0] == "train" and "--out" in command:
            short = ["--steps", "2", "--eval-sequences", "8"]
        if command[0] == "generate":
            short = ["--max-new-tokens", "3"]
        if command[0] == "bench":
            short = ["--sizes", "1x4", "--length", "16", "--seconds", "0.01", "--out", str(tmp_path / "bench")]
        assert main(command + short) == 0, capsys.readouterr().err
    assert Path("runs/recall-report/report.html").exists()


def test_make_commands_of_the_readme_exist():
    targets = {command[1] for command in shell_commands() if command[0] == "make"}
    assert targets == {"quickstart", "test", "results", "experiments"}
    for target in targets:
        assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_pictures_and_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(ROOT / "experiments" / "quickstart.py"), run_name="quickstart")


def test_quickstart_models_are_matched_as_their_labels_say(quickstart):
    models = {}
    for label, config in quickstart["configs"].items():
        vocab_size = build_task(config.task).vocab_size
        models[label] = SequenceModel(vocab_size, config.model.d_model, config.model.num_layers, config.mixer)
    mixed = models.pop("BD-LRU, block size 3")
    for label, model in models.items():
        if "same state" in label:
            assert model.state_size == mixed.state_size
        else:
            assert "same parameters" in label
            # of the mixers, which differ; the rest of the models is the same
            sizes = [sum(p.numel() for mixer in m.mixers for p in mixer.parameters()) for m in (model, mixed)]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
