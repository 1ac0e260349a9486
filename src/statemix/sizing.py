"""How large a mixer is, and how wide it may be for a budget of parameters or of state: for fair comparisons.

A mixer is counted on the meta device: nothing is allocated and no random number is drawn.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from statemix.mixers import MIXERS, build_mixer, complete_mixer
from statemix.mixers.base import check_choice, check_sizes
from statemix.specs import Spec

BUDGETS = ("parameters", "state")
MAX_WIDTH = 1 << 16


@dataclass(frozen=True)
class Solution:
    """A mixer of the width that comes nearest to a budget.

    Args:
        spec: of the mixer, with every option: for `build_mixer` and configs.
        parameters: of one mixer, all that is trained.
        state_size: numbers carried per sequence by one mixer.
        off: what the mixer has of the budgeted quantity over the budget, less 1: 0.01 is 1 % above it. Widths are whole
            numbers, so it is rarely 0.
    """

    spec: dict[str, Any]
    parameters: int
    state_size: int
    off: float


def measure(spec: Spec, d_model: int) -> tuple[int, int]:
    """Parameters and state size of the mixer of a spec at width `d_model`. Raises as `build_mixer`."""
    with torch.device("meta"):
        mixer = build_mixer(spec, d_model)
    return sum(p.numel() for p in mixer.parameters()), mixer.state_size


def solve(mixer: str, d_model: int, *, budget: int, what: str = "parameters", **fixed_options: Any) -> Solution:
    """The width of a mixer, its `width_option`, at which its size is nearest to a budget.

    Args:
        mixer: a name in `MIXERS`, or the path of one's own.
        d_model: D, at least 1.
        budget: of one mixer, at least 1.
        what: "parameters" or "state", the quantity that `budget` is of.
        fixed_options: the other options of the mixer, where they are not at their defaults.

    Returns:
        The nearest, and the narrower of two as near. How far it is from the budget is in `off`: look at it.

    Raises:
        TypeError: a size is not an int, or the mixer rejects an option's type.
        ValueError: a name is unknown, the width is among the options, another option is wrong or missing, or even the
            narrowest mixer has more than twice the budget.
    """
    solution = _nearest(mixer, d_model, budget, what, fixed_options)
    if solution.off > 1:
        least = round((1 + solution.off) * budget)
        raise ValueError(
            f"solve: `budget` is too low: the narrowest {mixer!r} has {least} {what} at d_model={d_model}, more than "
            f"twice the budget of {budget}. Raise it or change the other options."
        )
    return solution


def table(d_model: int, budget: int, what: str = "parameters") -> list[Solution]:
    """The nearest of every mixer, in the order of `MIXERS`, with its `table_options` and defaults.

    Unlike `solve` it also lists a mixer which no width brings near the budget, at its narrowest: `off` says so.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `what` is unknown.
    """
    return [_nearest(name, d_model, budget, what, mixer.table_options) for name, mixer in MIXERS.items()]


def _nearest(mixer: str, d_model: int, budget: int, what: str, fixed_options: Mapping[str, Any]) -> Solution:
    check_sizes("solve", d_model=d_model, budget=budget)
    check_choice("solve", "what", what, BUDGETS)
    knob = getattr(MIXERS[mixer], "width_option", None)
    if knob is None:
        raise ValueError(f"solve: {mixer!r} must say in `width_option` which of its options makes it wider.")
    if knob in fixed_options:
        raise ValueError(f"solve: `{knob}` is what is solved for in {mixer!r}, got {knob}={fixed_options[knob]!r}.")
    options = complete_mixer({"name": mixer, knob: 1} | dict(fixed_options))
    step = MIXERS[mixer].width_step(options)

    def size(number: int) -> int:
        return measure(options | {knob: number * step}, d_model)[BUDGETS.index(what)]

    numbers = range(1, MAX_WIDTH + 1)
    above = bisect.bisect_left(numbers, budget, key=size)  # sizes grow with the width
    number = min(numbers[max(0, above - 1) : above + 1], key=lambda number: abs(size(number) - budget))
    spec = options | {knob: number * step}
    parameters, state_size = measure(spec, d_model)
    return Solution(spec, parameters, state_size, off=size(number) / budget - 1)
