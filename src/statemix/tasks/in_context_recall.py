"""In-context recall, plain and noisy: key-value pairs that hold within one sequence."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import COMPAT, IGNORE_INDEX, Task, Tokens, next_tokens


@dataclass(frozen=True)
class InContextRecall(Task):
    """Pairs of a key and its value, drawn anew for each sequence; at a key shown before, the target is its value.

    `InContextRecall(vocab_size=8, seq_len=10)`: keys 0-3, values 4-7; the stream is the tokens and a last 4.

        tokens     1  6  3  4  1  6  0  4  3
        targets    .  .  .  .  6  .  .  .  4        1 -> 6 and 3 -> 4 were shown before

    Keys are the first half of the vocabulary, rounded down, and values the rest. L/2 - 1 pairs have a uniform key, with
    replacement, and the last pair, the probe, a key uniform among those shown: it can always be answered. The last
    value is a target only, so that T = L - 1.

    Args:
        vocab_size: V, at least 4.
        seq_len: L, in tokens, even, at least 4.
        compat: "mad" trains on the next token at every position, as MAD does, most of which cannot be known. What
            validation and test score is the same. "none": training scores what they do.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD.
    """

    name: ClassVar[str] = "in-context-recall"

    vocab_size: int = 16
    seq_len: int = 128
    compat: str = "none"

    def __post_init__(self) -> None:
        self.check_int("vocab_size", least=4)
        self.check_int("seq_len", least=4)
        if self.seq_len % 2:
            raise ValueError(f"{self.name}: `seq_len` must be even, for pairs, got {self.seq_len}.")
        self.check_choice("compat", COMPAT)

    @property
    def noise_vocab_size(self) -> int:
        """Tokens, the last ones, that are neither keys nor values."""
        return 0

    @property
    def frac_noise(self) -> float:
        """Share of the pairs that are noise."""
        return 0.0

    @property
    def num_keys(self) -> int:
        """Keys are [0, num_keys)."""
        return (self.vocab_size - self.noise_vocab_size) // 2

    @property
    def num_values(self) -> int:
        """Values are [num_keys, num_keys + num_values)."""
        return self.vocab_size - self.noise_vocab_size - self.num_keys

    @property
    def length(self) -> int:
        """T = L - 1."""
        return self.seq_len - 1

    @property
    def chance(self) -> float:
        """One in the number of values."""
        return 1 / self.num_values

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """The tokens of whole streams."""
        return self.streams(rng, count)[:, :-1]

    def streams(self, rng: np.random.Generator, count: int) -> Tokens:
        """Whole streams (count, L): pairs, then the probe and its value."""
        pairs, noise_begin, every = self.seq_len // 2 - 1, self.num_keys + self.num_values, np.arange(count)
        value_of = rng.integers(self.num_keys, noise_begin, size=(count, self.num_keys))
        keys = rng.integers(self.num_keys, size=(count, pairs))
        slots = np.stack((keys, np.take_along_axis(value_of, keys, axis=1)), axis=2)  # (B, pairs, 2)
        shown = np.zeros((count, self.num_keys), dtype=bool)
        if self.frac_noise > 0:
            noisy = rng.random((count, pairs)) < self.frac_noise
            noisy[every, rng.integers(pairs, size=count)] = False  # at least one pair, for the probe
            slots = np.where(noisy[..., None], rng.integers(noise_begin, self.vocab_size, size=slots.shape), slots)
            rows, places = np.nonzero(~noisy)
            shown[rows, keys[rows, places]] = True
        else:
            shown[every[:, None], keys] = True
        rank = rng.integers(shown.sum(1))
        probe = (shown.cumsum(1) > rank[:, None]).argmax(1)
        return np.concatenate((slots.reshape(count, -1), np.stack((probe, value_of[every, probe]), axis=1)), axis=1)

    def oracle(self, tokens: Tokens) -> Tokens:
        """At each key that stands further left too: the token after its first occurrence."""
        rows, columns = np.nonzero(tokens < self.num_keys)
        keys = rows * self.num_keys + tokens[rows, columns]  # as numbered over the batch
        first = np.full(len(tokens) * self.num_keys, tokens.shape[1])
        np.minimum.at(first, keys, columns)
        again = columns > first[keys]
        rows, columns, keys = rows[again], columns[again], keys[again]
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[rows, columns] = tokens[rows, first[keys] + 1]
        return targets

    def targets(self, tokens: Tokens, split: str) -> Tokens:
        """The oracle's, or every next token."""
        scored = self.oracle(tokens)
        return next_tokens(tokens, scored) if self.compat == "mad" and split == "train" else scored


@dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall in which a share of the pairs is two noise tokens.

    `NoisyInContextRecall(vocab_size=10, seq_len=12, noise_vocab_size=2)`: keys 0-3, values 4-7, noise 8 and 9.

        tokens     1  6  8  8  3  4  9  8  1  6  3
        targets    .  .  .  .  .  .  .  .  6  .  4

    Each of the L/2 - 1 pairs before the probe is noise with probability `frac_noise`, but for one, drawn at random,
    which never is. Noise tokens are uniform in [V - noise, V).

    Args:
        vocab_size: V, at least noise_vocab_size + 4.
        seq_len: L, in tokens, even, at least 4.
        compat: "mad" trains on the next token at every position, as MAD does, most of which cannot be known. What
            validation and test score is the same. "none": training scores what they do.
        noise_vocab_size: number of noise tokens, at least 1.
        frac_noise: probability in [0, 1).

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD.
    """

    name: ClassVar[str] = "noisy-in-context-recall"

    vocab_size: int = 32
    noise_vocab_size: int = 16
    frac_noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("noise_vocab_size", least=1)
        if self.vocab_size < self.noise_vocab_size + 4:
            raise ValueError(
                f"{self.name}: `vocab_size` must be at least noise_vocab_size + 4 = {self.noise_vocab_size + 4}, "
                f"got {self.vocab_size}."
            )
        if not isinstance(self.frac_noise, int | float) or isinstance(self.frac_noise, bool):
            raise TypeError(f"{self.name}: `frac_noise` must be a number, got {self.frac_noise!r}.")
        if not 0 <= self.frac_noise < 1:
            raise ValueError(f"{self.name}: `frac_noise` must be in [0, 1), got {self.frac_noise}.")
