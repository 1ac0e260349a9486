"""report.py: what tables say and what pictures show."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_checkpoint import NEEDING_SPACE, disk, disk_is_full, snapshot

from statemix.report import plot_curves, results_table


def result(parameters, state, speed, **test):
    """A result.json with token and sequence accuracy by length: l8=(0.5, 0.25)."""
    scores = {n[1:]: {"token_accuracy": token, "sequence_accuracy": whole} for n, (token, whole) in test.items()}
    return {"parameters": parameters, "state_size": state, "train_tokens_per_s": speed, "test": scores}


RESULTS = {
    "bd_lru": [
        result(12345, 48, 100000.4, l8=(1.0, 0.9996), l64=(0.5, 0.0)),
        result(12345, 48, 300000.4, l8=(0.5, 0.9994)),
    ],
    "lstm, one run": [result(1000, 1024, 99.6, l8=(0.98765, 0.125), l128=(0.25, 0.0))],
}
CELLS = [
    ["parameters", "state", "length 8", "length 64", "length 128", "tokens/s"],
    ["12,345", "48", "0.750 (0.500-1.000) / 1.000 (0.999-1.000)", "0.500 / 0.000", "", "200,000 (100,000-300,000)"],
    ["1,000", "1,024", "0.988 / 0.125", "", "0.250 / 0.000", "100"],
]


def test_a_markdown_table_has_a_row_per_label_and_a_column_per_length():
    lines = results_table(RESULTS, markdown=True).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert rows[1] == ["---", *["---:"] * 6]
    assert [row[0] for row in rows[2:]] == list(RESULTS)
    assert [row[1:] for row in (rows[0], *rows[2:])] == CELLS


def test_a_table_for_the_terminal_has_the_same_cells_aligned():
    lines = results_table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    # cells have no two blanks in a row, and an empty one is seen by the place of its neighbours
    assert [re.split(r" {2,}", line)[1:] for line in lines] == [[cell for cell in row if cell] for row in CELLS]
    assert [line.split("  ")[0] for line in lines[1:]] == list(RESULTS)
    for text in ("48", "1,024"):
        assert any(line.find(text) + len(text) == lines[0].find("state") + len("state") for line in lines[1:]), text
    assert lines[2].find("0.250 / 0.000") + 13 == lines[0].find("length 128") + 10


@pytest.mark.parametrize("markdown", [False, True])
def test_a_table_of_one_run(markdown):
    one = {"h_lru": [result(7, 3, 5.0, l16=(0.5, 0.125))]}
    lines = results_table(one, markdown=markdown).splitlines()
    assert len(lines) == 2 + markdown
    assert re.search(r"h_lru[ |]+7[ |]+3[ |]+0\.500 / 0\.125[ |]+5\b", lines[-1])


def metrics(steps=5, start=2.0):
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": start / step, "token_accuracy": 1 - 1 / (step + 1), "tokens_per_s": 10.0})
        lines.append({"step": step, "valid_loss": start / step + 0.1, "valid_token_accuracy": 1 - 1 / (step + 1)})
    return lines


def colored(path, rgb) -> int:
    """Number of pixels of this color, exactly."""
    return int((np.asarray(Image.open(path).convert("RGB")) == rgb).all(-1).sum())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first two of matplotlib's tab10


def test_a_png_shows_every_run_in_its_color(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_curves({"bd_lru": metrics()}, one)
    plot_curves({"bd_lru": metrics(), "lstm": metrics(start=1.0)}, two, title="S3", chance=1 / 6)
    for path in (one, two):
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("PNG", (1500, 675))
    assert colored(one, BLUE) > 500
    assert colored(one, ORANGE) == 0
    assert colored(two, ORANGE) > 500


def test_an_svg_and_a_pdf_are_of_their_kind(tmp_path):
    plot_curves({"bd_lru": metrics()}, tmp_path / "curves.svg")
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "720pt"
    plot_curves({"bd_lru": metrics()}, str(tmp_path / "curves.pdf"))
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF-")


# warnings are errors here, so that these also show that matplotlib has none
POOR = {
    "one step": {"run": metrics(steps=1)},
    "no validation": {"run": [line for line in metrics() if "loss" in line]},
    "only validation": {"run": [line for line in metrics() if "loss" not in line]},
    "no lines": {"run": []},
    "no runs": {},
    "one run of two without lines": {"empty": [], "run": metrics()},
    "loss 0 on a log scale": {"run": [{"step": s, "loss": 0.0, "token_accuracy": 1.0} for s in (1, 2)]},
    "loss nan": {"run": [{"step": s, "loss": math.nan, "token_accuracy": 0.0} for s in (1, 2)]},
}


@pytest.mark.parametrize("case", POOR)
def test_a_picture_of_few_points(tmp_path, case):
    path = tmp_path / "curves.png"
    plot_curves(POOR[case], path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (1500, 675)
    if case in ("one step", "only validation"):
        assert colored(path, BLUE) > 50


@pytest.mark.parametrize("name", ["curves.xyz", "curves"])
def test_an_unknown_ending_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"(?s)(ending|[Ff]ormat|suffix).*png"):
        plot_curves({"bd_lru": metrics()}, tmp_path / name)
    assert snapshot(tmp_path) == {}


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"the picture of yesterday")
    old = snapshot(tmp_path)
    with disk(tmp_path, NEEDING_SPACE) as changes:
        plot_curves({"bd_lru": metrics(steps=1)}, tmp_path / "dry.png")
    (tmp_path / "dry.png").unlink()
    assert any(change.startswith("write") for change in changes)
    for at in range(1, len(changes) + 1):
        with disk(tmp_path, NEEDING_SPACE, at, disk_is_full), pytest.raises(OSError, match="No space left on device"):
            plot_curves({"bd_lru": metrics(steps=1)}, path)
        assert snapshot(tmp_path) == old, changes[at - 1]
