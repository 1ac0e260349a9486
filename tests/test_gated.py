"""The product of a SwiGLU (csrc/gated.h, fused.gated) by every instruction set, and as torch sees it."""

import pytest
import torch
from helpers import assert_close, each_instruction_set, needs_kernels
from kernel_helpers import GATED_SHAPES, gated_by_torch

from statemix.backbone import SwiGLU
from statemix.fused import gated


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "size"), GATED_SHAPES)
def test_each_instruction_set_equals_torch(generator, calls, instruction_set, dtype, rows, size):
    x = 4 * torch.randn(rows, 2 * size, generator=generator, dtype=dtype)
    cotangent = torch.randn(rows, size, generator=generator, dtype=dtype)
    y, gradient = gated_by_torch(x, cotangent)
    assert_close(gated(x), y)
    assert_close(torch.autograd.grad(gated(x.requires_grad_()), x, cotangent)[0], gradient)
    assert calls == ["statemix_gated"] * 3


@each_instruction_set
def test_gates_of_any_size(instruction_set):
    gates = torch.tensor([-1e30, -200.0, -87.0, -30.0, -1e-30, 0.0, 1e-40, 5.0, 90.0, 1e30])
    x = torch.cat([gates, torch.ones(10)])[None].requires_grad_()
    expected = gates.double() * gates.double().sigmoid()
    y = gated(x)
    error = (y[0].double() - expected).abs() / expected.abs().clamp(min=1e-37)
    assert error.max() <= 4e-7  # of each number for itself
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, gated_by_torch(x, torch.ones(1, 10))[1])
    assert gated(torch.tensor([[float("nan"), 1.0]])).isnan().all()


@needs_kernels
def test_the_number_of_threads_changes_no_bit(generator, threads):
    x, results = torch.randn(70, 1000, generator=generator).requires_grad_(), []
    for count in (1, 2, 3):
        threads(count)
        y = gated(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_first_and_second_derivatives(generator):
    x = torch.randn(2, 3, 10, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gated, x)
    assert torch.autograd.gradgradcheck(gated, x)
    (gradient,) = torch.autograd.grad(gated(x).sum(), x)
    (to_go_on_from,) = torch.autograd.grad(gated(x).sum(), x, create_graph=True)  # by torch, not by the kernel
    assert_close(to_go_on_from.detach(), gradient)


def test_torch_sees_its_own_operations(generator, calls):
    x = torch.randn(4, 3, 10, generator=generator, dtype=torch.float64)
    expected = gated(x)
    calls.clear()
    assert_close(torch.compile(gated, fullgraph=True, backend="aot_eager")(x), expected)
    assert_close(torch.func.vmap(gated)(x), expected)
    gradient = torch.func.grad(lambda x: gated(x).square().sum())(x)
    assert_close(gradient, gated_by_torch(x, 2 * expected)[1])
    assert not calls


def test_any_layout_and_no_rows(generator):
    x = torch.randn(10, 3, 4, generator=generator, dtype=torch.float64).mT.transpose(0, 2)
    assert not x.is_contiguous()
    assert_close(gated(x), gated(x.contiguous()))
    assert gated(torch.empty(0, 10)).shape == (0, 5)


def test_autocast_keeps_bfloat16(generator):
    mlp, x = SwiGLU(8, 16), torch.randn(3, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(x), rtol=0, atol=0.02)
