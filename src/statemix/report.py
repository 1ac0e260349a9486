"""Tables of runs, and the curves that every run leaves in its folder. report_html.py makes the page of them all."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from statemix.files import write_whole
from statemix.runs import Run, interval

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
Groups = Mapping[str, Sequence[Run]]  # label -> runs that differ in their seed

ACCURACIES = {"token": "token_accuracy", "sequence": "sequence_accuracy", "macro": "macro_accuracy"}
BITS = {"bits per byte": "bits_per_byte"}  # of runs on a text


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


def results_table(results: Mapping[str, Sequence[Mapping[str, Any]]], *, markdown: bool = False) -> str:
    """A row per label: parameters, state size, token and sequence accuracy at every tested length, training speed.

    Args:
        results: label -> the contents of result.json of its runs, one a seed. Several are shown as mean (least-most).
        markdown: as a Markdown table, and else aligned for a terminal.
    """
    lengths = list(dict.fromkeys(length for runs in results.values() for run in runs for length in run["test"]))
    rows = [["token / sequence accuracy", "parameters", "state", *(f"length {n}" for n in lengths), "tokens/s"]]
    for label, runs in results.items():
        cells = [label, f"{runs[0]['parameters']:,}", f"{runs[0]['state_size']:,}"]
        for length in lengths:
            tests = [run["test"][length] for run in runs if length in run["test"]]
            accuracies = [_spread([t[key] for t in tests], ".3f") for key in ("token_accuracy", "sequence_accuracy")]
            cells.append(" / ".join(filter(None, accuracies)))
        rows.append([*cells, _spread([run["train_tokens_per_s"] for run in runs], ",.0f")])
    return align(rows, markdown=markdown)


def _spread(numbers: Sequence[float], form: str) -> str:
    """Mean (least-most), or the one number, or nothing."""
    if not numbers:
        return ""
    mean = format(sum(numbers) / len(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):{form}}-{max(numbers):{form}})"


def group_rows(groups: Groups) -> list[list[str]]:
    """A head and a row per group: sizes, the validation, the three accuracies at every tested length, the time.

    If a run is on a text there are bits per byte, too.

    Several seeds are shown as mean +- half of the 95 % interval of Student's t.
    """
    lengths = sorted({length for runs in groups.values() for run in runs for length in run.summary["test"]}, key=int)
    has_text = any("bits_per_byte" in run.summary["valid"] for runs in groups.values() for run in runs)
    valids = {"token": "token_accuracy"} | (BITS if has_text else {})
    scored = ACCURACIES | (BITS if has_text else {})
    tests = [(length, name) for length in lengths for name in scored]
    head = ["", "seeds", "parameters", "state", *(f"valid {name}" for name in valids)]
    rows = [[*head, *(f"test {length} {name}" for length, name in tests), "steps", "tokens/s"]]
    for label, runs in groups.items():
        summaries = [run.summary for run in runs]
        cells = [label, str(len(runs)), f"{summaries[0]['parameters']:,}", f"{summaries[0]['state_size']:,}"]
        for key in valids.values():
            cells.append(_estimate_of(key, [summary["valid"] for summary in summaries]))
        for length, name in tests:
            scores = [summary["test"][length] for summary in summaries if length in summary["test"]]
            cells.append(_estimate_of(scored[name], scores))
        cells.append(estimate([summary["steps"] for summary in summaries], ",.0f"))
        rows.append([*cells, estimate([summary["train_tokens_per_s"] for summary in summaries], ",.0f")])
    return rows


def _estimate_of(key: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """The estimate of a figure over those runs that have it."""
    return estimate([score[key] for score in scores if key in score], ".3f")


def estimate(numbers: Sequence[float], form: str) -> str:
    """Mean +- half of the 95 % interval; the number alone if there is one; nothing if there is none."""
    if not numbers:
        return ""
    mean, half_width, _ = interval(numbers)
    return format(mean, form) if half_width is None else f"{mean:{form}} ± {half_width:{form}}"


def align(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    if markdown:
        ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
