"""The three scans: the loop against hand-written numbers and NumPy, every backend against the loop, and laws."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from helpers import (
    LAYOUTS,
    SCANS,
    TOLERANCE,
    Problem,
    assert_close,
    assert_problem,
    each_backend,
    each_kind,
    each_normalization,
    make_problem,
    numpy_states,
)

from statemix import available_backends, block_scan, companion_scan, observer_scan
from statemix.gates import NORMALIZATIONS
from statemix.scan import lagged_states


@each_backend
def test_two_steps_by_hand(backend):
    def tensor(*numbers, shape):
        return torch.tensor(numbers, dtype=torch.float64).view(shape)

    one, two = [0.5, 0.25, 0.25], [-0.5, 0.25, 0.25]
    options, start = {"normalization": "none", "backend": backend}, tensor(1, 2, shape=(1, 2, 1))
    gates = tensor(*one, 0.125, 0.5, 0.5, 0.25, -0.5, 0.25, 0.75, 0.0, 0.25, shape=(1, 2, 2, 3, 1))
    states = block_scan(gates, tensor(4, 2, 8, -4, shape=(1, 2, 2, 1)), start, **options)
    # 0.5 * 1 + 0.25 * 2 + 0.25 * 4 = 2, 0.125 * 1 + 0.5 * 2 + 0.5 * 2 = 2.125; then
    # 0.25 * 2 - 0.5 * 2.125 + 0.25 * 8 = 1.4375, 0.75 * 2 + 0 * 2.125 - 0.25 * 4 = 0.5
    assert states.flatten().tolist() == [2, 2.125, 1.4375, 0.5]

    gates, values = tensor(*one, *two, shape=(1, 2, 3, 1)), tensor(4, -8, shape=(1, 2, 1))
    # 0.5 * 1 + 0.25 * 2 + 0.25 * 4 = 2, then -0.5 * 2 + 0.25 * 1 - 0.25 * 8 = -2.75
    assert companion_scan(gates, values, start, **options).flatten().tolist() == [2, -2.75]
    # 0.5 * 1 + 2 + 0.25 * 4 = 3.5, 0.25 * 1 = 0.25; then -0.5 * 3.5 + 0.25 - 0.25 * 8 = -3.5, 0.25 * 3.5 = 0.875
    assert observer_scan(gates, values, start, **options).flatten().tolist() == [3.5, 0.25, -3.5, 0.875]

    # with weights softmax(log (1, 2, 1)) = (1/4, 1/2, 1/4), and a reset before the second step
    gates, reset = tensor(1, 2, 1, 1, 2, 1, shape=(1, 2, 3, 1)).log(), torch.tensor([[False, True]])
    assert_close(companion_scan(gates, values, start, backend=backend)[0, :, 0], tensor(2.25, -0.9375, shape=2))
    assert_close(companion_scan(gates, values, start, reset=reset, backend=backend)[0, :, 0], tensor(2.25, -2, shape=2))


@each_kind
@each_normalization
@pytest.mark.parametrize("with_reset", [False, True])
def test_the_loop_equals_numpy(generator, kind, normalization, with_reset):
    for order, length in ((1, 6), (2, 5), (3, 9), (5, 7), (8, 31)):
        problem = make_problem(generator, kind, normalization, order=order, length=length, with_reset=with_reset)
        assert_close(problem.states("reference"), numpy_states(problem))


@each_kind
@each_normalization
def test_the_loop_passes_gradcheck(generator, kind, normalization):
    problem = make_problem(generator, kind, normalization, order=3, length=3, blocks=1, with_reset=True)
    # relu and |f| have a kink at 0, closer to some of the slow-decay gates than a difference quotient reaches
    raw_gates = torch.where(problem.raw_gates.abs() < 1e-2, 1e-2, problem.raw_gates)
    inputs = [x.requires_grad_() for x in (raw_gates, problem.values, problem.initial_state)]
    assert torch.autograd.gradcheck(states_of(problem, "reference"), inputs)


def states_of(problem: Problem, backend: str):
    """The states as a function of all that may have a gradient."""
    return lambda gates, values, state: problem.states(backend, raw_gates=gates, values=values, initial_state=state)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_comparison_rejects_what_is_wrong(dtype):
    expected = torch.linspace(-2, 1, 7, dtype=torch.float64).to(dtype).double()  # largest entry 2
    right = expected.to(dtype)
    assert_close(right, expected)
    wrong = expected.clone()
    wrong[3] += 10 * TOLERANCE[dtype] * 2
    rejected = [
        (wrong.to(dtype), expected, "relative error"),
        (torch.where(expected == 1, torch.nan, right), expected, "relative error"),
        (torch.where(expected == 1, torch.inf, right), expected, "relative error"),
        (right, torch.zeros_like(expected), "relative error"),
        (right[:, None], expected, "shape"),
        (right.int(), expected, "no tolerance"),
        (right, expected.float(), "must be float64"),
    ]
    for actual, reference, message in rejected:
        with pytest.raises(AssertionError, match=message):
            assert_close(actual, reference)


@pytest.mark.parametrize("order", [2, 3, 8])
def test_the_comparison_rejects_a_transposed_block(generator, order):
    for dtype in TOLERANCE:
        problem = make_problem(generator, "block", "softmax", order=order, length=31, dtype=dtype)
        expected = problem.to(torch.float64).results("reference")
        gates = problem.raw_gates.clone()
        gates[:, :, :, :-1] = gates[:, :, :, :-1].transpose(2, 3)
        with pytest.raises(AssertionError, match="states: relative error"):
            assert_problem(dataclasses.replace(problem, raw_gates=gates), "reference", expected)


class Row(NamedTuple):
    """The axes of one comparison with the loop, which every scan makes."""

    order: int
    normalization: str
    length: int
    blocks: int
    with_state: bool
    with_reset: bool
    layout: str


# Every M meets every normalisation, T, N, layout, state and reset, and any two of the others meet, too; but N = 17 not
# T = 257, as autograd through the loop takes T^2 N of time.
ROWS = [
    Row(1, "softmax", 257, 3, False, True, "time first"),
    Row(1, "sigmoid", 1, 1, True, True, "contiguous"),
    Row(1, "relu", 2, 17, True, False, "time first"),
    Row(1, "tanh", 31, 17, False, False, "time first"),
    Row(1, "silu", 64, 3, True, True, "blocks first"),
    Row(1, "linear", 65, 3, False, False, "contiguous"),
    Row(1, "none", 2, 1, True, False, "time first"),
    Row(2, "softmax", 2, 1, True, True, "contiguous"),
    Row(2, "sigmoid", 31, 1, False, False, "contiguous"),
    Row(2, "relu", 65, 17, False, True, "blocks first"),
    Row(2, "tanh", 257, 1, True, True, "contiguous"),
    Row(2, "silu", 1, 3, True, False, "time first"),
    Row(2, "linear", 64, 17, True, False, "time first"),
    Row(2, "none", 31, 3, False, True, "time first"),
    Row(3, "softmax", 31, 3, False, True, "blocks first"),
    Row(3, "sigmoid", 257, 3, False, False, "contiguous"),
    Row(3, "relu", 1, 3, False, True, "contiguous"),
    Row(3, "tanh", 64, 3, True, False, "contiguous"),
    Row(3, "silu", 257, 3, True, False, "contiguous"),
    Row(3, "linear", 2, 1, True, False, "time first"),
    Row(3, "none", 65, 17, True, True, "blocks first"),
    Row(4, "softmax", 65, 17, False, False, "time first"),
    Row(4, "sigmoid", 64, 1, False, True, "blocks first"),
    Row(4, "relu", 31, 3, False, True, "contiguous"),
    Row(4, "tanh", 65, 3, True, False, "blocks first"),
    Row(4, "silu", 2, 1, False, True, "contiguous"),
    Row(4, "linear", 257, 3, True, False, "contiguous"),
    Row(4, "none", 1, 1, True, True, "time first"),
    Row(5, "softmax", 1, 3, False, False, "contiguous"),
    Row(5, "sigmoid", 64, 17, True, False, "time first"),
    Row(5, "relu", 64, 1, False, False, "time first"),
    Row(5, "tanh", 2, 17, True, True, "blocks first"),
    Row(5, "silu", 31, 3, True, False, "blocks first"),
    Row(5, "linear", 65, 1, False, True, "contiguous"),
    Row(5, "none", 257, 3, False, True, "contiguous"),
    Row(8, "softmax", 64, 17, True, False, "blocks first"),
    Row(8, "sigmoid", 2, 3, False, False, "contiguous"),
    Row(8, "relu", 1, 17, True, True, "contiguous"),
    Row(8, "tanh", 31, 3, True, False, "time first"),
    Row(8, "silu", 65, 1, False, False, "contiguous"),
    Row(8, "linear", 31, 17, True, True, "contiguous"),
    Row(8, "none", 257, 1, False, True, "blocks first"),
    Row(16, "softmax", 31, 3, True, False, "time first"),
    Row(16, "sigmoid", 65, 17, False, True, "time first"),
    Row(16, "relu", 257, 1, True, True, "time first"),
    Row(16, "tanh", 1, 1, False, True, "blocks first"),
    Row(16, "silu", 2, 17, True, False, "contiguous"),
    Row(16, "linear", 1, 3, False, False, "blocks first"),
    Row(16, "none", 64, 17, False, False, "contiguous"),
    # orders with no compiled kernel of their own, where M is known at run time only
    Row(7, "softmax", 65, 3, True, True, "contiguous"),
    Row(7, "tanh", 31, 3, True, True, "contiguous"),
    Row(20, "sigmoid", 31, 3, True, True, "contiguous"),
    Row(64, "silu", 5, 3, True, True, "contiguous"),
]


def test_a_new_normalization_has_its_rows():
    assert {row.normalization for row in ROWS} == set(NORMALIZATIONS)


@functools.lru_cache(maxsize=8)
def solved(kind: str, row: Row, dtype: torch.dtype) -> tuple[Problem, dict[str, torch.Tensor]]:
    """The problem in its layout and dtype, and what the loop says about it in float64."""
    generator = torch.Generator().manual_seed(1000 * row.order + row.length)
    sizes = {"order": row.order, "length": row.length, "blocks": row.blocks}
    options = {"with_state": row.with_state, "with_reset": row.with_reset, "dtype": dtype}
    problem = make_problem(generator, kind, row.normalization, **sizes, **options)
    return problem.map(LAYOUTS[row.layout]), problem.to(torch.float64).results("reference")


@pytest.mark.parametrize(
    ("kind", "row", "dtype", "backend"),
    [
        (kind, row, dtype, backend)
        for kind in SCANS
        for row in ROWS
        for dtype in TOLERANCE
        for backend in available_backends("cpu")
        # the float64 loop is held by test_the_loop_equals_numpy; the half types only pass the door: so three orders do
        if (backend, dtype) != ("reference", torch.float64) and (dtype.itemsize > 2 or row.order in (2, 5, 7))
    ],
    ids=str,
)
def test_backend_equals_the_loop(kind, row, dtype, backend):
    problem, expected = solved(kind, row, dtype)
    assert_problem(problem, backend, expected)


@each_backend
@each_kind
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_the_initial_state_may_have_a_dtype_of_its_own(generator, backend, kind, dtype, state_dtype):
    problem = make_problem(generator, kind, "softmax", order=3, length=9, dtype=dtype)
    expected = problem.to(torch.float64).results("reference")
    results = dataclasses.replace(problem, initial_state=problem.initial_state.to(state_dtype)).results(backend)
    assert results["states"].dtype == dtype
    assert results["gradient of initial_state"].dtype == state_dtype
    assert_close(results["states"], expected["states"])
    # computed in float32, whatever wider dtype holds it
    assert_close(results["gradient of initial_state"].float(), expected["gradient of initial_state"])


@each_backend
@each_kind
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("order", [1, 4])
def test_split_anywhere_with_the_carried_state_equals_the_whole(generator, backend, kind, with_reset, order):
    problem = make_problem(generator, kind, "tanh", order=order, length=11, with_reset=with_reset)
    expected = problem.to(torch.float64).results("reference")
    for cut in range(1, 11):
        names, parts = ("raw_gates", "values", "initial_state"), []
        leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
        state = leaves["initial_state"]
        for piece in (slice(cut), slice(cut, None)):
            reset = problem.reset[:, piece] if with_reset else None
            inputs = {name: leaves[name][:, piece] for name in ("raw_gates", "values")}
            part = problem.states(backend, **inputs, initial_state=state, reset=reset)
            state = (lagged_states(part, state, reset, order) if kind == "companion" else part)[:, -1]
            parts.append(part)
        whole = torch.cat(parts, dim=1)
        assert_close(whole, expected["states"], f"cut at {cut}")
        gradients = torch.autograd.grad(whole, list(leaves.values()), problem.cotangent)
        for gradient, name in zip(gradients, names, strict=True):
            assert_close(gradient, expected[f"gradient of {name}"], f"cut at {cut}, {name}")


@each_backend
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_depends_on_no_later_input_bit_for_bit(generator, backend, kind, dtype):
    problem = make_problem(generator, kind, "softmax", order=3, length=65, blocks=5, with_reset=True, dtype=dtype)
    other = make_problem(generator, kind, "softmax", order=3, length=65, blocks=5, with_reset=True, dtype=dtype)
    states = problem.states(backend)
    for kept in (1, 2, 31, 32, 33, 63, 64):
        changed = {
            name: torch.cat([getattr(problem, name)[:, :kept], getattr(other, name)[:, kept:]], dim=1)
            for name in ("raw_gates", "values", "reset")
        }
        later = problem.states(backend, **changed)
        assert torch.equal(later[:, :kept], states[:, :kept])
        assert not torch.equal(later[:, kept], states[:, kept])


@each_backend
@each_kind
@pytest.mark.parametrize("order", [1, 3])
def test_a_reset_starts_a_separate_sequence(generator, backend, kind, order):
    problem = make_problem(generator, kind, "softmax", order=order, length=14)
    starts = [0, 4, 5, 11, 14]
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[:, starts[:-1]] = True
    whole = dataclasses.replace(problem, reset=reset).results(backend)
    assert not whole.pop("gradient of initial_state").any()
    for piece in map(slice, starts, starts[1:]):
        alone = dataclasses.replace(problem.map(lambda x, piece=piece: x[:, piece]), initial_state=None)
        for what, expected in alone.results("reference").items():
            assert_close(whole[what][:, piece], expected, what)


@pytest.mark.parametrize("order", [1, 2, 4, 9])
def test_lagged_states_are_those_of_a_plain_loop(generator, order):
    problem = make_problem(generator, "companion", "softmax", order=order, length=7, with_reset=True)
    reset = torch.rand(2, 7, generator=generator) < 0.3
    for initial_state, cleared in itertools.product((problem.initial_state, None), (reset, None)):
        expected = torch.zeros(2, 7, order, 3, dtype=torch.float64)
        for b in range(2):
            lags = [torch.zeros(3)] * order if initial_state is None else list(initial_state[b])
            for t in range(7):
                if cleared is not None and cleared[b, t]:
                    lags = [torch.zeros(3)] * order
                lags = [problem.values[b, t], *lags][:order]
                for i in range(order):
                    expected[b, t, i] = lags[i]
        assert torch.equal(lagged_states(problem.values, initial_state, cleared, order), expected)


@each_backend
@each_kind
def test_expanded_inputs_give_the_gradient_of_the_one_copy(generator, backend, kind):
    problem = make_problem(generator, kind, "softmax", order=3, length=31, with_reset=True)
    gates = problem.raw_gates[:1, :1].clone().requires_grad_()
    values = problem.values[:, :1].clone().requires_grad_()
    shape = problem.raw_gates.shape
    strided = {"raw_gates": gates.expand(shape), "values": values.expand_as(problem.values)}
    assert strided["raw_gates"].stride()[:2] == (0, 0)
    states = problem.states(backend, **strided)
    gradients = torch.autograd.grad(states, (gates, values), problem.cotangent)
    copied = dataclasses.replace(problem, **{k: x.detach().contiguous() for k, x in strided.items()})
    expected = copied.results("reference")
    assert_close(states, expected["states"])
    assert_close(gradients[0], expected["gradient of raw_gates"].sum((0, 1), keepdim=True))
    assert_close(gradients[1], expected["gradient of values"].sum(1, keepdim=True))


@each_backend
@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_inputs_are_left_unchanged(generator, backend, kind, layout):
    problem = make_problem(generator, kind, "relu", order=3, length=9, with_reset=True).map(LAYOUTS[layout])
    before = problem.map(torch.clone)
    problem.results(backend)
    for name in ("raw_gates", "values", "initial_state", "reset", "cotangent"):
        assert torch.equal(getattr(problem, name), getattr(before, name)), name


@each_kind
def test_the_associative_scan_has_second_derivatives(generator, kind):
    problem = make_problem(generator, kind, "softmax", order=3, length=5, blocks=2, with_reset=True)
    inputs = [x.requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
    assert torch.autograd.gradgradcheck(states_of(problem, "associative"), inputs, fast_mode=True)


def test_the_associative_scan_can_be_exported(generator):
    class Layer(torch.nn.Module):
        def forward(self, raw_gates, values, initial_state, reset):
            return block_scan(raw_gates, values, initial_state, reset=reset, backend="associative")

    problem = make_problem(generator, "block", "softmax", order=3, length=9, with_reset=True)
    inputs = (problem.raw_gates, problem.values, problem.initial_state, problem.reset)
    exported = torch.export.export(Layer(), inputs).module()
    assert_close(exported(*inputs), problem.states("reference"))
