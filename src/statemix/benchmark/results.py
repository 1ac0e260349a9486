"""Tables of what `measure.measured` returns, and the picture of what `commands.run` keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from statemix import records
from statemix.style import COLORS, INK, SMALL, canvas, label_ends, render, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

CONTENDER = {
    "name": str,
    "median?": float,
    "spread?": float,
    "ratios?": {str: [float]},
    "samples?": [float],
    "note?": str,
    "unavailable?": str,
}
KEPT = {  # the form of what `commands.run` keeps, see records.py
    "what": str,
    "machine": {"processor": str, "instruction_set": str | None, "threads": int, "date": str},
    "options": {"batch?": int, "length?": int, "d_model?": int, "dtype?": str},
    "groups": [
        {
            "panel": str,
            "size": str,
            "unit": str,
            "ratio": str,
            "baselines": [str],
            "contenders": [CONTENDER],
        }
    ],
}

LABELS = {  # what a reader of a picture understands of the names of contenders
    "bdlru": "BD-LRU",
    "bdlru float32": "BD-LRU in float32",
    "bdlru keep": "BD-LRU, raw gates kept",
    "bdlru recompute": "BD-LRU, raw gates computed again",
    "bdlru first layer": "BD-LRU, of a table of few tokens",
    "bdlru few rows": "BD-LRU, of few tokens",
    "hlru": "H-LRU",
    "products": "the bare matrix products",
    "lstm": "LSTM (torch)",
    "gru": "GRU (torch)",
    "mamba2": "Mamba-2 (transformers)",
    "lstm cell": "LSTMCell (torch), as large a state",
    "model of 4 layers": "model of 4 layers, by step",
    "Decoder of 4 layers": "model of 4 layers, by a Decoder",
    "cpu": "compiled kernel",
    "associative": "torch's associative scan",
    "loop": "plain loop",
    "copy": "a copy of its bytes",
    "softmax": "softmax of the gates alone",
    "mambapy": "mambapy (M = 1)",
    "assoc-scan": "assoc-scan (M = 1)",
}
CHOICES = ("bdlru keep", "bdlru recompute")  # "bdlru" takes one of them, by the size


def read_kept(path: Path) -> Result:
    """What `commands.run` kept in a JSON file. Raises as `records.read`."""
    kept: Result = records.read(path, KEPT, "bench")
    return kept


def table(title: str, result: Result) -> Table:
    """A row per contender: median, spread, rounds, ratios to every baseline with their range, and the note."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("contender", no_wrap=True)
    ratios = [f"{result['ratio']} / {name}" for name in result["baselines"]]
    for header in ["median", "spread", "rounds", *ratios]:
        drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("note")
    for row in result["contenders"]:
        cells, note = [""] * (3 + len(ratios)), row.get("unavailable", "")
        if "samples" in row:
            cells = [amount(row["median"], result["unit"]), f"{row['spread']:.1%}", str(len(row["samples"]))]
            cells += [_ratio(row, name) for name in result["baselines"]]
            note = row["note"]
        drawn.add_row(*map(escape, [row["name"], *cells, note]))
    return drawn


def _ratio(row: Mapping[str, Any], baseline: str) -> str:
    """Write the ratio of a contender to a baseline with its quartiles; a baseline has none to itself."""
    if baseline not in row["ratios"] or baseline == row["name"]:
        return ""
    return "{:.3g} ({:.3g}-{:.3g})".format(*row["ratios"][baseline])


def amount(number: float, unit: str) -> str:
    """Three digits and a unit, of seconds or bytes: 12.3 ms, 1.23 GB."""
    steps = [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)]
    if unit == "B":
        steps = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)]
    name, size = next((step for step in steps if number >= step[1]), steps[-1])
    return f"{number / size:.3g} {name}" if number < 999 * size else f"{number / size:,.0f} {name}"


def plot(kept: Mapping[str, Any]) -> bytes:
    """A PNG of the ratios to the first baseline over the sizes, with their interquartile range; a panel for each part.

    Args:
        kept: the contents of the JSON file that `commands.run` writes, so that it can be drawn again at any time.
    """
    panels: dict[str, list[Result]] = {}
    for result in kept["groups"]:
        panels.setdefault(result["panel"], []).append(result)
    with canvas(8, 0.4 + 3.1 * len(panels)) as figure:
        figure.suptitle(_conditions(kept), x=0.01, ha="left", fontsize=SMALL)
        for axes, (panel, results) in zip(
            figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            axes.set_title(panel)
            _draw(axes, results)
    return render(figure, "png", dpi=120)


def _draw(axes: "Axes", results: Sequence[Result]) -> None:
    """The panel of these tables: a line per contender, and the baseline at 1."""
    baseline, lines = results[0]["baselines"][0], {}
    for number, (name, ratios) in enumerate(_ratios(results, baseline).items()):
        ratio, low, high = np.array(list(ratios.values())).T
        whiskers = np.maximum([ratio - low, high - ratio], 0)  # a median of ratios is not a ratio of medians
        (line,) = axes.plot(list(ratios), ratio, **series(number))
        axes.errorbar(list(ratios), ratio, whiskers, fmt="none", capsize=3, ecolor=line.get_color(), linewidth=1)
        lines[LABELS.get(name, name)] = line
    ends = [-0.3, len(results) - 0.7]
    (lines[LABELS.get(baseline, baseline)],) = axes.plot(ends, [1, 1], color=INK, linewidth=1)
    axes.set(xlim=ends, xlabel="block size M x number of blocks N (of an H-LRU: order x channels)", yscale="log")
    axes.set_ylabel(f"{results[0]['ratio']} over that of\n{LABELS.get(baseline, baseline)}")
    axes.set_xticks(range(len(results)), [result["size"].replace("x", " x ") for result in results])
    label_ends(axes, lines, width=26)


def _ratios(results: Sequence[Result], baseline: str) -> dict[str, dict[int, list[float]]]:
    """Contender -> number of the table -> ratio to the baseline and its quartiles.

    If there are more than colours, the layer that chooses stands for the two that it chooses between.
    """
    ratios: dict[str, dict[int, list[float]]] = {}
    for number, result in enumerate(results):
        for row in result["contenders"]:
            if row["name"] != baseline and baseline in row.get("ratios", {}):
                ratios.setdefault(row["name"], {})[number] = row["ratios"][baseline]
    if len(ratios) > len(COLORS) and "bdlru" in ratios:
        return {name: own for name, own in ratios.items() if name not in CHOICES}
    return ratios


def _conditions(kept: Mapping[str, Any]) -> str:
    """What all numbers of a picture hold for."""
    options, machine = kept["options"], kept["machine"]
    words = {"batch": "batch", "length": "length", "d_model": "width"}
    shape = [f"{word} {options[name]:,}" for name, word in words.items() if name in options]
    if "dtype" in options:
        shape.append(options["dtype"])
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    processor = f"{machine['processor']} ({machine['instruction_set']}), {machine['date']}"
    return f"bench {kept['what']}: {', '.join(shape)}; {threads} of {processor}"
