"""A picture of an automaton: a graph of a small one, a table of colours of any other."""

import math
from typing import TYPE_CHECKING

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.style import COLORS, DASHES, INK, SMALL, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRAPH_STATES, GRAPH_ARROWS = 12, 60  # beyond, arrows hide one another


def draw_automaton(automaton: Automaton) -> "Figure":
    """States on a circle with an arrow for each transition, or a table of states by tokens if there are many."""
    states, tokens = automaton.transitions.shape
    arrows = np.count_nonzero(automaton.transitions != NONE)
    if states <= GRAPH_STATES and arrows <= GRAPH_ARROWS:
        with canvas(6.4, 6.6) as figure:
            _graph(figure.subplots(), automaton)
        return figure
    with canvas(2.4 + min(8.0, 0.12 * tokens), 1.6 + min(10.0, 0.08 * states)) as figure:
        axes = figure.subplots()
        shown = np.ma.masked_equal(automaton.transitions, NONE)
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, label="state after")
        axes.set(title=f"{states:,} states", xlabel="token", ylabel="state")
        axes.grid(visible=False)
    return figure


def _graph(axes: "Axes", automaton: Automaton) -> None:
    """Arrows from state to state, each with its token, and what is said at it; what stays is written outside."""
    from matplotlib.patches import FancyArrowPatch

    states = len(automaton.transitions)
    angles = math.pi / 2 - 2 * math.pi * np.arange(states) / states
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    used = np.flatnonzero((automaton.transitions != NONE).any(0)).tolist()
    staying: list[list[str]] = [[] for _ in range(states)]
    drawn: dict[tuple[int, int], int] = {}  # arrows from one state to another
    for before, token in np.argwhere(automaton.transitions != NONE).tolist():
        after, said = int(automaton.transitions[before, token]), automaton.outputs[before, token]
        text = f"{token}" if said == NONE else f"{token}: {said}"
        if before == after:
            staying[before].append(text)
            continue
        number = used.index(token)
        color, dash = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
        rank = drawn[before, after] = drawn.get((before, after), -1) + 1
        bend = 0.14 + 0.12 * rank
        start, end = places[before], places[after]
        arrow = FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            shrinkA=11,
            shrinkB=11,
            color=color,
            linestyle=dash,
        )
        axes.add_patch(arrow)
        corner = (start + end) / 2 + bend * np.array([end[1] - start[1], start[0] - end[0]])  # of the Bezier curve
        where = 0.49 * start + 0.42 * corner + 0.09 * end  # three tenths along it, where few arrows cross
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.annotate(text, where, color=color, fontsize=SMALL, ha="center", va="center", bbox=box)
    for state, place in enumerate(places):
        line = 2.5 if state == automaton.start else 1.0
        box = {"boxstyle": "circle", "facecolor": "white", "edgecolor": INK, "linewidth": line}
        axes.annotate(f"{state}", place, ha="center", va="center", bbox=box)
        if staying[state]:
            axes.annotate("\n".join(["stays", *staying[state]]), 1.22 * place, ha="center", va="center", fontsize=SMALL)
    axes.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
    axes.set_title("token: output; the first state is thick")
    axes.set_axis_off()
