"""Pictures of what a layer does with each token of a group: the group in its blocks, spectra, sharpness, states.

They are drawn from the transitions (X, N, M, M) of X tokens in N blocks; a `Group` says what the tokens stand for.
Weights are transparent at zero, so that a page shows its own colour there.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from statemix.analysis import (
    MAX_SUBSETS,
    Representation,
    Table,
    conjugacy_classes,
    discriminants,
    distance_to_permutation,
    eigenvalues,
    gate_entropy,
    half_life,
    leak,
    relabel,
    representation,
)
from statemix.style import BLUE, COLORS, INK, PURPLE, SMALL, VERMILION, canvas, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches: there is more in them than in those of figures.py
FAITHFUL, QUOTIENT, OTHER = BLUE, VERMILION, INK  # blocks that act as the group, as a quotient of it, as neither
MARKERS, HATCHES = {FAITHFUL: "o", QUOTIENT: "s", OTHER: "."}, {FAITHFUL: "", QUOTIENT: "////", OTHER: ""}
POSITIVE, NEGATIVE = INK, PURPLE  # weights
MAX_ROWS, MAX_COLUMNS = 15, 8  # tokens and blocks in the picture of the group
PITCH = 1.3  # from one small map to the next, in their own size
FAINT = 0.02  # weights below are not drawn
NEAR = 0.5  # how near a token's rows must be to a permutation to be taken for it: another one is 2 away
NONE, TRIVIAL = "no group", "identity"


class Group(NamedTuple):
    """What the X tokens of a model stand for.

    name: "S3". table: (G, G), a o b. elements: (X,) of each token. labels: (X,) what it is called, "(0 1)". action:
    (X, n), where the token takes each of n points; None if it is not known as permutations.
    """

    name: str
    table: Table
    elements: tuple[int, ...]
    labels: tuple[str, ...]
    action: Table | None

    @property
    def classes(self) -> list[list[int]]:
        """Tokens by conjugacy class, in the order of the classes."""
        members = [set(each) for each in conjugacy_classes(self.table)]
        tokens = [[x for x, element in enumerate(self.elements) if element in each] for each in members]
        return [each for each in tokens if each]


class Block(NamedTuple):
    """What a block acts as, and how it is drawn.

    found: what it represents, if anything. verdict: that in a word or two. components: in the order of the points that
    they play. right: (X,) whether the token's rows are near the permutation that is the token's own, or that stands for
    it in a quotient.
    """

    number: int
    found: Representation | None
    verdict: str
    components: tuple[int, ...]
    right: tuple[bool, ...]

    @property
    def color(self) -> str:
        """The colour says what the block represents: FAITHFUL, QUOTIENT, or OTHER where it is nothing."""
        if self.verdict in (NONE, TRIVIAL):
            return OTHER
        assert self.found is not None
        return FAITHFUL if self.found.composition.faithful else QUOTIENT

    @property
    def head(self) -> str:
        """The head names the block and what it acts as or, if that is no group, how many of the tokens it has right."""
        tokens = f"{sum(self.right)}/{len(self.right)}" if self.verdict == NONE else self.verdict
        return f"block {self.number}\n{tokens}"


def figures(
    transition: Tensor, input_gate: Tensor, group: Group, states: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[str, "Figure"]:
    """Every picture, by name.

    Args:
        transition, input_gate: of the tokens, (X, N, M, M) and (X, N, M).
        group: what they stand for.
        states: number of tokens read -> states (B, M, N) after them, and the products (B,) of the tokens.
    """
    blocks = read_blocks(transition, group)
    return {
        "group": group_picture(transition, group, blocks),
        "spectra": spectra(transition, group, blocks),
        "sharpness": sharpness(transition, input_gate, group, blocks),
        "states": trajectories(states, group, blocks),
    }


def read_blocks(transition: Tensor, group: Group) -> list[Block]:
    """What each block of (X, N, M, M) represents: first those that tell most elements apart, the sharpest of them."""
    order = transition.shape[-1]
    blocks = []
    for number, matrices in enumerate(transition.unbind(1)):
        found = representation(matrices, group.table, group.elements, within=NEAR)
        name = NONE if found is None else verdict(found, group)
        components: tuple[int, ...] = found.components if found else ()
        right = (name not in (NONE, TRIVIAL),) * len(matrices)
        faithful = name == NONE or (found is not None and found.composition.faithful)
        if faithful and group.action is not None and group.action.shape[1] <= order <= MAX_SUBSETS:
            components = relabel(matrices, group.action)
            wanted = torch.eye(order, dtype=matrices.dtype)[list(components)][torch.as_tensor(group.action)]
            right = tuple((torch.linalg.matrix_norm(matrices[:, list(components)] - wanted) < NEAR).tolist())
        rest = tuple(i for i in range(order) if i not in components)
        blocks.append(Block(number, found, name, components + rest, right))
    distance = distance_to_permutation(transition, signed=True).mean(0).tolist()

    def rank(block: Block) -> tuple[int, float]:
        if block.found is None:
            return 0, distance[block.number]
        return -block.found.composition.image_order, float(block.found.distance.mean())

    return sorted(blocks, key=rank)


def verdict(found: Representation, group: Group) -> str:
    """What the matrices of a representation are: "S3", "its sign", "Z2", "order 4", "identity"."""
    images, size = found.composition.images, found.composition.image_order
    if size == 1:
        return TRIVIAL
    if found.composition.faithful and len(images) == len(group.table):
        return group.name
    if size == 2 and group.name.startswith("S"):
        return "its sign"
    if _is_cyclic(images.values(), size):
        return f"Z{size}"
    return "S3" if size == 6 else f"order {size}"  # there are two groups of order 6


def _is_cyclic(images: Iterable[Tensor], size: int) -> bool:
    """Whether one of the matrices has as many powers as there are matrices."""
    for image in images:
        power, count = image, 1
        while not torch.equal(power, torch.eye(len(image), dtype=image.dtype)):
            power, count = power @ image, count + 1
        if count == size:
            return True
    return False


def group_picture(transition: Tensor, group: Group, blocks: Sequence[Block]) -> "Figure":
    """Rows of tokens by conjugacy class, columns of blocks, in each the block's A as a map: rows down, columns right.

    The components are in the order of the points that they play. A frame is around the maps that are right.
    """
    order, drawn = transition.shape[-1], _choice(blocks)
    pitch = order * PITCH
    rows, depth = _rows(group, pitch, order * 0.5)
    first = 0 if group.action is None else 1  # the column of what the maps should be
    width = (len(drawn) + first) * pitch
    margin = 0.15 + 0.07 * max(len(group.labels[token]) for token, _ in rows)  # inches, for the labels
    scale = min((WIDTH - margin - 0.1) / width, 0.5 / order)  # inches of a component
    title, note = textwrap.fill(_title(group, blocks), 62), textwrap.fill(_note(group, drawn, len(rows)), 84)
    head, foot = 0.38 / scale, (0.13 + 0.12 * (1 + note.count("\n"))) / scale
    with canvas(WIDTH, 0.35 + 0.16 * title.count("\n") + scale * (depth + head + foot)) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        axes.set(xlim=(-margin / scale, width), ylim=(depth + foot, -head), aspect="equal", anchor="W")
        for token, y in rows:
            axes.text(-0.08 / scale, y + order / 2, group.labels[token], ha="right", va="center", fontsize=SMALL)
        if group.action is not None:
            points = group.action.shape[1]
            _write_head(axes, points / 2, "the\ngroup", INK)
            for token, y in rows:
                _map(axes, 0, y, torch.eye(points)[list(group.action[token])])
                _frame(axes, 0, y, points, None)
        for column, block in enumerate(drawn, start=first):
            x, chosen = column * pitch, list(block.components)
            _write_head(axes, x + order / 2, block.head, block.color)
            size = len(block.found.components) if block.found else order
            for token, y in rows:
                _map(axes, x, y, transition[token, block.number][chosen][:, chosen])
                _frame(axes, x, y, order, None)
                if block.right[token]:
                    _frame(axes, x, y, size, block.color)
        axes.text(-margin / scale, depth + 0.05 / scale, note, va="top", fontsize=7)
        axes.set_axis_off()
        for text in axes.texts:
            text.set_in_layout(False)  # the limits have room for them
    return figure


def _rows(group: Group, pitch: float, gap: float) -> tuple[list[tuple[int, float]], float]:
    """The tokens to be drawn with the place of each, by class with a gap between classes; and where they end."""
    classes = group.classes
    apart = gap if len(classes) < len(group.labels) else 0.0
    share = max(1, MAX_ROWS // len(classes)) if len(group.labels) > MAX_ROWS else MAX_ROWS
    rows, depth = [], -apart
    for members in classes[:MAX_ROWS]:
        depth += apart
        for token in members[:share]:
            rows.append((token, depth))
            depth += pitch
    return rows, depth


def _title(group: Group, blocks: Sequence[Block]) -> str:
    """How many blocks act as what: "S3 in 4 blocks: 1 act as S3, 3 as no group"."""
    verdicts = [block.verdict for block in blocks]
    counts = [f"{verdicts.count(name)} as {name}" for name in dict.fromkeys(verdicts)]
    return f"{group.name} in {len(blocks)} blocks: {', '.join(counts).replace(' as', ' act as', 1)}"


def _note(group: Group, drawn: Sequence[Block], rows: int) -> str:
    """What the frames mean, and the numbers over blocks that act as no group."""
    note = "Framed: near the permutation that its token must have in the block."
    if rows < len(group.labels):
        note = f"{rows} of {len(group.labels)} tokens. {note}"
    if any(block.verdict == NONE for block in drawn):
        note += " Where a number is over a block, it acts as no group, and is near for so many tokens."
    return note


def _choice(blocks: Sequence[Block]) -> list[Block]:
    """The blocks to be drawn are the first of every verdict, then the second, and so on, in the order they came."""
    names = [block.verdict for block in blocks]
    turn = [names[:place].count(name) for place, name in enumerate(names)]
    chosen = sorted(range(len(blocks)), key=lambda place: (turn[place], place))[:MAX_COLUMNS]
    return [blocks[place] for place in sorted(chosen)]


def _write_head(axes: "Axes", x: float, text: str, color: str) -> None:
    offset: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points"}
    axes.annotate(text, (x, 0), color=color, ha="center", va="bottom", fontsize=7, **offset)


def _map(axes: "Axes", x: float, y: float, matrix: Tensor) -> None:
    """Draw the weights of a matrix as squares: the larger, the more opaque, and negative ones in another colour."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    cells, colors = [], []
    for i, row in enumerate(matrix.tolist()):
        for j, weight in enumerate(row):
            if abs(weight) >= FAINT:
                cells.append(Rectangle((x + j, y + i), 1, 1))
                colors.append(to_rgba(POSITIVE if weight > 0 else NEGATIVE, min(abs(weight), 1)))
    axes.add_collection(PatchCollection(cells, facecolor=colors, linewidth=0), autolim=False)


def _frame(axes: "Axes", x: float, y: float, size: int, color: str | None) -> None:
    """Draw a frame around a map; it is thin where it has no colour."""
    from matplotlib.patches import Rectangle

    line, alpha = (0.4, 0.5) if color is None else (1.3, 1.0)
    edge = color or INK
    axes.add_patch(Rectangle((x, y), size, size, facecolor="none", edgecolor=edge, linewidth=line, alpha=alpha))


def spectra(transition: Tensor, group: Group, blocks: Sequence[Block]) -> "Figure":
    """Eigenvalues of all blocks in the complex plane, a unit circle for each conjugacy class of tokens."""
    from matplotlib.lines import Line2D

    classes = group.classes
    columns = min(len(classes), 4)
    lines, width = math.ceil(len(classes) / columns), 2.5 * max(columns, 3)
    with canvas(WIDTH, 0.65 + 2.8 * lines * WIDTH / width) as figure:
        axes = figure.subplots()
        axes.set_title("eigenvalues of A, by class of token")
        for number, members in enumerate(classes):
            x, y = 2.5 * (number % columns), -2.8 * (number // columns)
            _circle(axes, x, y)
            more = f" and {len(members) - 1} like it" if len(members) > 1 else ""
            axes.text(x, y - 1.1, group.labels[members[0]] + more, ha="center", va="top", fontsize=SMALL)
            for block in reversed(blocks):
                values = eigenvalues(transition[members, block.number]).flatten()
                style: dict[str, Any] = {"marker": MARKERS[block.color], "alpha": 0.3 if block.color == OTHER else 0.8}
                axes.scatter(values.real + x, values.imag + y, s=20, color=block.color, linewidths=0, **style)
        axes.set(xlim=(-1.15, width - 1.35), ylim=(-2.8 * lines + 1.35, 1.1), aspect="equal")
        axes.set_axis_off()
        _add_legend(
            figure,
            [
                Line2D([], [], color=color, marker=MARKERS[color], linestyle="", label=name)
                for color, name in _names(group, blocks).items()
            ],
        )
    return figure


def _circle(axes: "Axes", x: float, y: float) -> None:
    """Draw the unit circle around a point, with its axes."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), 1, facecolor="none", edgecolor=INK, linewidth=0.8, alpha=0.6))
    axes.plot([x - 1, x + 1], [y, y], color=INK, linewidth=0.4, alpha=0.4)
    axes.plot([x, x], [y - 1, y + 1], color=INK, linewidth=0.4, alpha=0.4)


def _names(group: Group, blocks: Sequence[Block]) -> dict[str, str]:
    """What the colours mean that the blocks have."""
    names = {FAITHFUL: f"blocks that act as {group.name}", QUOTIENT: "as a quotient of it", OTHER: "other blocks"}
    there = {block.color for block in blocks}
    return {color: name for color, name in names.items() if color in there}


def _add_legend(figure: "Figure", handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=SMALL)


def sharpness(transition: Tensor, input_gate: Tensor, group: Group, blocks: Sequence[Block]) -> "Figure":
    """Histograms over tokens and blocks: how near to a permutation, how much leaks, how even, how long a state lasts.

    The distance of a block that represents something is that of the components which do.
    """
    from matplotlib.patches import Patch

    distance = distance_to_permutation(transition, signed=True)
    for block in blocks:
        if block.found is not None:
            distance[:, block.number] = block.found.distance
    panels = {
        "distance to a permutation": (distance, None),
        "entropy of a row (nats)": (gate_entropy(torch.cat([transition, input_gate[..., None]], dim=-1)), None),
        "leak of a row (at least 0.000001)": (leak(transition).clamp_min(1e-6), (-6, 0, 3)),
        "half-life (steps, at most a million)": (half_life(transition).clamp(1e-1, 1e6), (-1, 6, 2)),
    }
    names = _names(group, blocks)
    numbers = {color: [b.number for b in blocks if b.color == color] for color in names}
    with canvas(WIDTH, 3.6) as figure:
        figure.suptitle(f"{transition.shape[0]} tokens in {transition.shape[1]} blocks", x=0.01, ha="left", fontsize=10)
        for (name, (values, decades)), panel in zip(panels.items(), figure.subplots(2, 2).flat, strict=True):
            if decades is None:
                edges = torch.linspace(0, max(float(values.max()), 1e-9), 25, dtype=torch.float64)
                panel.locator_params(axis="x", nbins=3)
            else:
                first, last, step = decades
                edges = torch.logspace(first, last, 25, dtype=torch.float64)
                panel.set_xscale("log")
                marks = [10.0**decade for decade in range(first, last + 1, step)]
                panel.set_xticks(marks, map(plain, marks))
                panel.minorticks_off()
            parts = [values[:, chosen].flatten().tolist() for chosen in numbers.values()]
            _, _, bars = panel.hist(
                parts, edges.tolist(), stacked=True, color=list(numbers), edgecolor="white", linewidth=0
            )
            for drawn, color in zip(bars if len(parts) > 1 else [bars], numbers, strict=True):
                for bar in drawn:
                    bar.set_hatch(HATCHES[color])
            panel.set(xlabel=name, yticks=[])
            panel.spines["left"].set_visible(False)
        _add_legend(
            figure,
            [
                Patch(facecolor=color, edgecolor="white", linewidth=0, hatch=HATCHES[color], label=name)
                for color, name in names.items()
            ],
        )
    return figure


def trajectories(states: Mapping[int, tuple[Tensor, Tensor]], group: Group, blocks: Sequence[Block]) -> "Figure":
    """States after words of several lengths, a colour for each product: of the first block, and of all together.

    In the plane where, at the middle length, products are farthest apart next to their spread; the axes are the same
    for all lengths. The share is of states whose nearest mean, in all such directions, is that of their own product.
    Directions and means are of the first half of the words, shares of the second.
    """
    lengths = list(states)
    views = {f"block {blocks[0].number}": [blocks[0].number], "all blocks": [block.number for block in blocks]}
    with canvas(WIDTH, 3.9) as figure:
        figure.suptitle("states, a colour for each product of the tokens read", x=0.01, ha="left", fontsize=10)
        panels = iter(figure.subplots(len(views), len(lengths), squeeze=False).flat)
        for view, numbers in views.items():
            flat = {length: state[:, :, numbers].flatten(1).double() for length, (state, _) in states.items()}
            middle = lengths[len(lengths) // 2]
            half = len(flat[middle]) // 2
            directions = discriminants(flat[middle][:half], states[middle][1][:half])
            for length in lengths:
                panel, products = next(panels), states[length][1]
                seen = flat[length] @ directions
                share = _nearest(seen, products, half)
                points = torch.nn.functional.pad(seen, (0, max(0, 2 - seen.shape[1])))[half : half + 400]
                colors = [COLORS[int(product) % len(COLORS)] for product in products[half : half + 400]]
                panel.scatter(points[:, 0], points[:, 1], s=7, c=colors, linewidths=0, alpha=0.7)
                panel.set_title(f"{view}, {length} tokens: {share:.0%}", fontsize=SMALL)
                panel.set_xticks([])
                panel.set_yticks([])
    return figure


def _nearest(points: Tensor, labels: Tensor, half: int) -> float:
    """Share of the second half of the points that are nearest to the mean of their own label in the first half."""
    kinds, index = labels[:half].unique(return_inverse=True)
    means = torch.stack([points[:half][index == kind].mean(0) for kind in range(len(kinds))])
    return float((kinds[torch.cdist(points[half:], means).argmin(1)] == labels[half:]).double().mean())
