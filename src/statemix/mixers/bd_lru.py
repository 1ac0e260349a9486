"""BD-LRU, the block-diagonal linear recurrent unit: dense M x M mixing inside each of N blocks."""

from torch import Tensor, nn

from statemix.gates import check_normalization
from statemix.mixers.base import Mixer, RawGates, check_choice, check_flags, check_sizes, wide
from statemix.scan import BACKENDS, block_scan


class BDLRU(Mixer):
    """h_t[n] = A_t[n] h_{t-1}[n] + a0_t[n] * v_t[n], y_t = W_o vec(h_t), with input-dependent L1-normalised rows.

    Parameters: N M ((M + 1)(D + 1) + 2 D). Block size 1 is a gated diagonal LRU.

    Args:
        d_model: D, width of x and y.
        num_blocks: N.
        block_size: M.
        normalization: of the M + 1 raw gates of a row, a name in `NORMALIZATIONS`.
        selective: True: raw gates are a linear map of x_t. False: they are parameters, the same at every step.
        backend: of the scan, see `block_scan`.

    Raises:
        TypeError, ValueError: a size is not a positive int, or a name is unknown.

    Source: Dubinin et al. 2026 (arXiv 2602.12021).
    """

    def __init__(
        self,
        d_model: int,
        num_blocks: int,
        block_size: int,
        *,
        normalization: str = "softmax",
        selective: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("BDLRU", d_model=d_model, num_blocks=num_blocks, block_size=block_size)
        check_flags("BDLRU", selective=selective)
        check_normalization("BDLRU", normalization)
        check_choice("BDLRU", "backend", backend, ("auto", *BACKENDS))
        self.d_model, self.state_shape = d_model, (block_size, num_blocks)
        self.normalization, self.backend = normalization, backend
        # rows [i, j, n] of the projection carry old component j to new component i of block n; j = M is the input gate
        self.raw_gates = RawGates(d_model, (block_size, block_size + 1, num_blocks), selective)
        self.values = nn.Linear(d_model, block_size * num_blocks, bias=False)
        self.output = nn.Linear(block_size * num_blocks, d_model, bias=False)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is h_T, (B, M, N)."""
        raw_gates, values = wide(self.raw_gates(x)), wide(self.values(x).unflatten(2, self.state_shape))
        states = block_scan(
            raw_gates, values, state, normalization=self.normalization, reset=reset, backend=self.backend
        )
        return self.output(states.flatten(2).to(x.dtype)), states[:, -1]
