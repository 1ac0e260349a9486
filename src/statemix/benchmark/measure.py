"""Interleaved timing, statistics, the check against the reference, and the settings that the numbers hold for."""

import dataclasses
import datetime
import itertools
import math
import os
import platform
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statemix import kernels
from statemix.benchmark.contender import Contender, Shape, UnavailableError, Work

ROUNDS, SLOW_ROUNDS = 5, 3  # at least; and of a contender whose one call takes more than a fifth of the time
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 5e-2}  # relative to the largest entry of a result

Samples = dict[str, list[float]]  # contender -> a number a round, from round 0 on


@dataclass(frozen=True)
class Comparison:
    """A table: contenders on one shape, and those that ratios are to.

    panel: its part of the plot. checked: held to their reference first; None: the contenders.
    """

    panel: str
    shape: Shape
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...]
    checked: tuple[Contender, ...] | None = None

    def only(self, names: Sequence[str]) -> "Comparison":
        """The table with these contenders and the baselines."""
        return replace(self, contenders=tuple(c for c in self.contenders if c.name in (*names, *self.baselines)))


def measured(group: Comparison, sample: Callable[[Mapping[str, Work]], Samples], unit: str, of: str) -> dict[str, Any]:
    """Check and measure a table, and return it as it is kept in the JSON file.

    Args:
        group: what to measure.
        sample: the raw numbers of the works that could be made.
        unit: of the numbers, "s" or "B".
        of: what the ratios are of, see `summarize`.

    Raises:
        RuntimeError: a contender disagrees with the reference.
    """
    for contender in group.contenders if group.checked is None else group.checked:
        check_agreement(contender, group.shape)
    works, reasons = {}, {}
    for contender in group.contenders:
        try:
            works[contender.name] = contender.make(group.shape)
        except UnavailableError as error:
            reasons[contender.name] = str(error)
    samples = sample(works)
    summary = summarize(samples, group.baselines, of)
    rows: list[dict[str, Any]] = []
    for name in (c.name for c in group.contenders):
        if name in reasons:
            rows.append({"name": name, "unavailable": reasons[name]})
        else:
            slow = "slow: fewer rounds" if unit == "s" and len(samples[name]) < ROUNDS else ""
            note = "; ".join(filter(None, (works[name].note, slow)))
            rows.append({"name": name, **summary[name], "note": note, "samples": samples[name]})
    return {
        "panel": group.panel,
        "size": group.shape.size,
        "shape": dataclasses.asdict(group.shape),
        "unit": unit,
        "ratio": of,
        "baselines": group.baselines,
        "contenders": rows,
    }


def check_agreement(contender: Contender, shape: Shape) -> None:
    """Raise RuntimeError unless the results are those of the reference on the small version of the shape."""
    if contender.reference is None:
        return
    small = shape.small()
    try:
        results = contender.make(small).call()
    except UnavailableError:
        return
    expected = contender.reference(replace(small, dtype="float64")).call()
    error = max(relative_error(*pair) for pair in zip(results, expected, strict=True))
    if error > TOLERANCE[shape.dtype]:
        raise RuntimeError(
            f"bench: {contender.name!r} disagrees with the float64 loop on {small}: its largest relative error is "
            f"{error:.3g}, above {TOLERANCE[shape.dtype]:g}."
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of `expected`; infinite if there is a NaN or a shape is wrong."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.detach().double() - expected.detach()).abs().max().item()
    error = difference / (expected.detach().abs().max().item() or 1.0)
    return math.inf if math.isnan(error) else error


def interleave(works: Mapping[str, Work], seconds: float) -> Samples:
    """Seconds per unit of every work, a sample a round. Two untimed rounds first; a slow one has a single one.

    The time of slow works, those whose one call takes more than a fifth of `seconds`, does not count.
    """
    slow = {name for name, work in works.items() if _seconds(work) > seconds / 5}
    for name, work in works.items():
        if name not in slow:
            _seconds(work)
    samples: Samples = {name: [] for name in works}
    order, spent = deque(works), 0.0
    for number in itertools.count():
        due = [name for name in order if name not in slow or number < SLOW_ROUNDS]
        if not due or (number >= ROUNDS and spent >= seconds):
            break
        for name in due:
            elapsed = _seconds(works[name])
            samples[name].append(elapsed / works[name].per)
            spent += 0 if name in slow else elapsed
        order.rotate(-1)
    return samples


def _seconds(work: Work) -> float:
    if work.before is not None:
        work.before()
    begin = perf_counter()
    work.call()
    return perf_counter() - begin


def summarize(
    samples: Mapping[str, Sequence[float]], baselines: Sequence[str], of: str = "time"
) -> dict[str, dict[str, Any]]:
    """Median, spread and ratios of every contender.

    Args:
        samples: name -> a number a round, from round 0 on.
        baselines: names; those without samples are left out.
        of: "speed": baseline / contender. Anything else: contender / baseline.

    Returns:
        name -> median; spread, the interquartile range over the median; ratios: baseline -> ratio of medians and
        quartiles of the ratios, over the rounds that both have.
    """
    summary = {}
    for name, own in samples.items():
        ratios = {}
        for baseline in baselines:
            if theirs := samples.get(baseline):
                rounds = min(len(own), len(theirs))  # a slow one has fewer
                above, below = np.array([own[:rounds], theirs[:rounds]])[:: -1 if of == "speed" else 1]
                low, _, high = _quartiles(above / below)
                ratios[baseline] = [_quartiles(above)[1] / _quartiles(below)[1], low, high]
        low, median, high = _quartiles(own)
        summary[name] = {"median": median, "spread": (high - low) / median, "ratios": ratios}
    return summary


def _quartiles(numbers: Sequence[float] | np.ndarray[Any, Any]) -> list[float]:
    quartiles: list[float] = np.percentile(numbers, (25, 50, 75)).tolist()
    return quartiles


@contextmanager
def settings(threads: int, instruction_set: str | None) -> Iterator[None]:
    """Threads and instruction set of this process inside the block, and those from before after it."""
    before = torch.get_num_threads(), None if kernels.load_problem() else kernels.instruction_set()
    try:
        if instruction_set is not None:
            kernels.use_instruction_set(instruction_set)
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before[0])
        if before[1] is not None:
            kernels.use_instruction_set(before[1])


def machine(threads: int) -> dict[str, Any]:
    """What the numbers hold for."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "instruction_set": "torch" if kernels.load_problem() else kernels.instruction_set(),
        "threads": threads,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
