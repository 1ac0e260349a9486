"""How sure a mean over seeds is."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """Mean of n numbers, and the half width of its 95 % interval: None of a single number."""

    mean: float
    half_width: float | None
    n: int


def interval(numbers: Sequence[float]) -> Interval:
    """Mean and Student's t interval at 95 %: mean +- t(0.975, n - 1) s / sqrt(n)."""
    n = len(numbers)
    mean = sum(numbers) / n
    if n == 1:
        return Interval(mean, None, n)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (n - 1))
    return Interval(mean, t_quantile(n - 1) * deviation / math.sqrt(n), n)


def bounds(numbers: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean; of one or two numbers the least and the most.

    With two numbers t is 12.7: so wide an interval says nothing, and leaves the range of what is measured.
    """
    if len(numbers) < 3:
        return min(numbers), max(numbers)
    mean, half_width, _ = interval(numbers)
    assert half_width is not None
    return mean - half_width, mean + half_width


def t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = 0.95 for Student's distribution with so many degrees of freedom, by bisection."""
    low, high = 0.0, 13.0  # 12.706 at 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_probability(t: float, freedom: int) -> float:
    """P(|T| <= t). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
