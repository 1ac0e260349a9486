"""One step of a residual pair as one call of the kernels (csrc/step.h), against the modules it replaces, in float64."""

import pytest
import torch
from helpers import TOLERANCE, each_instruction_set, needs_kernels, relative_error
from kernel_helpers import READOUTS, STEPPED, assert_readout, assert_step, make_pair, make_readout, pair_by_the_modules

from statemix import kernels
from statemix.gates import NORMALIZATIONS

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


@pytest.mark.parametrize("case", ["gradients", "too many rows", "another mixer"])
def test_what_the_kernel_does_not_serve_is_done_by_the_modules(generator, calls, case):
    """What else it does not serve, of the parts of a pair and of torch, is in tests/test_fused.py."""
    pair = make_pair({"name": "lstm", "hidden_size": 6} if case == "another mixer" else STEPPED["block"])
    x = torch.randn(kernels.STEP_ROWS + 1 if case == "too many rows" else 2, 20, generator=generator)
    if case == "gradients":
        y, _ = pair.step(x, None)
        assert relative_error(y.detach(), pair_by_the_modules(pair, x, None)[0]) <= TOLERANCE[x.dtype]
        assert y.requires_grad
    else:
        assert_step(pair, x, None)
    assert "statemix_pair_step" not in calls
