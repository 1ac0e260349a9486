"""DeltaNet, Gated DeltaNet and DeltaProduct: a matrix state that is corrected towards a value at a key."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from statemix.mixers import library
from statemix.mixers.base import Mixer, check_choice, check_flags, check_sizes
from statemix.mixers.chunks import SelectiveDecay, delta_scan, forget
from statemix.mixers.convolution import ShortConvolution
from statemix.mixers.norms import rms_normalize, unit_normalize
from statemix.mixers.states import pack_state, start_state, unpack_state, without_autocast

MAX_RANK = 4


class DeltaProduct(Mixer):
    """S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T for r = 1..R at each step, y_t = W_o norm(S_t^T q_t), per head.

    A state S (K, V) is carried by a product of R generalised Householder matrices from the left. q, k and v are silu of
    a short convolution of W x_t; q and k are scaled to norm 1, q by K^(-1/2) besides; beta = sigmoid(W x_t). Gated, S
    first decays by a_t = exp(-exp(rate) softplus(W x_t + bias)) and the output is norm(.) * silu(W x_t). With V = E K
    and the C = H (K + R (K + V)) channels of q, k and v:
    Parameters: D (C + H R) + conv_size C + V + H V D; gated, D (H + H V) + 2 H more.

    Args:
        d_model: D, width of x and y.
        head_dim: K, width of the keys of a head.
        num_heads: H.
        rank: R, 1 to 4.
        expand_values: E; the state of a head has K rows and E K columns.
        gated: True: the state decays and the output is gated, as in Gated DeltaNet.
        negative_eigenvalues: True: beta in (0, 2): a factor has an eigenvalue in (-1, 1). False: beta in (0, 1).
        conv_size: taps of the short convolution; 0 for none.
        chunk_size: steps that are products of matrices at once; it changes the speed and not the result.
        backend: "torch"; "fla": the kernels of flash-linear-attention, for CUDA tensors of 16 bits without a reset;
            "auto": these where they are installed and serve the call.

    Raises:
        TypeError, ValueError: a size is not an int, or out of range.

    Source: Siems et al. 2025 (arXiv 2502.10297).
    """

    width_option = "head_dim"
    plain_options: ClassVar = {"backend": "torch"}

    def __init__(
        self,
        d_model: int,
        head_dim: int,
        *,
        num_heads: int = 4,
        rank: int = 2,
        expand_values: int = 1,
        gated: bool = False,
        negative_eigenvalues: bool = True,
        conv_size: int = 4,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_sizes(owner, d_model=d_model, head_dim=head_dim, num_heads=num_heads, rank=rank)
        check_sizes(owner, expand_values=expand_values, chunk_size=chunk_size)
        check_flags(owner, gated=gated, negative_eigenvalues=negative_eigenvalues)
        if rank > MAX_RANK:
            raise ValueError(f"{owner}: `rank` must be at most {MAX_RANK}, got {rank}.")
        check_sizes(owner, least=0, conv_size=conv_size)
        check_choice(owner, "backend", backend, ("auto", "torch", "fla"))
        self.d_model, self.num_heads, self.head_dim, self.rank = d_model, num_heads, head_dim, rank
        self.value_dim, self.chunk_size, self.backend = expand_values * head_dim, chunk_size, backend
        self.beta_range = 2 if negative_eigenvalues else 1
        self.widths = [num_heads * size for size in (head_dim, rank * head_dim, rank * self.value_dim)]
        channels = sum(self.widths)
        self.inputs = nn.Linear(d_model, channels, bias=False)  # q, k, v
        self.convolution = ShortConvolution(channels, conv_size) if conv_size else None
        self.beta = nn.Linear(d_model, num_heads * rank, bias=False)
        self.raw_steps = nn.Linear(d_model, num_heads, bias=False) if gated else None
        self.decay = SelectiveDecay(num_heads) if gated else None
        self.gate = nn.Linear(d_model, num_heads * self.value_dim, bias=False) if gated else None
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))
        self.output = nn.Linear(num_heads * self.value_dim, d_model, bias=False)
        recent = self.convolution.state_shape if self.convolution else (0, channels)
        self.parts = [(num_heads, head_dim, self.value_dim), recent]
        self.state_shape = (1, sum(map(math.prod, self.parts)))

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is S_T, (H, K, V), and the last inputs of the convolution, in one row."""
        memory, recent = unpack_state(start_state(x, state, self.state_shape, reset), self.parts)
        dtype = library.kernel_dtype(x) if library.serves(self, "fla", self.backend, x, reset) else None
        inputs, beta = self.inputs(x).to(memory.dtype), self.beta(x).to(memory.dtype)
        raw_steps, gate = (None if part is None else part(x).to(memory.dtype) for part in (self.raw_steps, self.gate))
        with without_autocast(x):
            if self.convolution is not None:
                inputs, recent = self.convolution(inputs, recent, reset)
            queries, keys, values = nn.functional.silu(inputs).split(self.widths, dim=2)
            heads = (self.num_heads, self.rank)
            queries = unit_normalize(queries.unflatten(2, (self.num_heads, -1))) * self.head_dim**-0.5
            keys = unit_normalize(keys.unflatten(2, (*heads, -1)))
            values = values.unflatten(2, (*heads, -1))
            beta = self.beta_range * torch.sigmoid(beta.unflatten(2, heads))
            logarithms = None if self.decay is None else self.decay(raw_steps)[1]
            if dtype is not None:
                y, memory = library.delta_scan(queries, keys, values, beta, logarithms, memory, dtype)
            else:
                if logarithms is None:
                    logarithms = torch.zeros_like(beta[..., 0])
                y, memory = delta_scan(queries, keys, values, beta, forget(logarithms, reset), memory, self.chunk_size)
            y = (rms_normalize(y) * self.norm_weight).flatten(2)
            if gate is not None:
                y = y * nn.functional.silu(gate)
        return self.output(y.to(x.dtype)), pack_state([memory, recent])


class DeltaNet(DeltaProduct):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = W_o norm(S_t^T q_t): DeltaProduct of rank 1.

    Parameters: D (3 H K + H) + 3 H K conv_size + K + H K D.

    Args:
        d_model: D, width of x and y.
        head_dim: K, width of the keys and values of a head.
        num_heads: H.
        negative_eigenvalues: True: beta in (0, 2). False: beta in (0, 1).
        conv_size: taps of the short convolution; 0 for none.
        chunk_size: steps that are products of matrices at once; it changes the speed and not the result.
        backend: "torch"; "fla": the kernels of flash-linear-attention, for CUDA tensors of 16 bits without a reset;
            "auto": these where they are installed and serve the call.

    Raises:
        TypeError, ValueError: a size is not an int, or out of range.

    Source: Yang et al. 2024 (arXiv 2406.06484); negative eigenvalues: Grazzi et al. 2024 (arXiv 2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        head_dim: int,
        *,
        num_heads: int = 4,
        negative_eigenvalues: bool = False,
        conv_size: int = 4,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            head_dim,
            num_heads=num_heads,
            rank=1,
            negative_eigenvalues=negative_eigenvalues,
            conv_size=conv_size,
            chunk_size=chunk_size,
            backend=backend,
        )


class GatedDeltaNet(DeltaProduct):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t)).

    The gated DeltaProduct of rank 1. With V = E K and C = 2 H K + H V channels:
    Parameters: D (C + 2 H + H V) + conv_size C + V + 2 H + H V D.

    Args:
        d_model: D, width of x and y.
        head_dim: K, width of the keys of a head.
        num_heads: H.
        expand_values: E; the state of a head has K rows and E K columns.
        negative_eigenvalues: True: beta in (0, 2). False: beta in (0, 1).
        conv_size: taps of the short convolution; 0 for none.
        chunk_size: steps that are products of matrices at once; it changes the speed and not the result.
        backend: "torch"; "fla": the kernels of flash-linear-attention, for CUDA tensors of 16 bits without a reset;
            "auto": these where they are installed and serve the call.

    Raises:
        TypeError, ValueError: a size is not an int, or out of range.

    Source: Yang et al. 2024 (arXiv 2412.06464).
    """

    def __init__(
        self,
        d_model: int,
        head_dim: int,
        *,
        num_heads: int = 4,
        expand_values: int = 2,
        negative_eigenvalues: bool = False,
        conv_size: int = 4,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            head_dim,
            num_heads=num_heads,
            rank=1,
            expand_values=expand_values,
            gated=True,
            negative_eigenvalues=negative_eigenvalues,
            conv_size=conv_size,
            chunk_size=chunk_size,
            backend=backend,
        )
