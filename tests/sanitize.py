"""Every kernel of a library built with sanitizers, on the shapes where an index goes wrong, against the loop.

`make sanitize` builds that library and runs this. It writes nothing: a sanitizer says what it found and stops.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import LAYOUTS, SCANS, TOLERANCE, make_problem, relative_error
from kernel_helpers import (
    GATED_SHAPES,
    READOUTS,
    SHIFTED,
    STEPPED,
    assert_readout,
    assert_step,
    gated_by_torch,
    make_layer_problem,
    make_pair,
    make_readout,
)
from torch import Tensor

from statemix import kernels
from statemix.gates import NORMALIZATIONS
from statemix.kernels import library

ORDERS = (*range(1, 17), 17, 33)  # the last two have no kernels of their own
BLOCKS = (1, 3, 15, 16, 17, 33)
# Every few problems are of several chunks of time: a chunk is 128 steps or less, and 24 to 240 in a layer. Where T is
# long the normalisation is one that keeps states bounded.
LENGTHS = (1, 2, 9, 300, 65)
BATCHES = (1, 2, 3)
WIDTHS = (1, 5, 16, 40)
ARRANGEMENTS = tuple((LAYOUTS | SHIFTED).values())


def run(orders: Sequence[int] = ORDERS, blocks: Sequence[int] = BLOCKS) -> None:
    """Scans and layers of these sizes, steps, logits and SwiGLUs by the library that is loaded."""
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)  # with it, torch.empty is filled with NaN
    generator = torch.Generator().manual_seed(0)
    # every option turns at its own pace, so that each meets each of the others
    for (kind, order, count), length, batch, normalization, with_state, with_reset, arrange, width in zip(
        itertools.product(SCANS, orders, blocks),
        itertools.cycle(LENGTHS),
        itertools.cycle(BATCHES),
        itertools.cycle(NORMALIZATIONS),
        itertools.cycle((True, False)),
        itertools.cycle((True, True, False, False)),
        itertools.cycle(ARRANGEMENTS),
        itertools.cycle(WIDTHS),
        strict=False,
    ):
        is_costly = (length == 300 and order > 4) or (length == 65 and order < 8)
        options = {
            "order": order,
            "blocks": count,
            "length": 9 if is_costly else length,
            "batch": batch,
            "normalization": "softmax" if normalization == "none" and length > 9 else normalization,
            "with_state": with_state,
            "with_reset": with_reset,
        }
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            run_scan(make_problem(generator, kind, dtype=dtype, **options), arrange)
        for dtype in (torch.float32, torch.float64):
            options |= {"with_visibility": dtype == torch.float64, "table_rows": (order + count) % 3}
            run_layer(make_layer_problem(generator, kind, width=width, dtype=dtype, **options), arrange)
    for instruction_set, dtype in itertools.product(kernels.instruction_sets(), (torch.float32, torch.float64)):
        kernels.use_instruction_set(instruction_set)
        run_pairs(dtype)
        run_readouts(dtype)
        run_gated(dtype)


def assert_near(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Softer than the tests: where gates are slow and T is long, the loop itself is off by more than they allow."""
    for what, actual in results.items():
        error, limit = relative_error(actual, expected[what]), min(100 * TOLERANCE[actual.dtype], 0.04)
        assert error <= limit, f"{what}: relative error {error:.3g} is above {limit:.3g} for {actual.dtype}"


def run_scan(problem, arrange) -> None:
    expected, problem = problem.to(torch.float64).results("reference"), problem.map(arrange)
    for instruction_set in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        assert_near(problem.results("cpu"), expected)


def run_layer(problem, arrange) -> None:
    expected, laid_out = problem.expected(), problem.map(lambda x: arrange(x) if x.ndim > 1 else x)
    x = problem.inputs["x"] if problem.places is None else problem.inputs["x"][problem.places]
    first = problem.inputs | {"x": x[:, :1]}
    first = dataclasses.replace(problem, inputs=first, reset=None, visibility=None, places=None)
    (y, _), (x, weights, state) = first.by_the_mixer(first.map(Tensor.double).inputs), first.split(first.inputs)
    state = x.new_zeros(len(x), *problem.mixer.state_shape) if state is None else state
    for instruction_set in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        for recompute in (False, True):
            assert_near(laid_out.results(laid_out.fused, recompute), expected)
        mixer = problem.mixer
        step = kernels.LayerStep(weights, mixer.state_shape, mixer.normalization, mixer.kind)
        stepped, _ = step(x[:, 0], state)
        assert_near({"y": stepped}, {"y": y[:, 0]})


def run_pairs(dtype: torch.dtype) -> None:
    """Steps of a whole residual pair; the last is large enough for two threads."""
    cases = ((1, 1), (5, 3), (16, 40), (33, 17), (96, 500))
    for mixer, (width, mlp_size) in itertools.product(STEPPED.values(), cases):
        pair = make_pair(mixer, width, mlp_size).to(dtype)
        for batch in (1, 2, 7):  # rows meet a weight three or six at a time
            assert_step(pair, torch.randn(batch, width, dtype=dtype), None)


def run_readouts(dtype: torch.dtype) -> None:
    """The logits of a model; the last are enough for two threads."""
    for batch, width, count in (*READOUTS, (7, 33, 65), (2, 512, 1001)):
        assert_readout(torch.randn(batch, width, dtype=dtype), *make_readout(width, count, dtype))


def run_gated(dtype: torch.dtype) -> None:
    """The product of a SwiGLU and its gradient."""
    for rows, size in GATED_SHAPES:
        x, cotangent = torch.randn(rows, 2 * size, dtype=dtype), torch.randn(rows, size, dtype=dtype)
        y, gradient = gated_by_torch(x, cotangent)
        made = kernels.gated(x.requires_grad_())
        (made_gradient,) = torch.autograd.grad(made, x, cotangent)
        assert_near({"y": made.detach(), "x": made_gradient}, {"y": y, "x": gradient})


def main() -> None:
    library._loaded = library.Library(Path(sys.argv[1]))
    run()


if __name__ == "__main__":
    main()
