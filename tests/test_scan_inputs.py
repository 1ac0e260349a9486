"""What the three scans refuse at the door, and what they make of numbers at the ends of their range."""

import dataclasses
import functools
import re
import subprocess
import sys

import pytest
import torch
from helpers import SCANS, assert_close, assert_problem, each_backend, each_kind, each_normalization, make_problem

from statemix import available_backends
from statemix.gates import NORMALIZATIONS
from statemix.scan import backend_problem, scan_to_state


def good_call(kind: str, device: str = "cpu") -> dict:
    rows = (3,) if kind == "block" else ()
    shapes = {"raw_gates": (2, 5, *rows, 4, 7), "values": (2, 5, *rows, 7), "initial_state": (2, 3, 7), "reset": (2, 5)}
    return {k: torch.zeros(shape, device=device) if k != "reset" else None for k, shape in shapes.items()}


DENSE, SPARSE = "must have shape (B, T, M, M+1, N)", "must have shape (B, T, M+1, N)"
EMPTY_DENSE = "must have B, T, M and N of at least 1 in (B, T, M, M+1, N)"
EMPTY_SPARSE = "must have B, T, M and N of at least 1 in (B, T, M+1, N)"
BAD_SHAPES = [
    *[("block", "raw_gates", shape, DENSE) for shape in ((2, 5, 4, 7), (2, 5, 3, 3, 7), (3, 4, 7))],
    *[("block", "raw_gates", (*shape, 7), EMPTY_DENSE) for shape in ((0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 1))],
    ("block", "raw_gates", (2, 5, 3, 4, 0), EMPTY_DENSE),
    ("block", "values", (2, 5, 7, 3), "must have shape (B, T, M, N) = (2, 5, 3, 7) to match `raw_gates`"),
    ("block", "values", (2, 5, 7), "must have shape (B, T, M, N) = (2, 5, 3, 7) to match `raw_gates`"),
    ("block", "initial_state", (2, 7, 3), "must have shape (B, M, N) = (2, 3, 7) to match `raw_gates`"),
    ("block", "reset", (5, 2), "must have shape (B, T) = (2, 5) to match `raw_gates`"),
    *[("companion", "raw_gates", shape, SPARSE) for shape in ((2, 5, 3, 4, 7), (5, 4, 7))],
    *[("companion", "raw_gates", (*shape, 7), EMPTY_SPARSE) for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 1))],
    ("companion", "raw_gates", (2, 5, 4, 0), EMPTY_SPARSE),
    ("companion", "values", (2, 5, 3, 7), "must have shape (B, T, N) = (2, 5, 7) to match `raw_gates`"),
    ("companion", "initial_state", (2, 7), "must have shape (B, M, N) = (2, 3, 7) to match `raw_gates`"),
    ("companion", "reset", (2, 5, 1), "must have shape (B, T) = (2, 5) to match `raw_gates`"),
    ("observer", "raw_gates", (2, 5, 3, 4, 7), SPARSE),
    ("observer", "raw_gates", (2, 5, 1, 7), EMPTY_SPARSE),
    ("observer", "values", (2, 5, 3, 7), "must have shape (B, T, N) = (2, 5, 7) to match `raw_gates`"),
]


@pytest.mark.parametrize(("kind", "argument", "shape", "rule"), BAD_SHAPES)
def test_a_wrong_shape_is_refused_with_the_right_one(kind, argument, shape, rule):
    SCANS[kind](**good_call(kind))
    wrong = torch.zeros(shape, dtype=torch.bool if argument == "reset" else torch.float32)
    with pytest.raises(ValueError, match=f"^{kind}_scan: {re.escape(f'`{argument}` {rule}, got {shape}.')}$"):
        SCANS[kind](**(good_call(kind) | {argument: wrong}))


NAMES = "['linear', 'none', 'relu', 'sigmoid', 'silu', 'softmax', 'tanh']"
BACKENDS = "'auto' or one of ['associative', 'cpu', 'gpu', 'reference']"
MASK = torch.zeros(2, 5, dtype=torch.bool)
BAD_ARGUMENTS = [  # (argument, from a good tensor to the bad one, exception, message); no floats: test_arguments.py
    ("values", lambda x: None, TypeError, "must be a tensor, got NoneType."),
    ("values", lambda x: x.double(), TypeError, "must be torch.float32 like `raw_gates`, got torch.float64."),
    ("values", lambda x: x.to("meta"), TypeError, "must be on cpu like `raw_gates`, got meta."),
    ("initial_state", lambda x: x.to("meta"), TypeError, "must be on cpu like `raw_gates`, got meta."),
    ("reset", lambda x: MASK.to("meta"), TypeError, "must be on cpu like `raw_gates`, got meta."),
    ("reset", lambda x: MASK.float(), TypeError, "must be a bool tensor, got torch.float32."),
    ("reset", lambda x: MASK.tolist(), TypeError, "must be a bool tensor, got list."),
    ("normalization", lambda x: "softmx", ValueError, f"must be one of {NAMES}, got 'softmx'."),
    ("backend", lambda x: "gp", ValueError, f"must be {BACKENDS}, got 'gp'."),
]


@each_kind
@pytest.mark.parametrize(("argument", "spoil", "exception", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_with_the_rule_and_what_came(kind, argument, spoil, exception, message):
    good = good_call(kind)
    with pytest.raises(exception, match=f"^{kind}_scan: {re.escape(f'`{argument}` {message}')}$"):
        SCANS[kind](**(good | {argument: spoil(good.get(argument))}))


@each_kind
def test_auto_goes_on_where_a_named_backend_refuses(generator, kind):
    problem = make_problem(generator, kind, "softmax", order=65, length=3, with_reset=True)
    message = f"{kind}_scan: backend 'cpu' cannot be used: it serves M up to 64, got M = 65. Use backend='auto'."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        problem.states("cpu")
    assert_problem(problem, "auto", problem.results("reference"))
    elsewhere = good_call(kind, device="meta")
    message = f"{kind}_scan: backend 'cpu' cannot be used: it needs CPU tensors, got device meta. Use backend='auto'."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        SCANS[kind](**elsewhere, backend="cpu")
    assert SCANS[kind](**elsewhere).device.type == "meta"


@each_backend
@each_kind
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("where", ["raw_gates", "values", "initial_state"])
def test_nan_reaches_the_states_that_depend_on_it_and_no_others(generator, backend, kind, order, where):
    problem = make_problem(generator, kind, "softmax", order=order, length=33, blocks=17, dtype=torch.float32)
    clean = problem.states(backend)
    b, t, n = 1, 0 if where == "initial_state" else 20, 5
    row = (0,) if kind == "block" else ()
    index = {"raw_gates": (b, t, *row, 1, n), "values": (b, t, *row, n), "initial_state": (b, 0, n)}[where]
    damaged = getattr(problem, where).clone()
    damaged[index] = torch.nan
    states = problem.states(backend, **{where: damaged})

    touched = torch.zeros(states.shape, dtype=torch.bool)
    touched[b, t:, ..., n] = True
    if (kind, where) in (("block", "raw_gates"), ("block", "values"), ("observer", "values")):
        touched[b, t, 1:, n] = False  # it entered component 0 alone, and mixes into the others one step later
    assert torch.equal(states.isnan(), touched)
    assert torch.equal(states[~touched], clean[~touched])


@each_backend
@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_pass_a_reset(generator, backend, kind, bad):
    problem = make_problem(generator, kind, "softmax", order=3, length=12, dtype=torch.float32)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 0] = reset[1, 5] = True
    problem = dataclasses.replace(problem, reset=reset)
    clean = problem.results(backend)
    values, initial_state = problem.values.clone(), problem.initial_state.clone()
    values[1, 2] = bad
    initial_state[0] = bad
    results = dataclasses.replace(problem, values=values, initial_state=initial_state).results(backend)
    assert not results["states"][1, 4].isfinite().any()
    for what in ("states", "gradient of raw_gates", "gradient of values"):
        assert torch.equal(results[what][0], clean[what][0]), what
        assert torch.equal(results[what][1, 5:], clean[what][1, 5:]), what


@each_backend
@each_kind
def test_minus_infinity_is_a_softmax_weight_of_exactly_zero(generator, backend, kind):
    shape = (1, 4, 1, 2, 3) if kind == "block" else (1, 4, 2, 3)
    values = torch.randn(*shape[:-2], 3, generator=generator)
    initial_state = torch.randn(1, 1, 3, generator=generator)
    kept, closed = torch.full(shape, -torch.inf), torch.full(shape, -torch.inf)
    kept[..., 0, :], closed[..., 1, :] = 0, 0
    scan = functools.partial(SCANS[kind], values=values, initial_state=initial_state, backend=backend)
    assert torch.equal(scan(kept).view(4, 3), initial_state.view(1, 3).expand(4, 3))
    assert torch.equal(scan(closed).view(4, 3), values.view(4, 3))


@each_backend
@each_kind
@each_normalization
@pytest.mark.parametrize("gate", [torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 3])  # the kernels have a softmax of two gates of its own
def test_infinite_gates_mean_what_they_mean_in_the_loop(generator, backend, kind, normalization, gate, dtype, order):
    # the last step, so that the loop's inf - inf and 0 * inf of later products, which depend on their order, stay out
    problem = make_problem(generator, kind, normalization, order=order, length=3, dtype=dtype)
    problem.raw_gates[1, -1, ..., 1, 2] = gate
    expected, states = problem.states("reference"), problem.states(backend)
    assert torch.equal(states.isnan(), expected.isnan())
    assert torch.equal(states.isposinf(), expected.isposinf())
    assert_close(states[expected.isfinite()], expected[expected.isfinite()].double())


@each_backend
@each_kind
@pytest.mark.parametrize("normalization", ["relu", "silu", "linear"])
def test_a_row_whose_sum_overflows_keeps_its_weights(generator, backend, kind, normalization):
    problem = make_problem(generator, kind, normalization, order=3, length=3, dtype=torch.float32)
    problem.raw_gates[:, 1] = torch.tensor([1.2e38, 1.2e38, 3e38, 1.2e38])[:, None]
    assert_problem(problem, backend, problem.to(torch.float64).results("reference"))


@each_backend
@each_kind
def test_a_tensor_with_the_negative_bit_is_read_with_its_sign(generator, backend, kind):
    problem = make_problem(generator, kind, "tanh", order=2, length=5, blocks=1)
    negated = problem.map(lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag)
    assert negated.values.is_neg()
    assert torch.equal(negated.values, problem.values)
    for name in ("raw_gates", "values", "initial_state"):
        states = problem.states(backend, **{name: getattr(negated, name)})
        assert_close(states, problem.states("reference"), name)


@pytest.mark.parametrize("backend", [name for name in available_backends("cpu") if name != "reference"])
@each_kind
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
def test_a_constant_weight_of_almost_one_is_kept_for_as_long_as_it_says(generator, backend, kind, normalization):
    length, gates = 16384, NORMALIZATIONS[normalization].inverse(torch.tensor([1 - 1.1e-4, 1e-5, 1e-4]).double())
    row = (2,) if kind == "block" else ()
    raw_gates = gates[:, None].float().expand(1, length, *row, 3, 1)
    values = torch.randn(1, length, *row, 1, generator=generator)
    scan = functools.partial(SCANS[kind], normalization=normalization)
    expected = scan(raw_gates.double(), values.double(), backend="associative")
    assert_close(scan(raw_gates, values, backend=backend), expected)


def test_backends_are_asked_for_by_device():
    assert available_backends("meta") == ("associative", "reference")
    assert set(available_backends("cpu")) <= set(available_backends())
    assert backend_problem("cpu", "meta") == "it needs CPU tensors, got device meta."


def test_an_unknown_kind_is_refused():
    kinds = r"\['block', 'companion', 'observer'\]"
    with pytest.raises(ValueError, match=rf"^scan_to_state: `kind` must be one of {kinds}, "):
        scan_to_state("diagonal", torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 1))


def test_a_backend_is_imported_when_it_is_first_asked_for():
    code = """
import sys
import torch
from statemix.scan import block_scan
modules = {f"statemix.scan.{name}" for name in ("gpu", "cpu", "associative", "reference")}
assert not modules & set(sys.modules)
block_scan(torch.zeros(1, 1, 1, 2, 1), torch.zeros(1, 1, 1, 1), backend="associative")
assert modules & set(sys.modules) == {"statemix.scan.associative"}
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
