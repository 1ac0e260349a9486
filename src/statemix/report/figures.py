"""Pictures that compare groups of runs: accuracy with its interval, over steps, and over the tested length.

Text and axes are drawn in INK, which the page replaces by the colour of its own text.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from statemix.report.tables import Groups
from statemix.runs.statistics import interval
from statemix.tasks import build_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#3a3b3c"
COLORS = ("#3b82d0", "#e07b39", "#3fa66a", "#c94f7c", "#8a6fd1", "#a38a3a", "#3ea3b0", "#8a8f98")
STYLES = ("-", "--", ":", "-.")  # once the colours are used up
SIZE = (5.0, 3.4)  # inches: its text can still be read on a screen of that width


def figures(groups: Groups) -> dict[str, "Figure"]:
    """Every picture that the groups allow, by name."""
    drawn = {"loss": curves(groups, "loss"), "learning": curves(groups, "token_accuracy")}
    if all(run.summary["test"] for runs in groups.values() for run in runs):  # a text may have no part for it
        drawn = {"accuracy": bars(groups)} | drawn
    if any(len(run.summary["test"]) > 1 for runs in groups.values() for run in runs):
        drawn["lengths"] = lengths(groups)
    return drawn


def bars(groups: Groups) -> "Figure":
    """Token accuracy on the test at the first of its lengths, a bar per group, with its 95 % interval."""
    firsts = {next(iter(run.summary["test"])) for runs in groups.values() for run in runs}
    at = f" at length {firsts.pop()}" if len(firsts) == 1 else ""
    with _canvas(f"test token accuracy{at}", 0.9 + 0.5 * len(groups)) as (figure, axes):
        for number, (label, runs) in enumerate(groups.items()):
            scores = [next(iter(run.summary["test"].values()))["token_accuracy"] for run in runs]
            mean, half_width, _ = interval(scores)
            axes.barh(number, mean, color=COLORS[number % len(COLORS)], height=0.4)
            axes.annotate(_wrap(label), (0, number - 0.24), va="bottom", fontsize=8)
            if half_width is not None:
                axes.errorbar(mean, number, xerr=half_width, color=INK, capsize=3, linewidth=1)
            axes.annotate(f"{mean:.3f}", (0.01, number), va="center", color="white", fontweight="bold", fontsize=8)
        axes.set_yticks([])
        axes.set(xlim=(0, 1), ylim=(len(groups) - 0.6, -0.75))
        _mark_chance(axes.axvline, groups)
    axes.grid(False)  # it would run through the labels
    return figure


def curves(groups: Groups, name: str) -> "Figure":
    """The validation's loss or token accuracy over steps: the mean of the seeds, and their whole spread as a band."""
    title = "validation loss (nats per token)" if name == "loss" else "validation token accuracy"
    with _canvas(title, SIZE[1] + 0.18 * len(groups)) as (figure, axes):
        positive = True
        for (label, runs), style in zip(groups.items(), _styles(), strict=False):
            by_step: dict[int, list[float]] = {}
            for line in itertools.chain.from_iterable(run.metrics for run in runs):
                if f"valid_{name}" in line:
                    by_step.setdefault(line["step"], []).append(line[f"valid_{name}"])
            # runs that ended early have no more points: a mean over others would jump
            steps = sorted(step for step, values in by_step.items() if len(values) == len(runs))
            means = [sum(by_step[step]) / len(runs) for step in steps]
            positive &= all(mean > 0 for mean in means)
            axes.plot(steps, means, label=_wrap(label), marker="." if len(steps) < 20 else "", **style)
            if len(runs) > 1:
                low, high = ([f(by_step[step]) for step in steps] for f in (min, max))
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="step")
        if name == "loss":
            axes.set_yscale("log" if positive else "linear")
        else:
            axes.set_ylim(0, 1.02)
            _mark_chance(axes.axhline, groups)
        _add_legend(figure, axes)
    return figure


def lengths(groups: Groups) -> "Figure":
    """Token accuracy on the test over its length, mean of the seeds with its 95 % interval; a line at the trained."""
    with _canvas("test token accuracy over length", SIZE[1] + 0.18 * len(groups)) as (figure, axes):
        for (label, runs), style in zip(groups.items(), _styles(), strict=False):
            tested = sorted({length for run in runs for length in run.summary["test"]}, key=int)
            scores = [
                interval([run.summary["test"][n]["token_accuracy"] for run in runs if n in run.summary["test"]])
                for n in tested
            ]
            errors = [score.half_width or 0.0 for score in scores]
            where = list(map(int, tested))
            means = [score.mean for score in scores]
            axes.errorbar(where, means, errors, label=_wrap(label), marker=".", capsize=3, **style)
        trained = {run.config.task["seq_len"] for runs in groups.values() for run in runs}
        for length in trained:
            axes.axvline(length, color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
        axes.set(xlabel="length (tokens); dashed: trained", ylim=(0, 1.02), xscale="log")
        marks = sorted({int(n) for runs in groups.values() for run in runs for n in run.summary["test"]} | trained)
        axes.set_xticks(marks, map(str, marks))
        axes.minorticks_off()
        _mark_chance(axes.axhline, groups)
        _add_legend(figure, axes)
    return figure


@contextmanager
def _canvas(title: str, height: float) -> Iterator[tuple["Figure", "Axes"]]:
    """A figure of one panel in the common style."""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {**dict.fromkeys(inked, INK), "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        axes = figure.subplots()
        yield figure, axes
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _styles() -> Iterator[Mapping[str, Any]]:
    return ({"linestyle": style, "color": color} for style in itertools.cycle(STYLES) for color in COLORS)


def _wrap(label: str) -> str:
    """In lines that fit into a picture; not as mathematics, and not hidden from the legend as "_..." would be."""
    return textwrap.fill(label, 76).replace("$", r"\$").replace("_", "\N{WORD JOINER}_", label.startswith("_"))


def _mark_chance(line: Callable[..., object], groups: Groups) -> None:
    """A dotted line at the accuracy of guessing, where it is one for all."""
    chances = {build_task(run.config.task).chance for runs in groups.values() for run in runs}
    if len(chances) == 1:
        line(chances.pop(), color=INK, linestyle=":", linewidth=1)


def _add_legend(figure: "Figure", axes: "Axes") -> None:
    entries: tuple[Sequence[Any], Sequence[Any]] = axes.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower left", ncols=1, frameon=False, fontsize=8)
