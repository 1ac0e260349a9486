"""The picture of its curves that every run leaves in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from statemix.files import write_whole
from statemix.style import INK, SMALL, canvas, label_ends, render, series

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


def plot_curves(runs: Mapping[str, Metrics], path: str | Path, *, title: str = "", chance: float | None = None) -> None:
    """Loss and token accuracy over steps: of one run thin while training and thick on the validation split.

    Of several runs the validation alone is shown, or the training where a run has no validation.

    Args:
        runs: label -> lines of metrics.jsonl.
        path: of the picture; the ending picks the format (.png, .svg, .pdf).
        title: above the picture.
        chance: token accuracy of guessing, drawn as a dotted line.
    """
    with canvas(10, 4.5) as figure:
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        losses: list[float] = []
        for axes, name in ((loss_axes, "loss"), (accuracy_axes, "token_accuracy")):
            axes.set(xlabel="step")
            lines = {}
            for number, (label, metrics) in enumerate(runs.items()):
                validated = _points(metrics, f"valid_{name}")
                trained = _points(metrics, name)
                style = series(number)
                if len(runs) == 1 or not validated:
                    axes.plot(list(trained), list(trained.values()), color=style["color"], linewidth=0.8, alpha=0.6)
                (lines[label],) = axes.plot(list(validated), list(validated.values()), **style)
                if name == "loss":
                    losses += [*trained.values(), *validated.values()]
            if name == "loss":
                axes.set(ylabel="loss (nats per token)", yscale="log" if any(loss > 0 for loss in losses) else "linear")
            else:
                axes.set(ylabel="token accuracy", ylim=(0, 1.02))
            if len(runs) > 1:
                label_ends(axes, lines, width=16)
        if chance is not None:
            accuracy_axes.axhline(chance, color=INK, linestyle=":", linewidth=1)
            accuracy_axes.annotate("guessing", (0.01, chance), xycoords=("axes fraction", "data"), va="bottom")
        if len(runs) == 1:
            loss_axes.set_title("thin: while training; thick: on the validation split", fontsize=SMALL)
        figure.suptitle(title, x=0.01, ha="left")
    write_whole(Path(path), render(figure, Path(path).suffix[1:], dpi=150))


def _points(metrics: Metrics, key: str) -> dict[int, float]:
    """Step -> figure, of the lines that have it."""
    return {line["step"]: line[key] for line in metrics if key in line}
