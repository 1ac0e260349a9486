"""What every mixer keeps to, and the parts of the baselines: convolution, chunks, first weights, bad options."""

import math
import re

import pytest
import torch
from helpers import TOLERANCE, assert_close, relative_error
from mixer_helpers import CHUNKED, SPECS, D, build, each_mixer, normal, random_reset, start

from statemix import mixers
from statemix.gates import NORMALIZATIONS
from statemix.mixers import BDLRU, GRU, HLRU, LRU, LSTM, MIXERS, build_mixer, complete_mixer
from statemix.mixers.chunks import SelectiveDecay, decays
from statemix.mixers.convolution import ShortConvolution

# ---- laws


@each_mixer
@pytest.mark.parametrize("with_reset", [False, True])
def test_the_past_does_not_see_the_future(generator, mixer, with_reset):
    mixer, length, now = build(mixer, generator), 13, 6
    x, state = normal(generator, 3, length, D), start(mixer, generator)
    changed = x.clone()
    changed[:, now:] = 1e3 * normal(generator, 3, length - now, D)
    resets = [None, None]
    if with_reset:
        resets = [random_reset(generator, 3, length) for _ in range(2)]
        resets[1][:, :now] = resets[0][:, :now]
    before, after = (mixer(*call)[0] for call in ((x, state, resets[0]), (changed, state, resets[1])))
    assert torch.equal(before[:, :now], after[:, :now])
    assert (before[:, now] != after[:, now]).any(dim=1).all()


@each_mixer
def test_rows_of_a_batch_do_not_mix(generator, mixer):
    mixer = build(mixer, generator)
    x, state, reset = normal(generator, 4, 13, D), start(mixer, generator, 4), random_reset(generator, 4, 13)
    y, final = mixer(x, state, reset)
    others = [part.clone() for part in (x, state, reset)]
    others[0][1:], others[1][1:], others[2][1:] = 1e3, 7, True
    changed, changed_final = mixer(*others)
    assert torch.equal(y[0], changed[0])
    assert torch.equal(final[0], changed_final[0])
    assert (y[1:] != changed[1:]).any(dim=(1, 2)).all()
    for row in range(4):
        alone = mixer(*(part[row : row + 1] for part in (x, state, reset)))
        assert relative_error(alone[0], y[row : row + 1]) < TOLERANCE[torch.float64]
        assert relative_error(alone[1], final[row : row + 1]) < TOLERANCE[torch.float64]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch asks for it where it breaks a graph
@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_and_eager_calls_agree(generator, mixer):
    """As one graph, but for those of torch.nn, which torch.compile leaves to torch; also where autocast is on."""
    torch.compiler.reset()  # all mixers have one `forward`, of which torch compiles so many versions and no more
    mixer = build(mixer, generator, torch.float32)
    compiled = torch.compile(mixer, fullgraph=not isinstance(mixer, LSTM | GRU), backend="aot_eager")
    x, state, reset = normal(generator, 2, 5, D).float(), start(mixer, generator, 2), random_reset(generator, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(compiled(x, state, reset), mixer(x, state, reset), strict=True):
            assert torch.equal(actual, expected)
    leaves = [x.requires_grad_(), state.requires_grad_(), *mixer.parameters()]
    eager, traced = mixer(x, state, reset), compiled(x, state, reset)
    cotangents = [normal(generator, *output.shape).float() for output in eager]
    gradients = (torch.autograd.grad(outputs, leaves, cotangents) for outputs in (traced, eager))
    for actual, expected in zip([*traced, *next(gradients)], [*eager, *next(gradients)], strict=True):
        assert_close(actual, expected.detach().double())


@each_mixer
def test_a_mixer_of_bfloat16_keeps_its_state_in_float32(generator, mixer):
    mixer = build(mixer, generator, torch.float32).bfloat16()
    x, state = normal(generator, 2, 9, D).bfloat16(), start(mixer, generator, 2).float()
    y, final = mixer(x, state)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    for rounded, exact in zip((y, final), mixer.double()(x.double(), state.double()), strict=True):
        assert (rounded - exact).norm() < 8 * 2**-8 * exact.norm()  # at most eight roundings, each to a relative 2^-8


@each_mixer
def test_every_mixer_can_be_built_without_memory_at_any_width(mixer):
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        module = build_mixer(SPECS[mixer], d_model=1)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(module.output, torch.nn.Linear)
    assert module.output.out_features == 1
    assert module.output.bias is None


# ---- chunks


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if "chunk_size" in complete_mixer(spec)])
def test_the_chunk_size_does_not_matter(generator, name):
    whole = build(name, generator, chunk_size=64)
    x, state, reset = normal(generator, 3, 37, D), start(whole, generator), random_reset(generator, 3, 37)
    y, final = whole(x, state, reset)
    for size in (1, 5, 37):
        other = build(name, generator, chunk_size=size)
        other.load_state_dict(whole.state_dict())
        assert_close(other(x, state, reset)[0], y, f"y, chunks of {size}")
        assert_close(other(x, state, reset)[1], final, f"state, chunks of {size}")


def test_decays_are_products_of_the_steps_between():
    found = decays(torch.tensor([0.5, 0.25, 0.1, 0.8], dtype=torch.float64).log())
    expected = [[1, 0, 0, 0], [0.25, 1, 0, 0], [0.025, 0.1, 1, 0], [0.02, 0.08, 0.8, 1]]
    assert_close(found.between, torch.tensor(expected, dtype=torch.float64))
    assert_close(found.from_start, torch.tensor([0.5, 0.125, 0.0125, 0.01], dtype=torch.float64))
    assert_close(found.to_end, torch.tensor(expected[3], dtype=torch.float64))
    assert_close(found.whole, torch.tensor(0.01, dtype=torch.float64))


def test_a_strong_decay_costs_the_others_no_precision():
    """A difference of cumulative sums would have an error of 1e4 * 6e-8 in the logarithm."""
    logarithms = torch.tensor([-1e4, -0.1, -0.2, -0.3])
    between = decays(logarithms).between
    assert_close(between[1:, 1:], decays(logarithms[1:].double()).between)
    logarithms = torch.tensor([-0.1, -torch.inf, -0.2, -0.3], requires_grad=True)
    found = decays(logarithms)
    assert torch.equal(found.between[1:, 0], torch.zeros(3))
    assert torch.equal(found.from_start[1:], torch.zeros(3))
    (found.between.sum() + found.from_start.sum()).backward()
    assert logarithms.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mamba2", "gated_delta_net"])
def test_gradients_are_finite_where_everything_decays(generator, name):
    mixer = build(name, generator, torch.float32)
    with torch.no_grad():
        mixer.decay.rate.fill_(12)  # exp(-exp(12) dt) is 0 in floating point
    x = normal(generator, 2, 9, D, dtype=torch.float32).requires_grad_()
    mixer(x, start(mixer, generator, 2), random_reset(generator, 2, 9))[0].sum().backward()
    for parameter in (x, *mixer.parameters()):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if isinstance(build_mixer(spec, D), CHUNKED)])
def test_zeros_have_finite_gradients(generator, name):
    """A key of zeros has no direction, and a read of zeros no scale."""
    mixer = build(name, generator, torch.float32)
    x = torch.zeros(2, 9, D, requires_grad=True)
    y, final = mixer(x)
    (y.sum() + final.sum()).backward()
    assert y.isfinite().all()
    for parameter in (x, *mixer.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()


# ---- the short convolution


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_short_convolution_is_that_of_torch(generator, size, bias):
    convolution = ShortConvolution(5, size, bias=bias).double()
    assert convolution.state_shape == (size - 1, 5)
    x, state = normal(generator, 2, 11, 5), normal(generator, 2, size - 1, 5)
    kernel = convolution.weight.flip(0).T[:, None]  # torch's first tap is the oldest
    padded = torch.cat([state, x], dim=1)
    expected = torch.nn.functional.conv1d(padded.mT, kernel, convolution.bias, groups=5).mT
    y, final = convolution(x, state, None)
    assert_close(y, expected)
    assert torch.equal(final, padded[:, 11:])


def test_a_short_convolution_by_hand():
    convolution = ShortConvolution(1, 3)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[1.0], [10.0], [100.0]]))
    x, state = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), torch.tensor([[[5.0], [6.0]]])  # 5, 6, then 1, 2, 3, 4
    reset = torch.tensor([[False, False, True, False]])
    y, final = convolution(x, state, None)
    assert y.flatten().tolist() == [561, 612, 123, 234]
    assert final.flatten().tolist() == [3, 4]
    y, final = convolution(x, state, reset)
    assert y.flatten().tolist() == [561, 612, 3, 34]
    assert final.flatten().tolist() == [3, 4]
    final = convolution(x, state, torch.tensor([[False, False, False, True]]))[1]
    assert final.flatten().tolist() == [0, 4]
    y, final = convolution(x[:, :1], state, torch.tensor([[True]]))  # shorter than the filter
    assert y.flatten().tolist() == [1]
    assert final.flatten().tolist() == [0, 1]


# ---- the first weights


def test_lru_starts_on_its_ring():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = LRU(3, 20_000, r_min=0.5, r_max=0.9, max_phase=0.3)
    radius, phase = torch.exp(-mixer.log_nu.exp()), mixer.log_theta.exp()
    assert 0.5 <= radius.min() < 0.501
    assert 0.899 < radius.max() <= 0.9
    assert 0 < phase.min() < 0.001
    assert 0.299 < phase.max() <= 0.3
    # uniform in area: a half of them lies within sqrt((r_min^2 + r_max^2) / 2); five standard errors
    share = (radius < math.sqrt((0.25 + 0.81) / 2)).float().mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    assert relative_error(mixer.log_gamma.exp().double(), (1 - radius.double() ** 2).sqrt()) < 1e-5
    assert mixer.values.weight.std().item() == pytest.approx(6**-0.5, rel=0.02)
    assert mixer.output.weight.std().item() == pytest.approx(20_000**-0.5, rel=0.02)


def test_lru_of_the_widest_ring_is_finite():
    mixer = LRU(2, 5000, r_min=0, r_max=1 - 1e-7)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())


def test_selective_decays_start_between_a_thousandth_and_a_tenth():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decay = SelectiveDecay(5000)
    steps, logarithms = decay(torch.zeros(1, 1, 5000))
    assert 1e-3 * (1 - 1e-4) <= steps.min() < 1.02e-3
    assert 0.098 < steps.max() <= 0.1 * (1 + 1e-4)
    assert steps.median().item() == pytest.approx(1e-2, rel=0.1)  # log-uniform
    rates = -logarithms / steps
    assert 0.99 < rates.min() < 1.01
    assert 15.9 < rates.max() < 16.01


HALF_LIVES = (0.5, 3.0, 40.0, 1000.0)
LAYERS = [
    (BDLRU, (D, 3, 1), {}),
    (BDLRU, (D, 3, 4), {}),
    (HLRU, (D, 3, 4), {}),
    (HLRU, (D, 3, 4), {"form": "observer"}),
    (BDLRU, (D, 3, 4), {"selective": False}),
    (HLRU, (D, 3, 3), {"selective": False}),
]


@pytest.mark.parametrize(("cls", "sizes", "options"), LAYERS, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_memory_halves_in_the_steps_asked_for(generator, cls, sizes, options, normalization):
    for half_life in HALF_LIVES:
        mixer = cls(*sizes, normalization=normalization, gate_half_life=half_life, **options).double()
        state = normal(generator, 1, *mixer.state_shape).abs()  # positive: no part of it is lost
        steps = max(1, round(half_life))
        with torch.no_grad():
            if cls is HLRU:  # the other roots die out
                _, state = mixer(torch.zeros(1, 60, D, dtype=torch.float64), state)
            _, later = mixer(torch.zeros(1, steps, D, dtype=torch.float64), state)
        # the sum of a block: what its differences hold halves sooner
        measured = -steps / (later.sum(1) / state.sum(1)).log2()
        assert measured.min() > 0.99 * half_life
        assert measured.max() < 1.01 * half_life


def test_every_component_of_a_block_remembers():
    """A difference of components halves in h / 2 steps: its eigenvalue is the square of the largest."""
    mixer = BDLRU(D, 1, 3, gate_half_life=10.0).double()
    state = torch.tensor([[[1.0], [-1.0], [0.0]]], dtype=torch.float64)
    with torch.no_grad():
        _, later = mixer(torch.zeros(1, 5, D, dtype=torch.float64), state)
    assert relative_error(later, 0.5 * state) < 1e-6  # the biases were rounded to float32
    weights = torch.softmax(mixer.raw_gates.projection.bias.view(3, 4, 1), dim=1)[..., 0]
    assert weights.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert weights[:, 3].tolist() == pytest.approx([1 - 2**-0.1] * 3, rel=1e-6)


@pytest.mark.parametrize(("cls", "sizes", "options"), LAYERS, ids=str)
def test_a_half_life_draws_the_same_random_numbers(cls, sizes, options):
    after, weights = [], []
    for half_life in (None, 8.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mixer = cls(*sizes, gate_half_life=half_life, **options)
            after.append(torch.rand(3))
            weights.append(mixer.state_dict())
    assert torch.equal(*after)
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed == {"raw_gates.projection.bias" if options.get("selective", True) else "raw_gates.constant"}


# ---- bad options

SIZES = {"num_blocks": 2, "block_size": 2, "num_channels": 2, "order": 2, "hidden_size": 2, "head_dim": 2, "context": 2}
RING = "`r_min` and `r_max` must have 0 <= r_min <= r_max < 1"
BACKENDS = "['associative', 'auto', 'cpu', 'gpu', 'reference']"
BAD = [  # mixer, option, value, exception, the message after the class
    ("lru", "num_channels", 0, ValueError, "`num_channels` must be at least 1, got 0."),
    ("lru", "r_min", "0.9", TypeError, "`r_min` must be a number, got '0.9'."),
    ("lru", "r_min", 0.9999, ValueError, f"{RING}, got 0.9999 and 0.999."),
    ("lru", "r_max", 1.0, ValueError, f"{RING}, got 0.9 and 1.0."),
    ("lru", "r_min", -0.1, ValueError, f"{RING}, got -0.1 and 0.999."),
    ("lru", "max_phase", 0, ValueError, "`max_phase` must be above 0 and finite, got 0."),
    ("lru", "max_phase", math.nan, ValueError, "`max_phase` must be above 0 and finite, got nan."),
    ("lru", "backend", "gqu", ValueError, f"`backend` must be one of {BACKENDS}, got 'gqu'."),
    ("gru", "hidden_size", 1.5, TypeError, "`hidden_size` must be an int, got 1.5."),
    ("mlstm", "num_heads", 3, ValueError, "num_heads * `head_dim` must be a multiple of 4, got 3 * 2."),
    ("mlstm", "conv_size", 0, ValueError, "`conv_size` must be at least 1, got 0."),
    ("mamba2", "head_dim", 0, ValueError, "`head_dim` must be at least 1, got 0."),
    ("mamba2", "state_dim", True, TypeError, "`state_dim` must be an int, got True."),
    ("mamba2", "conv_size", 0, ValueError, "`conv_size` must be at least 1, got 0."),
    ("mamba2", "chunk_size", 0, ValueError, "`chunk_size` must be at least 1, got 0."),
    ("mamba2", "num_groups", 3, ValueError, "`num_heads` must be a multiple of num_groups=3, got 4."),
    ("delta_net", "conv_size", -1, ValueError, "`conv_size` must be at least 0, got -1."),
    ("delta_net", "conv_size", False, TypeError, "`conv_size` must be an int, got False."),
    ("delta_net", "negative_eigenvalues", 1, TypeError, "`negative_eigenvalues` must be True or False, got 1."),
    ("gated_delta_net", "expand_values", 0, ValueError, "`expand_values` must be at least 1, got 0."),
    ("gated_delta_net", "num_heads", None, TypeError, "`num_heads` must be an int, got None."),
    ("delta_product", "rank", 0, ValueError, "`rank` must be at least 1, got 0."),
    ("delta_product", "rank", 5, ValueError, "`rank` must be at most 4, got 5."),
    ("delta_product", "gated", "yes", TypeError, "`gated` must be True or False, got 'yes'."),
    ("pd_ssm", "dictionary_size", 0, ValueError, "`dictionary_size` must be at least 1, got 0."),
    ("pd_ssm", "expand", 0.5, TypeError, "`expand` must be an int, got 0.5."),
    ("pd_ssm", "one_hot", 0, TypeError, "`one_hot` must be True or False, got 0."),
    ("attention", "head_dim", 3, ValueError, "`head_dim` must be even, for the pairs of a rotation, got 3."),
    ("attention", "context", 1, ValueError, "`context` must be at least 2, got 1."),
    ("bd_lru", "gate_half_life", 0, ValueError, "`gate_half_life` must be above 0 and finite, got 0."),
    ("bd_lru", "gate_half_life", math.inf, ValueError, "`gate_half_life` must be above 0 and finite, got inf."),
    ("h_lru", "gate_half_life", math.nan, ValueError, "`gate_half_life` must be above 0 and finite, got nan."),
    ("h_lru", "gate_half_life", "10", TypeError, "`gate_half_life` must be a number, got '10'."),
    ("h_lru", "gate_half_life", True, TypeError, "`gate_half_life` must be a number, got True."),
]


@pytest.mark.parametrize(("name", "option", "value", "error", "text"), BAD, ids=lambda value: str(value)[:30])
def test_bad_options(name, option, value, error, text):
    known = complete_mixer({"name": name} | {key: value for key, value in SIZES.items() if key in needed(name)})
    build_mixer(known, D)
    with pytest.raises(error, match=f"^{re.escape(f'{MIXERS[name].__name__}: {text}')}$"):
        build_mixer(known | {option: value}, D)


def needed(name: str) -> set[str]:
    """The options of a mixer that have no default."""
    return set(SIZES) & {key for spec in SPECS.values() if spec["name"] == name for key in complete_mixer(spec)}


# ---- kernels of other packages


def test_library_kernels_are_looked_for(monkeypatch):
    def version(package):
        if package != "mamba-ssm":
            raise mixers.PackageNotFoundError(package)
        return "2.2.4"

    monkeypatch.setattr(mixers, "version", version)
    facts = mixers.library_kernels()
    served = "delta_net, gated_delta_net, delta_product"
    assert facts == {
        "flash-linear-attention": f"not installed; runs {served} for CUDA tensors of 16 bits",
        "mamba-ssm": "2.2.4 is installed; runs mamba2 for CUDA tensors of 16 bits",
    }
    named = {name for served in mixers.KERNEL_LIBRARIES.values() for name in served.split(", ")}
    assert named <= set(MIXERS)
