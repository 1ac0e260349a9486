"""`statemix bench gpu --host`: what a scan costs in Python, all but the launch of its kernels. No card is needed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from statemix.benchmark.contender import Shape
from statemix.benchmark.gpu.card import leaves
from statemix.benchmark.scans import SCANS
from statemix.scan import gpu
from statemix.scan.gpu import compile, plan
from statemix.scan.gpu.compile import Kernel, Size

CALLS, ROUNDS = 50, 100
BATCH, LENGTH, BLOCKS, ORDER = 1, 2, 8, 16


# the calls of NVIDIA's driver that a launch makes; nothing comes of them
NO_DRIVER = SimpleNamespace(
    cuCtxPushCurrent=lambda context: (0,),
    cuLaunchKernel=lambda *arguments: (0,),
    cuCtxPopCurrent=lambda: (0, None),
)


@contextmanager
def without_a_card() -> Iterator[None]:
    """Tensors of the CPU stand for a card's, and a launch does nothing."""

    def load(kernel: Kernel, device: torch.device) -> tuple[Callable[[bytes, int], None], Size]:
        size = Size(threads=32, blocks=32, shared_bytes=0)
        return compile.launcher(NO_DRIVER, lambda *_: None, None, None, size, lambda: 0), size

    with (
        mock.patch.object(compile, "EMULATED", True),
        mock.patch.object(compile, "load", load),
        mock.patch.object(plan, "schedulers", return_value=528),
    ):
        gpu._plan.cache_clear()
        try:
            yield
        finally:
            gpu._plan.cache_clear()


def microseconds(
    kind: str, rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Of a call forward, in training, and of one backward: the fastest round counts, others were interrupted."""
    inputs = leaves(Shape(ORDER, BLOCKS, BATCH, LENGTH, kind=kind), "cpu")
    states, _ = gpu.scan_blocks(*inputs, None, "softmax", kind, ORDER)
    gradient, node = torch.ones_like(states), states.grad_fn

    def seconds(call: Callable[[], object]) -> float:
        began = clock()
        for _ in range(CALLS):
            call()
        return (clock() - began) / CALLS

    def backward() -> object:
        return gpu._derivative(node, gradient, None)  # as the engine calls it, which is C++

    forward_seconds = min(
        seconds(lambda: gpu.scan_blocks(*inputs, None, "softmax", kind, ORDER)) for _ in range(rounds)
    )
    with torch.no_grad():
        backward_seconds = min(seconds(backward) for _ in range(rounds))
    return 1e6 * forward_seconds, 1e6 * backward_seconds


def lines() -> Iterator[str]:
    """One for each scan: `block forward 21.3 us backward 24.0 us`."""
    with without_a_card():
        for kind in SCANS:
            forward, backward = microseconds(kind)
            yield f"{kind} forward {forward:.1f} us backward {backward:.1f} us"
