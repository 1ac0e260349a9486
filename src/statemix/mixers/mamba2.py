"""Mamba-2: a short convolution, a selective state space with one decay per head (SSD), a gated norm."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from statemix.mixers import library
from statemix.mixers.base import Mixer, check_choice, check_sizes
from statemix.mixers.chunks import SelectiveDecay, forget, linear_scan
from statemix.mixers.convolution import ShortConvolution
from statemix.mixers.norms import rms_normalize
from statemix.mixers.states import pack_state, start_state, unpack_state, without_autocast


class Mamba2(Mixer):
    """S_t = a_t S_{t-1} + dt_t B_t v_t^T, y_t = W_o norm((S_t^T C_t + D v_t) * silu(z_t)), per head.

    (z, v, B, C, raw dt) = W x_t, of which v, B and C go through a short convolution and silu; dt = softplus(raw dt +
    bias), a = exp(-exp(rate) dt). B and C are shared by the heads of a group. With I = H P and J = I + 2 G N channels:
    Parameters: D (I + J + H) + (K + 1) J + 3 H + I + I D.

    Args:
        d_model: D, width of x and y.
        head_dim: P, width of a head.
        num_heads: H.
        state_dim: N, rows of the state of a head, H P N numbers in all, besides the (K - 1) J of the convolution.
        num_groups: G, a divisor of H.
        conv_size: K, taps of the convolution.
        chunk_size: steps that are products of matrices at once; it changes the speed and not the result.
        backend: "torch"; "mamba_ssm": the kernels of mamba-ssm, for CUDA tensors of 16 bits without a reset; "auto":
            these where they are installed and serve the call.

    Raises:
        TypeError, ValueError: a size is not a positive int, or the heads do not fall into equal groups.

    Source: Dao and Gu 2024 (arXiv 2405.21060). One norm per group, as in the published code.
    """

    width_option = "head_dim"
    plain_options: ClassVar = {"backend": "torch"}

    def __init__(
        self,
        d_model: int,
        head_dim: int,
        *,
        num_heads: int = 4,
        state_dim: int = 64,
        num_groups: int = 1,
        conv_size: int = 4,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("Mamba2", d_model=d_model, head_dim=head_dim, num_heads=num_heads, state_dim=state_dim)
        check_sizes("Mamba2", num_groups=num_groups, conv_size=conv_size, chunk_size=chunk_size)
        if num_heads % num_groups:
            raise ValueError(f"Mamba2: `num_heads` must be a multiple of num_groups={num_groups}, got {num_heads}.")
        check_choice("Mamba2", "backend", backend, ("auto", "torch", "mamba_ssm"))
        inner, channels = num_heads * head_dim, num_heads * head_dim + 2 * num_groups * state_dim
        self.d_model, self.num_heads, self.num_groups, self.chunk_size = d_model, num_heads, num_groups, chunk_size
        self.inner, self.state_dim, self.backend = inner, state_dim, backend
        self.inputs = nn.Linear(d_model, inner + channels + num_heads, bias=False)
        self.convolution = ShortConvolution(channels, conv_size, bias=True)
        self.decay = SelectiveDecay(num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.output = nn.Linear(inner, d_model, bias=False)
        self.parts = [(num_heads, state_dim, head_dim), self.convolution.state_shape]
        self.state_shape = (1, sum(map(math.prod, self.parts)))

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is S_T and the last inputs of the convolution, (B, 1, H N P + (K - 1) J)."""
        memory, recent = unpack_state(start_state(x, state, self.state_shape, reset), self.parts)
        dtype = library.kernel_dtype(x) if library.serves(self, "mamba_ssm", self.backend, x, reset) else None
        inputs = self.inputs(x).to(memory.dtype)
        with without_autocast(x):
            gate, mixed, raw_steps = inputs.split([self.inner, recent.shape[2], self.num_heads], dim=2)
            mixed, recent = self.convolution(mixed, recent, reset)
            group = self.num_groups * self.state_dim
            values, keys, queries = nn.functional.silu(mixed).split([self.inner, group, group], dim=2)
            # (B, T, G, N), and one group serves all heads as it is
            keys, queries = (part.unflatten(2, (self.num_groups, -1)) for part in (keys, queries))
            values = values.unflatten(2, (self.num_heads, -1))
            steps, logarithms = self.decay(raw_steps)
            if dtype is not None:
                rates = self.decay.rate.to(steps.dtype).exp()
                y, memory = library.mamba_scan(queries, keys, values, steps, rates, memory, dtype)
            else:
                if self.num_groups > 1:
                    shared = self.num_heads // self.num_groups
                    keys, queries = (part.repeat_interleave(shared, dim=2) for part in (keys, queries))
                written = values * steps[..., None]
                y, memory = linear_scan(queries, keys, written, forget(logarithms, reset), memory, self.chunk_size)
            y = (y + self.skip[:, None] * values).flatten(2) * nn.functional.silu(gate)
            y = rms_normalize(y.unflatten(2, (self.num_groups, -1))).flatten(2) * self.norm_weight
        return self.output(y.to(x.dtype)), pack_state([memory, recent])
