"""Pictures that compare groups of runs: accuracy with its interval, over steps, and over the tested length."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from statemix.report.tables import Groups
from statemix.runs.read import longest
from statemix.runs.statistics import bounds
from statemix.style import COLORS, INK, SMALL, canvas, label_ends, series
from statemix.tasks import build_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 3.2  # inches: its text can still be read on a telephone, 3.7 inches of CSS wide
LABEL = 20  # characters of a line of a label beside the axes


def figures(groups: Groups) -> dict[str, "Figure"]:
    """Every picture that the groups allow, by name."""
    drawn = {"loss": curves(groups, "loss"), "learning": curves(groups, "token_accuracy")}
    if all(run.summary["test"] for runs in groups.values() for run in runs):  # a text may have no part for it
        drawn = {"accuracy": bars(groups)} | drawn
    if any(len(run.summary["test"]) > 1 for runs in groups.values() for run in runs):
        drawn["lengths"] = lengths(groups)
    return drawn


def bars(groups: Groups) -> "Figure":
    """Token accuracy on the test at the first of its lengths, a bar per group, with its `bounds`."""
    firsts = {next(iter(run.summary["test"])) for runs in groups.values() for run in runs}
    at = f" at length {firsts.pop()}" if len(firsts) == 1 else ""
    with canvas(WIDTH, 0.9 + 0.5 * len(groups)) as figure:
        axes = figure.subplots()
        for number, (label, runs) in enumerate(groups.items()):
            scores = [next(iter(run.summary["test"].values()))["token_accuracy"] for run in runs]
            mean = sum(scores) / len(scores)
            axes.barh(number, mean, color=COLORS[0], height=0.4)
            shown = textwrap.fill(label, 64)
            axes.annotate(shown, (0, number - 0.24), va="bottom", fontsize=SMALL, parse_math=False)
            if len(scores) > 1:
                low, high = bounds(scores)
                axes.errorbar(mean, number, xerr=[[mean - low], [high - mean]], color=INK, capsize=3, linewidth=1)
            axes.annotate(f"{mean:.3f}", (0.01, number), va="center", color="white", fontweight="bold", fontsize=SMALL)
        axes.set_yticks([])
        axes.set(xlim=(0, 1), ylim=(len(groups) - 0.6, -0.75), xlabel="token accuracy")
        axes.set_title(f"test token accuracy{at}")
        axes.grid(visible=False)  # it would run through the labels
        _mark_chance(axes.axvline, groups)
    return figure


def curves(groups: Groups, name: str) -> "Figure":
    """The validation's loss or token accuracy over steps: the mean of the seeds, and their whole spread as a band."""
    lines = {}
    with canvas(WIDTH, _height(groups)) as figure:
        axes = figure.subplots()
        positive = True
        for number, (label, runs) in enumerate(groups.items()):
            by_step: dict[int, list[float]] = {}
            for line in itertools.chain.from_iterable(run.metrics for run in runs):
                if f"valid_{name}" in line:
                    by_step.setdefault(line["step"], []).append(line[f"valid_{name}"])
            # runs that ended early have no more points: a mean over others would jump
            steps = sorted(step for step, values in by_step.items() if len(values) == len(runs))
            means = [sum(by_step[step]) / len(runs) for step in steps]
            positive &= all(mean > 0 for mean in means)
            (lines[label],) = axes.plot(steps, means, markevery=max(1, len(steps) // 8), **series(number))
            if len(runs) > 1:
                low, high = ([f(by_step[step]) for step in steps] for f in (min, max))
                axes.fill_between(steps, low, high, color=lines[label].get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="step")
        if name == "loss":
            axes.set(title="validation loss", ylabel="nats per token", yscale="log" if positive else "linear")
        else:
            axes.set(title="validation token accuracy", ylabel="token accuracy", ylim=(0, 1.02))
            _mark_chance(axes.axhline, groups)
        label_ends(axes, lines, LABEL)
    return figure


def lengths(groups: Groups) -> "Figure":
    """Token accuracy on the test over its length, mean of the seeds with its `bounds`; a line at the trained."""
    lines = {}
    with canvas(WIDTH, _height(groups)) as figure:
        axes = figure.subplots()
        for number, (label, runs) in enumerate(groups.items()):
            tested = sorted({length for run in runs for length in run.summary["test"]}, key=longest)
            scores = [
                [run.summary["test"][n]["token_accuracy"] for run in runs if n in run.summary["test"]] for n in tested
            ]
            where, means = list(map(longest, tested)), [sum(numbers) / len(numbers) for numbers in scores]
            (lines[label],) = axes.plot(where, means, **series(number))
            ends = [bounds(numbers) for numbers in scores]
            errors = [[abs(mean - end[side]) for mean, end in zip(means, ends, strict=True)] for side in (0, 1)]
            axes.errorbar(where, means, errors, fmt="none", capsize=3, ecolor=lines[label].get_color())
        trained = {run.config.task["seq_len"] for runs in groups.values() for run in runs}
        for length in trained:
            axes.axvline(length, color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
        axes.set(xlabel="length (tokens); dashed: trained", ylabel="token accuracy", ylim=(0, 1.02), xscale="log")
        axes.set_title("test token accuracy over length")
        marks = sorted({longest(n) for runs in groups.values() for run in runs for n in run.summary["test"]} | trained)
        shown = _apart(marks)
        axes.set_xticks(shown, [f"{mark:,}" for mark in shown])
        axes.minorticks_off()
        _mark_chance(axes.axhline, groups)
        label_ends(axes, lines, LABEL)
    return figure


def _height(groups: Groups) -> float:
    """How many inches a picture needs for the label of every group."""
    return max(HEIGHT, 0.7 + 0.17 * sum(len(textwrap.wrap(label, LABEL)) for label in groups))


def _apart(marks: Sequence[int]) -> list[int]:
    """Those of ascending marks whose numbers do not run into each other on a log scale, the last among them."""
    kept = [marks[-1]]
    for mark in reversed(marks[:-1]):
        if math.log(kept[-1] / mark) >= math.log(marks[-1] / marks[0]) / 6:
            kept.append(mark)
    return kept[::-1]


def _mark_chance(line: Callable[..., object], groups: Groups) -> None:
    """Draw a dotted line at the accuracy of guessing, where it is the same for all groups."""
    chances = {build_task(run.config.task).chance for runs in groups.values() for run in runs}
    if len(chances) == 1:
        line(chances.pop(), color=INK, linestyle=":", linewidth=1)
