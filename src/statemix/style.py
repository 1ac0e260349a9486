"""How every picture looks: its colours, its axes, and the labels at the ends of its lines.

It is at the root, below all rooms that draw: training, report, benchmark and the experiments. Text and axes are drawn
in INK, which a page replaces by the colour of its own text.
"""

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK = "#3a3b3c"
# Okabe and Ito 2008, "Color universal design", without their yellow, which is too faint for a line on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BLUE, VERMILION, PURPLE = COLORS[0], COLORS[1], COLORS[3]
# Of 7 markers and 4 dashes no two series below the 28th have the same pair: they differ in grey, too.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
SMALL = 8  # points: labels in a picture

_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
_STYLE: Any = dict.fromkeys(_INKED, INK) | {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 4.5,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of so many inches in the common style; at the end its numbers are written plainly."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                _write_plainly(axis)
                axis.get_major_ticks()  # ticks take the style of the time at which they are made
                axis.get_minor_ticks()


def render(figure: "Figure", kind: str, dpi: int = 160) -> bytes:
    """A picture as the content of a file of a kind such as "png"; an SVG is transparent, and its text stays text."""
    import matplotlib

    content = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "statemix"}):
        metadata = {"Date": None} if kind == "svg" else None  # the same figures, the same bytes
        figure.savefig(content, format=kind, dpi=dpi, transparent=kind == "svg", metadata=metadata)
    return content.getvalue()


def series(number: int) -> dict[str, Any]:
    """The colour, marker and dashes of the line of that number, from 0 on; every other marker is hollow.

    So where two lines lie on each other, both are seen.
    """
    hollow = {"markerfacecolor": "none"} if number % 2 else {}
    return hollow | {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def plain(number: float) -> str:
    """A number as in a text: 1,000 and 0.0001, not 10^3 and 1e-4."""
    text = f"{number:,.12f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def label_ends(axes: "Axes", lines: Mapping[str, "Line2D"], width: int = 24) -> None:
    """Write the label of each line beside the axes, at the height of the line's last point.

    Labels that would overlap are moved apart, as little as can be; a thin line leads from each to its point. Call it
    when the limits of the axes are settled.

    Args:
        axes: what the lines are in.
        lines: label -> line. Those without a point have no label.
        width: in characters; a longer label is broken into several lines.
    """
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    leader = {"arrowstyle": "-", "linewidth": 0.8, "alpha": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
    texts = []
    for label, line in lines.items():
        xs, ys = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
        points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if not points:
            continue
        _, height = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))
        text = axes.annotate(
            textwrap.fill(label, width),
            points[-1],
            xytext=(1.04, min(max(height, 0.0), 1.0)),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=SMALL,
            parse_math=False,
            annotation_clip=False,
            arrowprops=leader | {"color": line.get_color()},
        )
        texts.append(text)
    figure.draw_without_rendering()  # the height of the axes is known from here on
    texts.sort(key=lambda text: text.get_position()[1])
    # of the text alone: an annotation's own extent has the leader in it
    sizes = [1.2 * Text.get_window_extent(text).height / axes.bbox.height for text in texts]
    places = spread([text.get_position()[1] for text in texts], sizes)
    for text, place in zip(texts, places, strict=True):
        text.set_position((1.04, place))


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Places of labels of these sizes that do not overlap, in [0, 1] if they fit, nearest to those wanted.

    Args:
        wanted: middles, ascending.
        sizes: of each label.

    Returns:
        The middles with the least sum of squared moves: labels that touch share the mean of their moves.
    """
    # with what is below a label taken off, its place need only be no lower than the one before
    half = [size / 2 for size in sizes]
    below = [sum(sizes[:number]) + half[number] for number in range(len(sizes))]
    groups: list[tuple[float, int]] = []  # mean place, number of labels
    for place in (middle - under for middle, under in zip(wanted, below, strict=True)):
        mean, count = place, 1
        while groups and groups[-1][0] > mean:
            other, more = groups.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        groups.append((mean, count))
    room = max(0.0, 1 - sum(sizes))
    starts = itertools.chain.from_iterable([min(max(mean, 0.0), room)] * count for mean, count in groups)
    return [start + under for start, under in zip(starts, below, strict=True)]


def _write_plainly(axis: "Axis") -> None:
    """Write numbers without exponents and offsets; on a short log scale also between the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullFormatter, ScalarFormatter

    if isinstance(axis.get_major_formatter(), ScalarFormatter | LogFormatter):
        axis.set_major_formatter(FuncFormatter(lambda number, _: plain(number)))
        axis.set_minor_formatter(NullFormatter())
    if isinstance(axis.get_major_locator(), LogLocator):
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
