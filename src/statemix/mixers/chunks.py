"""Recurrences of matrix states with one decay per head, in chunks: products inside a chunk, a loop over the chunks.

Notation: chunks of C steps, head h, decay a_t in (0, 1]; a reset is a decay of 0. P(i, j) = a_{j+1} ... a_i carries
what step j wrote to step i of the same chunk. All sums of logarithms are over the very steps they span, so a strong
decay elsewhere in the chunk costs no precision.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

FEW = 4  # unknowns of a system that is solved row by row: the writes of a single step, in what ONNX has operators for


class Decays(NamedTuple):
    """Products of decays inside chunks of C steps; shapes begin with those of the logarithms, (..., C)."""

    between: Tensor  # (..., C, C), [..., i, j] = P(i, j), carries step j to step i; 0 for j > i
    from_start: Tensor  # (..., C), carries the state before the chunk to step i
    to_end: Tensor  # (..., C), carries step j to the end of the chunk
    whole: Tensor  # (...), carries the state before the chunk to its end


def decays(logarithms: Tensor) -> Decays:
    """Products of decays from their logarithms, (..., C), which may be -inf: a reset."""
    between, from_start = (part.exp() for part in log_decays(logarithms))
    return Decays(between, from_start, to_end=between[..., -1, :], whole=from_start[..., -1])


def log_decays(logarithms: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of `Decays.between`, (..., C, C), and of `Decays.from_start`, (..., C)."""
    size = logarithms.shape[-1]
    spans = torch.ones(size, size, dtype=torch.bool, device=logarithms.device)
    # [..., i, j]: sum over j < k <= i
    sums = logarithms[..., :, None].expand(*logarithms.shape, size).masked_fill(~spans.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~spans.tril(), -torch.inf), logarithms.cumsum(-1)


class SelectiveDecay(nn.Module):
    """dt = softplus(raw + bias), log a = -exp(rate) dt, per head: the decay of Mamba-2 and of the gated delta rule.

    The first exp(rate) are uniform in [1, 16], and the first dt of raw = 0 log-uniform in [0.001, 0.1].

    Args:
        num_heads: H.

    Source: Dao and Gu 2024 (arXiv 2405.21060).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        steps = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Raw step sizes (B, T, H) -> dt and log a, (B, T, H)."""
        steps = nn.functional.softplus(raw + self.bias)
        return steps, -self.rate.to(steps.dtype).exp() * steps


def forget(logarithms: Tensor, reset: Tensor | None) -> Tensor:
    """Logarithms of decays (B, T, H) with -inf where `reset` (B, T) says so."""
    return logarithms if reset is None else logarithms.masked_fill(reset[..., None], -torch.inf)


def to_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> (B, H, n, C, ...), with zeros after the end: steps that neither decay nor write."""
    missing = -x.shape[1] % size
    x = nn.functional.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def from_chunks(x: Tensor, length: int) -> Tensor:
    """(B, H, n, C, V) -> (B, T, H, V)."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def linear_scan(
    queries: Tensor, keys: Tensor, values: Tensor, logarithms: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T and y_t = S_t^T q_t.

    In a chunk, with S_0 the state before it and P as above:

        y_i = P(i, 0) S_0^T q_i + sum_{j<=i} P(i, j) (q_i . k_j) v_j      S_C = P(C, 0) S_0 + sum_j P(C, j) k_j v_j^T

    Args:
        queries, keys: (B, T, H, K), or one for all heads (B, T, 1, K).
        values: (B, T, H, V).
        logarithms: log a, (B, T, H), at most 0; -inf where the state is zero before the step.
        state: S_0, (B, H, K, V).
        chunk_size: C, at most; the results do not depend on it.

    Returns:
        y (B, T, H, V) and S_T (B, H, K, V).

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 6.
    """
    length = values.shape[1]
    size = min(chunk_size, length)
    queries, keys, values = (to_chunks(x, size) for x in (queries, keys, values))
    decay = decays(to_chunks(logarithms, size))
    inside = (queries @ keys.mT * decay.between) @ values
    written = (keys * decay.to_end[..., None]).mT @ values  # (B, H, n, K, V)
    starts = []
    for whole, own in zip(decay.whole.unbind(2), written.unbind(2), strict=True):
        starts.append(state)
        state = whole[..., None, None] * state + own
    carried = (queries * decay.from_start[..., None]) @ torch.stack(starts, dim=2)
    return from_chunks(inside + carried, length), state


def delta_scan(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, logarithms: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S = a_t S_{t-1}, then S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T for r = 1..R, and y_t = S_t^T q_t.

    The R writes of a step are R steps of a longer recurrence, of which the first decays by a_t and the others not. In
    a chunk of it, with u_i = beta_i (v_i - P(i, 0) S_0^T k_i - sum_{j<i} P(i, j) (k_i . k_j) u_j) the recurrence is
    S_i = P(i, 0) S_0 + sum_{j<=i} P(i, j) k_j u_j^T. So u solves a unit lower triangular system, linear in S_0 too:

        (I + L) [U, W] = [beta v, beta P(., 0) k]     L_ij = beta_i P(i, j) (k_i . k_j), j < i     u = U - W S_0

    U and W are found for all chunks at once (the WY form); the loop over chunks is left with products.

    Args:
        queries: (B, T, H, K).
        keys: k, (B, T, H, R, K), of norm at most 1.
        values: v, (B, T, H, R, V).
        beta: (B, T, H, R), in (0, 2).
        logarithms: log a, (B, T, H), at most 0; -inf where the state is zero before the step.
        state: S_0, (B, H, K, V).
        chunk_size: C, at most, in steps; the results do not depend on it.

    Returns:
        y (B, T, H, V) and S_T (B, H, K, V).

    Source: Yang et al. 2024 (arXiv 2406.06484 and 2412.06464), Siems et al. 2025 (arXiv 2502.10297) for R > 1.
    """
    length, rank = keys.shape[1], keys.shape[3]
    size = min(chunk_size, length)
    queries, keys, values, beta = (to_chunks(x, size) for x in (queries, keys, values, beta))
    logarithms = to_chunks(logarithms, size)
    later = logarithms.new_zeros(*logarithms.shape, rank - 1)
    decay = decays(torch.cat([logarithms[..., None], later], dim=-1).flatten(-2))  # of the C R writes of a chunk
    keys, values, beta = keys.flatten(3, 4), values.flatten(3, 4), beta.flatten(3, 4)[..., None]  # (B, H, n, C R, ...)

    system = beta * (keys @ keys.mT) * decay.between
    sides = torch.cat([beta * values, beta * decay.from_start[..., None] * keys], dim=-1)
    own, of_state = _solve(system, sides).split([values.shape[-1], keys.shape[-1]], dim=-1)
    seen = queries @ keys.mT * decay.between[..., rank - 1 :: rank, :]  # a step reads after its last write
    queries = queries * decay.from_start[..., rank - 1 :: rank, None]
    keys = (keys * decay.to_end[..., None]).mT
    outputs = []
    parts = (own, of_state, queries, seen, keys, decay.whole[..., None, None])
    for u, w, q, p, k, whole in zip(*(part.unbind(2) for part in parts), strict=True):
        updates = u - w @ state
        outputs.append(q @ state + p @ updates)
        state = whole * state + k @ updates
    return from_chunks(torch.stack(outputs, dim=2), length), state


def _solve(system: Tensor, sides: Tensor) -> Tensor:
    """X of (I + L) X = sides (..., C, V), L what is below the diagonal of `system` (..., C, C)."""
    if system.shape[-1] > FEW:
        return torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    rows: list[Tensor] = []  # `list[Tensor]()` is more than torch.compile reads
    for i in range(system.shape[-1]):
        row = sides[..., i, :]
        for j, solved in enumerate(rows):
            row = row - system[..., i, j, None] * solved
        rows.append(row)
    return torch.stack(rows, dim=-2)
