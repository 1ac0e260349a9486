"""What the README and the pages of docs/ show runs as it is written, and the front page is short.

A block of Python whose first line is "# NAME.py" is that file, too, for the commands of its page. Shell commands run in
a shorter form; of those in `only_parsed` the command line alone is looked at.
"""

import argparse
import contextlib
import io
import pkgutil
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from statemix import SequenceModel
from statemix.cli import main
from statemix.tasks import build_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def shell_commands(page: str) -> list[list[str]]:
    """The commands of a page, continuation lines joined, without their comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_front_page_is_short():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(README.split()) <= 600
    for paragraph in prose.split("\n\n"):
        figures = re.findall(
            r"(?<![\w./])\d[\d,.]*(?!\w*[/.]\w)", re.sub(r"\(http\S*\)|\[arXiv [^\]]*\]", "", paragraph)
        )
        assert len(figures) <= 3, f"{figures} in {paragraph!r}"


def test_there_are_no_other_blocks():
    """A block without a language, or an indented one, would be run by no test."""
    for name, path in PAGES.items():
        languages = re.findall(r"^```(\w*)$", path.read_text(), flags=re.MULTILINE)[::2]
        assert set(languages) <= {"python", "sh", "text"}, name
        assert not re.search(
            r"^    \S", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
        )


def write_files(page: str) -> None:
    """Those that blocks of Python are, with runs of two steps and one seed."""
    for code in blocks(page, "python"):
        if found := re.match(r"# (\S+\.py)\n", code):
            path = Path(found[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            code = re.sub(r"\bsteps=\d+", "steps=2, batch_size=2, eval_sequences=2", code)
            path.write_text(re.sub(r"\brange\(3\)", "range(1)", code))


# Lightning asks torch and itself what they will not have for ever
@pytest.mark.filterwarnings("default:.*LeafSpec:FutureWarning", "default::UserWarning:pytorch_lightning")
@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if blocks(path.read_text(), "python")])
def test_python_runs_and_prints_what_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page, names, printed = PAGES[name].read_text(), {"__name__": "page"}, io.StringIO()
    write_files(page)
    with forgotten("my_pkg"):
        for code in blocks(page, "python"):
            with contextlib.redirect_stdout(printed):
                exec(compile(code, name, "exec"), names)
    assert printed.getvalue() == "".join(blocks(page, "text"))


@contextlib.contextmanager
def forgotten(package: str) -> Iterator[None]:
    """At the end no module of the package is known."""
    try:
        yield
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            del sys.modules[module]


def only_parsed(program: str, command: list[str]) -> bool:
    """Whether it trains or measures for minutes to hours, needs a GPU or several, or is run by another test."""
    if program == "statemix":
        large = command[0] == "sweep" and "experiments/" in command[1] and command[1] != "experiments/recall.py"
        return large or command[:2] == ["bench", "gpu"]
    return True


EXPERIMENTS = ROOT / "experiments"


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if shell_commands(path.read_text())])
def test_statemix_commands_run(name, tmp_path, capsys, monkeypatch):
    commands = shell_commands(PAGES[name].read_text())
    monkeypatch.chdir(tmp_path)  # as written but shorter, and not into the reader's folder
    Path("experiments").mkdir()
    shown = (EXPERIMENTS / "recall.py").read_text()
    Path("experiments/recall.py").write_text(
        f"{shown}\nfrom dataclasses import replace\n"
        "configs = [replace(configs[m], steps=2, batch_size=2, eval_sequences=2) for m in ('LRU', 'Mamba-2')]\n"
    )
    write_files(PAGES["docs/own-model.md"].read_text())
    monkeypatch.setattr(sys, "path", [*sys.path])  # the commands put the current folder there
    Path("book.txt").write_text("Once upon a time there was a sequence that never ended. " * 1_000)
    monkeypatch.setenv("STATEMIX_CACHE", str(tmp_path / "cache"))
    with forgotten("my_pkg"):
        for program, *command in commands:
            if only_parsed(program, command):
                continue
            short = {
                "generate": ["--max-new-tokens", "3"],
                "bench": ["--sizes", "1x4", "--length", "16", "--seconds", "0.01", "--out", str(tmp_path / "bench")],
                "verify": ["--max-states", "100"],
                "train": ["--steps", "2", "--eval-sequences", "8"] if "--out" in command else [],
            }.get(command[0], [])
            wrong = command[0] == "verify"  # after two steps
            assert main(command + short) == wrong, capsys.readouterr().err


class Parsed(Exception):
    """The command line is one."""


ONLY_PARSED = [
    pytest.param(program, arguments, id=f"{name}: {' '.join([program, *arguments])[:60]}")
    for name, path in PAGES.items()
    for program, *arguments in shell_commands(path.read_text())
    if program in ("python", "accelerate") or (program == "statemix" and only_parsed(program, arguments))
]


@pytest.mark.parametrize(("program", "arguments"), ONLY_PARSED)
def test_the_command_lines_of_the_others_are_right(program, arguments, monkeypatch, capsys):
    """Each is read by its own parser, and stops there."""

    def reads(parse):
        def read(*given, **options):
            parse(*given, **options)
            raise Parsed

        return read

    monkeypatch.setattr(sys, "path", [*sys.path])
    if program == "accelerate":
        launch = pytest.importorskip("accelerate.commands.launch")
        given = launch.launch_command_parser().parse_args(arguments[1:])
        assert (given.module, given.training_script) == (True, "statemix")
        program, arguments = "statemix", given.training_script_args
    if program == "python" and arguments[0] == "-m":
        program, arguments = arguments[1], arguments[2:]
    for owner, name in ((argparse.ArgumentParser, "parse_args"), (tyro, "cli")):
        monkeypatch.setattr(owner, name, reads(getattr(owner, name)))
    monkeypatch.chdir(ROOT)
    if program == "statemix":
        with pytest.raises(Parsed):
            main(arguments)
        return
    script, *options = arguments
    monkeypatch.setattr(sys, "argv", [script, *options])
    try:
        runpy.run_path(script, run_name="__main__")
    except Parsed:
        return
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed, which {script} needs")
    pytest.fail(f"{script} has read no command line")


def test_other_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set()
    for path in PAGES.values():
        for program, *arguments in shell_commands(path.read_text()):
            assert program in ("make", "python", "statemix", "accelerate"), program
            if program == "make":
                targets.add(arguments[0])
                assert re.search(rf"^{arguments[0]}: ", makefile, flags=re.MULTILINE), arguments
            if program == "python" and arguments[0] != "-m":
                assert (ROOT / arguments[0]).exists(), arguments
    assert {"quickstart", "test", "results", "experiments"} <= targets


def test_pictures_and_links_exist():
    for name, path in {**PAGES, "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{name}: {target}"


def test_the_walks_of_contributing_name_functions_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    walks = re.findall(r"^### (From .*?)\n\n((?:\d+\. .*\n)+)", page, flags=re.MULTILINE)
    assert len(walks) == 3
    for title, walk in walks:
        lines = walk.splitlines()
        assert len(lines) <= 8, title
        for line in lines:
            places = re.findall(r"`(statemix\.[\w.]+)`", line)
            assert places, line
            assert all(callable(pkgutil.resolve_name(place)) for place in places), line


def test_the_map_of_contributing_names_every_room():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "src" / "statemix"
    rooms = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    rooms += [path.parent.name for path in package.glob("*/__init__.py")]
    assert [room for room in sorted(rooms) if not re.search(rf"`[^`\n]*\b{room}(\.py|/)`", page)] == []


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(EXPERIMENTS / "quickstart.py"), run_name="quickstart")


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
