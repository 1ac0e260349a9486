"""mLSTM, the matrix memory of xLSTM: exponential input gates, a normaliser, and a short convolution before it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer, check_sizes
from statemix.mixers.chunks import from_chunks, log_decays, to_chunks
from statemix.mixers.convolution import ShortConvolution
from statemix.mixers.states import pack_state, start_state, unpack_state, without_autocast

BLOCK = 4  # q, k and v are maps of neighbouring channels, four at a time
EPSILON = 1e-6  # added to the normaliser, as published: it may underflow


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t . q_t|, 1), per head.

    (u, z) = W x_t and c = silu(convolution(u)), both of width I = H P; q and k / sqrt(P) are maps of c and v of u,
    block by block; f = sigmoid and i = exp of maps of (q, k, v) with bias; y_t = W_o ((norm(h_t) + s * c) * silu(z)).
    C and n are carried divided by exp(m), m_t = max(m_{t-1} + log f_t, log i_t), so that no exponential overflows.
    Parameters: 2 D I + (conv_size + 1) I + 12 I + 2 H (3 I + 1) + 2 I + I D.

    Args:
        d_model: D, width of x and y.
        head_dim: P, width of a head; H P is a multiple of 4.
        num_heads: H.
        conv_size: taps of the short convolution.
        chunk_size: steps that are products of matrices at once; it changes the speed and not the result.

    Raises:
        TypeError, ValueError: a size is not a positive int, or H P is not a multiple of 4.

    Source: Beck et al. 2024 (arXiv 2405.04517), mLSTM block.
    """

    width_option = "head_dim"

    def __init__(
        self, d_model: int, head_dim: int, *, num_heads: int = 4, conv_size: int = 4, chunk_size: int = 64
    ) -> None:
        super().__init__()
        check_sizes("MLSTM", d_model=d_model, head_dim=head_dim, num_heads=num_heads)
        check_sizes("MLSTM", conv_size=conv_size, chunk_size=chunk_size)
        inner = num_heads * head_dim
        if inner % BLOCK:
            raise ValueError(
                f"MLSTM: num_heads * `head_dim` must be a multiple of {BLOCK}, got {num_heads} * {head_dim}."
            )
        self.d_model, self.num_heads, self.head_dim, self.chunk_size = d_model, num_heads, head_dim, chunk_size
        self.inputs = nn.Linear(d_model, 2 * inner, bias=False)  # u, z
        self.convolution = ShortConvolution(inner, conv_size, bias=True)
        # q, k and v, [block, out, in]
        self.blocks = nn.Parameter(torch.randn(3, inner // BLOCK, BLOCK, BLOCK) * math.sqrt(2 / (5 * BLOCK)))
        self.gates = nn.Linear(3 * inner, 2 * num_heads)  # log i, raw f
        nn.init.zeros_(self.gates.weight)
        nn.init.normal_(self.gates.bias[:num_heads], std=0.1)
        with torch.no_grad():
            self.gates.bias[num_heads:] = torch.linspace(3, 6, num_heads)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.skip = nn.Parameter(torch.ones(inner))
        self.output = nn.Linear(inner, d_model, bias=False)
        # C and n side by side, m, the last inputs of the convolution
        self.parts = [(num_heads, head_dim, head_dim + 1), (num_heads,), self.convolution.state_shape]
        self.state_shape = (1, sum(map(math.prod, self.parts)))

    @classmethod
    def width_step(cls, options: Mapping[str, Any]) -> int:
        """All heads together are blocks."""
        check_sizes("MLSTM", num_heads=options["num_heads"])
        return BLOCK // math.gcd(BLOCK, options["num_heads"])

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is (C_T, n_T) / exp(m_T), m_T and the last inputs of the convolution."""
        memory, scale, recent = unpack_state(start_state(x, state, self.state_shape, reset), self.parts)
        u, z = self.inputs(x).to(memory.dtype).chunk(2, dim=2)
        with without_autocast(x):
            convolved, recent = self.convolution(u, recent, reset)
            convolved = nn.functional.silu(convolved)
            pairs = zip((convolved, convolved, u), self.blocks.to(u.dtype), strict=True)
            q, k, v = (torch.einsum("btni,noi->btno", a.unflatten(2, (-1, BLOCK)), w).flatten(2) for a, w in pairs)
            weight, bias = (part.to(u.dtype) for part in (self.gates.weight, self.gates.bias))
            write, forget = nn.functional.linear(torch.cat([q, k, v], dim=2), weight, bias).chunk(2, dim=2)
            q, k, v = (part.unflatten(2, (self.num_heads, -1)) for part in (q, k * self.head_dim**-0.5, v))
            forget = nn.functional.logsigmoid(forget)
            h, memory, scale = mlstm_scan(q, k, v, write, forget, memory, scale, reset, self.chunk_size)
            h = nn.functional.layer_norm(h, h.shape[-1:]).flatten(2) * self.norm_weight
            h = (h + self.skip * convolved) * nn.functional.silu(z)
        return self.output(h.to(x.dtype)), pack_state([memory, scale, recent])


def mlstm_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    write: Tensor,
    forget: Tensor,
    memory: Tensor,
    scale: Tensor,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t of mLSTM, in chunks: products inside a chunk, a loop over the chunks.

    In a chunk, with P as in chunks.py, a weight of step j at step i is P(i, j) i_j / exp(m_i), and m_i the largest of
    log P(i, j) + log i_j and log P(i, 0) + m_0. A reset leaves a state of zeros, of which m is 0 as well.

    Args:
        queries, keys, values: (B, T, H, P).
        write, forget: log i, any real, and log f, at most 0; (B, T, H).
        memory: (C_0, n_0) / exp(m_0), (B, H, P, P + 1).
        scale: m_0, (B, H).
        reset: (B, T) bool or None.
        chunk_size: C, at most; the results do not depend on it.

    Returns:
        h (B, T, H, P), (C_T, n_T) / exp(m_T) (B, H, P, P + 1) and m_T (B, H).
    """
    length = values.shape[1]
    size = min(chunk_size, length)
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)  # n is C's column of a value of 1
    writes = torch.ones_like(write, dtype=torch.bool)
    queries, keys, values, write, forget, writes = (
        to_chunks(part, size) for part in (queries, keys, values, write, forget, writes)
    )
    write = write.masked_fill(~writes, -torch.inf)  # what pads the sequence writes nothing
    starts = torch.zeros_like(forget, dtype=torch.bool)
    if reset is not None:
        starts = starts | to_chunks(reset[..., None], size)
    between, from_start = log_decays(forget.masked_fill(starts, -torch.inf))
    total = forget.cumsum(-1)
    # log decay since the start of the chunk or the last reset, before which it is `total`, falling, without the step
    since = torch.where(starts, total - forget, torch.inf)
    if size > 1:  # of a step it is the same, and ONNX has no such operator
        since = since.cummin(-1).values
    since = total - since.masked_fill(since == torch.inf, 0)

    between = between + write[..., None, :]
    own_scale = between.amax(-1)
    inside = (queries @ keys.mT * (between - own_scale[..., None]).exp()) @ values
    outputs = []
    parts = (queries, keys, values, between[..., -1, :], from_start, since, own_scale, inside)
    for q, k, v, to_end, carried, decayed, own, y in zip(*(part.unbind(2) for part in parts), strict=True):
        before = scale[..., None]
        scales = torch.maximum(decayed + before.where(carried > -torch.inf, 0), own)
        weight = (carried + before - scales).exp()
        y = weight[..., None] * (q @ memory) + (own - scales).exp()[..., None] * y
        norm = torch.maximum(y[..., -1:].abs(), (-scales)[..., None].exp()) + EPSILON
        outputs.append(y[..., :-1] / norm)
        scale = scales[..., -1]
        memory = weight[..., -1, None, None] * memory + (k * (to_end - scale[..., None]).exp()[..., None]).mT @ v
    return from_chunks(torch.stack(outputs, dim=2), length), memory, scale
