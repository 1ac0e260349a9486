"""PD-SSM: each component of a complex state is turned, and then goes to one place, alone or with others."""

import itertools
import math

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer, check_flags, check_sizes
from statemix.mixers.states import start_state, without_autocast


class PDSSM(Mixer):
    """h_t = P_t (d_t * h_{t-1}) + B x_t, y_t = W_o (Re h_t, Im h_t) + s * x_t, with complex d, B and h.

    Each column of P_t has a single 1, where the matrix M_t = sum_k softmax(W_s x_t)_k M^(k) of a dictionary has the
    largest entry of that column; its gradient is that of the columns' softmax (straight-through). With f a network
    with GELU of E N inner numbers, |d| = sigmoid(f(x_t)) and its phase is 2 pi sigmoid(g(x_t)).
    Parameters: D K + K N^2 + 2 E N (D + 1) + 2 N (E N + 1) + D (4 N + 1).

    A state is carried step by step: the gradient of P_t wants all N^2 numbers of each step, so that a scan of sparse
    products, which the paper has, would save nothing in training.

    Args:
        d_model: D, width of x and y.
        num_channels: N, complex numbers in the state, which is (re, im), 2 N numbers.
        dictionary_size: K.
        expand: E.
        one_hot: True: as above. False: P_t is the softmax of the columns of M_t itself.
        chunk_size: steps whose P_t are made at once; it changes time and memory, and not the result.

    Raises:
        TypeError, ValueError: a size is not a positive int, or the flag no bool.

    Source: Terzic et al. 2025 (arXiv 2509.22284). Their state begins with a one in its first component, here with zeros
        like that of every mixer: a start token can write it. Their public code for state tracking takes the softmax of
        rows, and multiplies by d from the left; here it is the paper's equation.
    """

    width_option = "num_channels"

    def __init__(
        self,
        d_model: int,
        num_channels: int,
        *,
        dictionary_size: int = 8,
        expand: int = 2,
        one_hot: bool = True,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_sizes("PDSSM", d_model=d_model, num_channels=num_channels, dictionary_size=dictionary_size)
        check_sizes("PDSSM", expand=expand, chunk_size=chunk_size)
        check_flags("PDSSM", one_hot=one_hot)
        self.d_model, self.state_shape = d_model, (2, num_channels)
        self.one_hot, self.chunk_size = one_hot, chunk_size
        inner = expand * num_channels
        self.selector = nn.Linear(d_model, dictionary_size, bias=False)
        # [k, i, j] carries old component j to new component i
        self.dictionary = nn.Parameter(torch.randn(dictionary_size, num_channels, num_channels) * num_channels**-0.5)
        self.magnitude, self.phase = (
            nn.Sequential(nn.Linear(d_model, inner), nn.GELU(), nn.Linear(inner, num_channels)) for _ in range(2)
        )
        self.values = nn.Linear(d_model, 2 * num_channels, bias=False)  # Re B, Im B
        self.output = nn.Linear(2 * num_channels, d_model, bias=False)
        self.skip = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        nn.init.normal_(self.values.weight, std=(2 * num_channels) ** -0.5)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is (Re h_T, Im h_T), (B, 2, N)."""
        state = start_state(x, state, self.state_shape, reset)
        values = self.values(x).to(state.dtype).unflatten(2, self.state_shape)
        magnitude, phase = self.magnitude(x).to(state.dtype), self.phase(x).to(state.dtype)
        states = []
        with without_autocast(x):
            decay = torch.polar(torch.sigmoid(magnitude), 2 * math.pi * torch.sigmoid(phase))
            # where a column has its largest entry is not to depend on the precision
            inputs = x.to(self.dictionary.dtype).split(self.chunk_size, dim=1)
            # the entries of a column come to lie side by side: softmax and argmax take half the time
            columns = self.dictionary.mT.contiguous()
            made = (self._transitions(chunk, columns).to(state.dtype) for chunk in inputs)
            transitions = itertools.chain.from_iterable(chunk.unbind(1) for chunk in made)
            # numbers of one step are taken out all at once: the gradient of one index is as large as the whole
            clear = [None] * x.shape[1] if reset is None else reset[..., None, None].unbind(1)
            for transition, d, v, zero in zip(transitions, decay.unbind(1), values.unbind(1), clear, strict=True):
                if zero is not None:
                    state = state.masked_fill(zero, 0)
                turned = torch.view_as_real(d * torch.complex(*state.unbind(1)))  # (B, N, 2)
                state = torch.baddbmm(v, turned.mT, transition)
                states.append(state)
        y = self.output(torch.stack(states, dim=1).flatten(2).to(x.dtype))
        return y + (self.skip * x).to(y.dtype), state

    def _transitions(self, x: Tensor, columns: Tensor) -> Tensor:
        """P_t at x (B, T, D), (B, T, N, N): [..., j, i] carries old component j to new component i."""
        chosen = torch.softmax(self.selector(x), dim=-1)
        soft = torch.softmax(torch.einsum("btk,kji->btji", chosen, columns), dim=-1)
        if not self.one_hot:
            return soft
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1)
        return hard + (soft - soft.detach())  # in this order it is exactly `hard`
