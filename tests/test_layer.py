"""The fused layer of kernels/layers.py and csrc/layer.h, against torch's products around the float64 loop."""

import dataclasses
import functools
import itertools
import sys
import threading

import pytest
import torch
from helpers import LAYOUTS, assert_close, each_instruction_set, each_kind, needs_kernels, relative_error
from kernel_helpers import SHIFTED, WEIGHTS, LayerCase, LayerProblem, make_layer_problem
from torch import Tensor

from statemix import block_scan, kernels
from statemix.kernels import layers, library

pytestmark = needs_kernels


def assert_results(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for what, actual in results.items():
        assert_close(actual, expected[what], what)


# ---- against the loop


CASES = [
    LayerCase(1, 33, 16, 300, 2, "softmax", True, True),
    LayerCase(1, 16, 128, 300, 1, "softmax", False, False),
    LayerCase(1, 1, 1, 1, 1, "sigmoid", True, False),
    LayerCase(2, 17, 40, 65, 3, "sigmoid", True, True),
    LayerCase(3, 15, 5, 64, 2, "relu", False, True),
    LayerCase(4, 16, 128, 31, 1, "tanh", True, True),
    LayerCase(5, 3, 16, 65, 2, "silu", True, False),
    LayerCase(6, 1, 1, 300, 3, "linear", False, True),
    LayerCase(7, 33, 40, 2, 2, "none", True, True),
    LayerCase(8, 16, 16, 65, 1, "softmax", True, True),
    LayerCase(9, 17, 5, 31, 2, "sigmoid", False, False),
    LayerCase(10, 1, 128, 64, 1, "relu", True, True),
    LayerCase(11, 3, 40, 1, 3, "tanh", True, True),
    LayerCase(12, 15, 1, 65, 1, "silu", True, True),
    LayerCase(13, 17, 16, 31, 2, "softmax", False, True),
    LayerCase(14, 3, 5, 64, 1, "linear", True, False),
    LayerCase(15, 1, 16, 2, 3, "none", True, False),
    LayerCase(16, 33, 16, 31, 1, "softmax", True, True),
    LayerCase(17, 15, 40, 31, 1, "relu", True, True),
    LayerCase(33, 3, 5, 65, 2, "softmax", True, True),
]


@functools.cache
def solved(kind: str, case: LayerCase, dtype: torch.dtype) -> tuple[LayerProblem, dict[str, Tensor]]:
    problem = case.problem(torch.Generator().manual_seed(case.order), kind, dtype)
    return problem, problem.expected()


@each_instruction_set
@each_kind
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_instruction_set_equals_the_loop_however_much_it_keeps(instruction_set, kind, case, dtype):
    problem, expected = solved(kind, case, dtype)
    kept, recomputed, chosen = (problem.results(problem.fused, recompute) for recompute in (False, True, None))
    for results in (kept, recomputed, chosen):
        assert_results(results, expected)
        assert torch.equal(results["y"], kept["y"])
        assert torch.equal(results["final state"], kept["final state"])


@each_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_resets_at_every_kind_of_place_equal_the_loop(generator, kind, recompute):
    order, length = 5, 300  # two chunks of time or more
    problem = make_layer_problem(generator, kind, order=order, blocks=17, width=5, length=length, batch=7)
    reset = torch.zeros(7, length, dtype=torch.bool)
    reset[0, 0] = True
    reset[1, -order:] = True
    reset[2, :order] = True
    reset[3] = True
    reset[4, ::2] = True
    reset[5] = torch.rand(length, generator=generator) < 0.2
    problem = dataclasses.replace(problem, reset=reset)
    assert_results(problem.results(problem.fused, recompute), problem.expected())


HIDDEN = {
    "one tile": LayerCase(3, 5, 16, 31, 2, "softmax", True, False),
    "more than a tile, in chunks": LayerCase(5, 33, 5, 300, 3, "softmax", True, True),
    "one block": LayerCase(1, 1, 1, 65, 2, "sigmoid", False, False),
    "many gates": LayerCase(16, 17, 40, 40, 1, "tanh", True, True),
}


@each_instruction_set
@each_kind
@pytest.mark.parametrize("case", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_the_read_out_does_not_see_go_on(generator, instruction_set, kind, case, dtype):
    problem = case.problem(generator, kind, dtype, with_visibility=True)
    expected = problem.expected()
    for recompute in (False, True):
        assert_results(problem.results(problem.fused, recompute), expected)


TABLES = {  # with how many rows
    "one row": (1, LayerCase(3, 5, 16, 31, 2, "softmax", True, True)),
    "more rows than a sequence has steps": (40, LayerCase(2, 3, 5, 9, 2, "softmax", False, False)),
    "more than a tile, in chunks": (7, LayerCase(5, 33, 5, 300, 3, "softmax", True, True)),
    "many gates": (3, LayerCase(16, 17, 40, 40, 1, "softmax", True, True)),
    "sigmoid": (5, LayerCase(1, 33, 16, 65, 2, "sigmoid", True, True)),
    "relu": (5, LayerCase(4, 17, 16, 65, 2, "relu", True, True)),
    "tanh": (5, LayerCase(4, 17, 16, 65, 2, "tanh", True, True)),
    "silu": (5, LayerCase(4, 17, 16, 65, 2, "silu", True, True)),
    "linear": (5, LayerCase(4, 17, 16, 65, 2, "linear", True, True)),
    "none": (5, LayerCase(4, 17, 16, 31, 2, "none", True, True)),
}


@each_instruction_set
@each_kind
@pytest.mark.parametrize(("rows", "case"), TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("with_visibility", [False, True])
def test_a_table_of_rows_equals_the_loop(generator, instruction_set, kind, rows, case, with_visibility):
    for dtype in (torch.float32, torch.float64):
        problem = case.problem(generator, kind, dtype, table_rows=rows, with_visibility=with_visibility)
        assert_results(problem.results(problem.fused), problem.expected())


@each_kind
def test_a_table_of_rows_is_what_the_rows_are_to_the_bit(generator, kind):
    problem = make_layer_problem(generator, kind, length=300, table_rows=7, with_reset=True, dtype=torch.float32)
    inputs = problem.inputs | {"x": problem.inputs["x"][problem.places]}
    whole = dataclasses.replace(problem, inputs=inputs, places=None)
    for one, other in zip(problem.fused(), whole.fused(), strict=True):
        assert torch.equal(one, other)


@each_kind
def test_a_table_that_is_too_large_is_spread_out(generator, kind, monkeypatch):
    problem = make_layer_problem(generator, kind, table_rows=7, with_reset=True)
    expected, of_row = problem.expected(), 8 * sum(len(problem.inputs[name]) for name in (WEIGHTS[0], WEIGHTS[2]))
    for limit, rows in ((3 * 7 * of_row, 7), (3 * 7 * of_row - 1, 2)):  # of two threads
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(layers, "KEPT_BYTES", limit)
            patch.setattr(torch, "get_num_threads", lambda: 2)
            patch.setattr(
                layers, "_layer", lambda x, *rest, call=layers._layer, seen=seen: seen.append(x) or call(x, *rest)
            )
            assert_results(problem.results(problem.fused), expected)
        assert [len(x) for x in seen] == [rows]


@pytest.mark.parametrize("wrong", [-1, 7, 2**62])
def test_a_place_outside_the_table_is_refused(generator, wrong):
    problem = make_layer_problem(generator, "block", table_rows=7)
    problem.places[1, 3] = wrong
    with pytest.raises(IndexError, match=rf"^layer: `places` must be in \[0, 7\), got {wrong}\.$"):
        problem.fused()


def test_a_place_that_is_outside_by_then_is_refused_in_the_backward(generator):
    problem = make_layer_problem(generator, "block", table_rows=7)
    y, _ = problem.fused(problem.inputs | {"x": problem.inputs["x"].requires_grad_()})
    problem.places.data[1, 3] = 7  # through .data autograd does not see it
    with pytest.raises(IndexError, match=r"^layer: `places` must be in \[0, 7\), got 7\.$"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["companion", "observer"])
def test_lags_longer_than_a_chunk_equal_the_loop(generator, kind):
    sizes = {"order": 64, "blocks": 128, "width": 5, "length": 100, "batch": 1}  # chunks of 24 steps
    problem = make_layer_problem(generator, kind, **sizes, with_reset=True)
    for reset in (problem.reset, None):
        cut = dataclasses.replace(problem, reset=reset)
        assert_results(cut.results(cut.fused), cut.expected())


@each_kind
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "final state"])
def test_gradients_of_one_output_equal_the_loop(generator, kind, outputs):
    problem = make_layer_problem(generator, kind, with_reset=True)
    assert_results(problem.results(problem.fused, outputs=outputs), problem.expected(outputs=outputs))


@each_instruction_set
@each_kind
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
def test_a_memory_of_ten_thousand_steps_is_accurate(generator, instruction_set, kind, normalization):
    blocks, length = 16, 65536
    case = LayerCase(1, blocks, blocks, length, 1, normalization, with_state=True, with_reset=False)
    problem = case.problem(generator, kind, torch.float32)
    gate_weight, bias, value_weight, output_weight = (problem.inputs[name] for name in WEIGHTS)
    gate_weight.zero_()  # products that are exact: only the recurrence is left
    bias.view(2, blocks)[0], bias.view(2, blocks)[1] = 5.0, torch.linspace(-9.3, -4, blocks)
    value_weight.copy_(torch.eye(blocks))
    output_weight.copy_(torch.eye(blocks))
    wide = problem.map(Tensor.double).inputs
    raw_gates = wide[WEIGHTS[1]].view(1, 2, blocks).expand(1, length, 1, 2, blocks)
    options = {"normalization": normalization, "backend": "associative"}
    states = block_scan(raw_gates, wide["x"][:, :, None], wide["state"], **options)
    y, final_state = problem.fused()
    assert relative_error(y, states[:, :, 0]) <= 2e-6
    assert relative_error(final_state, states[:, -1]) <= 2e-6


# ---- laws


@each_instruction_set
@each_kind
@pytest.mark.parametrize(
    "sizes",
    [
        {"order": 1, "blocks": 3, "width": 5, "length": 1100, "batch": 1},
        {"order": 3, "blocks": 33, "width": 5, "length": 65, "batch": 3},
        {"order": 2, "blocks": 16, "width": 16, "length": 400, "batch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_output_and_a_second_run_nothing(
    generator, instruction_set, threads, kind, sizes, dtype
):
    problem = make_layer_problem(generator, kind, **sizes, with_reset=True, dtype=dtype)
    runs = {}
    for count in (1, 2, 3):
        threads(count)
        runs[count], again = (problem.results(problem.fused) for _ in range(2))
        for what, result in runs[count].items():
            assert torch.equal(result, again[what]), what
    for count, what in itertools.product((2, 3), ("y", "final state", "gradient of x", "gradient of state")):
        assert torch.equal(runs[count][what], runs[1][what]), what
    for count, name in itertools.product((2, 3), WEIGHTS):  # sums over time, in another order
        assert_close(runs[count][f"gradient of {name}"], runs[1][f"gradient of {name}"].double(), name)


@each_kind
def test_two_halves_with_a_carried_state_equal_the_whole(generator, kind):
    problem = make_layer_problem(generator, kind, length=65, with_reset=True)
    whole = problem.fused()
    state, parts = problem.inputs["state"], []
    for steps in (slice(30), slice(30, 31), slice(31, None)):
        part = dataclasses.replace(problem, reset=problem.reset[:, steps])
        y, state = part.fused(problem.inputs | {"x": problem.inputs["x"][:, steps], "state": state})
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole[0])
    assert_close(state, whole[1])


@each_kind
@pytest.mark.parametrize("changed", [1, 23, 24, 299])
def test_no_output_sees_a_later_step_or_another_sequence(generator, kind, changed):
    problem = make_layer_problem(generator, kind, order=3, blocks=33, width=16, length=300, batch=3)
    y, _ = problem.fused()
    x = problem.inputs["x"].clone()
    x[1, changed:] = torch.nan
    other, final_state = problem.fused(problem.inputs | {"x": x})
    assert torch.equal(other[1, :changed], y[1, :changed])
    assert torch.equal(other[::2], y[::2])
    assert other[1, changed:].isnan().all()
    assert final_state[::2].isfinite().all()


@each_kind
def test_a_reset_forgets_what_is_not_a_number(generator, kind):
    problem = make_layer_problem(generator, kind, order=3, blocks=5, width=4, length=40, batch=1, with_reset=True)
    problem.reset[0] = torch.arange(40) == 20
    (y, final_state), x = problem.fused(), problem.inputs["x"].clone()
    x[:, 10:20] = torch.nan
    other, other_state = problem.fused(problem.inputs | {"x": x, "state": problem.inputs["state"] * torch.inf})
    assert torch.equal(other[:, 20:], y[:, 20:])
    assert torch.equal(other_state, final_state)


# ---- inputs as they come


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS | SHIFTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_layout_gives_the_same_result_and_no_input_changes(generator, kind, layout, dtype):
    problem = LayerCase(3, 16, 16, 65, 3, "softmax", True, True).problem(generator, kind, dtype)
    expected, arrange = problem.results(problem.fused), (LAYOUTS | SHIFTED)[layout]
    laid_out = problem.map(lambda x: arrange(x) if x.ndim > 1 else SHIFTED["odd offset"](x))
    laid_out = dataclasses.replace(laid_out, reset=problem.reset.t().contiguous().t())
    copies = laid_out.map(Tensor.clone)
    for what, result in laid_out.results(laid_out.fused).items():
        assert torch.equal(result, expected[what]), what
    for before, after in ((copies.inputs, laid_out.inputs), (dict(enumerate(copies.cotangents)), laid_out.cotangents)):
        for name, x in before.items():
            assert torch.equal(after[name], x), name
    assert torch.equal(laid_out.reset, problem.reset)


@each_kind
def test_expanded_tensors_and_a_second_backward_are_right(generator, kind):
    problem = make_layer_problem(generator, kind, order=3, blocks=5, width=4, length=40, batch=2)
    x = problem.inputs["x"][:1].expand(2, 40, 4)
    problem = dataclasses.replace(problem, inputs=problem.inputs | {"x": x})
    leaves = {name: x.detach().requires_grad_() for name, x in problem.inputs.items()}
    y, final_state = problem.fused(leaves)
    total = y.sum() + final_state.sum()  # the cotangents are one number, expanded
    first, second = (torch.autograd.grad(total, list(leaves.values()), retain_graph=True) for _ in range(2))
    ones = dataclasses.replace(problem, cotangents=tuple(torch.ones_like(x) for x in (y, final_state)))
    for name, x, again in zip(leaves, first, second, strict=True):
        assert torch.equal(x, again), name
        assert_close(x, ones.expected()[f"gradient of {name}"], name)


@each_kind
def test_memory_that_no_kernel_wrote_is_nan(generator, monkeypatch, kind):
    problem = make_layer_problem(generator, kind)
    monkeypatch.setattr(library.Library, "run", lambda *arguments: None)
    for what, result in problem.results(problem.fused).items():
        assert result.isnan().all(), what


@each_kind
def test_more_bytes_than_kept_bytes_are_recomputed(generator, monkeypatch, kind):
    kept, run = [], library.Library.run

    def spy(self, function, problem, *rest):
        kept.append(problem.kept is not None)
        run(self, function, problem, *rest)

    monkeypatch.setattr(library.Library, "run", spy)
    problem = make_layer_problem(generator, kind, order=3, blocks=17, width=5, length=31, batch=2, dtype=torch.float32)
    size = 2 * 31 * (3 if kind == "block" else 1) * 4 * 17 * 4  # of raw gates, 4 bytes each
    rules = [(size, None, True), (size - 1, None, False), (size - 1, False, True), (size, True, False)]
    for limit, recompute, wanted in rules:
        monkeypatch.setattr(layers, "KEPT_BYTES", limit)
        kept.clear()
        problem.results(problem.fused, recompute)
        assert kept == [wanted, wanted], (limit, recompute)  # the forward and the backward
    kept.clear()
    with torch.no_grad():
        problem.fused(recompute=False)
    assert kept == [False]


@each_instruction_set
@each_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_a_call_reads_the_instruction_set_once(generator, monkeypatch, instruction_set, kind, recompute):
    """As if another thread chose each of the others whenever a kernel is about to run, also before the backward."""
    problem, run = make_layer_problem(generator, kind), library.Library.run
    expected = problem.results(problem.fused, recompute)
    others = itertools.cycle(kernels.instruction_sets())

    def disturbed(self, *arguments):
        kernels.use_instruction_set(next(others))
        return run(self, *arguments)

    monkeypatch.setattr(library.Library, "run", disturbed)
    for _ in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        for what, actual in problem.results(problem.fused, recompute).items():
            assert torch.equal(actual, expected[what]), what


@each_instruction_set
def test_threads_may_choose_the_instruction_set_at_any_moment(generator, instruction_set):
    problem, over = make_layer_problem(generator, "block"), threading.Event()
    expected = problem.expected()

    def choose() -> None:
        while not over.is_set():
            for name in kernels.instruction_sets():
                kernels.use_instruction_set(name)

    interval = sys.getswitchinterval()
    choosers = [threading.Thread(target=choose) for _ in range(2)]
    try:
        sys.setswitchinterval(1e-5)
        for chooser in choosers:
            chooser.start()
        for i in range(50):
            assert_results(problem.results(problem.fused, i % 2 == 0), expected)
    finally:
        over.set()
        for chooser in choosers:
            chooser.join()
        sys.setswitchinterval(interval)


@each_instruction_set
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_a_step_is_what_it_is_alone(generator, threads, instruction_set, kind, dtype):
    """Bit for bit: rows meet the weights a few at a time, and threads share them out."""
    problem = LayerCase(3, 170, 53, 1, kernels.STEP_ROWS, "softmax", True, False).problem(generator, kind, dtype)
    x, weights, state = problem.split(problem.inputs)
    step = kernels.LayerStep(weights, problem.mixer.state_shape, "softmax", kind)
    threads(1)
    alone = [step(x[b], state[b : b + 1]) for b in range(len(x))]
    for batch, count in itertools.product((2, 3, 5, 7, len(x)), (1, 2, 3)):
        threads(count)
        y, final_state = step(x[:batch, 0], state[:batch])
        for b in range(batch):
            assert torch.equal(y[b], alone[b][0][0]), (batch, count, b)
            assert torch.equal(final_state[b], alone[b][1][0]), (batch, count, b)
