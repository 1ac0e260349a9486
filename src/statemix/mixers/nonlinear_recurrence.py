"""LSTM and GRU as one: a recurrence of torch's with a linear read-out, run from reset to reset."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from statemix.mixers.base import Mixer
from statemix.mixers.states import start_state, without_autocast


class NonlinearRecurrence(Mixer):
    """A recurrence of torch's with a linear read-out: LSTM and GRU. A subclass sets `output` and defines `run`."""

    output: nn.Linear

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`."""
        state, own = start_state(x, state, self.state_shape, reset), self.dtype or x.dtype
        with without_autocast(x):
            hidden, final_state = between_resets(self.run, x.to(own), state.to(own), reset)
        return self.output(hidden.to(x.dtype)), final_state.to(state.dtype)

    def run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and a state (B, M, H) -> hidden states (B, T, H), final state; torch's modules know no reset."""
        raise NotImplementedError


def between_resets(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `run`, a recurrence without a reset of its own, makes of x (B, T, D) and a state (B, M, N), piece by piece.

    A piece ends before each step at which a sequence of the batch has a reset, (B, T) bool or None.
    """
    starts = [] if reset is None else torch.nonzero(reset.any(0)).flatten().tolist()
    outputs = []
    for begin, end in itertools.pairwise(sorted({0, *starts, x.shape[1]})):
        if reset is not None:
            state = state.masked_fill(reset[:, begin, None, None], 0)
        y, state = run(x[:, begin:end], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state
