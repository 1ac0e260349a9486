"""BD-LRU, the block-diagonal linear recurrent unit: dense M x M mixing inside each of N blocks."""

from typing import ClassVar

from torch import nn

from statemix.gates import check_normalization
from statemix.mixers.base import check_choice, check_flags, check_recompute, check_sizes
from statemix.mixers.half_life import check_half_life, half_life_gates
from statemix.mixers.linear_recurrence import RECURRENCE, LinearRecurrence, RawGates
from statemix.scan import BACKENDS


@RECURRENCE.of
class BDLRU(LinearRecurrence):
    """h_t[n] = A_t[n] h_{t-1}[n] + a0_t[n] * v_t[n], y_t = W_o vec(h_t), with input-dependent L1-normalised rows.

    Parameters: N M ((M + 1)(D + 1) + 2 D). Block size 1 is a gated diagonal LRU.

    Args:
        d_model: D, width of x and y.
        num_blocks: N.
        block_size: M.
        normalization: of the M + 1 raw gates of a row, a name in `NORMALIZATIONS`.
        selective: True: raw gates are a linear map of x_t. False: they are parameters, the same at every step.
        backend: of the scan, see `block_scan`.
        recompute: True: the backward computes the raw gates again, and they never exist at full length, which saves
            memory. False: they are kept for it, which is faster. None: kept up to 256 MiB. It matters to the fused
            kernels of a CPU only.
        gate_half_life: steps in which what a block remembers is halved at first, above 0. None: torch's first biases.

    Raises:
        TypeError, ValueError: a size is not a positive int, a half-life not above 0, or a name unknown.

    Source: Dubinin et al. 2026 (arXiv 2602.12021).
    """

    width_option = "num_blocks"
    table_options: ClassVar = {"block_size": 4}

    def __init__(
        self,
        d_model: int,
        num_blocks: int,
        block_size: int,
        *,
        normalization: str = "softmax",
        selective: bool = True,
        backend: str = "auto",
        recompute: bool | None = None,
        gate_half_life: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes("BDLRU", d_model=d_model, num_blocks=num_blocks, block_size=block_size)
        check_flags("BDLRU", selective=selective)
        check_normalization("BDLRU", normalization)
        check_choice("BDLRU", "backend", backend, ("auto", *BACKENDS))
        check_recompute("BDLRU", recompute)
        check_half_life("BDLRU", gate_half_life)
        self.d_model, self.state_shape, self.kind = d_model, (block_size, num_blocks), "block"
        self.normalization, self.backend, self.recompute = normalization, backend, recompute
        self.one_hot, self.hidden, self.heard = False, 0.0, None
        # rows [i, j, n] of the projection carry old component j to new component i of block n; j = M is the input gate
        self.raw_gates = RawGates(d_model, (block_size, block_size + 1, num_blocks), selective)
        self.values = nn.Linear(d_model, block_size * num_blocks, bias=False)
        self.output = nn.Linear(block_size * num_blocks, d_model, bias=False)
        if gate_half_life is not None:
            self.raw_gates.start_from(half_life_gates(self.kind, block_size, normalization, gate_half_life))
