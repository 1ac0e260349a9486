"""H-LRU, the higher-order linear recurrent unit: each of N channels mixes its last M states."""

from typing import ClassVar

from torch import nn

from statemix.gates import check_normalization
from statemix.mixers.base import check_choice, check_flags, check_recompute, check_sizes
from statemix.mixers.half_life import check_half_life, half_life_gates
from statemix.mixers.linear_recurrence import RECURRENCE, LinearRecurrence, RawGates
from statemix.scan import BACKENDS

FORMS = ("companion", "observer")


@RECURRENCE.of
class HLRU(LinearRecurrence):
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
        recompute: True: the backward computes the raw gates again, and they never exist at full length, which saves
            memory. False: they are kept for it, which is faster. None: kept up to 256 MiB. It matters to the fused
            kernels of a CPU only.
        gate_half_life: steps in which what a channel remembers is halved at first, above 0. None: torch's first biases.

    Raises:
        TypeError, ValueError: a size is not a positive int, a half-life not above 0, or a name unknown.

    Source: Dubinin et al. 2026 (arXiv 2602.12021).
    """

    width_option = "num_channels"
    table_options: ClassVar = {"order": 4}

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
        recompute: bool | None = None,
        gate_half_life: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes("HLRU", d_model=d_model, num_channels=num_channels, order=order)
        check_flags("HLRU", selective=selective)
        check_normalization("HLRU", normalization)
        check_choice("HLRU", "form", form, FORMS)
        check_choice("HLRU", "backend", backend, ("auto", *BACKENDS))
        check_recompute("HLRU", recompute)
        check_half_life("HLRU", gate_half_life)
        self.d_model, self.state_shape, self.form, self.kind = d_model, (order, num_channels), form, form
        self.normalization, self.backend, self.recompute = normalization, backend, recompute
        self.one_hot, self.hidden, self.heard = False, 0.0, None
        self.raw_gates = RawGates(
            d_model, (order + 1, num_channels), selective
        )  # [j, n]: lag j + 1; j = M the input gate
        self.values = nn.Linear(d_model, num_channels, bias=False)
        self.output = nn.Linear(order * num_channels, d_model, bias=False)
        if gate_half_life is not None:
            self.raw_gates.start_from(half_life_gates(self.kind, order, normalization, gate_half_life))
