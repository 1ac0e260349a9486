"""GRU, the nonlinear baseline with one state vector: torch.nn.GRU with a linear read-out."""

from torch import Tensor, nn

from statemix.mixers.base import check_sizes
from statemix.mixers.nonlinear_recurrence import NonlinearRecurrence


class GRU(NonlinearRecurrence):
    """h_t = GRU(x_t, h_{t-1}), y_t = W_o h_t.

    Parameters: 3 H (D + H + 2) + H D.

    Args:
        d_model: D, width of x and y.
        hidden_size: H. The state is h, H numbers.

    Raises:
        TypeError, ValueError: a size is not a positive int.

    Source: Cho et al. 2014 (arXiv 1406.1078), as torch.nn.GRU computes it.
    """

    width_option = "hidden_size"

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes("GRU", d_model=d_model, hidden_size=hidden_size)
        self.d_model, self.state_shape = d_model, (1, hidden_size)
        self.gru = nn.GRU(d_model, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, d_model, bias=False)

    def run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `NonlinearRecurrence`. The state is h_T, (B, 1, H)."""
        hidden, h = self.gru(x, state.transpose(0, 1).contiguous())
        return hidden, h.transpose(0, 1)
