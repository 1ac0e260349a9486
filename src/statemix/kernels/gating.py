"""The product within a SwiGLU, silu(gate) * inner: one pass over memory instead of torch's eight (csrc/gated.h)."""

from typing import Any, cast

import torch
from torch import Tensor

from statemix.kernels.library import STORAGES, GatedCall, library
from statemix.kernels.memory import address, dense


def gated(x: Tensor) -> Tensor:
    """silu(gate) * inner for x (..., 2 H), the gates first, float32 or float64, to (..., H)."""
    return cast(Tensor, _Gated.apply(x))


class _Gated(torch.autograd.Function):
    """`gated` and its gradient; a gradient of that one is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        problem = _problem(x)
        problem.y = address(y)
        library().run("statemix_gated", problem)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            gate, inner = x.chunk(2, dim=-1)
            share = gate.sigmoid()
            return torch.cat([grad * inner * share * (1 + gate * (1 - share)), grad * gate * share], dim=-1)
        grad_y, grad_x = dense(grad), torch.empty_like(x)
        problem = _problem(x)
        problem.grad_y, problem.grad_x = address(grad_y), address(grad_x)
        library().run("statemix_gated", problem)
        return grad_x


def _problem(x: Tensor) -> GatedCall:
    size = x.shape[-1] // 2
    return GatedCall(
        rows=x.numel() // (2 * size),
        size=size,
        storage=STORAGES[x.dtype],
        threads=torch.get_num_threads(),
        x=address(x),
    )
