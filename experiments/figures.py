"""The pictures of the claims: heat maps of accuracy, and loss or accuracy over size and time.

Each takes the rows of a table.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statemix.style import BLUE, INK, SMALL, canvas, label_ends, plain, series

Row = dict[str, Any]


def state_tracking(rows: Sequence[Row]) -> Figure:
    """Mixers by groups: token accuracy at the trained length and at four times it."""
    by_group: dict[str, None] = dict.fromkeys(row["label"].split(", ")[0] for row in rows)
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    columns = {str(n): f"test_{n}_token_accuracy" for n in (16, 32, 64)}
    with canvas(1.8 + 1.3 * len(by_group), 0.8 + 0.22 * len(mixers)) as figure:
        for axes, group in zip(_row_of_panels(figure, len(by_group)), by_group, strict=True):
            values = [[_mean(rows, f"{group}, {mixer}", key) for key in columns.values()] for mixer in mixers]
            _heat(axes, values, mixers, list(columns), group)
            axes.set_xlabel("length (tokens)")
        figure.suptitle("token accuracy; trained at length 16", x=0.01, ha="left")
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Mixers by tasks: token accuracy."""
    tasks = list(dict.fromkeys(_bare(row).partition(", ")[0] for row in rows))
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    lengths = {row["task.name"]: f"{row['task.seq_len']:.0f}" for row in rows if row["status"] == "done"}
    values = [
        [_mean(rows, f"{task}, {mixer}", f"test_{lengths.get(task)}_token_accuracy") for task in tasks]
        for mixer in mixers
    ]
    with canvas(1.6 + 0.95 * len(tasks), 1.2 + 0.22 * len(mixers)) as figure:
        _heat(figure.subplots(), values, mixers, [task.replace("-", "\n") for task in tasks], "token accuracy")
    return figure


def structure(rows: Sequence[Row]) -> Figure:
    """Accuracy over the size of the state and over parameters, a line per block size M; a dot is a seed."""
    sizes = sorted({int(row["mixer.block_size"]) for row in rows})
    over = {
        "state_size": ("state (numbers a sequence, N M)", (2, 5, 10, 20, 50, 100)),
        "mixer_parameters": ("parameters of the mixer", (500, 2000, 10_000, 50_000)),
    }
    with canvas(8, 3.6) as figure:
        for axes, (key, (name, marks)) in zip(_row_of_panels(figure, 2), over.items(), strict=True):
            lines = {}
            for number, m in enumerate(sizes):
                own = [row for row in rows if row["mixer.block_size"] == m and row["status"] == "done"]
                scores: dict[float, list[float]] = {}
                for row in sorted(own, key=lambda row: row[key]):
                    scores.setdefault(row[key], []).append(row["test_16_token_accuracy"])
                means = [np.mean(values) for values in scores.values()]
                (line,) = axes.plot(list(scores), means, **series(number))
                dots = [row[key] for row in own], [row["test_16_token_accuracy"] for row in own]
                axes.plot(dots[0], dots[1], ".", color=line.get_color(), alpha=0.4, markersize=4)
                lines[f"M {m}"] = line
            axes.set(xscale="log", xlabel=name, ylim=(0, 1.02))
            axes.set_xticks(marks, map(plain, marks))
            axes.minorticks_off()
            label_ends(axes, lines)
        figure.axes[0].set_ylabel("token accuracy at length 16")
        figure.suptitle(
            "S4 by block size M; along each line the number of blocks N is 2, 4, 8, 16, 32", x=0.01, ha="left"
        )
    return figure


def normalization(rows: Sequence[Row]) -> Figure:
    """Normalisations by block size at each length: token accuracy, and how many runs diverged."""
    lengths = sorted({int(row["task.seq_len"]) for row in rows if row["task.seq_len"] != ""})
    names = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    sizes = list(dict.fromkeys(row["label"].split(", ")[1] for row in rows))
    with canvas(1 + 2.2 * len(lengths), 3.4) as figure:
        for axes, length in zip(_row_of_panels(figure, len(lengths)), lengths, strict=True):
            labels = [[f"{name}, {size}, length {length}" for size in sizes] for name in names]
            values = [[_mean(rows, label, f"test_{length}_token_accuracy") for label in line] for line in labels]
            notes = [[_failures(rows, label) for label in line] for line in labels]
            _heat(axes, values, names, sizes, f"length {length}", notes=notes)
        figure.suptitle("S3, token accuracy", x=0.01, ha="left")
    return figure


def regular(rows: Sequence[Row]) -> Figure:
    """Languages by normalisation and block size: scaled accuracy at the longest trained length and beyond."""
    tasks = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    gates = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    columns = {str(n): f"test_{n}_scaled_accuracy" for n in (40, 80, 160)}
    with canvas(1.2 + 1.2 * len(tasks), 1.1 + 0.23 * len(gates)) as figure:
        for axes, task in zip(_row_of_panels(figure, len(tasks)), tasks, strict=True):
            values = [[_mean(rows, f"{task}, {gate}", key) for key in columns.values()] for gate in gates]
            _heat(axes, values, gates, list(columns), task.replace("-", "\n"))
            axes.set_xlabel("length (tokens)")
        figure.suptitle("accuracy, 0 for guessing; trained up to length 40", x=0.01, ha="left")
    return figure


def language(rows: Sequence[Row]) -> Figure:
    """Bits per byte of every mixer on each text: a dot for each seed, a line at the mean."""
    texts = list(dict.fromkeys(row["label"].split(", ")[0] for row in rows))
    mixers = list(dict.fromkeys(_bare(row).partition(", ")[2] for row in rows))
    with canvas(7, 1.1 + 0.21 * len(mixers)) as figure:
        for axes, text in zip(_row_of_panels(figure, len(texts)), texts, strict=True):
            for y, mixer in enumerate(mixers):
                losses = _all(rows, f"{text}, {mixer}", "test_128_bits_per_byte")
                axes.plot(losses, [y] * len(losses), "o", markersize=3.5, alpha=0.6, color=BLUE)
                if losses:
                    axes.plot([np.mean(losses)] * 2, [y - 0.35, y + 0.35], color=BLUE)
            axes.set_title(text)
            axes.set_xlabel("test loss (bits per byte)")
            axes.grid(visible=False, axis="y")
            axes.set_yticks(range(len(mixers)), mixers)
        axes.invert_yaxis()
    return figure


def shakespeare(rows: Sequence[Row]) -> Figure:
    """Validation loss over wall-clock time, a line a run; the short runs of BD-LRU and H-LRU share a label."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["label"], []).append(row)
    short = [label for label in runs if re.fullmatch(r"(BD|H)-LRU, M \d+", label)]
    ends = sorted(runs[label][-1]["valid_loss"] for label in short)
    bundle = f"BD-LRU and H-LRU, {len(short)} mixers: {ends[0]:.3f} to {ends[-1]:.3f}"
    others = [label for label in runs if label not in short]
    lines = {}
    with canvas(8, 4) as figure:
        axes = figure.subplots()
        for label in [*short, *others]:
            number = 0 if label in short else 1 + others.index(label)
            seconds, losses = ([row[key] for row in runs[label]] for key in ("at_seconds", "valid_loss"))
            (line,) = axes.plot(seconds, losses, **series(number))
            lines[bundle if label in short else f"{label}: {losses[-1]:.3f}"] = line
        axes.set(xlabel="seconds of training steps", ylabel="validation loss (nats per character)", xscale="log")
        marks = (15, 30, 60, 120, 240, 480, 900)
        axes.set_xticks(marks, map(str, marks))
        axes.minorticks_off()
        label_ends(axes, lines, width=30)
    return figure


def _row_of_panels(figure: Figure, count: int) -> Sequence[Axes]:
    """Panels beside each other on one vertical axis."""
    return list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


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
            axes.annotate(text, (j, i), ha="center", va="center", fontsize=7, color="white" if value > 0.6 else INK)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(title, loc="center", fontsize=SMALL)


def _short(value: float) -> str:
    """Two digits, not rounded up; 1.0 only where it is at least 0.9995."""
    return "1.0" if value >= 0.9995 else f".{int(100 * max(value, 0)):02d}"
