"""Causal softmax attention over a window, the baseline whose state is a list of what it has read."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer, check_sizes
from statemix.mixers.states import start_state, without_autocast

BASE = 10_000.0  # of the rotary angles


class Attention(Mixer):
    """y_t = W_o sum_s softmax_s(q_t . R(s - t) k_s / sqrt(P)) v_s over the last W steps s <= t, per head, R rotary.

    The state is the window itself: y_t reads the keys and values of the W newest steps, its own among them, as a
    recurrence reads its state. For T <= W from an empty state it is full causal attention. Keys are kept unrotated and
    turned by their slot: only differences of positions matter, so a state serves at any position.
    Parameters: 4 D H P.

    Args:
        d_model: D, width of x and y.
        head_dim: P, width of a head, even.
        context: W, steps in the window, at least 2.
        num_heads: H.

    Raises:
        TypeError, ValueError: a size is not an int, or too small, or `head_dim` is odd.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), rotary positions of Su et al. 2021 (arXiv 2104.09864), in torch's
        scaled_dot_product_attention.
    """

    width_option = "head_dim"
    table_options: ClassVar = {"context": 128}

    def __init__(self, d_model: int, head_dim: int, context: int, *, num_heads: int = 4) -> None:
        super().__init__()
        check_sizes("Attention", d_model=d_model, head_dim=head_dim, num_heads=num_heads)
        check_sizes("Attention", least=2, context=context)
        if head_dim % 2:
            raise ValueError(f"Attention: `head_dim` must be even, for the pairs of a rotation, got {head_dim}.")
        self.d_model, self.num_heads, self.context = d_model, num_heads, context
        self.inner = num_heads * head_dim
        self.state_shape = (context, 2 * self.inner + 1)
        self.inputs = nn.Linear(d_model, 3 * self.inner, bias=False)  # q, k, v
        self.output = nn.Linear(self.inner, d_model, bias=False)

    @classmethod
    def width_step(cls, options: Mapping[str, Any]) -> int:
        """A rotation turns pairs."""
        return 2

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is the W newest (k, v, 1), oldest first, (B, W, 2 H P + 1).

        The last number says whether a slot is filled: the others of an empty slot are not read.
        """
        length, window = x.shape[1], self.context
        kept = start_state(x, state, self.state_shape, reset)
        queries, *pairs = self.inputs(x).to(kept.dtype).split(self.inner, dim=2)
        history = torch.cat([kept, torch.cat([*pairs, torch.ones_like(queries[..., :1])], dim=2)], dim=1)
        last_reset = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)  # slot of the history, by step
        if reset is not None:
            slots = window + torch.arange(length, device=x.device)
            last_reset = torch.where(reset, slots, 0).cummax(dim=1).values
        # the slots before the first step that it can read: none are filled in a short sequence from an empty state
        before = 0 if state is None and length <= window else window - 1
        unread = window - before
        with without_autocast(x):
            y = self._attend(queries, history[:, unread:], last_reset - unread, before)
        final_state = history[:, length:]
        if reset is not None:
            old = torch.arange(length, length + window, device=x.device) < last_reset[:, -1:]
            final_state = final_state.masked_fill(old[..., None], 0)
        return self.output(y.to(x.dtype)), final_state

    def _attend(self, queries: Tensor, history: Tensor, last_reset: Tensor, before: int) -> Tensor:
        """Queries (B, T, H P) over the history (B, before + T, 2 H P + 1), from the slot `last_reset` (B, T) on.

        The queries are cut in chunks of C <= W steps, each with the before + C slots that it may read.
        """
        batch, length, _ = queries.shape
        size = min(self.context, length)
        missing = -length % size
        queries = nn.functional.pad(queries, (0, 0, 0, missing)).view(batch, -1, size, self.inner)
        history = nn.functional.pad(history, (0, 0, 0, missing)).unfold(1, before + size, size).mT  # (B, n, slots, .)
        keys, values, filled = history.split([self.inner, self.inner, 1], dim=3)

        slot = torch.arange(before + size, device=history.device)
        own = slot[before:, None]  # of each query
        first = size * torch.arange(queries.shape[1], device=history.device)[:, None]  # slot of the history, by chunk
        since = nn.functional.pad(last_reset, (0, missing)).view(batch, -1, size) - first
        visible = (slot <= own) & (slot > own - self.context) & (slot >= since[..., None]) & (filled.mT > 0.5)
        visible |= slot == own  # what pads the sequence reads itself
        keys, values = (part.masked_fill(filled <= 0.5, 0) for part in (keys, values))  # not even a NaN is read

        queries, keys, values = (
            part.unflatten(3, (self.num_heads, -1)).transpose(2, 3).flatten(0, 1)  # (B n, H, C or slots, P)
            for part in (rotate(queries, slot[before:], self.num_heads), rotate(keys, slot, self.num_heads), values)
        )
        mask = visible.flatten(0, 1)[:, None]
        y = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return y.transpose(1, 2).flatten(2).view(batch, -1, self.inner)[:, :length]


def rotate(x: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """Numbers i and i + P/2 of a head turned by position * BASE^(-2 i / P): x (..., C, H P), positions (C,)."""
    first, second = x.unflatten(-1, (num_heads, 2, -1)).unbind(-2)  # (..., C, H, P/2)
    size = first.shape[-1]
    rates = BASE ** -(torch.arange(size, device=x.device, dtype=x.dtype) / size)
    angles = (positions.to(x.dtype)[:, None] * rates)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3)
