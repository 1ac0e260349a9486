"""LRU, the linear recurrent unit: a complex diagonal recurrence with fixed decays, run as 2 x 2 real blocks."""

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer, check_choice, check_numbers, check_sizes
from statemix.mixers.states import without_autocast
from statemix.scan import BACKENDS, scan_to_state


class LRU(Mixer):
    """h_t = lambda * h_{t-1} + gamma * (B x_t), y_t = Re(C h_t) + D * x_t, with complex lambda, B, C and h.

    lambda = exp(-exp(nu) + i exp(theta)). A complex number is the block [[re, -im], [im, re]] (`[i, j]` carries old
    component j to new component i), so this is a BD-LRU of block size 2 with fixed gates and no normalisation.
    Parameters: N (4 D + 3) + D. In a model of a half type nu, theta and gamma are float32 all the same: what rounding
    does to a phase is done again at every step.

    Args:
        d_model: D, width of x and y.
        num_channels: N, complex numbers in the state, which is (re, im), 2 N numbers.
        r_min: the first |lambda| are uniform in area on the ring from this to r_max, 0 <= r_min <= r_max < 1.
        r_max: the outer radius of that ring.
        max_phase: the first phases of lambda are uniform in [0, max_phase), radians, above 0.
        backend: of the scan, see `block_scan`.

    Raises:
        TypeError, ValueError: a size is not a positive int, a radius or phase is out of range, or a name is unknown.

    Source: Orvieto et al. 2023 (arXiv 2303.06349), section 3 and appendix A. The sign of C's imaginary part is in
        `output`, whose first N columns are Re C and whose last N are -Im C.
    """

    width_option = "num_channels"
    plain_options: ClassVar = {"backend": "reference"}

    def __init__(
        self,
        d_model: int,
        num_channels: int,
        *,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("LRU", d_model=d_model, num_channels=num_channels)
        check_numbers("LRU", r_min=r_min, r_max=r_max, max_phase=max_phase)
        if not 0 <= r_min <= r_max < 1:
            raise ValueError(f"LRU: `r_min` and `r_max` must have 0 <= r_min <= r_max < 1, got {r_min} and {r_max}.")
        if not 0 < max_phase < math.inf:
            raise ValueError(f"LRU: `max_phase` must be above 0 and finite, got {max_phase}.")
        check_choice("LRU", "backend", backend, ("auto", *BACKENDS))
        self.d_model, self.state_shape, self.backend = d_model, (2, num_channels), backend
        tiny = torch.finfo(torch.float32).tiny  # a draw of exactly 0 has no logarithm
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        square = r_min**2 + (r_max**2 - r_min**2) * torch.rand(num_channels, dtype=wide)
        nu = -0.5 * square.clamp(min=tiny).log()
        self.log_nu = nn.Parameter(nu.log())
        self.log_theta = nn.Parameter((max_phase * torch.rand(num_channels, dtype=wide)).clamp(min=tiny).log())
        self.log_gamma = nn.Parameter(0.5 * torch.log(-torch.expm1(-2 * nu)))  # of sqrt(1 - |lambda|^2)
        self.values = nn.Linear(d_model, 2 * num_channels, bias=False)  # Re B, Im B
        self.output = nn.Linear(2 * num_channels, d_model, bias=False)  # Re C, -Im C
        self.skip = nn.Parameter(torch.randn(d_model))
        nn.init.normal_(self.values.weight, std=(2 * d_model) ** -0.5)
        nn.init.normal_(self.output.weight, std=num_channels**-0.5)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the model: that of D, where the products may be quantised, and nu, theta and gamma are wider."""
        return self.skip.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like call: they leave nu, theta and gamma in float32 or wider."""
        kept = (self.log_nu, self.log_theta, self.log_gamma)
        wide = {id(tensor) for log in kept for tensor in (log, log.grad)}

        def keeping(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in wide and moved.dtype.itemsize < 4 else moved

        return super()._apply(keeping, recurse)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`. The state is (Re h_T, Im h_T), (B, 2, N)."""
        values = self.values(x)
        values = values.to(torch.promote_types(values.dtype, torch.float32)).unflatten(2, self.state_shape)
        with without_autocast(x):
            nu, theta, gamma = (log.to(values.dtype).exp() for log in (self.log_nu, self.log_theta, self.log_gamma))
            re, im = torch.exp(-nu) * theta.cos(), torch.exp(-nu) * theta.sin()
            gates = torch.stack([torch.stack([re, -im, gamma]), torch.stack([im, re, gamma])])  # (2, 3, N)
        states, final_state = scan_to_state(
            "block",
            gates.expand(*x.shape[:2], *gates.shape),
            values,
            state,
            normalization="none",
            reset=reset,
            backend=self.backend,
        )
        y = self.output(states.flatten(2).to(x.dtype))
        return y + (self.skip * x).to(y.dtype), final_state
