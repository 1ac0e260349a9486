"""What every task shares: batches, disjoint splits, accuracies.

A split is a property of the sequence itself: a hash of its tokens says whether it belongs to training, validation or
test. So the three never overlap, whatever the seeds, the number of batches, or the number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100  # a target that is not scored

# split -> buckets of the sequence hash, out of 8
SPLITS: dict[str, tuple[int, ...]] = {"train": (2, 3, 4, 5, 6, 7), "valid": (0,), "test": (1,)}

Tokens = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class Batch(NamedTuple):
    """Tokens (B, L) and targets (B, L), int64; a target of IGNORE_INDEX is not scored."""

    tokens: Tensor
    targets: Tensor


def draw(
    split: str, count: int, seed: int, index: int, generate: Callable[[np.random.Generator, int], Tokens]
) -> Tokens:
    """`count` sequences of one split, the same for the same (split, count, seed, index) in any process.

    Args:
        split: "train", "valid" or "test".
        count: sequences wanted.
        seed: of the stream, at least 0.
        index: number of the batch in the stream, at least 0.
        generate: (generator, n) -> n sequences (n, L), drawn independently.

    Raises:
        TypeError: a number is not an int.
        ValueError: an argument is out of range, or so few sequences exist that none is found for the split.
    """
    if split not in SPLITS:
        raise ValueError(f"sample: `split` must be one of {sorted(SPLITS)}, got {split!r}.")
    for name, value, least in (("batch_size", count, 1), ("seed", seed, 0), ("index", index, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"sample: `{name}` must be an int, got {value!r}.")
        if not least <= value < 2**64:
            raise ValueError(f"sample: `{name}` must be at least {least} and below 2^64, got {value}.")
    buckets = SPLITS[split]
    # words of fixed width: numpy would read (0, 2^32) and (0, 0, 1) as one seed
    words = [part for number in (seed, index) for part in (number % 2**32, number // 2**32)]
    rng = np.random.default_rng([*words, *(1 + bucket for bucket in buckets)])
    found: list[Tokens] = []
    missing, tries = count, 0
    while missing > 0:
        candidates = generate(rng, 8 + missing * 9 // len(buckets))
        chosen = candidates[np.isin(sequence_hash(candidates) % np.uint64(8), buckets)][:missing]
        found.append(chosen)
        missing -= len(chosen)
        tries = 0 if len(chosen) else tries + 1
        if tries == 100:
            raise ValueError(
                f"sample: no sequence of length {candidates.shape[1]} belongs to split {split!r}: the task has too few "
                "sequences. Ask for longer ones or a larger vocabulary."
            )
    return np.concatenate(found)


def sequence_hash(tokens: Tokens) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit hash of each row, (B, L) -> (B,), the same on every machine (FNV-1a, finished as in splitmix64)."""
    state = np.full(tokens.shape[0], 0xCBF29CE484222325, dtype=np.uint64)
    for column in tokens.T.astype(np.uint64):
        state = (state ^ column) * np.uint64(0x100000001B3)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True)
class Score:
    """Counts of right answers; scores of several batches add up.

    token accuracy: right / scored over all scored tokens. Sequence accuracy: sequences with every scored token right.
    """

    right: Tensor  # (L,) int64: right tokens by position
    scored: Tensor  # (L,) int64
    sequences_right: int
    sequences: int

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor) -> "Score":
        """The score of predicted tokens (B, L) against targets (B, L). Raises ValueError if the shapes differ."""
        if predictions.shape != targets.shape:
            wanted, got = tuple(targets.shape), tuple(predictions.shape)
            raise ValueError(f"Score: `predictions` must have the shape of `targets` = {wanted}, got {got}.")
        scored = targets != IGNORE_INDEX
        right = (predictions == targets) & scored
        whole = int((right == scored).all(1).sum())
        return cls(right.sum(0).cpu(), scored.sum(0).cpu(), whole, targets.shape[0])

    def __add__(self, other: "Score") -> "Score":
        if self.right.shape != other.right.shape:
            raise ValueError(f"Score: lengths must agree to add up, got {len(self.right)} and {len(other.right)}.")
        return Score(
            self.right + other.right,
            self.scored + other.scored,
            self.sequences_right + other.sequences_right,
            self.sequences + other.sequences,
        )

    @property
    def token_accuracy(self) -> float:
        """Share of scored tokens that are right, in [0, 1]."""
        return float(self.right.sum() / self.scored.sum())

    @property
    def sequence_accuracy(self) -> float:
        """Share of sequences without a wrong token, in [0, 1]."""
        return self.sequences_right / self.sequences

    @property
    def accuracy_by_position(self) -> list[float | None]:
        """Token accuracy at each of the L positions; None where nothing is scored."""
        pairs = zip(self.right.tolist(), self.scored.tolist(), strict=True)
        return [right / scored if scored else None for right, scored in pairs]


def to_batch(tokens: Tokens, targets: Tokens) -> Batch:
    """NumPy tokens and targets as a batch."""
    return Batch(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
