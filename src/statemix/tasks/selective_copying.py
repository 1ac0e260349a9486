"""Selective copying: remember the data tokens among blanks."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import COMPAT, IGNORE_INDEX, Task, Tokens


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Data tokens stand among blanks; after the copy marker the targets are the data tokens in order.

    `SelectiveCopying(vocab_size=6, seq_len=9, num_tokens_to_copy=2)`: data 0-3, blank 4, copy marker 5.

        tokens     4  1  4  3  4  4  5  4  4
        targets    .  .  .  .  .  .  .  1  3

    n data tokens, uniform in [0, V - 2), stand at places drawn uniformly among the L - n - 1 before the marker, where
    the other L - 2n - 1 are blank; n blanks follow the marker.

    Args:
        vocab_size: V, at least 4.
        seq_len: L, in tokens, at least 2 num_tokens_to_copy + 1.
        num_tokens_to_copy: n, at least 1.
        compat: "mad" or "none": MAD and this task train on the same targets.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD. In its code a data token always stands right before the marker.
    """

    name: ClassVar[str] = "selective-copying"

    vocab_size: int = 16
    seq_len: int = 256
    num_tokens_to_copy: int = 16
    compat: str = "none"

    def __post_init__(self) -> None:
        self.check_int("vocab_size", least=4)
        self.check_int("seq_len", least=3)
        self.check_int("num_tokens_to_copy", least=1)
        if self.seq_len < 2 * self.num_tokens_to_copy + 1:
            raise ValueError(
                f"{self.name}: `num_tokens_to_copy` must be at most (seq_len - 1) / 2 = {(self.seq_len - 1) // 2}, "
                f"to be shown and copied, got {self.num_tokens_to_copy}."
            )
        self.check_choice("compat", COMPAT)

    @property
    def blank(self) -> int:
        """V - 2."""
        return self.vocab_size - 2

    @property
    def marker(self) -> int:
        """The copy marker, V - 1."""
        return self.vocab_size - 1

    @property
    def chance(self) -> float:
        """One in the number of data tokens."""
        return 1 / (self.vocab_size - 2)

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Every choice of n places is equally likely."""
        n = self.num_tokens_to_copy
        before = self.seq_len - n - 1
        is_data = rng.permuted(np.tile(np.arange(before) < n, (count, 1)), axis=1)
        tokens = np.full((count, self.seq_len), self.blank)
        tokens[:, :before][is_data] = rng.integers(self.blank, size=count * n)
        tokens[:, before] = self.marker
        return tokens

    def oracle(self, tokens: Tokens) -> Tokens:
        """The data tokens from left to right, at the last n positions."""
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[:, -self.num_tokens_to_copy :] = tokens[tokens < self.blank].reshape(len(tokens), -1)
        return targets
