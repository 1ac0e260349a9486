"""LSTM, the nonlinear baseline: torch.nn.LSTM with a linear read-out."""

import torch
from torch import Tensor, nn

from statemix.mixers.base import check_sizes
from statemix.mixers.nonlinear_recurrence import NonlinearRecurrence


class LSTM(NonlinearRecurrence):
    """(h_t, c_t) = LSTM(x_t, h_{t-1}, c_{t-1}), y_t = W_o h_t.

    Parameters: 4 H (D + H + 2) + H D.

    Args:
        d_model: D, width of x and y.
        hidden_size: H. The state is (h, c), 2 H numbers.

    Raises:
        TypeError, ValueError: a size is not a positive int.
    """

    width_option = "hidden_size"

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes("LSTM", d_model=d_model, hidden_size=hidden_size)
        self.d_model, self.state_shape = d_model, (2, hidden_size)
        self.lstm = nn.LSTM(d_model, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, d_model, bias=False)

    def run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `NonlinearRecurrence`. The state is (h_T, c_T), (B, 2, H)."""
        h, c = state.transpose(0, 1).unsqueeze(1).contiguous()
        hidden, (h, c) = self.lstm(x, (h, c))
        return hidden, torch.cat([h, c]).transpose(0, 1)
