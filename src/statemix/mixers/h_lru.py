"""H-LRU, the higher-order linear recurrent unit: each of N channels mixes its last M states."""

from torch import Tensor, nn

from statemix.gates import check_normalization
from statemix.mixers.base import Mixer, RawGates, check_choice, check_flags, check_sizes, wide
from statemix.scan import BACKENDS, companion_scan, lagged_states, observer_scan

FORMS = ("companion", "observer")


class HLRU(Mixer):
    """h_t[n] = sum_{i=1..M} a_{i,t}[n] h_{t-i}[n] + a_{0,t}[n] v_t[n], y_t = W_o vec(h_t, ..., h_{t-M+1}).

    Parameters: N (M + 1)(2 D + 1). Order 1 is a gated diagonal LRU.

    Args:
        d_model: D, width of x and y.
        num_channels: N.
        order: M.
        normalization: of the M + 1 raw gates of a channel, a name in `NORMALIZATIONS`.
        selective: True: raw gates are a linear map of x_t. False: they are parameters, the same at every step.
        form: "companion" is the equation above; "observer" is its transposed block, in which a coefficient is taken
            from the step at which it was made. They differ for M >= 2; the paper's language models use the second.
        backend: of the scan, see `companion_scan`.

    Raises:
        TypeError, ValueError: a size is not a positive int, or a name is unknown.

    Source: Dubinin et al. 2026 (arXiv 2602.12021).
    """

    def __init__(
        self,
        d_model: int,
        num_channels: int,
        order: int,
        *,
        normalization: str = "softmax",
        selective: bool = True,
        form: str = "companion",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("HLRU", d_model=d_model, num_channels=num_channels, order=order)
        check_flags("HLRU", selective=selective)
        check_normalization("HLRU", normalization)
        check_choice("HLRU", "form", form, FORMS)
        check_choice("HLRU", "backend", backend, ("auto", *BACKENDS))
        self.d_model, self.state_shape = d_model, (order, num_channels)
        self.normalization, self.form, self.backend = normalization, form, backend
        self.raw_gates = RawGates(
            d_model, (order + 1, num_channels), selective
        )  # [j, n]: lag j + 1; j = M the input gate
        self.values = nn.Linear(d_model, num_channels, bias=False)
        self.output = nn.Linear(order * num_channels, d_model, bias=False)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state, (B, M, N): the last M values, newest first (companion), or the block."""
        raw_gates, values = wide(self.raw_gates(x)), wide(self.values(x))
        scan = companion_scan if self.form == "companion" else observer_scan
        states = scan(raw_gates, values, state, normalization=self.normalization, reset=reset, backend=self.backend)
        if self.form == "companion":
            states = lagged_states(states, state, reset, self.state_shape[0])
        return self.output(states.flatten(2).to(x.dtype)), states[:, -1]
