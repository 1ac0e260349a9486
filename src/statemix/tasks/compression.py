"""Compression: a whole sequence in the state at its last position."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import COMPAT, Task, Tokens


@dataclass(frozen=True)
class Compression(Task):
    """Random tokens, then the compression token; all of them are predicted from the output at the last position.

    `Compression(vocab_size=5, seq_len=6)`: data 0-3, compression token 4.

        tokens     2  0  3  3  1  4
        targets    2  0  3  3  1  4        all read off the position of the 4

    Data tokens are uniform in [0, V - 1). For an autoencoder: a model that predicts position by position could copy.

    Args:
        vocab_size: V, at least 3.
        seq_len: L, in tokens, at least 2.
        compat: "mad" or "none": MAD and this task train on the same targets.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD.
    """

    name: ClassVar[str] = "compression"
    autoencoder: ClassVar[bool] = True

    vocab_size: int = 16
    seq_len: int = 32
    compat: str = "none"

    def __post_init__(self) -> None:
        self.check_int("vocab_size", least=3)
        self.check_int("seq_len", least=2)
        self.check_choice("compat", COMPAT)

    @property
    def chance(self) -> float:
        """One in V: the compression token is a target too."""
        return 1 / self.vocab_size

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Uniform data tokens and the compression token."""
        tokens = rng.integers(self.vocab_size - 1, size=(count, self.seq_len))
        tokens[:, -1] = self.vocab_size - 1
        return tokens

    def oracle(self, tokens: Tokens) -> Tokens:
        """The tokens themselves."""
        return tokens.copy()
