"""The picture of its curves that every run leaves in its folder."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from statemix.files import write_whole

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


def plot_curves(runs: Mapping[str, Metrics], path: str | Path, *, title: str = "", chance: float | None = None) -> None:
    """Loss and token accuracy over steps, one colour a run: thin while training, thick on the validation split.

    Args:
        runs: label -> lines of metrics.jsonl.
        path: of the picture; the ending picks the format (.png, .svg, .pdf).
        title: above the picture.
        chance: token accuracy of guessing, drawn as a dotted line.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, (label, metrics) in enumerate(runs.items()):
        color = matplotlib.color_sequences["tab10"][number % 10]
        for axes, name in ((loss_axes, "loss"), (accuracy_axes, "token_accuracy")):
            for key, style in (
                (name, {"linewidth": 0.8, "alpha": 0.5}),
                (f"valid_{name}", {"label": label, "marker": "."}),
            ):
                points = [(line["step"], line[key]) for line in metrics if key in line]
                axes.plot(*zip(*points, strict=True), color=color, **style) if points else None
    losses = [
        line[key] for metrics in runs.values() for line in metrics for key in ("loss", "valid_loss") if key in line
    ]
    scale = "log" if any(loss > 0 for loss in losses) else "linear"
    loss_axes.set(xlabel="step", ylabel="loss (nats per token)", yscale=scale)
    accuracy_axes.set(xlabel="step", ylabel="token accuracy", ylim=(0, 1.02))
    if chance is not None:
        accuracy_axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        accuracy_axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="top")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if accuracy_axes.get_legend_handles_labels()[0]:
        figure.legend(*accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    picture = BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:], dpi=150)
    write_whole(Path(path), picture.getvalue())
