"""What takes much of a training step on a CPU though it computes little: passes over memory, here fewer of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from statemix import kernels


def gated(x: Tensor) -> Tensor:
    """silu(gate) * inner, the product within a SwiGLU.

    The compiled kernels serve float32 and float64 on a CPU. torch.compile (which fuses it by itself), functorch and
    tensors of other kinds see torch's operations.

    Args:
        x: (..., 2 H), the gates first.

    Returns:
        (..., H).
    """
    served = kernels.serves(x.device, order=1) and x.dtype in (torch.float32, torch.float64) and type(x) is Tensor
    if not served or x.numel() == 0 or kernels.transformed():
        gate, inner = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * inner
    return cast(Tensor, _Gated.apply(x))


class _Gated(torch.autograd.Function):
    """`gated` by the compiled kernels, and its gradient; a gradient of that one is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return kernels.gated(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            gate, inner = x.chunk(2, dim=-1)
            share = gate.sigmoid()
            return torch.cat([grad * inner * share * (1 + gate * (1 - share)), grad * gate * share], dim=-1)
        return kernels.gated_backward(grad, x)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU 16 random bits decide about a number, so the share is a multiple of 2^-16.

    There torch draws a double for each, one after another, on processors other than Intel's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        if not (self.training and self.p and x.is_cpu) or kernels.transformed():
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (kept * x.new_tensor(2**16 / (2**16 - dropped)))
