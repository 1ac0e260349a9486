"""GRU, the nonlinear baseline with one state vector: torch.nn.GRU with a linear read-out."""

from torch import Tensor, nn

from statemix.mixers.base import Mixer, between_resets, check_sizes, start_state, without_autocast


class GRU(Mixer):
    """h_t = GRU(x_t, h_{t-1}), y_t = W_o h_t.

    Parameters: 3 H (D + H + 2) + H D.

    Args:
        d_model: D, width of x and y.
        hidden_size: H. The state is h, H numbers.

    Raises:
        TypeError, ValueError: a size is not a positive int.

    Source: Cho et al. 2014 (arXiv 1406.1078), as torch.nn.GRU computes it.
    """

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes("GRU", d_model=d_model, hidden_size=hidden_size)
        self.d_model, self.state_shape = d_model, (1, hidden_size)
        self.gru = nn.GRU(d_model, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, d_model, bias=False)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is h_T, (B, 1, H)."""
        state = start_state(x, state, self.state_shape, reset)
        with without_autocast(x):
            hidden, final_state = between_resets(self._run, x.to(self.dtype), state.to(self.dtype), reset)
        return self.output(hidden.to(x.dtype)), final_state.to(state.dtype)

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, h = self.gru(x, state.transpose(0, 1).contiguous())
        return hidden, h.transpose(0, 1)
