"""LSTM, the nonlinear baseline: torch.nn.LSTM with a linear read-out."""

import itertools

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer, check_sizes


class LSTM(Mixer):
    """(h_t, c_t) = LSTM(x_t, h_{t-1}, c_{t-1}), y_t = W_o h_t.

    Parameters: 4 H (D + H + 2) + H D.

    Args:
        d_model: D, width of x and y.
        hidden_size: H. The state is (h, c), 2 H numbers.

    Raises:
        TypeError, ValueError: a size is not a positive int.
    """

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes("LSTM", d_model=d_model, hidden_size=hidden_size)
        self.d_model, self.state_shape = d_model, (2, hidden_size)
        self.lstm = nn.LSTM(d_model, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, d_model, bias=False)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is (h_T, c_T), (B, 2, H)."""
        if state is None:
            state = x.new_zeros(x.shape[0], *self.state_shape)
        # torch's LSTM knows no reset: cut the batch wherever one of its sequences has one
        starts = [] if reset is None else torch.nonzero(reset.any(0)).flatten().tolist()
        cuts = sorted({0, *starts, x.shape[1]})
        hidden = []
        for begin, end in itertools.pairwise(cuts):
            if reset is not None:
                state = state.masked_fill(reset[:, begin, None, None], 0)
            h, c = state.unbind(1)
            out, (h, c) = self.lstm(x[:, begin:end], (h[None].contiguous(), c[None].contiguous()))
            hidden.append(out)
            state = torch.stack([h[0], c[0]], dim=1)
        return self.output(torch.cat(hidden, dim=1)), state
