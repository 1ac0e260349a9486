"""The short causal convolution before a recurrence, with its last inputs as a state."""

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = sum_{j<K} w_j * x_{t-j} + b, one filter per channel; an x from before a reset counts as zero.

    Args:
        channels: C.
        size: K, taps.
        bias: True: there is a b.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        bound = size**-0.5  # as torch's convolutions of one channel
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    @property
    def state_shape(self) -> tuple[int, int]:
        """(K - 1, C): the last inputs, newest last."""
        size, channels = self.weight.shape
        return size - 1, channels

    def forward(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), the inputs before it (B, K - 1, C) and reset (B, T) or None -> y (B, T, C), the last inputs."""
        length, kept = x.shape[1], state.shape[1]
        history = torch.cat([state, x], dim=1)
        y = self.weight[0] * x
        if self.bias is not None:
            y = y + self.bias
        for lag in range(1, kept + 1):
            earlier = history[:, kept - lag : kept - lag + length]
            if reset is not None:
                earlier = earlier.masked_fill(_recent(reset, lag)[..., None], 0)
            y = y + self.weight[lag] * earlier
        final_state = history[:, length:]
        if reset is not None and kept:
            # (B, K - 1): whether a reset lies between an input, oldest first, and the end
            ages = [_recent(reset, age)[:, -1] for age in range(kept - 1, -1, -1)]
            final_state = final_state.masked_fill(torch.stack(ages, dim=1)[..., None], 0)
        return y, final_state


def _recent(reset: Tensor, lag: int) -> Tensor:
    """Whether there is a reset in the last `lag` steps, the present one included: (B, T) bool."""
    since = torch.zeros_like(reset)
    for age in range(min(lag, reset.shape[1])):
        since[:, age:] |= reset[:, : reset.shape[1] - age]
    return since
