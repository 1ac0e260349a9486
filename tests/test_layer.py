"""The fused layer of kernels/layers.py and csrc/layer.h, against torch's products around the float64 loop."""

import dataclasses
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SCANS, assert_close, make_raw_gates, relative_error
from torch import Tensor
from torch.func import functional_call

from statemix import BDLRU, HLRU, block_scan, kernels
from statemix.kernels import layers, library
from statemix.mixers.linear_recurrence import LinearRecurrence

pytestmark = pytest.mark.skipif(
    kernels.load_problem() is not None, reason=f"no compiled kernels: {kernels.load_problem()}"
)
each_kind = pytest.mark.parametrize("kind", SCANS)
each_instruction_set = pytest.mark.parametrize("instruction_set", kernels.instruction_sets(), indirect=True)

WEIGHTS = ("raw_gates.projection.weight", "raw_gates.projection.bias", "values.weight", "output.weight")


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(2)


def build(kind: str, blocks: int, width: int, order: int, **options) -> LinearRecurrence:
    return (
        BDLRU(width, blocks, order, **options) if kind == "block" else HLRU(width, blocks, order, form=kind, **options)
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer, its inputs by name (x, the weights, perhaps a state), and the cotangents of y and of the final state."""

    mixer: LinearRecurrence  # without weights of its own, and its products are torch's
    inputs: dict[str, Tensor]
    reset: Tensor | None
    cotangents: tuple[Tensor, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return Problem(self.mixer, inputs, self.reset, tuple(function(x) for x in self.cotangents))

    def split(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        return inputs["x"], tuple(inputs[name] for name in WEIGHTS), inputs.get("state")

    def fused(self, inputs: dict[str, Tensor] | None = None, recompute: bool | None = None) -> tuple[Tensor, Tensor]:
        options = {"normalization": self.mixer.normalization, "kind": self.mixer.kind, "recompute": recompute}
        order = self.mixer.state_shape[0]
        return kernels.layer(*self.split(self.inputs if inputs is None else inputs), self.reset, order=order, **options)

    def by_the_loop(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, weights, state = self.split(inputs)
        return functional_call(self.mixer, dict(zip(WEIGHTS, weights, strict=True)), (x, state, self.reset))

    def results(self, function: Callable, *options, outputs: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
        """y, the final state, and the gradient of the sum of the chosen `outputs` * cotangents in every input."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        made = function(leaves, *options)
        chosen = [made[i] for i in outputs], [self.cotangents[i] for i in outputs]
        unused = 0 not in outputs  # only y is read through the output weight
        gradients = torch.autograd.grad(chosen[0], list(leaves.values()), chosen[1], materialize_grads=unused)
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {"y": made[0].detach(), "final state": made[1].detach()} | named

    def expected(self, **options) -> dict[str, Tensor]:
        return self.map(Tensor.double).results(self.by_the_loop, **options)


def make_problem(
    generator: torch.Generator,
    kind: str,
    order: int = 3,
    blocks: int = 17,
    width: int = 5,
    length: int = 31,
    batch: int = 2,
    normalization: str = "softmax",
    with_state: bool = True,
    with_reset: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random weights and inputs, rounded to `dtype`. In every other block the decay is slow: see `make_raw_gates`."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = order if kind == "block" else 1
    bias = make_raw_gates(generator, normalization, (2, 1, rows, order + 1, blocks))[order % 2]
    slow = (torch.arange(blocks) + order) % 2 == 0
    scale = torch.where(slow, 1e-4, 0.3 / (order + 1) if normalization == "none" else 1.0)
    weights = (
        (normal(rows * (order + 1), blocks, width) * scale[:, None]).flatten(0, 1) / width**0.5,
        bias.flatten(),
        normal(rows * blocks, width) / width**0.5,
        normal(width, order * blocks) / (order * blocks) ** 0.5,
    )
    inputs = {"x": normal(batch, length, width)} | dict(zip(WEIGHTS, weights, strict=True))
    if with_state:
        inputs["state"] = normal(batch, order, blocks)
    reset = None
    if with_reset:
        reset = torch.rand(batch, length, generator=generator) < 0.05
        reset[0, -1] = reset[-1, 0] = reset[0, length // 2] = True
    with torch.device("meta"):
        mixer = build(kind, blocks, width, order, normalization=normalization, backend="reference")
    cotangents = normal(batch, length, width), normal(batch, order, blocks)
    return Problem(mixer, inputs, reset, cotangents).map(lambda x: x.to(dtype))


def assert_results(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for what, actual in results.items():
        assert_close(actual, expected[what], what)


# ---- against the loop

CASES = [  # order, blocks, width, length, batch, normalization, with_state, with_reset
    (1, 33, 16, 300, 2, "softmax", True, True),
    (1, 16, 128, 300, 1, "softmax", False, False),
    (1, 1, 1, 1, 1, "sigmoid", True, False),
    (2, 17, 40, 65, 3, "sigmoid", True, True),
    (3, 15, 5, 64, 2, "relu", False, True),
    (4, 16, 128, 31, 1, "tanh", True, True),
    (5, 3, 16, 65, 2, "silu", True, False),
    (6, 1, 1, 300, 3, "linear", False, True),
    (7, 33, 40, 2, 2, "none", True, True),
    (8, 16, 16, 65, 1, "softmax", True, True),
    (9, 17, 5, 31, 2, "sigmoid", False, False),
    (10, 1, 128, 64, 1, "relu", True, True),
    (11, 3, 40, 1, 3, "tanh", True, True),
    (12, 15, 1, 65, 1, "silu", True, True),
    (13, 17, 16, 31, 2, "softmax", False, True),
    (14, 3, 5, 64, 1, "linear", True, False),
    (15, 1, 16, 2, 3, "none", True, False),
    (16, 33, 16, 31, 1, "softmax", True, True),
    (17, 15, 40, 31, 1, "relu", True, True),
    (33, 3, 5, 65, 2, "softmax", True, True),
]


@functools.cache
def solved(kind: str, case: int, dtype: torch.dtype) -> tuple[Problem, dict[str, Tensor]]:
    problem = make_problem(torch.Generator().manual_seed(case), kind, *CASES[case], dtype=dtype)
    return problem, problem.expected()


@each_instruction_set
@each_kind
@pytest.mark.parametrize("case", range(len(CASES)))
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
    problem = make_problem(generator, kind, order, 17, 5, length, 7)
    reset = torch.zeros(7, length, dtype=torch.bool)
    reset[0, 0] = True
    reset[1, -order:] = True
    reset[2, :order] = True
    reset[3] = True
    reset[4, ::2] = True
    reset[5] = torch.rand(length, generator=generator) < 0.2
    problem = dataclasses.replace(problem, reset=reset)
    assert_results(problem.results(problem.fused, recompute), problem.expected())


@pytest.mark.parametrize("kind", ["companion", "observer"])
def test_lags_longer_than_a_chunk_equal_the_loop(generator, kind):
    problem = make_problem(generator, kind, 64, 128, 5, 100, 1, with_reset=True)  # chunks of 24 steps
    for reset in (problem.reset, None):
        cut = dataclasses.replace(problem, reset=reset)
        assert_results(cut.results(cut.fused), cut.expected())


@each_kind
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "final state"])
def test_gradients_of_one_output_equal_the_loop(generator, kind, outputs):
    problem = make_problem(generator, kind, with_reset=True)
    assert_results(problem.results(problem.fused, outputs=outputs), problem.expected(outputs=outputs))


@each_kind
@pytest.mark.parametrize("normalization", ["softmax", "silu"])
def test_gradients_equal_finite_differences(generator, kind, normalization):
    problem = make_problem(generator, kind, 2, 3, 2, 4, 2, normalization, with_reset=True)
    leaves = [x.requires_grad_() for x in problem.inputs.values()]
    for recompute in (False, True):
        assert torch.autograd.gradcheck(
            lambda *xs, keep=recompute: problem.fused(dict(zip(problem.inputs, xs, strict=True)), keep), leaves
        )


@each_instruction_set
@each_kind
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
def test_a_memory_of_ten_thousand_steps_is_accurate(generator, instruction_set, kind, normalization):
    blocks, length = 16, 65536
    problem = make_problem(generator, kind, 1, blocks, blocks, length, 1, normalization, dtype=torch.float32)
    gate_weight, bias, value_weight, output_weight = (problem.inputs[name] for name in WEIGHTS)
    gate_weight.zero_()  # products that are exact: only the recurrence is left
    bias.view(2, blocks)[0], bias.view(2, blocks)[1] = 5.0, torch.linspace(-9.3, -4, blocks)
    value_weight.copy_(torch.eye(blocks))
    output_weight.copy_(torch.eye(blocks))
    wide = problem.map(Tensor.double).inputs
    raw_gates = wide[WEIGHTS[1]].view(1, 2, blocks).expand(1, length, 1, 2, blocks)
    states = block_scan(
        raw_gates, wide["x"][:, :, None], wide["state"], normalization=normalization, backend="associative"
    )
    y, final_state = problem.fused()
    assert relative_error(y, states[:, :, 0]) <= 2e-6
    assert relative_error(final_state, states[:, -1]) <= 2e-6


# ---- laws


@each_instruction_set
@each_kind
@pytest.mark.parametrize("sizes", [(1, 3, 5, 1100, 1), (3, 33, 5, 65, 3), (2, 16, 16, 400, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_output_and_a_second_run_nothing(
    generator, instruction_set, threads, kind, sizes, dtype
):
    problem = make_problem(generator, kind, *sizes, with_reset=True, dtype=dtype)
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
    problem = make_problem(generator, kind, length=65, with_reset=True)
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
    problem = make_problem(generator, kind, 3, 33, 16, 300, 3)
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
    problem = make_problem(generator, kind, 3, 5, 4, 40, 1, with_reset=True)
    problem.reset[0] = torch.arange(40) == 20
    (y, final_state), x = problem.fused(), problem.inputs["x"].clone()
    x[:, 10:20] = torch.nan
    other, other_state = problem.fused(problem.inputs | {"x": x, "state": problem.inputs["state"] * torch.inf})
    assert torch.equal(other[:, 20:], y[:, 20:])
    assert torch.equal(other_state, final_state)


# ---- inputs as they come

SHIFTED = {"odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS | SHIFTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_layout_gives_the_same_result_and_no_input_changes(generator, kind, layout, dtype):
    problem = make_problem(generator, kind, 3, 16, 16, 65, 3, with_reset=True, dtype=dtype)
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
    problem = make_problem(generator, kind, 3, 5, 4, 40, 2)
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
    problem = make_problem(generator, kind)
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
    problem = make_problem(generator, kind, 3, 17, 5, 31, 2, dtype=torch.float32)
    size = 2 * 31 * (3 if kind == "block" else 1) * 4 * 17 * 4  # of raw gates, 4 bytes each
    for limit, recompute, wanted in (
        (size, None, True),
        (size - 1, None, False),
        (size - 1, False, True),
        (size, True, False),
    ):
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
    problem, run = make_problem(generator, kind, 3, 17, 5, 31, 2), library.Library.run
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
    problem, over = make_problem(generator, "block", 3, 17, 5, 31, 2), threading.Event()
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
    problem = make_problem(generator, kind, 3, 170, 53, 1, kernels.STEP_ROWS, dtype=dtype)
    x, weights, state = problem.split(problem.inputs)
    options = {"normalization": "softmax", "kind": kind}
    threads(1)
    alone = [kernels.layer_step(x[b], weights, state[b : b + 1], **options) for b in range(len(x))]
    for batch, count in itertools.product((2, 3, 5, 7, len(x)), (1, 2, 3)):
        threads(count)
        y, final_state = kernels.layer_step(x[:batch, 0].contiguous(), weights, state[:batch].contiguous(), **options)
        for b in range(batch):
            assert torch.equal(y[b], alone[b][0][0]), (batch, count, b)
            assert torch.equal(final_state[b], alone[b][1][0]), (batch, count, b)


# ---- as a module


def make_mixer(generator: torch.Generator, kind: str, dtype: torch.dtype = torch.float64, **sizes) -> tuple:
    """A mixer with the weights of a problem, and the problem."""
    problem = make_problem(generator, kind, dtype=dtype, **sizes)
    order, blocks = problem.mixer.state_shape
    mixer = build(kind, blocks, problem.mixer.d_model, order).to(dtype)
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
def test_the_operators_pass_opcheck(generator, kind):
    problem = make_problem(generator, kind, 2, 3, 4, 5, with_reset=True)
    x, weights, state = problem.split({name: x.requires_grad_() for name, x in problem.inputs.items()})
    inputs = (x, *weights, state)
    for reset, keep in ((problem.reset, True), (None, False)):
        arguments = (*inputs, reset, "softmax", kind, keep)
        checks = torch.library.opcheck(torch.ops.statemix.layer_forward, arguments)
        assert set(checks.values()) == {"SUCCESS"}
        with torch.no_grad():
            y, final_state, states, kept = layers._layer(*arguments)
        arguments = (
            torch.ones_like(y),
            torch.ones_like(final_state) if keep else None,
            *(x.detach() for x in inputs),
            reset,
            states,
            kept,
            "softmax",
            kind,
        )
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
    problem = make_problem(generator, kind, 2, 3, 2, 3)
    x = problem.inputs["x"].requires_grad_()
    y, _ = problem.fused()
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'cpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()


@each_kind
def test_a_child_of_fork_finishes(generator, kind):
    problem = make_problem(
        generator, kind, 1, 9, 4, 40, 4
    )  # small: torch itself must not want its threads in the child
    expected = problem.results(problem.fused)  # here it has two
    child = os.fork()
    if child == 0:
        code = 1
        try:
            results = problem.results(problem.fused)
            code = 0 if torch.equal(results["y"], expected["y"]) else 2
        finally:
            os._exit(code)
    for _ in range(300):
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child did not finish in 30 s")
