"""Tables and the plot of what was measured on a card."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]


def speed(found: Sequence[Record]) -> float | None:
    """Bytes a second of a copy, if it was measured."""
    return next((record["bytes_per_second"] for record in found if record["part"] == "copy"), None)


def tables(found: Sequence[Record], conditions: str) -> list[Table]:
    """Of the scans, the layers and the training steps, as far as there are any."""
    parts: dict[str, list[Record]] = {}
    for record in found:
        parts.setdefault(record["part"], []).append(record)
    makers = {"scan": lambda records: _scans(records, speed(found)), "layer": _layers, "step": _steps}
    drawn = [make(parts[part]) for part, make in makers.items() if part in parts]
    if (copied := speed(found)) is not None:
        conditions += f", copy {copied / 1e12:.2f} TB/s"
    for one in drawn:
        one.caption = conditions
    return drawn


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    drawn = Table(title=title, title_justify="left")
    for header in names:
        drawn.add_column(header, no_wrap=True)
    for header in numbers:
        drawn.add_column(header, justify="right")
    return drawn


def _scans(records: Sequence[Record], copied: float | None) -> Table:
    numbers = ["error", "forward ms", "/ least", "backward ms", "/ least", "with host ms"]
    drawn = _table("scans: the kernels alone, over the time of the least bytes", ["scan (B, T, N)"], numbers)
    for record in records:
        cells = [record["name"], f"{record['error']:.1e}"]
        if "wrong" in record:
            drawn.add_row(*cells, "WRONG")
            continue
        for part, moved in zip(("forward", "backward"), record["bytes"], strict=True):
            ratio = "" if copied is None else f"{record[part] * copied / moved:.2f}"
            cells += [f"{1e3 * record[part]:.3f}", ratio]
        cells.append(f"{1e3 * record['forward_with_host']:.3f} + {1e3 * record['backward_with_host']:.3f}")
        drawn.add_row(*cells)
    return drawn


def _layers(records: Sequence[Record]) -> Table:
    drawn = _table(
        "layers: bfloat16 by autocast, with the host",
        ["layer"],
        ["parameters", "forward ms", "forward + backward ms", "/ products"],
    )
    times = {record["name"]: record["forward_backward"] for record in records if "forward_backward" in record}
    for record in records:
        if "unavailable" in record:
            drawn.add_row(record["name"], record["unavailable"])
            continue
        bare = times.get(f"products of {record['name']}")
        both = record["forward_backward"]
        name = record["name"] + (f", D {record['d_model']}" if "d_model" in record else "")
        drawn.add_row(
            name,
            f"{record['parameters']:,}",
            f"{1e3 * record['forward']:.2f}",
            f"{1e3 * both:.2f}",
            "" if bare is None else f"{both / bare:.2f}",
        )
    return drawn


def _steps(records: Sequence[Record]) -> Table:
    drawn = _table("training steps, B 16, T 2048", ["model"], ["parameters", "ms", "tokens/s"])
    for record in records:
        drawn.add_row(
            record["name"],
            f"{record['parameters']:,}",
            f"{1e3 * record['seconds']:.1f}",
            f"{record['tokens_per_second']:,.0f}",
        )
    return drawn


def roofline(found: Sequence[Record], conditions: str) -> bytes:
    """A PNG: the least bytes over the time of the kernels alone, by M, beside the speed of a copy; a panel a dtype."""
    from matplotlib.figure import Figure

    scans = [record for record in found if record["part"] == "scan" and "forward" in record]
    dtypes = list(dict.fromkeys(record["dtype"] for record in scans))
    figure = Figure(figsize=(5 * len(dtypes), 4.5), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0], dtypes, strict=True):
        for kind in dict.fromkeys(record["kind"] for record in scans):
            of_kind = [record for record in scans if record["kind"] == kind and record["dtype"] == dtype]
            for i, (part, marker) in enumerate((("forward", "o"), ("backward", "s"))):
                axes.plot(
                    [record["order"] for record in of_kind],
                    [record["bytes"][i] / record[part] / 1e12 for record in of_kind],
                    marker,
                    label=f"{kind}, {part}",
                )
        if (copied := speed(found)) is not None:
            axes.axhline(copied / 1e12, color="black", linewidth=0.8, label="copy")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set(title=dtype, xlabel="M", ylabel="least bytes over time, TB/s")
        axes.legend(fontsize="small")
    figure.suptitle(conditions, fontsize="small")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
