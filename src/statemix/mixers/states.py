"""What a mixer does with its state: begin with it, keep several tensors in it, and keep its sums wide."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def start_state(x: Tensor, state: Tensor | None, shape: tuple[int, int], reset: Tensor | None) -> Tensor:
    """The state to begin with, (B, M, N), float32 or wider: zeros if None, and where the first step has a reset."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return x.new_zeros(x.shape[0], *shape, dtype=wide)
    state = state.to(wide)
    return state if reset is None else state.masked_fill(reset[:, 0, None, None], 0)


def pack_state(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, ...) side by side as one state (B, 1, N)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)[:, None]


def unpack_state(state: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors (B, *shape) that `pack_state` put side by side."""
    parts = state[:, 0].split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their factors: sums over time are float32 or wider."""
    kind = x.device.type  # tensors of meta have none; torch.compile cannot ask for which there is below torch 2.13
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
