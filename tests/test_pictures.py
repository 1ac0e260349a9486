"""style.py: colours that all can tell apart, labels that do not overlap, numbers that are written plainly."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.text import Text

from statemix.report import inside
from statemix.style import COLORS, INK, canvas, label_ends, plain, render, series, spread

# Machado, Oliveira and Fernandes 2009: what remains of linear RGB without one kind of cones.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Ottosson 2020: linear RGB to OKLab, in which equal distances look equally large.
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]
APART = 0.07  # black and white are 1 apart; 0.02 can just be told apart side by side


def linear(color: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    values = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def distance(one: str, other: str, sight: str) -> float:
    """Between two colours as they are seen."""
    seen = [np.clip(SIGHTS[sight] @ linear(color), 0, 1) for color in (one, other)]
    first, second = (TO_LAB @ np.cbrt(TO_CONES @ color) for color in seen)
    return float(np.linalg.norm(first - second))


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_that_are_used_together_can_be_told_apart(sight):
    blocks = (inside.FAITHFUL, inside.QUOTIENT, inside.OTHER)
    for palette in ((INK, *COLORS), blocks, (inside.POSITIVE, inside.NEGATIVE)):
        for one, other in itertools.combinations(palette, 2):
            assert distance(one, other, sight) > APART, (one, other)


def test_the_distance_knows_red_and_green():
    """Of matplotlib's usual colours, which are far apart for most people and not for those without green cones."""
    assert distance("#d62728", "#2ca02c", "normal") > 0.2
    assert distance("#d62728", "#2ca02c", "deuteranopia") < APART
    assert distance("#000000", "#ffffff", "normal") == pytest.approx(1, abs=1e-3)


def test_in_grey_no_two_lines_look_alike():
    drawn = [series(number) for number in range(28)]
    assert len({(line["marker"], line["linestyle"]) for line in drawn}) == 28
    assert len({line["color"] for line in drawn[: len(COLORS)]}) == len(COLORS)
    marks = inside.MARKERS.values(), inside.HATCHES.values()
    assert len(set(marks[0])) == 3
    assert inside.HATCHES[inside.FAITHFUL] != inside.HATCHES[inside.QUOTIENT]


NUMBERS = {"1,000": 1000, "1,000,000": 1e6, "0.000001": 1e-6, "0.25": 0.25, "-3": -3, "0": -1e-15}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_plain(text):
    assert plain(NUMBERS[text]) == text


PLACES = {  # where labels are wanted, their sizes, and where they are put
    "none": ([], [], []),
    "apart": ([0.2, 0.6], [0.1, 0.1], [0.2, 0.6]),
    "on each other": ([0.5, 0.5], [0.1, 0.3], [0.4, 0.6]),
    "at the ends": ([0.0, 1.0], [0.2, 0.2], [0.1, 0.9]),
    "pushed": ([0.5, 0.55, 0.9], [0.1, 0.1, 0.1], [0.475, 0.575, 0.9]),
    "too many": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.25, 0.75, 1.25]),
}


@pytest.mark.parametrize("case", PLACES)
def test_labels_are_moved_apart_as_little_as_can_be(case):
    wanted, sizes, places = PLACES[case]
    assert spread(wanted, sizes) == pytest.approx(places)


def test_labels_stand_at_the_ends_of_their_lines():
    with canvas(6, 3) as figure:
        axes = figure.subplots()
        ends = {"up": 1.0, "_hidden $x$": 0.5, "beside": 0.5, "down": 0.0}
        lines = {}
        for number, (label, end) in enumerate(ends.items()):
            (lines[label],) = axes.plot([0, 1, 2], [0.5, end, float("nan")], **series(number))
        (lines["empty"],) = axes.plot([], [])
        label_ends(axes, lines)
    figure.draw_without_rendering()
    texts = sorted(axes.texts, key=lambda text: text.get_position()[1])
    assert [text.get_text() for text in texts][::3] == ["down", "up"]
    assert {text.get_text() for text in texts} == set(ends)
    boxes = [Text.get_window_extent(text) for text in texts]  # without the leaders
    assert all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes))
    assert all(box.x0 > axes.bbox.x1 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(text.xy == (1, ends[text.get_text()]) for text in texts)  # the last point that is a number


def test_ticks_are_plain_on_every_axis_and_in_the_ink_of_the_page():
    with canvas(6, 3) as figure:
        linear_axes, log_axes = figure.subplots(1, 2)
        linear_axes.plot([1e7, 1e7 + 1, 1e7 + 2], [0, 1e6, 2e6])
        log_axes.plot([0.75, 1, 2.6], [1e-6, 1, 1e3])
        log_axes.set(xscale="log", yscale="log")
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            texts = [label.get_text() for label in axis.get_ticklabels()]
            assert axis.get_offset_text().get_text() == ""
            assert all(re.fullmatch(r"(\N{MINUS SIGN}|-)?[\d,]+(\.\d+)?", text) for text in texts), texts
    assert {"1", "1.5", "2"} <= {label.get_text() for label in log_axes.get_xticklabels()}
    assert "1,000,000" in {label.get_text() for label in linear_axes.get_yticklabels()}
    svg = render(figure, "svg")
    assert svg.count(INK.encode()) > 10
    assert b"stroke: #000000" not in svg
