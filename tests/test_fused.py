"""fused.py: whatever changes what a call of a module does, changes the same by every way into the modules.

Each row of `CHANGES` is done to two equal models. One runs as it is, the other with the kernels kept from standing in
for modules. Both must give the same, and what watches must have seen as much.
"""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, needs_kernels, relative_error
from mixer_helpers import D, build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import statemix.fused
from statemix import BDLRU, SequenceModel, block_scan, kernels
from statemix.backbone import Layer, SwiGLU
from statemix.decoder import Decoder
from statemix.generate import generate
from statemix.mixers import MIXERS, build_mixer
from statemix.mixers.linear_recurrence import RECURRENCE, RawGates

pytestmark = needs_kernels

WIDTH = 16
KINDS = {
    "block": {"name": "bd_lru", "num_blocks": 4, "block_size": 4},  # the weights of values and output are square
    "companion": {"name": "h_lru", "num_channels": 8, "order": 2},
    "observer": {"name": "h_lru", "num_channels": 8, "order": 2, "form": "observer"},
}


def make_model(kind: str = "block", **options) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(11, WIDTH, 2, KINDS[kind], **options)
    with torch.no_grad():
        model.head.weight.mul_(4)  # or the likeliest token would be a near tie
        for norm in (model.norm, model.layers[0].mixer_norm, model.layers[0].mlp_norm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
    return model


# ---- ways in


def draw(model: SequenceModel, *shape: int) -> Tensor:
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(model.embedding.weight.dtype)


def with_gradients(model: SequenceModel) -> list[Tensor]:
    mixer, x = model.layers[0].mixer, draw(model, 2, 40).requires_grad_()
    y, state = mixer(x)
    leaves = [x, *(weight for weight in mixer.parameters() if weight.requires_grad)]
    return [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)]


def two_steps(step: Callable, first: Tensor, second: Tensor) -> Any:
    y, state = step(first, None)
    return y, step(second, state)


def decode(model: SequenceModel) -> Any:
    decoder = Decoder(model, batch=2)
    return [decoder.step(torch.tensor([token, 3])) for token in (4, 1)], decoder.state


TOKENS = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(2))
WAYS: dict[str, tuple[Callable, str]] = {  # with the kernel that each takes in a plain model
    "mixer, one": (lambda model: model.layers[0].mixer(draw(model, 3, 1)), "statemix_layer_step"),
    "mixer, many": (lambda model: model.layers[0].mixer(draw(model, 2, 40)), "statemix_layer_forward"),
    "mixer, step": (
        lambda model: two_steps(model.layers[0].mixer.step, draw(model, 3), draw(model, 3) / 2),
        "statemix_layer_step",
    ),
    "layer, step": (
        lambda model: two_steps(model.layers[0].step, draw(model, 3), draw(model, 3) / 2),
        "statemix_pair_step",
    ),
    "model, many": (lambda model: model(TOKENS), "statemix_layer_forward"),
    "model, one": (lambda model: model(TOKENS[:, :1]), "statemix_pair_step"),
    "model, step": (lambda model: two_steps(model.step, TOKENS[:, 0], TOKENS[:, 1]), "statemix_pair_step"),
    "decoder": (decode, "statemix_model_step"),
    "generate": (
        lambda model: torch.tensor(generate(model, [[1, 2, 3], [7]], 6, temperature=0)),
        "statemix_model_step",
    ),
}
each_way = pytest.mark.parametrize("way", WAYS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [part for result in results for part in flat(result)]


# ---- changes

MIXER, VALUES = "layers.0.mixer", "layers.0.mixer.values"
PLACES = [name for name, module in make_model().named_modules() if not name.startswith("layers.1") and name != "layers"]


def scaled(result: Any) -> Any:
    """Of a module's result, the first tensor times 1.5."""
    return (1.5 * result[0], *result[1:]) if isinstance(result, tuple) else 1.5 * result


class ScaledMixer(BDLRU):
    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return scaled(super().mix(x, state, reset))


class Int8(Tensor):
    """A weight of 8 bits that says it is float32, as quantised weights do."""

    @staticmethod
    def __new__(cls, weight: Tensor):
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.numbers = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        args = torch.utils._pytree.tree_map(lambda x: x.numbers * x.scale if isinstance(x, cls) else x, args)
        return function(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    """Sees every call of these operators."""

    def __init__(self, seen: list, *operators: Any) -> None:
        super().__init__()
        self.seen, self.operators = seen, operators

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.operators:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Scaling(TorchFunctionMode):
    """Makes every product larger."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 1.5 * result if function is nn.functional.linear else result


def hooked(register: str, place: str = VALUES, **options) -> Callable:
    """A hook on a part that sees its calls; those that may also change them."""

    def change(model: SequenceModel, seen: list, stack: contextlib.ExitStack) -> None:
        def hook(module: nn.Module, *arguments: Any) -> Any:
            seen.append(register)
            if register == "register_forward_pre_hook":
                return ((1.5 * arguments[0][0],), {}) if options.get("with_kwargs") else (1.5 * arguments[0][0],)
            return scaled(arguments[-1]) if register == "register_forward_hook" else None

        getattr(model.get_submodule(place), register)(hook, **options)

    return change


def hooked_everywhere(register: Callable) -> Callable:
    def hook(seen: list) -> Callable:
        return lambda module, *arguments: seen.append(type(module).__name__)

    return lambda model, seen, stack: stack.callback(register(hook(seen)).remove)


def patched(owner: Any, name: str) -> Callable:
    """A function of torch, or a method of a class or of the module at a place, made larger."""

    def change(model: SequenceModel, seen: list, stack: contextlib.ExitStack) -> None:
        place = model.get_submodule(owner) if isinstance(owner, str) else owner
        patch, before = stack.enter_context(pytest.MonkeyPatch.context()), getattr(place, name)
        patch.setattr(place, name, lambda *arguments, **options: scaled(before(*arguments, **options)))

    return change


def subclassed(place: str) -> Callable:
    """A module that is of a subclass with a forward of its own."""

    def change(model: SequenceModel, seen: list, stack: contextlib.ExitStack) -> None:
        module = model.get_submodule(place)
        plain = type(module)
        forward = {"forward": lambda self, *arguments, **options: scaled(plain.forward(self, *arguments, **options))}
        module.__class__ = type("Scaled", (plain,), forward)

    return change


def exchanged(place: str, make: Callable) -> Callable:
    def change(model: SequenceModel, seen: list, stack: contextlib.ExitStack) -> None:
        torch.manual_seed(3)
        model.set_submodule(place, make(model.get_submodule(place)))

    return change


def reweighted(make: Callable[[Tensor], Tensor], place: str = VALUES, grad: bool = True) -> Callable:
    def change(model: SequenceModel, seen: list, stack: contextlib.ExitStack) -> None:
        module = model.get_submodule(place)
        module.weight = nn.Parameter(make(module.weight.detach()), requires_grad=grad)

    return change


def within(enter: Callable) -> Callable:
    return lambda model, seen, stack: stack.enter_context(enter(seen))


def replicate(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module on each device: its weights are attributes and no parameters."""
    replica = module._replicate_for_data_parallel()
    for name, weight in module._parameters.items():
        setattr(replica, name, None if weight is None else weight.clone())
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    return replica


def quantise(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]


def negated(weight: Tensor) -> Tensor:
    """The same numbers with a pending minus sign before their opposites."""
    return torch._neg_view(-weight)


def transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous().T


def share(model: SequenceModel) -> None:
    model.layers[0].mixer.values.weight = model.layers[1].mixer.output.weight


def for_model(function: Callable[[SequenceModel], Any]) -> Callable:
    return lambda model, seen, stack: function(model)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.t.default)
SAME: dict[str, Callable] = {  # these leave the numbers as they are, or nearly
    "nothing": lambda model, seen, stack: None,
    "backward hook": hooked("register_full_backward_hook"),
    "backward pre-hook": hooked("register_full_backward_pre_hook"),
    "global hook": hooked_everywhere(nn.modules.module.register_module_forward_hook),
    "global pre-hook": hooked_everywhere(nn.modules.module.register_module_forward_pre_hook),
    "global backward hook": hooked_everywhere(nn.modules.module.register_module_full_backward_hook),
    "norm of no epsilon": exchanged("layers.0.mlp_norm", lambda norm: nn.RMSNorm(WIDTH, eps=None)),
    "last norm of no epsilon": exchanged("norm", lambda norm: nn.RMSNorm(WIDTH, eps=None)),
    "weight norm": for_model(lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(VALUES))),
    "weight norm in the SwiGLU": for_model(
        lambda model: nn.utils.parametrizations.weight_norm(model.layers[0].mlp.output)
    ),
    "quantised": exchanged(VALUES, quantise),
    "all quantised": lambda model, seen, stack: [
        exchanged(name, quantise)(model, seen, stack)
        for name, module in list(model.named_modules())
        if type(module) is nn.Linear
    ],
    "int8 weight": reweighted(Int8, grad=False),
    "int8 weight of the gates": reweighted(Int8, "layers.0.mixer.raw_gates.projection", grad=False),
    "int8 weight in the SwiGLU": reweighted(Int8, "layers.0.mlp.output", grad=False),
    "int8 weight of a norm": reweighted(Int8, "layers.0.mlp_norm", grad=False),
    "replica": for_model(lambda model: model.__dict__.update(replicate(model).__dict__)),
    "compiled": for_model(lambda model: model.get_submodule(VALUES).compile(backend="eager")),
    "dispatch mode": within(lambda seen: Watching(seen, *PRODUCTS)),
    "autocast": within(lambda seen: torch.autocast("cpu", torch.bfloat16)),
    "negated weight": reweighted(negated),
    "transposed weight": reweighted(transposed),
    "transposed weight in the SwiGLU": reweighted(transposed, "layers.0.mlp.output"),
    "transposed weight of the head": reweighted(transposed, "head"),
    "bfloat16": for_model(lambda model: model.bfloat16()),
    "float64": for_model(lambda model: model.double()),
}
OTHER: dict[str, Callable] = {  # these must change them, or their rows would show nothing
    "forward hook with kwargs": hooked("register_forward_hook", with_kwargs=True),
    "forward hook, always": hooked("register_forward_hook", always_call=True),
    "pre-hook": hooked("register_forward_pre_hook"),
    "pre-hook with kwargs": hooked("register_forward_pre_hook", with_kwargs=True),
    **{f"hook at {place or 'model'}": hooked("register_forward_hook", place) for place in PLACES},
    **{f"subclass at {place or 'model'}": subclassed(place) for place in PLACES},
    "class forward": patched(nn.Linear, "forward"),
    "class forward of a norm": patched(nn.RMSNorm, "forward"),
    "class forward of gates": patched(RawGates, "forward"),
    "class forward of a SwiGLU": patched(SwiGLU, "forward"),
    "class forward of a layer": patched(Layer, "forward"),
    "class forward of a model": patched(SequenceModel, "forward"),
    "class mix": patched(BDLRU, "mix"),
    "class call": patched(nn.Linear, "__call__"),
    "call of all modules": patched(nn.Module, "_call_impl"),
    "function": patched(nn.functional, "linear"),
    "instance forward": patched(VALUES, "forward"),
    "instance forward of a mixer": patched(MIXER, "forward"),
    "instance forward of a SwiGLU": patched("layers.0.mlp", "forward"),
    "instance mix": patched(MIXER, "mix"),
    "subclass with a mix of its own": exchanged(MIXER, lambda mixer: ScaledMixer(WIDTH, 4, 4)),
    "another module": exchanged(VALUES, lambda linear: nn.Sequential(linear, nn.Tanh())),
    "bias": exchanged(VALUES, lambda linear: nn.Linear(WIDTH, linear.out_features)),
    "bias in the SwiGLU": exchanged("layers.0.mlp.output", lambda linear: nn.Linear(linear.in_features, WIDTH)),
    "bias in the head": exchanged("head", lambda linear: nn.Linear(WIDTH, 11)),
    "another norm": exchanged("layers.0.mlp_norm", lambda norm: nn.LayerNorm(WIDTH)),
    "another norm before the mixer": exchanged("layers.0.mixer_norm", lambda norm: nn.LayerNorm(WIDTH)),
    "another last norm": exchanged("norm", lambda norm: nn.LayerNorm(WIDTH)),
    "embedding of bounded norm": for_model(lambda model: setattr(model.embedding, "max_norm", 0.1)),
    "parametrisation": for_model(
        lambda model: nn.utils.parametrize.register_parametrization(model.get_submodule(VALUES), "weight", nn.Tanh())
    ),
    "dropout": for_model(lambda model: setattr(model.layers[0].dropout, "p", 1 - 1e-12)),  # nothing is left
    "function mode": within(lambda seen: Scaling()),
    "shared weight": for_model(share),
}
CHANGES = SAME | OTHER


def run(way: Callable, change: str, unfused: bool, kind: str = "block") -> tuple[list[Tensor], list]:
    """What a way into a changed model gives, and what was seen on it."""
    model, seen = make_model(kind), []
    with contextlib.ExitStack() as stack:
        CHANGES[change](model, seen, stack)
        if unfused:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(statemix.fused, "undisturbed", lambda *engine: False)
        torch.manual_seed(5)
        return [result.detach() for result in flat(way(model))], seen


def assert_same(way: Callable, change: str, kind: str = "block") -> None:
    (actual, seen), (expected, wanted) = (run(way, change, unfused, kind) for unfused in (False, True))
    assert len(actual) == len(expected)
    for got, right in zip(actual, expected, strict=True):
        assert (got.shape, got.dtype) == (right.shape, right.dtype)
        assert relative_error(got, right.double()) <= TOLERANCE.get(right.dtype, 0)
    assert sorted(seen) == sorted(wanted)


@each_way
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch moves its quantisation to another package
def test_a_kernel_stands_in_only_where_calls_would_do_the_same(way, change):
    with torch.no_grad():
        assert_same(WAYS[way][0], change)


@each_way
@each_kind
@pytest.mark.parametrize("change", [f"hook at {VALUES}", f"hook at {MIXER}", "class forward", "instance forward"])
def test_so_it_is_for_every_kind_of_scan(way, kind, change):
    with torch.no_grad():
        assert_same(WAYS[way][0], change, kind)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_the_calls(change):
    if change in ("int8 weight", "int8 weight of the gates", "all quantised"):
        pytest.skip("they have no gradient")
    assert_same(with_gradients, change)


@each_way
@each_kind
def test_a_plain_model_takes_the_kernels(calls, way, kind):
    """Or the table would compare a path with itself."""
    with torch.no_grad():
        WAYS[way][0](make_model(kind))
    assert WAYS[way][1] in calls


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.filterwarnings("ignore")
def test_every_change_changes_what_the_model_gives(change):
    with torch.no_grad():
        (actual, _), (plain, _) = (run(WAYS["model, many"][0], name, True) for name in (change, "nothing"))
    assert relative_error(actual[0], plain[0].double()) > 1e-3


# ---- the cases of their own


@pytest.mark.parametrize("place", PLACES)
def test_a_step_is_the_forward_of_one_token_bit_for_bit(place):
    model, seen = make_model(), []
    CHANGES[f"hook at {place or 'model'}"](model, seen, contextlib.ExitStack())
    with torch.no_grad():
        full, calls = model(torch.tensor([[1]]))[0][:, 0], len(seen)
        step = model.step(torch.tensor([1]))[0]
    assert torch.equal(full, step)
    assert 0 < calls == len(seen) / 2


@pytest.mark.parametrize("name", MIXERS)
def test_replicas_of_data_parallel_run(generator, name):
    mixer, x = build(name, generator, torch.float32), torch.randn(2, 5, D, generator=generator)
    for got, right in zip(replicate(mixer)(x), mixer(x), strict=True):
        assert relative_error(got.detach(), right.detach().double()) <= TOLERANCE[torch.float32]


# mlstm reads a weight itself, then a method; the choice of one of the other pd_ssm is no small change
@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"mlstm", "pd_ssm"} | {"pd_ssm soft"}))
@pytest.mark.filterwarnings("ignore")
def test_quantised_mixers_run(generator, name):
    mixer, x = build(name, generator, torch.float32).eval(), torch.randn(2, 40, D, generator=generator)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(mixer), {nn.Linear})
    with torch.no_grad():
        for steps in (x, x[:, :1]):
            assert relative_error(quantised(steps)[0], mixer(steps)[0].double()) < 0.2
        _, state = quantised.step(x[:, 0])
        assert relative_error(quantised.step(x[:, 1], state)[0], mixer(x[:, :2])[0][:, 1].double()) < 0.2


# Beside its products a layer has its scan. The loop is of sums of products, which torch does not count; the associative
# scan multiplies blocks, more often than there are steps.
SCAN_FLOPS: dict[str, Callable[[int], int] | None] = {
    "auto": lambda gates: gates,
    "cpu": lambda gates: gates,
    "reference": lambda gates: 0,
    "associative": None,
}


@each_kind
@pytest.mark.parametrize("backend", SCAN_FLOPS)
@pytest.mark.parametrize("shape", [(2, 64), (2, 1)], ids=["many", "one"])
def test_flops_are_counted(kind, backend, shape):
    mixer = build_mixer(KINDS[kind] | {"backend": backend}, WIDTH)
    with FlopCounterMode(display=False) as counter:
        y, _ = mixer(torch.randn(*shape, WIDTH, requires_grad=True))
    projection, steps = mixer.raw_gates.projection, shape[0] * shape[1]
    weights = (projection.weight, mixer.values.weight, mixer.output.weight)
    products = 2 * steps * sum(weight.numel() for weight in weights)
    forward = counter.get_total_flops() - products
    with counter:
        y.sum().backward()
    backward = counter.get_total_flops() - 2 * products  # of x and of the weights; the counter began anew
    gates = 2 * steps * projection.out_features
    if (flops := SCAN_FLOPS[backend]) is None:
        assert shape[1] == 1 or (forward > gates and backward > 2 * gates)
    else:
        assert (forward, backward) == (flops(gates), 2 * flops(gates))


def test_a_scan_alone_is_counted_under_its_name():
    gates, values = torch.randn(1, 3, 2, 3, 4), torch.randn(1, 3, 2, 4)
    for _ in range(2):  # each counter is told
        with FlopCounterMode(display=False) as counter:
            block_scan(gates, values)
        assert counter.get_flop_counts()["Global"] == {torch.ops.statemix.scan_forward: 2 * gates.numel()}


def test_a_mode_sees_the_scan_as_an_operator():
    gates, values = torch.randn(1, 3, 2, 3, 4), torch.randn(1, 3, 2, 4)
    expected = block_scan(gates, values)
    with Watching(seen := [], torch.ops.statemix.scan_forward.default):
        assert torch.equal(block_scan(gates, values), expected)
    assert seen == ["statemix.scan_forward.default"]


def test_a_default_device_disturbs_nothing(calls):
    with torch.no_grad(), torch.device("cpu"):
        WAYS["model, step"][0](make_model())
    assert "statemix_pair_step" in calls


def pending(x: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a conjugate: memory holds their opposites."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def test_a_pending_sign_counts_wherever_numbers_are_read(calls):
    mixer, x, state = make_model().layers[0].mixer, torch.randn(2, 40, 1), torch.randn(2, 4, 4)
    x = x.expand(2, 40, WIDTH).contiguous()
    assert pending(x).is_neg()
    assert torch.equal(pending(x), x)
    with torch.no_grad():
        for call, argument in ((mixer, x), (mixer, x[:, :1]), (mixer.step, x[:, 0])):
            for got, right in zip(call(pending(argument), pending(state)), call(argument, state), strict=True):
                assert torch.equal(got, right)
        gates, values = torch.randn(2, 5, 1, 2, 1), torch.randn(2, 5, 1, 1)  # of N = 1: there a pending view is dense
        assert torch.equal(block_scan(pending(gates), pending(values)), block_scan(gates, values))
        inner = torch.randn(3, 8)
        assert torch.equal(statemix.fused.gated(pending(inner)), statemix.fused.gated(inner))
    assert {"statemix_layer_forward", "statemix_layer_step", "statemix_scan_forward", "statemix_gated"} <= set(calls)


def test_gradients_with_a_pending_sign():
    mixer, x = make_model().layers[0].mixer, torch.randn(2, 40, WIDTH, requires_grad=True)
    y, _ = mixer(x)
    gradients = [
        torch.autograd.grad(y, x, sign(torch.ones_like(y)), retain_graph=True)[0] for sign in (pending, copy.copy)
    ]
    assert torch.equal(*gradients)


REFUSED = r"^kernels: every tensor must have memory, got one of shape|^setStorage: sizes"  # the latter is torch's


@each_way
def test_a_weight_whose_memory_was_given_back_is_refused(way):
    model = make_model()
    for name in ("values", "output"):
        model.layers[0].mixer.get_submodule(name).weight.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
        WAYS[way][0](model)


def test_scans_refuse_memory_that_was_given_back():
    gates, values = torch.randn(1, 3, 2, 3, 4), torch.randn(1, 4, 2, 4)[:, 1:]  # at an offset
    values.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=REFUSED):
        block_scan(gates, values)


@each_way
def test_a_copy_of_a_model_that_ran_has_its_own_weights(way):
    """What a module keeps for its kernels must not go with a copy."""
    model = make_model()
    with torch.no_grad():
        WAYS[way][0](model)
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.mul_(1.5)
        actual = flat(WAYS[way][0](other))
        expected = make_model()
        expected.load_state_dict(other.state_dict())
        for got, right in zip(actual, flat(WAYS[way][0](expected)), strict=True):
            assert torch.equal(got, right)


def test_a_module_that_is_gone_leaves_nothing(calls):
    gc.disable()
    try:
        model = make_model()
        with torch.no_grad():
            WAYS["model, step"][0](model)
        weight = weakref.ref(model.layers[0].mixer.values.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_without_the_library_a_module_is_read_at_each_call(monkeypatch):
    """As where there is a GPU and no compiler: no snapshot can be made."""
    mixer = make_model().layers[0].mixer
    anywhere = statemix.fused.Engine(serves=lambda device: True, dtypes=(torch.float32,), autocasts=True)
    part = RECURRENCE.on(anywhere, allows=lambda mixer: True, arrange=lambda mixer, weights: weights)
    monkeypatch.setattr(kernels, "load_problem", lambda: "there is none")
    assert part.inputs(mixer)[2] is mixer.values.weight
    mixer.values.weight = nn.Parameter(torch.zeros(16, WIDTH))
    assert part.inputs(mixer)[2] is mixer.values.weight
