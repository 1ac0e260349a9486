"""Tables and the plot of what `measure.measured` returns."""

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

Result = Mapping[str, Any]


def table(title: str, result: Result) -> Table:
    """A row per contender: median, spread, rounds, ratios to every baseline with their range, and the note."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("contender", no_wrap=True)
    for header in ("median", "spread", "rounds", *(f"{result['ratio']} / {name}" for name in result["baselines"])):
        drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("note")
    for row in result["contenders"]:
        cells = [row["name"], *[""] * (3 + len(result["baselines"])), row.get("unavailable", "")]
        if "samples" in row:
            cells[1:4] = amount(row["median"], result["unit"]), f"{row['spread']:.1%}", str(len(row["samples"]))
            for i, name in enumerate(result["baselines"]):
                if name in row["ratios"] and name != row["name"]:
                    cells[4 + i] = "{:.3g} ({:.3g}-{:.3g})".format(*row["ratios"][name])
            cells[-1] = row["note"]
        drawn.add_row(*map(escape, cells))
    return drawn


def amount(number: float, unit: str) -> str:
    """Three digits and a unit, of seconds or bytes: 12.3 ms, 1.23 GB."""
    steps = [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)]
    if unit == "B":
        steps = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)]
    name, size = next((step for step in steps if number >= step[1]), steps[-1])
    return f"{number / size:.3g} {name}" if number < 999 * size else f"{number / size:,.0f} {name}"


def plot(results: Sequence[Result], over_contenders: bool) -> bytes:
    """A PNG of the ratios to the first baseline, with their interquartile range; a panel for each part.

    Args:
        results: of all tables.
        over_contenders: True: over the numbers in the names of the contenders, a line per size. False: over the
            sizes, a line per contender.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(result["panel"] for result in results))
    figure = Figure(figsize=(10, 3.5 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        groups = [result for result in results if result["panel"] == panel]
        sizes, baseline = [group["size"] for group in groups], groups[0]["baselines"][0]
        series: dict[str, dict[int, list[float]]] = {}  # label -> x -> ratio and its quartiles
        for i, group in enumerate(groups):
            for row in group["contenders"]:
                if baseline in row.get("ratios", {}):
                    number = int(re.sub(r"\D", "", row["name"]) or 0)
                    label, x = (group["size"], number) if over_contenders else (row["name"], i)
                    series.setdefault(label, {})[x] = row["ratios"][baseline]
        for label, points in series.items():
            ratio, low, high = np.array(list(points.values())).T
            whiskers = np.maximum([ratio - low, high - ratio], 0)  # a median of ratios is not a ratio of medians
            axes.errorbar(list(points), ratio, whiskers, marker="o", capsize=3, label=label)
        if over_contenders:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(points), list(points), rotation=30)
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.set_xticks(range(len(sizes)), sizes)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(title=panel, ylabel=f"{groups[0]['ratio']} / {baseline}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
