"""Proposition 1: no normalisation but `none` lets |h| grow past the initial state and the values, at any length."""

import math

import numpy as np
import pytest
import torch
from helpers import each_instruction_set, make_raw_gates, numpy_block, numpy_weights

from statemix import block_scan, companion_scan
from statemix.gates import NORMALIZATIONS, normalize

BOUNDED = [name for name in NORMALIZATIONS if name != "none"]
SIGNED = ("tanh", "silu", "linear")
SCANS = {"block": block_scan, "companion": companion_scan}  # observer is stable in the 1-norm of its block only
each_kind = pytest.mark.parametrize("kind", SCANS)
ORDER, LANES = 3, 16
BOUND = torch.tensor(0.7).item()  # no power of two: every product is rounded

each_normalization = pytest.mark.parametrize("normalization", BOUNDED)


def adversarial_gates(generator: torch.Generator, normalization: str) -> torch.Tensor:
    """Raw gates (M, M+1, N), in every lane another block, with rounding errors of its own.

    In 12 of 16 lanes a transition is nearly one-hot: the identity, a cyclic shift, one column; the last four are
    random. In a signed normalisation one of the two identities and one random block are negative. relu gates are large
    beside its floor, which would make the block contract.
    """
    raw = torch.rand(ORDER, ORDER + 1, LANES, generator=generator) + 0.1
    columns = {0: (0, 1, 2), 1: (1, 2, 0), 2: (0, 0, 0), 3: (0, 1, 2)}
    for lane in range(12):
        small = {"softmax": -6.0, "sigmoid": -8.0}.get(normalization)
        raw[..., lane] = raw[..., lane] / 1000 if small is None else raw[..., lane] + small
        for row, column in enumerate(columns[lane % 4]):
            raw[row, column, lane] = 4 + torch.rand((), generator=generator)
    if normalization in SIGNED:
        raw[:, :ORDER, 3::4] *= -1
    return raw * 1e6 if normalization == "relu" else raw


def arguments(kind: str, raw: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gates (M, M+1, N) at every step, with a time stride of 0; values and initial state equal to the bound."""
    rows = (ORDER,) if kind == "block" else ()
    gates = raw if kind == "block" else raw[0]
    values = torch.tensor(BOUND).expand(1, steps, *rows, raw.shape[-1])
    return gates.expand(1, steps, *gates.shape), values, torch.full((1, ORDER, raw.shape[-1]), BOUND)


def largest(states: torch.Tensor) -> float:
    low, high = torch.aminmax(states)  # NaN in both if there is any
    assert states[:, -1].abs().max() > 0.5 * BOUND  # the end is still near the bound, not in a decay far below
    return max(-low.item(), high.item())


@each_instruction_set
@each_kind
@each_normalization
def test_a_million_equal_steps_stay_below_the_bound_exactly(generator, instruction_set, kind, normalization):
    gates, values, start = arguments(kind, adversarial_gates(generator, normalization), 10**6)
    states = SCANS[kind](gates, values, start, normalization=normalization, backend="cpu")
    assert largest(states) <= BOUND


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.rand(1, 20_000, ORDER, ORDER + 1, LANES, generator=torch.Generator().manual_seed(1)) - 0.5


@each_instruction_set
@each_kind
@each_normalization
def test_random_steps_stay_below_the_bound_exactly(generator, noise, instruction_set, kind, normalization):
    raw = adversarial_gates(generator, normalization)
    gates = raw * (1 + noise / 2)  # every gate up to 25 % up or down, at every step
    gates = gates if kind == "block" else gates[:, :, 0].contiguous()
    _, values, state = arguments(kind, raw, noise.shape[1])
    for _ in range(5):
        states = SCANS[kind](gates, values, state, normalization=normalization, backend="cpu")
        assert largest(states) <= BOUND
        # the block, or the last M values, newest first
        state = states[:, -1] if kind == "block" else states[:, -ORDER:].flip(1)


@each_kind
def test_weights_that_sum_to_more_than_one_break_the_bound(generator, kind):
    raw = adversarial_gates(generator, "linear")
    for excess in (0.0, 1e-5):
        weights = normalize(raw.double(), "linear", dim=1) * (1 - 1e-6 + excess)
        gates, values, start = arguments(kind, weights.float(), 10_000)
        states = SCANS[kind](gates, values, start, normalization="none", backend="cpu")
        assert (largest(states) <= BOUND) == (excess == 0)


@each_normalization
def test_a_sum_that_is_not_clamped_breaks_the_bound(generator, normalization):
    """The kernel's arithmetic in NumPy, without its clamp: why the tests above can fail."""
    raw = adversarial_gates(generator, normalization).numpy()
    weights = numpy_weights(normalization, raw, axis=1)
    assert weights.dtype == np.float32
    values = state = np.full((ORDER, LANES), BOUND, dtype=np.float32)
    for _ in range(2_000):
        total = weights[:, ORDER] * values
        for j in range(ORDER):
            total = total + weights[:, j] * state[j]
        state = total
    assert np.abs(state).max() > BOUND


@each_kind
@pytest.mark.parametrize(
    ("backend", "normalization", "steps"),
    [("reference", normalization, 10**4) for normalization in BOUNDED]
    + [("associative", normalization, 10**6) for normalization in ("softmax", "linear")],
)
def test_backends_without_a_clamp_leave_the_bound_by_rounding_only(generator, kind, normalization, backend, steps):
    gates, values, start = arguments(kind, adversarial_gates(generator, normalization)[..., 1:3], steps)
    states = SCANS[kind](gates, values, start, normalization=normalization, backend=backend)
    # In one step, the M+1 weights (a sum and a division) and a_0 v are off by up to 2 (M+1) half units in the last
    # place in all, and a sum of M+1 products by M+1 more; each step can hand on a state that is too large by so much.
    per_step = 3 * (ORDER + 1) * torch.finfo(torch.float32).eps / 2
    assert largest(states) <= BOUND * math.exp(per_step * steps)


@each_kind
@each_normalization
def test_eigenvalues_stay_below_one_minus_the_input_gate(generator, kind, normalization):
    shape = (2, 50, 4, 5, 6) if kind == "block" else (2, 50, 5, 6)
    weights = normalize(make_raw_gates(generator, normalization, shape), normalization, dim=len(shape) - 2).numpy()
    block, input_gate = numpy_block(kind, weights)
    radius = np.abs(np.linalg.eigvals(block)).max(-1)
    excess = radius - (1 - np.abs(input_gate).min(-1))
    assert excess.max() <= 1e-12
    # close to it somewhere, so that the bound is one; and without a normalisation it does not hold
    assert excess.max() > -1e-2
    assert (np.abs(np.linalg.eigvals(1.1 * block)).max(-1) - (1 - np.abs(input_gate).min(-1))).max() > 0.01


@each_kind
def test_only_signed_normalisations_have_negative_eigenvalues_of_any_size(generator, kind):
    shape = (2, 50, 2, 3, 6) if kind == "block" else (2, 50, 3, 6)
    for normalization in BOUNDED:
        weights = normalize(make_raw_gates(generator, normalization, shape), normalization, dim=len(shape) - 2).numpy()
        traces = np.trace(numpy_block(kind, weights)[0], axis1=-2, axis2=-1)
        assert (traces.min() < -0.5) == (normalization in SIGNED)
