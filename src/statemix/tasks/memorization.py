"""Memorization: a fixed map from keys to values, learned in the weights."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import COMPAT, IGNORE_INDEX, TRIES, Task, Tokens, in_split, stream, too_few

Map = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Memorization(Task):
    """After each key stands the insert token, whose target is the key's value in a map that never changes.

    `Memorization(vocab_size=9, seq_len=8)`: keys 0-3, values 4-7, insert 8; the map is 0 -> 6, 1 -> 4, 2 -> 5, 3 -> 7.

        tokens     2  8  0  8  2  8  3  8
        targets    .  5  .  6  .  5  .  7

    Keys are [0, (V-1)//2), values are among the tokens from there to V - 2; no two keys have one value. The map is the
    same in all splits: they differ in the sequences of keys. In validation and test, keys are uniform and independent.
    In training every key occurs equally often in a sample, or once more or less, so that a set of n sequences lacks
    none if n L/2 is their number or more: independent keys would miss 37 % of 4,095 in 256 sequences of 16.

    Args:
        vocab_size: V, at least 5.
        seq_len: L, in tokens, even, at least 4 (with one key a sequence, splits would hold different keys).
        map_seed: which map, at least 0.
        compat: "mad" draws training keys independently too, as MAD does. "none": they occur equally often.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD.
    """

    name: ClassVar[str] = "memorization"

    vocab_size: int = 256
    seq_len: int = 32
    map_seed: int = 0
    compat: str = "none"

    def __post_init__(self) -> None:
        self.check_int("vocab_size", least=5)
        self.check_int("seq_len", least=4)
        if self.seq_len % 2:
            raise ValueError(f"{self.name}: `seq_len` must be even, for pairs, got {self.seq_len}.")
        self.check_int("map_seed", least=0)
        self.check_choice("compat", COMPAT)

    @property
    def num_keys(self) -> int:
        """Keys are [0, num_keys)."""
        return (self.vocab_size - 1) // 2

    @property
    def insert(self) -> int:
        """The token at which the value is asked for, V - 1."""
        return self.vocab_size - 1

    @property
    def value_of(self) -> Map:
        """The value of each key, (num_keys,)."""
        return _value_of(self.vocab_size, self.map_seed)

    @property
    def chance(self) -> float:
        """One in the number of keys, which is how many values there are to choose from."""
        return 1 / self.num_keys

    def draw(self, split: str, count: int, seed: int, index: int) -> Tokens:
        """The tokens (count, L) of a sample; in training its keys are one shuffled deck with all keys equally often."""
        if split != "train" or self.compat == "mad":
            return super().draw(split, count, seed, index)
        rng = stream(split, count, seed, index)
        # sequences of other splits exchange keys among themselves and with one that may be right, until none is left;
        # the keys of a small deck may have no such order: then a new deck
        for attempt in range(TRIES**2):
            if attempt % TRIES == 0:
                deck = np.resize(rng.permutation(self.num_keys), (count, self.seq_len // 2))
                keys = rng.permutation(deck.ravel()).reshape(count, -1)
            wrong = ~in_split(self._with_inserts(keys), split)
            if not wrong.any():
                return self._with_inserts(keys)
            wrong[rng.integers(count)] = True
            keys[wrong] = rng.permutation(keys[wrong].ravel()).reshape(-1, self.seq_len // 2)
        raise too_few(split, self.seq_len)

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Uniform, independent keys."""
        return self._with_inserts(rng.integers(self.num_keys, size=(count, self.seq_len // 2)))

    def oracle(self, tokens: Tokens) -> Tokens:
        """At each insert token, the value of the key before it."""
        targets = np.full_like(tokens, IGNORE_INDEX)
        rows, columns = np.nonzero(tokens == self.insert)
        targets[rows, columns] = self.value_of[tokens[rows, columns - 1]]
        return targets

    def _with_inserts(self, keys: Tokens) -> Tokens:
        tokens = np.full((len(keys), self.seq_len), self.insert)
        tokens[:, ::2] = keys
        return tokens


@functools.lru_cache(maxsize=8)
def _value_of(vocab_size: int, map_seed: int) -> Map:
    keys = (vocab_size - 1) // 2
    values: Map = np.random.default_rng(map_seed).permutation(np.arange(keys, vocab_size - 1))[:keys]
    values.flags.writeable = False  # it is shared by all callers
    return values
