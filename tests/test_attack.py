"""attack.py: a hundredth of it finds nothing, and what is planted in the sources it finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack import WRONG, judge

FOLDER = Path(__file__).parent
MADE_WRONG = """
import sys
from unittest import mock
import attack
from statemix.scan import cpu
with mock.patch.object(cpu, "_strided", lambda x: x.resolve_neg().contiguous().roll(1, 1)):
    sys.exit(attack.main())
"""
ENDS = """
import os, sys, time
import attack
attempts = {
    "dies": lambda *_: os.abort(),
    "hangs": lambda *_: time.sleep(60),
    "raises": lambda *_: 1 / 0,
    "lies": lambda *_: attack.End("silently different", ""),
    "is right": lambda *_: attack.End("as before", ""),
}
attack.SECONDS = 1
attack.attacks = lambda: [attack.Attack(name, 3, lambda place: None, attempt) for name, attempt in attempts.items()]
sys.exit(attack.main())
"""


def attacked(out: Path, *options: str, code: str | None = None) -> tuple[int, dict]:
    """The status of the program and what it found."""
    program = [str(FOLDER / "attack.py")] if code is None else ["-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, *program, *options, "--out", str(out)], env=environment, capture_output=True)
    assert done.returncode in (0, 1), done.stderr.decode()
    return done.returncode, json.loads(out.read_text())["attacks"]


def test_a_hundredth_of_the_attack_finds_nothing(tmp_path):
    status, found = attacked(tmp_path / "found.json", "--scale", "0.01")
    assert {name: line["wrong"] for name, line in found.items() if line["wrong"]} == {}
    assert status == 0
    assert [line["tried"] for line in found.values()] == [5, 6, 2, 200, 1, 2, 1]
    assert all(line["as before"] + line["refused"] == line["tried"] for line in found.values())
    assert sum(line["refused"] for line in found.values()) > 100


def test_a_scan_that_is_wrong_is_found(tmp_path):
    """The first steps of its inputs are elsewhere in time."""
    numbers = [str(number) for number in range(25)]
    status, found = attacked(tmp_path / "found.json", "--only", "calls", "--tries", *numbers, code=MADE_WRONG)
    assert status == 1
    assert found["calls"]["silently different"] > 0


def test_each_try_ends_in_one_of_the_columns(tmp_path):
    status, found = attacked(tmp_path / "found.json", code=ENDS)
    assert status == 1
    columns = {"dies": "crashed", "hangs": "hung", "raises": "traceback", "lies": WRONG[2], "is right": "as before"}
    for name, line in found.items():
        assert {key: line[key] for key in ("as before", "refused", *WRONG) if line[key]} == {columns[name]: 3}


def test_the_page_has_the_figures_that_were_written():
    written = json.loads((FOLDER.parent / "results" / "attack.json").read_text())
    page = (FOLDER.parent / "docs" / "reliability.md").read_text()
    for name, line in written["attacks"].items():
        assert line["tried"] == line["as before"] + line["refused"]
        columns = ("tried", "as before", "refused", *WRONG)
        assert f"| {name} | {' | '.join(f'{line[key]:,}' for key in columns)} |" in page
    for fact in ("machine", "versions"):
        assert written[fact] in page
    assert f"--seed {written['seed']} --scale {written['scale']:g}`" in page


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("train: `steps` must be at least 1, got 0."), "refused"),
        ("error: train: `steps` must be at least 1, got 0.", "refused"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "refused"),
        (ValueError("train: it went wrong."), "unclear"),
        (ValueError("`steps` went wrong"), "unclear"),
        (KeyError("train: `steps`"), "traceback"),
        ("Traceback (most recent call last):\nValueError: train: `steps`", "traceback"),
    ],
)
def test_an_error_is_judged_by_rule(error, kind):
    assert judge("a try", error, {"`steps`"}).kind == kind
    assert kind in ("refused", *WRONG)
