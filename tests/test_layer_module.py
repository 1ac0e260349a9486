"""The fused layer of kernels/layers.py as a module: steps, layouts, and what torch's machinery makes of it."""

import multiprocessing
import sys

import pytest
import torch
from helpers import assert_close, each_instruction_set, each_kind, exit_code, needs_kernels, relative_error
from kernel_helpers import WEIGHTS, make_layer, make_layer_problem
from torch.func import functional_call

from statemix.kernels import layers
from statemix.mixers.base import Rows

pytestmark = needs_kernels


def make_mixer(generator: torch.Generator, kind: str, dtype: torch.dtype = torch.float64, **sizes) -> tuple:
    """A mixer with the weights of a problem, and the problem."""
    problem = make_layer_problem(generator, kind, dtype=dtype, **sizes)
    order, blocks = problem.mixer.state_shape
    mixer = make_layer(kind, blocks, problem.mixer.d_model, order).to(dtype)
    mixer.load_state_dict({name: problem.inputs[name] for name in WEIGHTS})
    return mixer, problem


@each_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_a_module_is_the_operator(generator, kind, recompute):
    mixer, problem = make_mixer(generator, kind, with_reset=True)
    mixer.recompute = recompute
    actual = mixer(problem.inputs["x"], problem.inputs["state"], problem.reset)
    for result, expected in zip(actual, problem.fused(recompute=recompute), strict=True):
        assert torch.equal(result, expected)


PLACES = torch.zeros(2, 5, dtype=torch.int64)
WRONG_ROWS = {
    "places of int32": (Rows(torch.zeros(3, 4), PLACES.int()), TypeError, "must have int64 places"),
    "a table of another dtype": (Rows(torch.zeros(3, 4).double(), PLACES), TypeError, "a table of torch.float32"),
    "places of another batch": (Rows(torch.zeros(3, 4), PLACES.repeat(2, 1)), ValueError, r"got \(3, 4\) and \(4, 5\)"),
    "rows of another width": (Rows(torch.zeros(3, 5), PLACES), ValueError, r"got \(3, 5\) and \(2, 5\)"),
    "places outside the table": (Rows(torch.zeros(3, 4), PLACES + 3), IndexError, r"must be in \[0, 3\), got 3"),
}


@pytest.mark.parametrize(("rows", "error", "told"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_that_are_not_of_x_are_refused(rows, error, told):
    with pytest.raises(error, match=told):
        make_layer("block", 3, 4, 2)(torch.zeros(2, 5, 4), None, None, rows)


@each_kind
@pytest.mark.parametrize("length", [1, 40])
def test_hidden_blocks_are_those_of_the_parts(generator, kind, length, monkeypatch):
    mixer, problem = make_mixer(generator, kind, blocks=17, length=length, with_reset=length > 1)
    mixer.hidden, results, calls = 0.5, [], []
    monkeypatch.setattr(layers, "_layer", lambda *given, call=layers._layer: calls.append(given) or call(*given))
    for mixer.backend in ("auto", "reference"):
        torch.manual_seed(3)
        with torch.no_grad():  # as a step of one token that is one call
            results.append(mixer(problem.inputs["x"], problem.inputs["state"], problem.reset))
    assert len(calls) == (length > 1)  # a step of one token goes by its parts then
    for one, other in zip(*results, strict=True):
        assert_close(one, other)
    mixer.hidden = 0.0
    assert relative_error(mixer(problem.inputs["x"], problem.inputs["state"], problem.reset)[0], results[0][0]) > 0.1


@each_instruction_set
@each_kind
@pytest.mark.parametrize("batch", [1, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_the_loop_with_and_without_gradients(generator, instruction_set, kind, batch, dtype):
    mixer, problem = make_mixer(generator, kind, dtype, order=5, blocks=17, width=21, length=9, batch=batch)
    expected = problem.expected()
    for with_gradients in (False, True):
        state, ys = problem.inputs["state"], []
        with torch.set_grad_enabled(with_gradients):
            for t in range(9):
                y, state = mixer.step(problem.inputs["x"][:, t], state)
                ys.append(y)
        assert_close(torch.stack(ys, 1), expected["y"])
        assert_close(state, expected["final state"])


@each_kind
@pytest.mark.parametrize("changed", ["weights", "x", "state"])
def test_a_step_takes_tensors_of_any_layout(generator, kind, changed):
    mixer, problem = make_mixer(generator, kind, order=3, blocks=5, width=4)
    x, state = problem.inputs["x"][:, 0].contiguous(), problem.inputs["state"]
    expected = mixer.step(x, state)
    if changed == "weights":
        for parameter in mixer.parameters():
            parameter.data = parameter.data.t().contiguous().t()
    x = x.t().contiguous().t() if changed == "x" else x
    state = state.mT.contiguous().mT if changed == "state" else state
    with torch.no_grad():
        for actual, wanted in zip(mixer.step(x, state), expected, strict=True):
            assert_close(actual, wanted.detach())


@each_kind
def test_autocast_keeps_a_float32_state(generator, kind):
    mixer, problem = make_mixer(generator, kind, torch.float32, width=16, length=64)
    y, state = mixer(problem.inputs["x"], problem.inputs["state"])
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_state = mixer(problem.inputs["x"], problem.inputs["state"])
    assert (rounded.dtype, rounded_state.dtype) == (torch.bfloat16, torch.float32)
    # x, three weights, raw gates, values, states and y: eight roundings, each to a relative 2^-8
    assert relative_error(rounded, y.double()) <= 8 * 2**-8
    assert relative_error(rounded_state, state.double()) <= 8 * 2**-8


# ---- in torch's machinery


@each_kind
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.14's own opcheck
def test_the_operators_pass_opcheck(generator, kind):
    sizes = {"order": 2, "blocks": 3, "width": 4, "length": 5}
    problem = make_layer_problem(generator, kind, **sizes, with_reset=True, with_visibility=True)
    x, weights, state = problem.split({name: x.requires_grad_() for name, x in problem.inputs.items()})
    rows = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for of_x, reset, visibility, places, keep in (
        (x, problem.reset, problem.visibility, None, True),
        (x, None, None, None, False),
        (x[:, 0].detach().requires_grad_(), problem.reset, None, rows, False),
    ):
        inputs = (of_x, *weights, state)
        arguments = (*inputs, reset, visibility, places, "softmax", kind, keep)
        checks = torch.library.opcheck(torch.ops.statemix.layer_forward, arguments)
        assert set(checks.values()) == {"SUCCESS"}
        with torch.no_grad():
            y, final_state, states, kept = layers._layer(*arguments)
        cotangents = torch.ones_like(y), torch.ones_like(final_state) if keep else None
        read = (x.detach() for x in inputs)
        arguments = (*cotangents, *read, reset, visibility, places, states, kept, "softmax", kind)
        checks = torch.library.opcheck(torch.ops.statemix.layer_backward, arguments)
        assert set(checks.values()) == {"SUCCESS"}


@each_kind
def test_compiled_and_eager_calls_agree(generator, kind):
    mixer, problem = make_mixer(generator, kind, length=33, with_reset=True)
    x, state = (problem.inputs[name].requires_grad_() for name in ("x", "state"))
    leaves, compiled = [x, state, *mixer.parameters()], torch.compile(mixer, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (mixer, compiled):
        outputs = function(x, state, problem.reset)
        runs.append([*outputs, *torch.autograd.grad(outputs, leaves, problem.cotangents)])
    for actual, expected in zip(*runs, strict=True):
        assert_close(actual, expected.detach())


@each_kind
def test_an_exported_layer_is_the_layer(generator, kind):
    mixer, problem = make_mixer(generator, kind, length=33)
    inputs = (problem.inputs["x"], problem.inputs["state"])
    exported = torch.export.export(mixer, inputs)
    assert "statemix.layer_forward" in exported.graph_module.code
    for actual, expected in zip(exported.module()(*inputs), mixer(*inputs), strict=True):
        assert torch.equal(actual, expected)


@each_kind
def test_vmap_over_parameters_is_a_loop_over_them(generator, kind):
    mixers, problems = zip(*(make_mixer(generator, kind, length=33) for _ in range(3)), strict=True)
    x, cotangent = problems[0].inputs["x"], problems[0].cotangents[0]
    stacked, _ = torch.func.stack_module_state(list(mixers))

    def loss(parameters):
        y, _ = functional_call(mixers[0], parameters, (x,))
        return (y * cotangent).sum(), y

    gradients, ys = torch.func.vmap(torch.func.grad(loss, has_aux=True))(stacked)
    for i, mixer_i in enumerate(mixers):
        y, _ = mixer_i(x)
        assert_close(ys[i], y.detach())
        (y * cotangent).sum().backward()
        for name, parameter in mixer_i.named_parameters():
            assert_close(gradients[name][i], parameter.grad, name)


@each_kind
def test_a_second_derivative_is_refused(generator, kind):
    problem = make_layer_problem(generator, kind, order=2, blocks=3, width=2, length=3)
    x = problem.inputs["x"].requires_grad_()
    y, _ = problem.fused()
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'cpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()


@each_kind
def test_a_child_of_fork_finishes(generator, kind):
    # small: torch itself must not want its threads in the child
    problem = make_layer_problem(generator, kind, order=1, blocks=9, width=4, length=40, batch=4)

    expected = problem.results(problem.fused)["y"]  # here it has two

    def compare():
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:  # torch's engine refuses any backward in the child where it has threads for devices
            y, _ = problem.fused()
        else:
            y = problem.results(problem.fused)["y"]
        sys.exit(0 if torch.equal(y, expected) else 2)

    child = multiprocessing.get_context("fork").Process(target=compare)
    child.start()
    assert exit_code(child) == 0
