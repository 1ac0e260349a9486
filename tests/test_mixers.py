"""The layers: one recurrence however it is called, resets, counts, gradients, baselines, bad input."""

import copy
import itertools
import json
import re

import pytest
import torch
from helpers import LAYOUTS, TOLERANCE, assert_close, relative_error
from mixer_helpers import CHUNKED, SCANNED, SPECS, D, build, each_mixer, everything, normal, random_reset, start
from torch import Tensor

from statemix import SequenceModel, available_backends
from statemix.gates import NORMALIZATIONS
from statemix.mixers import LRU, MIXERS, Attention, Mixer, build_mixer, complete_mixer

# Largest difference over the largest entry, where the linear maps sum their products in another order.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-14}
each_dtype = pytest.mark.parametrize("dtype", CLOSE)


def assert_same(actual: Tensor, expected: Tensor, what: str = "result", mixer: Mixer | None = None) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    limits = TOLERANCE if isinstance(mixer, CHUNKED) else CLOSE
    assert error <= limits[actual.dtype], f"{what}: relative error {error:.3g}"


def assert_same_without_state(actual: Tensor, expected: Tensor, mixer: Mixer) -> None:
    """To the last bit, but for an attention: without a state it has fewer slots to sum over."""
    if isinstance(mixer, Attention):
        assert_close(actual.detach(), expected.detach().double())
    else:
        assert torch.equal(actual, expected)


# ---- one recurrence


def test_every_mixer_is_tried():
    assert {spec["name"] for spec in SPECS.values()} == set(MIXERS)


@each_mixer
@each_dtype
@pytest.mark.parametrize("with_state", [False, True])
def test_call_equals_step_repeated(generator, mixer, dtype, with_state):
    mixer = build(mixer, generator, dtype)
    x = normal(generator, 3, 20, D, dtype=dtype)
    state = start(mixer, generator) if with_state else None
    y, final = mixer(x, state)
    for t in range(x.shape[1]):
        y_t, state = mixer.step(x[:, t], state)
        assert y_t.shape == (3, D)
        assert_same(y_t, y[:, t], f"y at {t}", mixer)
    assert_same(state, final, "state", mixer)


@each_mixer
@pytest.mark.parametrize("grad", [False, True])
def test_a_reset_of_a_step_is_that_of_a_sequence_of_one(generator, mixer, grad):
    mixer = build(mixer, generator)
    x, state, reset = normal(generator, 3, D), start(mixer, generator), torch.tensor([True, False, True])
    state[0] = torch.nan
    before = state.clone()
    with torch.set_grad_enabled(grad):
        y, final = mixer.step(x, state, reset)
        expected = mixer(x[:, None], state, reset[:, None])
        alone, kept = mixer.step(x, mixer.initial_state(3)), mixer.step(x, state)
    assert_same(y, expected[0][:, 0], "y", mixer)
    assert_same(final, expected[1], "state", mixer)
    for actual, of_zeros, of_state in zip((y, final), alone, kept, strict=True):
        assert_same(actual[reset], of_zeros[reset], "a row of a reset", mixer)
        assert_same(actual[~reset], of_state[~reset], "another row", mixer)
    assert torch.equal(state.nan_to_num(7.0), before.nan_to_num(7.0))  # the caller's own stays as it is
    assert_same(mixer.step(x, None, reset)[0], alone[0], "y without a state", mixer)


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_first_state_is_what_none_stands_for(generator, mixer, dtype):
    mixer = build(mixer, generator, dtype)
    state = mixer.initial_state(3)
    assert state.shape == (3, *mixer.state_shape)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = normal(generator, 3, 7, D, dtype=dtype)
    for actual, expected in zip(mixer(x, state), mixer(x), strict=True):
        assert_same_without_state(actual, expected, mixer)


@each_mixer
@pytest.mark.parametrize("with_reset", [False, True])
def test_split_at_every_point_equals_the_whole(generator, mixer, with_reset):
    mixer = build(mixer, generator)
    x, state = normal(generator, 3, 7, D), start(mixer, generator)
    reset = random_reset(generator, 3, 7) if with_reset else None
    whole = everything(mixer, x, state, reset)
    for cuts in [*((cut,) for cut in range(1, 7)), (2, 3, 6)]:
        for what, value in everything(mixer, x, state, reset, cuts).items():
            assert_same(value, whole[what], f"{what}, cut at {cuts}", mixer)


@each_mixer
def test_a_state_that_is_not_passed_on_is_noticed(generator, mixer):
    mixer = build(mixer, generator)
    x = normal(generator, 3, 9, D)
    whole = mixer(x)[0]
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(mixer(x[:, 4:])[0], whole[:, 4:])


@each_mixer
@each_dtype
def test_reset_equals_separate_sequences(generator, mixer, dtype):
    mixer = build(mixer, generator, dtype)
    length, starts = 12, [[0, 5], [], [3, 4, 11]]  # by row: the first step, none, two in a row and the last
    x, state = normal(generator, 3, length, D, dtype=dtype), start(mixer, generator)
    reset = torch.zeros(3, length, dtype=torch.bool)
    for row, times in enumerate(starts):
        reset[row, times] = True
    packed, apart = (tuple(v.clone().requires_grad_() for v in (x, state)) for _ in range(2))
    y, final = mixer(*packed, reset)
    finals = []
    for row, times in enumerate(starts):
        cuts = sorted({0, *times, length})
        for begin, end in itertools.pairwise(cuts):
            carried = None if begin in times else apart[1][row : row + 1]
            piece, last = mixer(apart[0][row : row + 1, begin:end], carried)
            assert_same(y[row : row + 1, begin:end], piece, f"row {row} from {begin}", mixer)
            piece.square().sum().backward(retain_graph=True)
        finals.append(last)
    assert_same(final, torch.cat(finals), "final", mixer)
    y.square().sum().backward()
    assert_same(packed[0].grad, apart[0].grad, "gradient of x", mixer)
    assert_same(packed[1].grad, apart[1].grad, "gradient of state", mixer)
    assert (packed[1].grad[0] == 0).all()  # the reset at the first step overrides the state
    assert (packed[1].grad[1:] != 0).any(dim=(1, 2)).all()


@each_mixer
def test_a_reset_hides_a_state_of_nan(generator, mixer):
    mixer = build(mixer, generator)
    x, reset = normal(generator, 2, 5, D), torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 0] = True
    y, final = mixer(x, torch.full((2, *mixer.state_shape), torch.nan, dtype=x.dtype), reset)
    expected = mixer(x)
    assert_same_without_state(y, expected[0], mixer)
    assert torch.equal(final, expected[1])


@each_mixer
def test_memory_layout_does_not_matter_and_inputs_stay_as_they_are(generator, mixer):
    mixer = build(mixer, generator)
    x, state, reset = normal(generator, 3, 9, D), start(mixer, generator), random_reset(generator, 3, 9)
    before = [v.clone() for v in (x, state, reset)]
    y, final = mixer(x, state, reset)
    assert all(map(torch.equal, (x, state, reset), before))
    layouts = LAYOUTS | {"a slice": lambda v: torch.cat([v, v], dim=1)[:, : v.shape[1]]}
    for name, layout in layouts.items():
        strided = [layout(v) for v in (x, state, reset)]
        assert strided[0].is_contiguous() == (name == "contiguous")
        actual = mixer(*strided)
        assert_same(actual[0], y, name, mixer)
        assert_same(actual[1], final, name, mixer)
    repeated = x[:1].expand(3, -1, -1)  # stride 0
    assert_same(mixer(repeated, state)[0], mixer(repeated.contiguous(), state)[0], "expanded", mixer)


# ---- sizes


@each_mixer
def test_shapes(generator, mixer):
    mixer = build(mixer, generator)
    for batch, length in ((1, 1), (2, 1), (1, 7), (3, 4)):
        y, state = mixer(normal(generator, batch, length, D))
        assert y.shape == (batch, length, D)
        assert state.shape == (batch, *mixer.state_shape)


# ---- gradients


# the gradient of pd_ssm with its one-hot columns is that of another function
@pytest.mark.parametrize("mixer", [name for name in SPECS if name != "pd_ssm"])
def test_gradients_are_the_numerical_ones(generator, mixer):
    mixer = build(mixer, generator)
    inputs = [normal(generator, 2, 3, D), start(mixer, generator, batch=2), *mixer.state_dict().values()]
    reset = torch.tensor([[False, False, True], [False, False, False]])

    def call(x, state, *weights):
        return torch.func.functional_call(mixer, dict(zip(mixer.state_dict(), weights, strict=True)), (x, state, reset))

    leaves = [v.clone().requires_grad_() for v in inputs]
    torch.autograd.grad(sum(out.sum() for out in call(*leaves)), leaves)  # raises if one of them is not used
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_mixer
def test_gradients_reach_the_initial_state_and_every_weight(generator, mixer):
    mixer = build(mixer, generator)
    state = start(mixer, generator).requires_grad_()
    mixer(normal(generator, 3, 4, D), state)[0].square().sum().backward()
    for name, tensor in (("state", state), *mixer.named_parameters()):
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).any(), name
    assert (state.grad != 0).any(dim=(1, 2)).all()  # every row of the batch


# ---- the layers among themselves


@pytest.mark.parametrize("form", ["companion", "observer"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_block_size_1_equals_order_1(generator, normalization, form):
    block = build("bd_lru M=1", generator, normalization=normalization)
    channel = build("h_lru M=1", generator, normalization=normalization, form=form)
    channel.load_state_dict(block.state_dict())
    x, state, reset = normal(generator, 3, 9, D), start(block, generator), random_reset(generator, 3, 9)
    assert_same(channel(x, state, reset)[0], block(x, state, reset)[0])
    assert_same(channel(x, state, reset)[1], block(x, state, reset)[1])


@pytest.mark.parametrize("form", ["companion", "observer"])
@pytest.mark.parametrize("order", [2, 3, 5])
def test_h_lru_equals_bd_lru_with_its_block_written_out(generator, form, order):
    channels = 4
    options = {"normalization": "none"}
    sparse = build("h_lru", generator, num_channels=channels, order=order, form=form, **options)
    dense = build("bd_lru", generator, num_blocks=channels, block_size=order, **options)
    with torch.no_grad():
        sparse.raw_gates.projection.weight /= 4  # nothing normalises these: stay near stability
        sparse.raw_gates.projection.bias /= 4
        for ours, theirs in zip(dense.raw_gates.parameters(), sparse.raw_gates.parameters(), strict=True):
            ours.zero_()
            rows, gates = ours.unflatten(0, (order, order + 1, channels)), theirs.unflatten(0, (order + 1, channels))
            rows[0, order] = gates[order]
            for i in range(order):
                rows[(0, i) if form == "companion" else (i, 0)] = gates[i]
        shift = dense.raw_gates.projection.bias.unflatten(0, (order, order + 1, channels))
        for i in range(1, order):
            shift[(i, i - 1) if form == "companion" else (i - 1, i)] = 1
        values = dense.values.weight.zero_().unflatten(0, (order, channels))
        values[0] = sparse.values.weight
        dense.output.load_state_dict(sparse.output.state_dict())
    x, state, reset = normal(generator, 3, 9, D), start(sparse, generator), random_reset(generator, 3, 9)
    assert_same(sparse(x, state, reset)[0], dense(x, state, reset)[0], "y")
    assert_same(sparse(x, state, reset)[1], dense(x, state, reset)[1], "state")


@pytest.mark.parametrize("mixer", ["bd_lru", "h_lru", "observer"])
def test_fixed_gates_are_the_same_at_every_step(generator, mixer):
    fixed, selective = build(f"{mixer} fixed", generator), build(mixer, generator)
    x = normal(generator, 3, 9, D)
    assert torch.equal(fixed.raw_gates(x), fixed.raw_gates.constant.expand(3, 9, *fixed.raw_gates.shape))

    def linearity_error(layer):
        """Of y in x: only gates that do not depend on x leave it linear, and the same after a delay."""
        y = layer(x)[0]
        delayed = layer(torch.cat([torch.zeros_like(x[:, :1]), x], dim=1))[0][:, 1:]
        return max((layer(2 * x)[0] - 2 * y).abs().max().item(), (delayed - y).abs().max().item())

    assert linearity_error(fixed) < 1e-13
    assert linearity_error(selective) > 1e-2
    fixed(x)[0].square().sum().backward()
    assert (fixed.raw_gates.constant.grad != 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_phases_of_an_lru_are_not_rounded_to_a_half_type(generator, half, tmp_path):
    """A rounded phase is wrong by up to 2^-7 of itself, and the error is taken again at every step of a long memory."""
    torch.manual_seed(0)
    mixer, x = LRU(32, 32), torch.randn(2, 256, 32, generator=generator).to(half)
    exact, exact_state = copy.deepcopy(mixer).double()(x.double())
    rounded = copy.deepcopy(mixer)
    rounded.log_theta.grad = torch.ones(32)
    rounded.to(half)
    y, state = rounded(x)
    assert relative_error(y, exact) < 1e-2
    assert relative_error(state, exact_state) < 1e-2
    assert y.dtype == rounded.values.weight.dtype == rounded.skip.dtype == half
    assert {log.dtype for log in (rounded.log_nu, rounded.log_theta, rounded.log_gamma)} == {torch.float32}
    assert rounded.log_theta.grad.dtype == torch.float32
    assert torch.equal(rounded.float().log_theta, mixer.log_theta)
    assert rounded.double().log_theta.dtype == rounded.log_theta.grad.dtype == torch.float64
    assert rounded.to("meta", half).log_theta.is_meta
    torch.set_default_dtype(half)
    try:
        assert LRU(4, 3).log_nu.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    model = SequenceModel(5, 8, 1, {"name": "lru", "num_channels": 3}).to(half)
    model.save(tmp_path)
    again = SequenceModel.load(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name])
        assert weight.dtype == again[name].dtype


@pytest.mark.parametrize("mixer", [*SCANNED, "lru"])
@pytest.mark.parametrize("backend", [name for name in available_backends("cpu") if name != "reference"])
def test_backends_agree_through_the_layer(generator, mixer, backend):
    reference = build(mixer, generator, backend="reference")
    other = build(mixer, generator, backend=backend)
    other.load_state_dict(reference.state_dict())
    x, state, reset = normal(generator, 3, 13, D), start(reference, generator), random_reset(generator, 3, 13)
    expected = everything(reference, x, state, reset)
    for what, value in everything(other, x, state, reset).items():
        assert_close(value, expected[what], what)
    for what, value in everything(other.float(), x.float(), state.float(), reset).items():
        assert_close(value, expected[what], what)


# ---- as a module


@each_mixer
def test_autocast_to_bfloat16_is_close_to_float32(generator, mixer):
    mixer = build(mixer, generator, torch.float32)
    x, state = normal(generator, 3, 31, D, dtype=torch.float32), start(mixer, generator)
    y, final = mixer(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_final = mixer(x, state)
        again, _ = mixer(x, rounded_final)
        half, half_final = mixer(x.bfloat16())
        half_again, last = mixer(x.bfloat16(), half_final, random_reset(generator, 3, 31))
    # x, three weights, raw gates, values, states and y: eight roundings, each to a relative 2^-8
    for actual, expected in ((rounded, y), (rounded_final, final), (again, mixer(x, final)[0])):
        assert ((actual.float() - expected).abs().max() / expected.abs().max()).item() <= 8 * 2**-8
    assert rounded.dtype == half.dtype == half_again.dtype == torch.bfloat16
    assert rounded_final.dtype == half_final.dtype == last.dtype == torch.float32
    for y in (rounded, half_again):
        gradients = torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()), retain_graph=True)
        for (name, _), gradient in zip(mixer.named_parameters(), gradients, strict=True):
            assert gradient.dtype == torch.float32, name
            assert gradient.isfinite().all(), name
            assert (gradient != 0).any(), name


@each_mixer
def test_copies_state_dicts_and_specs_are_whole(generator, mixer):
    spec, mixer = complete_mixer(SPECS[mixer]), build(mixer, generator, torch.float32)
    x = normal(generator, 3, 9, D, dtype=torch.float32)
    y, state = mixer(x)
    text = json.dumps(spec)
    assert complete_mixer(json.loads(text)) == spec
    loaded = build_mixer(json.loads(text), D)
    assert not torch.equal(loaded(x)[0], y)
    loaded.load_state_dict(mixer.state_dict())
    copied = copy.deepcopy(mixer)
    for parameter in mixer.parameters():
        parameter.data.zero_()  # nothing is shared
    for twin in (loaded, copied):
        assert torch.equal(twin(x)[0], y)
        assert torch.equal(twin(x)[1], state)


@each_mixer
def test_double_makes_everything_double(generator, mixer):
    mixer = build(mixer, generator, torch.float32)
    x, initial = normal(generator, 3, 9, D, dtype=torch.float32), start(mixer, generator)
    single, single_final = mixer(x, initial)
    assert single.dtype == single_final.dtype == torch.float32
    y, state = mixer.double()(x.double(), initial.double())
    assert_close(single, y)
    assert_close(single_final, state)


# ---- bad input

X = "`x` must have shape (B, T, D) with D = 6 and B, T of at least 1, got "
# (shape of x, shape of the state, shape of reset, its dtype, exception, the message after the name); {} is M, N
BAD_CALLS = [
    ((5, D), None, None, None, ValueError, X + "(5, 6)."),
    ((2, 5, D, 1), None, None, None, ValueError, X + "(2, 5, 6, 1)."),
    ((2, 5, D + 1), None, None, None, ValueError, X + "(2, 5, 7)."),
    ((2, 0, D), None, None, None, ValueError, X + "(2, 0, 6)."),
    ((0, 5, D), None, None, None, ValueError, X + "(0, 5, 6)."),
    ((2, 5, D), (2, 99, 1), None, None, ValueError, "`state` must have shape (B, M, N) = (2, {}), got (2, 99, 1)."),
    ((2, 5, D), (3, "M", "N"), None, None, ValueError, "`state` must have shape (B, M, N) = (2, {}), got (3, {})."),
    ((2, 5, D), ("M", "N"), None, None, ValueError, "`state` must have shape (B, M, N) = (2, {}), got ({})."),
    ((2, 5, D), None, (2, 4), bool, ValueError, "`reset` must have shape (B, T) = (2, 5), got (2, 4)."),
    ((2, 5, D), None, (5, 2), bool, ValueError, "`reset` must have shape (B, T) = (2, 5), got (5, 2)."),
    ((2, 5, D), None, (2, 5, 1), bool, ValueError, "`reset` must have shape (B, T) = (2, 5), got (2, 5, 1)."),
    ((2, 5, D), None, (2, 5), torch.uint8, TypeError, "`reset` must be a bool tensor, got torch.uint8."),
    ((2, 5, D), None, (2, 5), torch.float32, TypeError, "`reset` must be a bool tensor, got torch.float32."),
]


@pytest.mark.parametrize("mixer", ["bd_lru", "h_lru", "observer", "lstm", "mamba2", "attention"])
@pytest.mark.parametrize(("x", "state", "reset", "dtype", "error", "text"), BAD_CALLS, ids=lambda v: str(v)[:40])
def test_bad_calls(generator, mixer, x, state, reset, dtype, error, text):
    mixer = build(mixer, generator, torch.float32)
    m, n = mixer.state_shape
    state = None if state is None else torch.zeros([{"M": m, "N": n}.get(size, size) for size in state])
    reset = None if reset is None else torch.zeros(reset, dtype=dtype)
    text = f"{type(mixer).__name__}: " + text.replace("{}", f"{m}, {n}")
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        mixer(torch.zeros(x), state, reset)


@pytest.mark.parametrize("mixer", ["bd_lru", "h_lru", "lstm", "delta_net"])
def test_bad_steps(generator, mixer):
    mixer = build(mixer, generator, torch.float32)
    for shape in ((2, D + 1), (2, 3, D)):
        with pytest.raises(ValueError, match=re.escape(f"step: `x` must have shape (B, D) with D = {D}, got {shape}.")):
            mixer.step(torch.zeros(shape))
    wanted, state = re.escape(f"(B, M, N) = {(2, *mixer.state_shape)}"), torch.zeros(1, *mixer.state_shape)
    for reset in (None, torch.tensor([True, False])):
        with pytest.raises(ValueError, match=f"`state` must have shape {wanted}"):
            mixer.step(torch.zeros(2, D), state, reset)
    name = type(mixer).__name__
    with pytest.raises(ValueError, match=rf"^{name}\.step: `reset` must have shape \(B,\) = \(2,\), got \(2, 1\)\.$"):
        mixer.step(torch.zeros(2, D), None, torch.zeros(2, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=rf"^{name}\.step: `reset` must be a bool tensor, got torch\.float32\.$"):
        mixer.step(torch.zeros(2, D), None, torch.zeros(2))
    with pytest.raises(TypeError, match=rf"^{name}\.step: `reset` must be a tensor, got list\.$"):
        mixer.step(torch.zeros(2, D), None, [True, False])
    with pytest.raises(ValueError, match=rf"^{name}\.initial_state: `batch` must be at least 1, got 0\.$"):
        mixer.initial_state(0)
