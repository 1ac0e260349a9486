"""scan/gpu/layer.py: a mixer served by the GPU against its parts around the loop, and what touches activations."""

import contextlib
import copy
import dataclasses
import re
from collections import Counter

import pytest
import torch
from helpers import LAYOUTS, SCANS, TOLERANCE, assert_close, each_kind, relative_error
from kernel_helpers import WEIGHTS, LayerCase, LayerProblem, make_layer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from statemix import BDLRU, fused
from statemix.scan.gpu import compile, layer

HAS_GPU = torch.cuda.is_available() and not compile.EMULATED
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    """The kernels on a CPU, where there is no GPU."""
    monkeypatch.setattr(compile, "EMULATED", not HAS_GPU)


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """The kinds of the layers that the GPU served."""
    kinds, run = [], layer.layer

    def spy(*arguments, **options):
        kinds.append(options["kind"])
        return run(*arguments, **options)

    monkeypatch.setattr(layer, "layer", spy)
    return kinds


def call(problem: LayerProblem, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mixer as users call it, with these weights."""
    mixer = copy.copy(problem.mixer)
    mixer.backend = "gpu"
    return dataclasses.replace(problem, mixer=mixer).by_the_mixer(inputs)


def results(problem: LayerProblem, **options) -> dict[str, Tensor]:
    there = problem.map(lambda x: x.to(DEVICE))
    if problem.reset is not None:
        there = dataclasses.replace(there, reset=problem.reset.to(DEVICE))
    return {what: x.cpu() for what, x in there.results(lambda inputs: call(there, inputs), **options).items()}


CASES = {
    "block": (
        LayerCase(1, 13, 16, 37, 2, "softmax", True, True),
        LayerCase(2, 5, 5, 64, 1, "tanh", True, False),
        LayerCase(3, 3, 16, 40, 2, "relu", False, True),
        LayerCase(4, 2, 40, 33, 1, "sigmoid", True, True),
        LayerCase(8, 3, 16, 35, 1, "linear", True, True),
        LayerCase(16, 2, 16, 32, 1, "softmax", True, False),
    ),
    "companion": (
        LayerCase(1, 3, 16, 37, 2, "sigmoid", True, True),
        LayerCase(3, 13, 5, 40, 2, "silu", True, True),
        LayerCase(4, 8, 16, 33, 1, "softmax", False, False),
        LayerCase(8, 5, 16, 35, 2, "none", True, True),
        LayerCase(16, 3, 16, 40, 1, "softmax", True, True),
    ),
    "observer": (
        LayerCase(1, 3, 16, 37, 2, "tanh", True, False),
        LayerCase(3, 13, 5, 40, 2, "none", True, True),
        LayerCase(4, 8, 16, 33, 1, "softmax", True, True),
        LayerCase(8, 5, 16, 35, 2, "silu", False, True),
        LayerCase(16, 3, 16, 40, 1, "relu", True, False),
    ),
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in SCANS for case in CASES[kind]])
def test_a_layer_equals_its_parts_around_the_loop(generator, served, kind, case):
    problem = case.problem(generator, kind, torch.float32)
    actual = results(problem)
    assert served == [kind]
    assert actual["final state"].dtype == torch.float32
    expected = problem.expected()
    assert actual.keys() == expected.keys()
    for what, result in actual.items():
        assert_close(result, expected[what], what)


@each_kind
def test_blocks_that_the_read_out_does_not_see_go_on(served, generator, kind):
    case = LayerCase(3, 5, 16, 40, 2, "softmax", True, True)
    problem = case.problem(generator, kind, torch.float32, with_visibility=True)
    actual, expected = results(problem), problem.expected()
    assert served == [kind]
    for what, result in actual.items():
        assert_close(result, expected[what], what)


@each_kind
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "final state"])
def test_gradients_of_one_output_equal_the_loop(generator, kind, outputs):
    problem = LayerCase(2, 5, 5, 40, 1, "softmax", True, True).problem(generator, kind, torch.float32)
    expected = problem.expected(outputs=outputs)
    for what, result in results(problem, outputs=outputs).items():
        assert_close(result, expected[what], what)


HALF_CASES = [(kind, 2, torch.bfloat16) for kind in SCANS]
HALF_CASES += [("block", 8, torch.float16), ("observer", 8, torch.float16)]
# the gradients of a companion's lags are added up in their own dtype, by both: of two the order does not matter
HALF_CASES += [("companion", 2, torch.float16)]


@pytest.mark.parametrize(("kind", "order", "dtype"), HALF_CASES)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_types_round_what_the_parts_round(served, kind, order, dtype, autocast, monkeypatch):
    """With the same scan between them, which test_gpu.py holds to the loop."""
    generator = torch.Generator().manual_seed(order)
    problem = LayerCase(order, 5, 16, 40, 2, "softmax", True, True).problem(generator, kind, torch.float32)
    cotangents = (problem.cotangents[0].to(dtype), problem.cotangents[1])
    inputs = {name: x if autocast or name == "state" else x.to(dtype) for name, x in problem.inputs.items()}
    problem = dataclasses.replace(problem, inputs=inputs, cotangents=cotangents)
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        actual = results(problem)
        monkeypatch.setattr(fused, "undisturbed", lambda engine: False)
        expected = results(problem)
    assert served == [kind]
    assert (actual["y"].dtype, actual["final state"].dtype) == (dtype, torch.float32)
    for what, result in actual.items():
        assert result.dtype == expected[what].dtype
        # the gradient of x is rounded once; of the parts each rounds its own
        roundings = 3 if what == "gradient of x" else 1
        assert relative_error(result, expected[what].double()) <= roundings * TOLERANCE[dtype], what


@each_kind
def test_a_reset_forgets_what_is_not_a_number(generator, kind):
    problem = LayerCase(3, 5, 5, 40, 1, "softmax", True, True).problem(generator, kind, torch.float32)
    problem.reset[0] = torch.arange(40) == 20
    clean, x = results(problem), problem.inputs["x"].clone()
    x[:, 10:20] = torch.nan
    spoiled = problem.inputs | {"x": x, "state": problem.inputs["state"] * torch.inf}
    other = results(dataclasses.replace(problem, inputs=spoiled))
    assert torch.equal(other["y"][:, 20:], clean["y"][:, 20:])
    assert torch.equal(other["final state"], clean["final state"])
    assert not other["y"][:, 10:20].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_result(generator, layout):
    problem = LayerCase(2, 5, 5, 40, 2, "softmax", True, False).problem(generator, "block", torch.float32)
    expected = results(problem)
    inputs = problem.inputs | {name: LAYOUTS[layout](problem.inputs[name]) for name in ("x", "state")}
    for what, result in results(dataclasses.replace(problem, inputs=inputs)).items():
        assert_close(result, expected[what].double(), what)  # a product may add up in another order


# ---- where the GPU must not stand in


def make_mixer(kind: str = "block", backend: str = "gpu"):
    torch.manual_seed(0)
    return make_layer(kind, 5, 16, 2, backend=backend).to(DEVICE)


class Twice(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is nn.functional.linear else result


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Subclass(BDLRU):
    pass  # it may mean anything by its parts


def hook(place: str):
    def change(mixer, stack):
        stack.enter_context(mixer.get_submodule(place).register_forward_hook(lambda module, x, y: 2 * y))

    return change


def patched(mixer, stack):
    forward = nn.Linear.forward
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))


CHANGES = {
    **{f"hook at {place}": hook(place) for place in ("values", "raw_gates", "raw_gates.projection", "output")},
    "global hook": lambda mixer, stack: stack.enter_context(register_module_forward_hook(lambda module, x, y: None)),
    "class forward": patched,
    "subclass of a part": lambda mixer, stack: setattr(mixer.values, "__class__", Doubled),
    "bias": lambda mixer, stack: setattr(mixer, "values", nn.Linear(16, 10, device=DEVICE)),
    "function mode": lambda mixer, stack: stack.enter_context(Twice()),
    "dispatch mode": lambda mixer, stack: stack.enter_context(Watching()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_stands_in_only_where_calls_would_do_the_same(served, change):
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mixer, reference = make_mixer(), make_mixer(backend="reference")
    mixer(x)
    assert served == ["block"]
    with contextlib.ExitStack() as stack:
        torch.manual_seed(1)
        CHANGES[change](mixer, stack)
        torch.manual_seed(1)
        CHANGES[change](reference, stack)
        actual, expected = mixer(x)[0], reference(x)[0]
    assert served == ["block"]
    assert relative_error(actual, expected.double()) <= TOLERANCE[torch.float32]


def test_other_calls_take_the_parts(served):
    mixer, x = make_mixer(), torch.randn(2, 40, 16, device=DEVICE)
    mixer.step(x[:, 0])
    mixer(x[:1, :31])  # packing the weights takes longer than the products
    for backend in ("associative", "reference") if HAS_GPU else ("auto", "associative", "reference"):
        mixer.backend = backend
        mixer(x)  # "auto" never takes the emulator
    for other in (BDLRU(16, 5, 2, selective=False, backend="gpu"), Subclass(16, 5, 2, backend="gpu")):
        other.to(DEVICE)(x)
    assert served == []
    too_large = BDLRU(16, 1, 17, backend="gpu").to(DEVICE)
    start = r"^block_scan: backend 'gpu' cannot be used: it "
    with pytest.raises(RuntimeError, match=start + "serves M up to 16, got M = 17"):
        too_large(x)
    mixer.backend = "gpu"
    mixer.double()
    with pytest.raises(RuntimeError, match=start + "computes in float32, got"):
        mixer(x.double())


# ---- what touches activations

TOUCHING = {"aten::addmm", "aten::mm", "aten::sum", "aten::copy_", "aten::where", "aten::unfold_backward"}
VIEWS = re.compile(
    r"aten::(_reshape_alias|_to_copy|_unsafe_view|alias|as_strided|clone|detach|empty_like|flatten|linear|matmul|new_empty"
    r"|reshape|resolve_conj|resolve_neg|slice|split_with_sizes|squeeze|t|to|transpose|unflatten|unfold|view)"
)  # and what only calls others


def touching(event) -> str | None:
    """The operation of `TOUCHING` that an event of the profiler is or is a part of, the outermost."""
    if event is None:
        return None
    return touching(event.cpu_parent) or (event.name if event.name in TOUCHING else None)


@each_kind
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_reset", [False, True])
def test_nothing_but_products_and_the_scan_touches_activations(kind, autocast, has_reset, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    batch, length, width = 2, 600, 16  # an activation is larger than all weights
    mixer, x = make_layer(kind, 5, width, 3, backend="gpu").to(DEVICE), torch.randn(batch, length, width, device=DEVICE)
    x.requires_grad_()
    reset = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE) if has_reset else None
    state = torch.randn(batch, 3, 5, device=DEVICE, requires_grad=True)
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
    ):
        y, final_state = mixer(x, state, reset)
        torch.autograd.grad([y, final_state], [x, state, *mixer.parameters()], [y.detach(), final_state.detach()])
    large = 4 * batch * length
    events = [e for e in seen.events() if any(torch.Size(shape).numel() > large for shape in e.input_shapes if shape)]
    touched = Counter(e.name for e in events if touching(e) == e.name and touching(e.cpu_parent) is None)
    wanted = Counter({"aten::addmm": 1, "aten::mm": 5, "aten::sum": 1})  # the sum is the gradient of the bias
    wanted["aten::copy_"] = 2 * autocast  # x, and its gradient
    if kind == "companion":  # its lags
        wanted["aten::copy_"] += not has_reset
        wanted.update({"aten::where": 2 * has_reset, "aten::unfold_backward": 1})
    assert touched == wanted
    others = {e.name for e in events if e.name.startswith("aten::") and touching(e) is None}
    assert [name for name in others if not VIEWS.fullmatch(name)] == []


# ---- as operators


@each_kind
def test_a_compiled_layer_is_one_graph_with_the_same_results(kind, served):
    mixer, names = make_mixer(kind), []

    def record(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(1, 40, 16, device=DEVICE, requires_grad=True)
    reset = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    reset[:, 20] = True
    expected = mixer(x, None, reset)
    assert served == [kind]
    actual = torch.compile(mixer, fullgraph=True, backend=record)(x, None, reset)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
    leaves = [x, *mixer.parameters()]
    gradients = (torch.autograd.grad(y.sum() + state.sum(), leaves) for y, state in (expected, actual))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert {"statemix.gpu_pack.default", "statemix.gpu_columns_forward.default"} <= set(names)


@each_kind
def test_fake_tensors_of_a_card_show_what_comes_out(kind):
    """Without a card: torch.compile sees a call for one as this."""
    rows, columns, operators = 3 if kind == "block" else 1, 144 if kind == "block" else 48, torch.ops.statemix
    with FakeTensorMode():
        shapes = [(rows * 20, 16), (rows * 20,), (rows * 5, 16), (16, 15)]
        weights = [torch.empty(shape, device="cuda") for shape in shapes]
        x = torch.empty(80, 16, device="cuda", dtype=torch.bfloat16)
        start = torch.empty(2, 6 if kind == "block" else 8, 4, device="cuda")
        packed = operators.gpu_pack(*weights, kind, 3, torch.bfloat16)
        made = linear(x, *packed[:2]).unflatten(0, (2, 40))
        history, end = operators.gpu_columns_forward(made, start, None, "relu", kind, 3)
        grads = operators.gpu_columns_backward(history, None, made, start, None, history, "relu", kind, 3)
        unpacked = operators.gpu_unpack(*packed, kind, 3, 5, torch.float32)
    assert packed[0].shape == (columns, 16)
    assert history.shape == {"block": (2, 40, 6, 4), "companion": (2, 42, 8), "observer": (2, 40, 8, 4)}[kind]
    wanted = (start, made, start, *weights)
    for one, other in zip((end, *grads, *unpacked), wanted, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


@each_kind
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.14's own opcheck
def test_the_operators_pass_opcheck(generator, kind):
    problem = LayerCase(2, 3, 5, 5, 1, "softmax", True, True).problem(generator, kind, torch.float32)
    there = problem.map(lambda x: x.to(DEVICE))
    weights = [there.inputs[name].requires_grad_() for name in WEIGHTS]
    packed = torch.ops.statemix.gpu_pack(*weights, kind, 2, torch.float32)
    columns = torch.randn(1, 5, packed[0].shape[0], device=DEVICE, requires_grad=True)
    state = torch.randn(1, layer._filled(kind, 2, 3)[0], 2, device=DEVICE, requires_grad=True)
    reset = problem.reset.to(DEVICE)
    for operator, arguments in (
        (torch.ops.statemix.gpu_pack, (*weights, kind, 2, torch.bfloat16)),
        (torch.ops.statemix.gpu_columns_forward, (columns, state, reset, "softmax", kind, 2)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@each_kind
def test_a_second_derivative_is_refused(kind):
    mixer, x = make_mixer(kind), torch.randn(1, 40, 16, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'gpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()
