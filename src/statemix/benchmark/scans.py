"""Scans: ours, the published log-depth scan, the loop, peers for M = 1, a copy of the bytes, torch's softmax alone."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from statemix import kernels
from statemix.benchmark.contender import (
    BACKWARD,
    BOTH,
    FORWARD,
    Contender,
    Results,
    Shape,
    UnavailableError,
    Work,
    imported,
    inputs,
)
from statemix.gates import normalize
from statemix.scan import block_scan, companion_scan, observer_scan

SCANS = {"block": block_scan, "companion": companion_scan, "observer": observer_scan}

Diagonal = Callable[[Tensor, Tensor], Tensor]  # h_t = a_t h_{t-1} + b_t from a and b, (B, T, N)


def sizes(shape: Shape) -> list[tuple[int, ...]]:
    """The sizes of raw gates, values, initial state and states."""
    time, rows = (shape.batch, shape.length), (shape.order,) if shape.kind == "block" else ()
    kept = () if shape.kind == "companion" else (shape.order,)
    return [
        (*time, *rows, shape.order + 1, shape.blocks),
        (*time, *rows, shape.blocks),
        (shape.batch, shape.order, shape.blocks),
        (*time, *kept, shape.blocks),
    ]


def scan_work(shape: Shape, scan: Callable[..., Tensor]) -> Work:
    """A scan from raw gates, values and initial state to states; the backward gives the gradients of all three."""
    *leaves, cotangent = inputs(shape, *sizes(shape))
    cotangent.detach_()

    def forward() -> Results:
        with torch.no_grad():
            return (scan(*leaves),)

    def both() -> Results:
        states = scan(*leaves)
        return states, *torch.autograd.grad(states, leaves, cotangent)

    if shape.part != BACKWARD:
        return Work(forward if shape.part == FORWARD else both)
    states = scan(*leaves)
    return Work(lambda: torch.autograd.grad(states, leaves, cotangent, retain_graph=True))


def reference_scan(shape: Shape) -> Work:
    """The scan of the reference, which is a loop."""
    return scan_work(shape, partial(SCANS[shape.kind], backend="reference"))


def own_scan(name: str, backend: str) -> Contender:
    """The scan of this package with a backend."""

    def make(shape: Shape) -> Work:
        problem = kernels.load_problem() or (
            f"M up to {kernels.MAX_ORDER} only" if shape.order > kernels.MAX_ORDER else None
        )
        if backend == "cpu" and problem:
            raise UnavailableError(problem)
        return scan_work(shape, partial(SCANS[shape.kind], backend=backend))

    return Contender(name, make, reference_scan)


def copy(shape: Shape) -> Work:
    """A plain copy that reads and writes as many bytes as the scan must, in buffers that are already there.

    Forward: raw gates and values are read, states written. Backward: raw gates, values, states and their gradient are
    read, the gradients of raw gates and values written.
    """
    gates, values, _, states = map(math.prod, sizes(shape))
    passes = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[shape.part]
    # half of the bytes are read and half written
    source = torch.ones(passes * (gates + values + states) * (2 if shape.dtype == "float64" else 1) // 2)
    target = torch.ones_like(source)
    return Work(lambda: target.copy_(source), note=f"{8 * len(source) / 1e6:.3g} MB")


def softmax(shape: Shape) -> Work:
    """The softmax of the raw gates alone, by torch: what the scan does before it scans."""
    (gates,) = inputs(shape, sizes(shape)[0])
    cotangent = torch.ones_like(gates)

    def forward() -> Results:
        with torch.no_grad():
            return (torch.softmax(gates, dim=-2),)

    def both() -> Results:
        weights = torch.softmax(gates, dim=-2)
        return weights, *torch.autograd.grad(weights, gates, cotangent)

    if shape.part != BACKWARD:
        return Work(forward if shape.part == FORWARD else both)
    weights = torch.softmax(gates, dim=-2)
    return Work(lambda: torch.autograd.grad(weights, gates, cotangent, retain_graph=True))


def _peer(name: str, scan: Callable[[], Diagonal]) -> Contender:
    """A peer's diagonal scan as the block scan of M = 1: with normalised gates, the initial state in b_1."""

    def make(shape: Shape) -> Work:
        if shape.order != 1 or shape.kind != "block":
            raise UnavailableError("block scan of M = 1 only")
        diagonal = scan()

        def states(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> Tensor:
            decay, input_gate = normalize(raw_gates[:, :, 0], "softmax", 2).unbind(2)
            entering = input_gate * values[:, :, 0]
            first = entering[:, :1] + decay[:, :1] * initial_state
            return diagonal(decay, torch.cat([first, entering[:, 1:]], dim=1))[:, :, None]

        return scan_work(shape, states)

    return Contender(name, make, reference_scan)


def _mambapy() -> Diagonal:
    pscan = imported("mambapy.pscan", "pscan")
    return lambda decay, entering: pscan(decay[:, :, None], entering[:, :, None])[:, :, 0]


def _assoc_scan() -> Diagonal:
    scan: Diagonal = imported("assoc_scan", "AssocScan")(use_accelerated=False)
    return scan


SCAN_CONTENDERS = (
    own_scan("cpu", "cpu"),
    own_scan("associative", "associative"),
    own_scan("loop", "reference"),
    Contender("copy", copy),
    Contender("softmax", softmax),
    _peer("mambapy", _mambapy),
    _peer("assoc-scan", _assoc_scan),
)
