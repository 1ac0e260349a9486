"""One step of a residual pair as one call of the kernels (csrc/step.h), against the modules it replaces, in float64."""

import pytest
import torch
from helpers import TOLERANCE, each_instruction_set, needs_kernels, relative_error
from kernel_helpers import READOUTS, STEPPED, assert_readout, assert_step, make_pair, make_readout, pair_by_the_modules
from torch import Tensor, nn

from statemix import kernels
from statemix.backbone import SwiGLU
from statemix.gates import NORMALIZATIONS
from statemix.mixers import BDLRU
from statemix.mixers.linear_recurrence import RawGates
from statemix.model import SequenceModel

pytestmark = needs_kernels


@each_instruction_set
@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize("batch", [1, 3, 8, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_what_the_modules_do(generator, calls, instruction_set, kind, batch, dtype):
    pair = make_pair(STEPPED[kind]).to(dtype)
    x, state = torch.randn(batch, 20, generator=generator, dtype=dtype), None
    for _ in range(3):  # 20 and 33 are no multiples of a vector
        assert_step(pair, x, state)
        with torch.no_grad():
            x, state = pair.step(x, state)
    assert calls.count("statemix_pair_step") == 6


@each_instruction_set
@pytest.mark.parametrize(("batch", "width", "count"), READOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_what_the_modules_make(generator, instruction_set, batch, width, count, dtype):
    assert_readout(torch.randn(batch, width, generator=generator, dtype=dtype), *make_readout(width, count, dtype))


def test_threads_change_no_bit_of_logits(generator, threads):
    """2 MB of weights: enough for three threads, and 1,001 rows are no multiple of what one takes at once."""
    x, (norm, head) = torch.randn(2, 512, generator=generator), make_readout(512, 1001)
    logits = []
    for count in (1, 2, 3):
        threads(count)
        logits.append(assert_readout(x, norm, head))
    assert all(torch.equal(y, logits[0]) for y in logits)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normalization(generator, calls, normalization):
    pair = make_pair(STEPPED["block"] | {"normalization": normalization})
    assert_step(pair, torch.randn(2, 20, generator=generator), torch.randn(2, 3, 5, generator=generator))
    assert "statemix_pair_step" in calls


def test_each_norm_has_its_own_epsilon(generator, calls):
    pair = make_pair(STEPPED["block"])
    pair.mixer_norm.eps, pair.mlp_norm.eps = 0.1, 1.0
    assert_step(pair, torch.randn(2, 20, generator=generator), None)
    assert "statemix_pair_step" in calls


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_bit(generator, threads, count):
    """1.7 MB of weights: enough for three threads. Each product is one thread's, whichever it is."""
    pair = make_pair({"name": "bd_lru", "num_blocks": 40, "block_size": 5}, width=96, mlp_size=500)
    x, state = torch.randn(2, 96, generator=generator), torch.randn(2, 5, 40, generator=generator)
    with torch.no_grad():
        threads(1)
        expected = pair.step(x, state)
        threads(count)
        for _ in range(20):
            assert all(map(torch.equal, pair.step(x, state), expected))
    assert_step(pair, x, state)


@pytest.mark.parametrize("watched", ["mixer", "mixer_norm", "mlp_norm", "mlp", "mlp.gate_and_input", "mixer.output"])
def test_a_hook_is_called(generator, calls, watched):
    pair, seen = make_pair(STEPPED["block"]), []
    pair.get_submodule(watched).register_forward_hook(lambda *arguments: seen.append(watched))
    assert_step(pair, torch.randn(1, 20, generator=generator), None)
    assert len(seen) >= 1
    assert "statemix_pair_step" not in calls


@pytest.mark.parametrize("case", ["gradients", "too many rows", "another mixer", "parametrised", "two layouts"])
def test_what_the_kernel_does_not_serve_is_done_by_the_modules(generator, calls, case):
    pair = make_pair({"name": "lstm", "hidden_size": 6} if case == "another mixer" else STEPPED["block"])
    x = torch.randn(kernels.STEP_ROWS + 1 if case == "too many rows" else 2, 20, generator=generator)
    if case == "two layouts":
        pair.mlp.output.weight = nn.Parameter(pair.mlp.output.weight.detach().T.contiguous().T)
    if case == "parametrised":
        nn.utils.parametrizations.weight_norm(pair.mlp.output)
    if case == "gradients":
        y, _ = pair.step(x, None)
        assert relative_error(y.detach(), pair_by_the_modules(pair, x, None)[0]) <= TOLERANCE[x.dtype]
        assert y.requires_grad
    else:
        assert_step(pair, x, None)
    assert "statemix_pair_step" not in calls


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Doubled(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(BDLRU):
    def mix(self, x, state, reset):
        y, state = super().mix(x, state, reset)
        return y + 1, state


class SlowGates(RawGates):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Wrapped(Tensor):
    """A tensor without memory of its own, as quantised and distributed ones are."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, cls) else x, args)
        result = function(*args, **(kwargs or {}))
        return cls(result) if function is torch.ops.aten.detach.default else result


EXCHANGED = {
    "mixer_norm": lambda: nn.LayerNorm(20),
    "mlp_norm": lambda: nn.RMSNorm(20, eps=None),
    "mlp": lambda: Doubled(20, 33),
    "mlp.output": lambda: nn.Linear(33, 20, bias=True),
    "mlp.gate_and_input": lambda: Halved(20, 66, bias=False),
    "mixer": lambda: Shifted(20, 5, 3),
    "mixer.raw_gates": lambda: SlowGates(20, (3, 4, 5), True),
    "mixer.output": lambda: Halved(15, 20, bias=False),
}


@pytest.mark.parametrize("part", EXCHANGED)
def test_a_part_that_was_exchanged_is_called(generator, calls, part):
    """The kernel has the arithmetic of the parts that a Layer is made of, and of no others."""
    pair = make_pair(STEPPED["block"])
    pair.set_submodule(part, EXCHANGED[part]())
    assert_step(pair, torch.randn(2, 20, generator=generator), None)
    assert "statemix_pair_step" not in calls


@pytest.mark.parametrize("part", ["mlp.output", "mlp_norm", "mixer.values", "mixer.raw_gates.projection"])
def test_a_weight_without_an_address_is_not_read(generator, calls, part):
    pair, x = make_pair(STEPPED["block"]), torch.randn(2, 20, generator=generator)
    expected = pair_by_the_modules(pair, x, None)[0]
    module = pair.get_submodule(part)
    module.weight = nn.Parameter(Wrapped(module.weight.detach()), requires_grad=False)
    with torch.no_grad():
        assert relative_error(pair.step(x, None)[0], expected) <= TOLERANCE[x.dtype]
        y, _ = pair.mixer(torch.randn(2, 40, 20, generator=generator))
    assert y.isfinite().all()
    assert "statemix_pair_step" not in calls


def test_a_model_steps_as_it_runs(generator, calls):
    torch.manual_seed(0)
    model = SequenceModel(11, 32, 3, STEPPED["companion"])
    tokens = torch.randint(11, (2, 9), generator=generator)
    with torch.no_grad():
        expected, state = model(tokens), None
        for t in range(9):
            logits, state = model.step(tokens[:, t], state)
            assert relative_error(logits, expected[0][:, t]) <= TOLERANCE[torch.float32]
    assert calls.count("statemix_pair_step") == 27
    for got, wanted in zip(state, expected[1], strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]
