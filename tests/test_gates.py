"""gates.py: each normalisation against its formula in NumPy, and where it could divide by zero."""

import numpy as np
import pytest
import torch
from helpers import assert_close, make_raw_gates, numpy_weights

from statemix.gates import NORMALIZATIONS, normalize

FLOATS = (torch.float32, torch.float64)
BOUNDED = [name for name in NORMALIZATIONS if name != "none"]
SUM_IS_ONE = [name for name in BOUNDED if name != "relu"]  # relu adds its floor to the sum


def test_the_names_are_those_of_the_spec():
    assert list(NORMALIZATIONS) == ["softmax", "sigmoid", "relu", "tanh", "silu", "linear", "none"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 3), (2, 5, 2, 3), (2, 3, 17, 1)])
def test_weights_follow_the_formula(generator, normalization, dtype, shape):
    raw = make_raw_gates(generator, normalization, shape).to(dtype)
    expected = torch.from_numpy(numpy_weights(normalization, raw.double().numpy(), axis=len(shape) - 2))
    assert_close(normalize(raw, normalization, dim=len(shape) - 2), expected)


def test_weights_written_by_hand():
    raw = torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)
    assert normalize(raw, "linear", dim=0).tolist() == [0.25, -0.75, 0.0]
    assert normalize(raw, "relu", dim=0).tolist() == [1 / 1.003, 0.0, 0.0]
    assert normalize(raw, "none", dim=0).tolist() == [1.0, -3.0, 0.0]
    logarithms = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()
    assert_close(normalize(logarithms, "softmax", dim=0), torch.tensor([1, 2, 5], dtype=torch.float64) / 8)
    # s(log x) = x / (1 + x): 1/2, 3/4, 3/4
    odds = torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64).log()
    assert_close(normalize(odds, "sigmoid", dim=0), torch.tensor([2, 3, 3], dtype=torch.float64) / 8)
    # tanh(log x) = (x^2 - 1) / (x^2 + 1): 3/5, -3/5, 4/5
    doubled = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64).log()
    assert_close(normalize(doubled, "tanh", dim=0), torch.tensor([0.3, -0.3, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("normalization", SUM_IS_ONE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_absolute_weights_sum_to_one(generator, normalization, dtype):
    raw = make_raw_gates(generator, normalization, (4, 50, 5, 6, 8)).to(dtype)
    sums = normalize(raw, normalization, dim=3).double().abs().sum(3)
    # M+1 = 6 weights, each within a unit in the last place of its share
    assert (sums - 1).abs().max() <= 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("normalization", ["tanh", "silu", "linear", "relu"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_row_has_the_weights_zero_and_finite_gradients(generator, normalization, dtype):
    raw = torch.randn(3, 4, 2, generator=generator, dtype=dtype)
    raw[1] = 0
    raw.requires_grad_()
    weights = normalize(raw, normalization, dim=1)
    assert torch.equal(weights[1], torch.zeros(4, 2, dtype=dtype))
    others = torch.from_numpy(numpy_weights(normalization, raw.detach()[::2].double().numpy(), axis=1))
    assert_close(weights[::2], others)
    weights.square().add(weights).sum().backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[::2] != 0).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_that_underflows_keeps_its_ratios_or_has_the_weights_zero(dtype):
    raw = torch.tensor([-1e4, -1e4, -1e4 - 1, -1e4 - 2], dtype=dtype, requires_grad=True)
    # s(z) = e^z there: the ratios 1 : 1 : 1/e : 1/e^2, although every s(z) is zero in floating point
    ratios = torch.tensor([0, 0, -1, -2], dtype=torch.float64).exp()
    assert_close(normalize(raw, "sigmoid", dim=0), ratios / ratios.sum())
    for normalization in ("silu", "relu"):
        assert torch.equal(normalize(raw, normalization, dim=0), torch.zeros(4, dtype=dtype))
    for normalization in ("sigmoid", "silu", "relu"):
        assert torch.autograd.grad(normalize(raw, normalization, dim=0)[0], raw)[0].isfinite().all()


# -88 and -740: where exp leaves the normal numbers of float32 and float64
EXTREMES = [[v] * 4 for v in (100.0, -100.0, 1e4, -1e4, -88.0, -740.0, 1e-40, 1e-310)] + [
    [100.0, -100.0, 0.0, 1.0],
    [1e4, -1e4, 1e4, -1e4],
    [-100.0, -100.0, -99.0, -1e4],
    [1e4, 0.0, 0.0, 0.0],
]


@pytest.mark.parametrize("normalization", BOUNDED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", EXTREMES, ids=str)
def test_extreme_raw_gates_have_finite_bounded_weights_and_finite_gradients(generator, normalization, dtype, row):
    raw = torch.tensor(row, dtype=dtype, requires_grad=True)
    weights = normalize(raw, normalization, dim=0)
    assert weights.isfinite().all()
    assert weights.detach().double().abs().sum() <= 1 + 4 * torch.finfo(dtype).eps
    cotangent = torch.randn(4, generator=generator, dtype=dtype)
    assert torch.autograd.grad(weights, raw, cotangent)[0].isfinite().all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_are_the_numerical_ones(generator, normalization):
    # normal numbers: none is so near 0 that a difference quotient would cross the kink of relu or |f|
    raw = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert raw.abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda z: normalize(z, normalization, 2), (raw,))
    assert torch.autograd.gradgradcheck(lambda z: normalize(z, normalization, 2), (raw,))


def test_weights_do_not_depend_on_the_shift_of_softmax_or_the_scale_of_linear(generator):
    raw = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    assert_close(normalize(raw + 300, "softmax", dim=1), normalize(raw, "softmax", dim=1))
    assert_close(normalize(raw * 300, "linear", dim=1), normalize(raw, "linear", dim=1))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nan_stays_in_its_row(generator, normalization):
    raw = torch.randn(3, 4, 2, generator=generator)
    clean = normalize(raw, normalization, dim=1)
    raw[1, 2, 0] = torch.nan
    weights = normalize(raw, normalization, dim=1)
    touched = torch.zeros(3, 4, 2, dtype=torch.bool)
    touched[1, slice(2, 3) if normalization == "none" else slice(None), 0] = True
    assert np.array_equal(weights.isnan(), touched)
    assert torch.equal(weights[~touched], clean[~touched])


def test_an_unknown_name_is_refused_with_the_known_ones():
    names = r"\['linear', 'none', 'relu', 'sigmoid', 'silu', 'softmax', 'tanh'\]"
    with pytest.raises(ValueError, match=rf"^normalize: `normalization` must be one of {names}, got 'softmx'\.$"):
        normalize(torch.zeros(2, 3), "softmx", dim=1)


@pytest.mark.parametrize("normalization", ["relu", "silu", "linear"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_whose_sum_overflows_is_scaled_first(normalization, dtype):
    large = torch.finfo(dtype).max / 2.5
    raw = torch.tensor([large, large, large, large / 2], dtype=dtype, requires_grad=True)
    weights = normalize(raw, normalization, dim=0)
    assert_close(weights, torch.tensor([2, 2, 2, 1], dtype=torch.float64) / 7)
    assert torch.autograd.grad(weights[3], raw)[0].isfinite().all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_inverse_gives_the_gates_of_given_weights(normalization):
    wanted = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.699, 0.001]], dtype=torch.float64)
    record = NORMALIZATIONS[normalization]
    weights = normalize(record.inverse(wanted), normalization, dim=1)
    assert_close(weights[:, :-1], wanted[:, :-1])
    assert (weights[:, -1] > 0).all()
    if record.floor == 0:
        assert_close(weights, wanted)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_record_says_whether_weights_may_be_negative(generator, normalization):
    raw = torch.randn(20, 4, generator=generator)
    assert (normalize(raw, normalization, dim=1) < 0).any() == NORMALIZATIONS[normalization].signed


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_wider_dtype_has_the_same_rows_of_zeros(normalization):
    raw = torch.tensor([[-95.0] * 3, [1e-40] * 3, [0.0] * 3, [-1.0, 2.0, 3.0]])
    wide = normalize(raw, normalization, dim=1, dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert_close(normalize(raw, normalization, dim=1), wide)
