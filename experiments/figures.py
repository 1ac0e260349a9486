"""The pictures of the claims: heat maps of accuracy, and accuracy over length. Each takes the rows of a table."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

matplotlib.rc("font", size=8)


def state_tracking(rows: Sequence[Row]) -> Figure:
    """Mixers by groups: token accuracy at the trained length and at four times it."""
    by_group: dict[str, None] = dict.fromkeys(row["label"].split(", ")[0] for row in rows)
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    figure = Figure(figsize=(1.6 + 1.25 * len(by_group), 0.6 + 0.21 * len(mixers)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(by_group), sharey=True))
    for axes, group in zip(panels, by_group, strict=True):
        columns = {str(n): f"test_{n}_token_accuracy" for n in (16, 32, 64)}
        values = [[_mean(rows, f"{group}, {mixer}", key) for key in columns.values()] for mixer in mixers]
        _heat(axes, values, mixers, list(columns), group)
        axes.set_xlabel("length")
    figure.suptitle("token accuracy; trained at length 16")
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Mixers by tasks: token accuracy."""
    tasks = list(dict.fromkeys(_bare(row).partition(", ")[0] for row in rows))
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    figure = Figure(figsize=(1.6 + 0.9 * len(tasks), 1.2 + 0.21 * len(mixers)), layout="constrained")
    lengths = {row["task.name"]: f"{row['task.seq_len']:.0f}" for row in rows if row["status"] == "done"}
    values = [
        [_mean(rows, f"{task}, {mixer}", f"test_{lengths.get(task)}_token_accuracy") for task in tasks]
        for mixer in mixers
    ]
    _heat(figure.subplots(), values, mixers, [task.replace("-", "\n") for task in tasks], "token accuracy")
    return figure


def structure(rows: Sequence[Row]) -> Figure:
    """Accuracy over blocks N and block size M, with lines of equal parameters and of equal state."""
    sizes = sorted({int(row["mixer.block_size"]) for row in rows})
    widths = sorted({int(row["mixer.num_blocks"]) for row in rows})
    values = [[_mean(rows, f"M {m}, N {n}", "test_16_token_accuracy") for m in sizes] for n in widths]
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    _heat(axes, values, list(map(str, widths)), list(map(str, sizes)), "S4, token accuracy at length 16")
    axes.invert_yaxis()
    m, log_n = np.meshgrid(np.linspace(0.6, max(sizes) + 0.4, 100), np.linspace(-0.45, len(widths) - 0.55, 100))
    n, d_model = widths[0] * 2.0**log_n, rows[0]["model.d_model"]
    where = (m - sizes[0], log_n)
    for name, quantity, levels, style, color in (
        ("parameters", n * m * ((m + 1) * (d_model + 1) + 2 * d_model), (3e3, 12e3, 48e3), "--", "#e8590c"),
        ("state", n * m, (12, 48, 192), ":", "#1c7ed6"),
    ):
        lines = axes.contour(*where, quantity, levels=levels, linestyles=style, colors=color, linewidths=1.4)
        axes.plot([], [], style, color=color, label=f"equal {name}: {', '.join(f'{level:,.0f}' for level in levels)}")
        axes.clabel(lines, fmt=lambda level: f"{level:,.0f}", fontsize=6)
    axes.set(xlabel="block size M", ylabel="blocks N")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def normalization(rows: Sequence[Row]) -> Figure:
    """Normalisations by block size at each length: token accuracy, and how many runs diverged."""
    lengths = sorted({int(row["task.seq_len"]) for row in rows if row["task.seq_len"] != ""})
    names = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    sizes = list(dict.fromkeys(row["label"].split(", ")[1] for row in rows))
    figure = Figure(figsize=(1 + 2.1 * len(lengths), 2.4), layout="constrained")
    for axes, length in zip(np.atleast_1d(figure.subplots(1, len(lengths), sharey=True)), lengths, strict=True):
        labels = [[f"{name}, {size}, length {length}" for size in sizes] for name in names]
        values = [[_mean(rows, label, f"test_{length}_token_accuracy") for label in line] for line in labels]
        failed = [
            [sum(row["status"] != "done" for row in rows if _bare(row) == label) for label in line] for line in labels
        ]
        _heat(
            axes,
            values,
            names,
            sizes,
            f"length {length}",
            notes=[[f"\n{n} failed" if n else "" for n in line] for line in failed],
        )
    figure.suptitle("S3, token accuracy")
    return figure


def exact(rows: Sequence[Row]) -> Figure:
    """Sequence accuracy over length: the recipe on every group, and S3 without parts of it."""
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lengths = sorted({int(key.split("_")[1]) for row in rows for key in row if re.fullmatch(r"test_\d+_loss", key)})
    for label in dict.fromkeys(_bare(row) for row in rows):
        group, _, part = label.partition(", ")
        scores = [_all(rows, label, f"test_{n}_sequence_accuracy") for n in lengths]
        for axes, shown, name in ((above, part == "the recipe", group), (below, group == "S3", part)):
            if shown:
                means = [np.mean(s) if s else np.nan for s in scores]
                style = ("-", "--", ":", "-.")[len(axes.lines) % 4]  # lines lie on each other
                (line,) = axes.plot(lengths, means, style, marker=".", label=name)
                low, high = ([f(s) if s else np.nan for s in scores] for f in (min, max))
                axes.fill_between(lengths, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    above.set_title(
        "the recipe: sequence accuracy over length (bands: least to most of the seeds)", loc="left", fontsize=8
    )
    below.set_title("S3 without parts of it", loc="left", fontsize=8)
    below.set_xlabel("length; trained up to 64")
    for axes in (above, below):
        axes.set(ylim=(-0.02, 1.03), xscale="log")
        axes.set_xticks(lengths, map(str, lengths))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def regular(rows: Sequence[Row]) -> Figure:
    """Languages by normalisation and block size: scaled accuracy at the longest trained length and beyond."""
    tasks = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    gates = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    figure = Figure(figsize=(1.2 + 1.1 * len(tasks), 0.9 + 0.22 * len(gates)), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        values = [
            [_mean(rows, f"{task}, {gate}", f"test_{n}_scaled_accuracy") for n in (40, 80, 160)] for gate in gates
        ]
        _heat(axes, values, gates, ["40", "80", "160"], task.replace("-", "\n"))
        axes.set_xlabel("length")
    figure.suptitle("accuracy, 0 for guessing; trained up to length 40")
    return figure


def language(rows: Sequence[Row]) -> Figure:
    """Bits per byte of every mixer on each text: a dot for each seed, a line at the mean."""
    texts = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    figure = Figure(figsize=(6.4, 0.9 + 0.2 * len(mixers)), layout="constrained")
    for axes, text in zip(np.atleast_1d(figure.subplots(1, len(texts), sharey=True)), texts, strict=True):
        for y, mixer in enumerate(mixers):
            losses = _all(rows, f"{text}, {mixer}", "test_128_bits_per_byte")
            axes.plot(losses, [y] * len(losses), "o", markersize=3, alpha=0.6, color="#2b8a3e")
            if losses:
                axes.plot([np.mean(losses)] * 2, [y - 0.35, y + 0.35], color="#2b8a3e")
        axes.set_title(text, fontsize=8)
        axes.set_xlabel("test loss, bits per byte")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(mixers)), mixers)
    axes.invert_yaxis()
    return figure


def shakespeare(rows: Sequence[Row]) -> Figure:
    """Validation loss over wall-clock time: a line a run."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(row["label"] for row in rows):
        points = [(row["at_seconds"], row["valid_loss"]) for row in rows if row["label"] == label]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"{label}: {points[-1][1]:.3f}")
    axes.set(xlabel="seconds of training steps", ylabel="validation loss, nats per character", xscale="log")
    seconds = (30, 60, 120, 240, 480, 900)
    axes.set_xticks(seconds, map(str, seconds))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _bare(row: Row) -> str:
    return re.sub(r", seed \d+$", "", row["label"])


def _all(rows: Sequence[Row], label: str, key: str) -> list[float]:
    return [row[key] for row in rows if _bare(row) == label and row.get(key, "") != ""]


def _mean(rows: Sequence[Row], label: str, key: str) -> float:
    values = _all(rows, label, key)
    return float(np.mean(values)) if values else float("nan")


def _failures(rows: Sequence[Row], label: str) -> str:
    failed = sum(row["status"] != "done" for row in rows if _bare(row) == label)
    return f"\n{failed} failed" if failed else ""


def _heat(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    notes: Sequence[Sequence[str]] | None = None,
) -> None:
    """A heat map from 0 to 1 with its numbers; a dash where there is none."""
    axes.imshow(np.asarray(values, dtype=float), vmin=0, vmax=1, cmap="Greens", aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            text = ("-" if np.isnan(value) else _short(value)) + (notes[i][j] if notes else "")
            axes.annotate(
                text, (j, i), ha="center", va="center", fontsize=6.5, color="white" if value > 0.6 else "black"
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8)


def _short(value: float) -> str:
    """Two digits, not rounded up; 1.0 only where it is at least 0.9995."""
    return "1.0" if value >= 0.9995 else f".{int(100 * max(value, 0)):02d}"
