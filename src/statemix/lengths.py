"""Sequences of unequal length in one batch: where they end, and how they are moved to end together."""

import torch
from torch import Tensor, nn


class Ends:
    """Where the sequences of a batch end, and how they are moved to end together, at the last step of the longest.

    So the state after that step is the one after the last step of each. What then stands before a sequence is forgotten
    by a reset at its first step.

    Args:
        owner: in whose name a wrong length is refused.
        lengths: (B,) integers in [1, T].
        x: (B, T, ...).

    Raises:
        TypeError, ValueError: the lengths are of another type or shape, or out of range.
    """

    def __init__(self, owner: str, lengths: Tensor, x: Tensor) -> None:
        check_lengths(owner, lengths, x)
        self.lengths = lengths.to(x.device)
        self._missing = x.shape[1] - int(self.lengths.max())
        steps = torch.arange(x.shape[1] - self._missing, device=x.device)
        self._behind = steps >= self.lengths[:, None]
        self._order = (steps + self.lengths[:, None]) % len(steps)
        self._first = steps == len(steps) - self.lengths[:, None]  # step of each sequence, after `together`

    def cut(self, x: Tensor) -> Tensor:
        """x (B, T, ...) without the steps that are behind the end of all, and with zeros behind that of each."""
        x = x[:, : self._behind.shape[1]]
        return x.masked_fill(_like(self._behind, x), 0)

    def together(self, x: Tensor) -> Tensor:
        """Of what was cut: the sequences end at the last step."""
        return x.take_along_dim(_like(self._order, x), dim=1)

    def starts(self, reset: Tensor | None) -> Tensor:
        """The resets of sequences that end together: those given, (B, T) bool or None, and one at each first step."""
        return self._first if reset is None else self._first | reset

    def apart(self, y: Tensor) -> Tensor:
        """The inverse of `together`."""
        return y.take_along_dim(_like(self._order.argsort(dim=1), y), dim=1)

    def pad(self, y: Tensor) -> Tensor:
        """What was made of what was cut, (B, ., D) to (B, T, D): zeros behind the end of each sequence."""
        return nn.functional.pad(y.masked_fill(self._behind[..., None], 0), (0, 0, 0, self._missing))


def _like(steps: Tensor, x: Tensor) -> Tensor:
    """Of each step, (B, T) to as many axes as x has."""
    return steps if x.ndim == 2 else steps[..., None]


def check_lengths(owner: str, lengths: Tensor, x: Tensor) -> None:
    """Raise, in the name of `owner`, unless they are integers in [1, T], one for each row of x (B, T, ...)."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{owner}: `lengths` must be a tensor of int64 or int32, got {got}.")
    rows, longest = x.shape[:2]
    if lengths.shape != (rows,):
        raise ValueError(f"{owner}: `lengths` must have shape (B,) = {(rows,)}, got {tuple(lengths.shape)}.")
    wrong = torch.nonzero((lengths < 1) | (lengths > longest)).flatten().tolist()
    if wrong:
        first = f"{int(lengths[wrong[0]])} in row {wrong[0]}"
        raise ValueError(f"{owner}: `lengths` must be in [1, T] = [1, {longest}], got {first}.")
