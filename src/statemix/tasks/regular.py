"""Regular languages that count: parity, modular counting, cycle navigation; sequences of many lengths."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.tasks.base import IGNORE_INDEX, Task, Tokens

SCORED = ("every", "last")

Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class VariableLength(Task):
    """Sequences with a length uniform in [min_len, seq_len], padded on the right up to T = seq_len.

    The padding stands behind a sequence and is not scored: a causal model is at each token where it would be without
    it. Nor does it count in the hash of the sequence, which is in one split whatever it is padded to. The shortest
    lengths have few sequences (parity has 8 of length 3), most of them for training.
    """

    seq_len: int = 40
    min_len: int = 3

    def __post_init__(self) -> None:
        self.check_int("seq_len", least=1)
        self.check_int("min_len", least=1)
        if self.min_len > self.seq_len:
            raise ValueError(f"{self.name}: `min_len` must be at most seq_len = {self.seq_len}, got {self.min_len}.")

    def with_seq_len(self, seq_len: int) -> Self:
        """The same task with every sequence exactly `seq_len` tokens long: the accuracy at one length."""
        return type(self)(**(vars(self) | {"seq_len": seq_len, "min_len": seq_len}))

    def lengths(self, rng: np.random.Generator, count: int) -> Lengths:
        """Of `count` sequences."""
        return rng.integers(self.min_len, self.seq_len + 1, size=count)


@dataclass(frozen=True)
class Counter(VariableLength):
    """Uniform inputs, each of which adds a number to a state modulo `num_states`, zero at first: the target."""

    scored: str = "every"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("scored", SCORED)

    @property
    @abstractmethod
    def num_inputs(self) -> int:
        """Inputs are [0, num_inputs)."""

    @property
    @abstractmethod
    def num_states(self) -> int:
        """Targets are [0, num_states)."""

    @abstractmethod
    def increments(self, tokens: Tokens) -> Tokens:
        """What each input adds to the state."""

    @property
    def vocab_size(self) -> int:
        """The inputs or the targets, whichever are more, and the pad."""
        return max(self.num_inputs, self.num_states) + 1

    @property
    def pad(self) -> int:
        """The last token."""
        return self.vocab_size - 1

    @property
    def chance(self) -> float:
        """One in the number of states."""
        return 1 / self.num_states

    def automaton(self) -> Automaton:
        """The sums are the states, zero the first; see `Task.automaton`."""
        states, inputs = np.arange(self.num_states)[:, None], np.arange(self.num_inputs)[None]
        transitions = np.full((self.num_states, self.vocab_size), NONE)
        transitions[:, : self.num_inputs] = (states + self.increments(inputs)) % self.num_states
        return Automaton(transitions, transitions)

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Uniform inputs and padding."""
        lengths = self.lengths(rng, count)
        tokens = rng.integers(self.num_inputs, size=(count, self.seq_len))
        tokens[np.arange(self.seq_len) >= lengths[:, None]] = self.pad
        return tokens

    def oracle(self, tokens: Tokens) -> Tokens:
        """The state after each token, or after the last one only."""
        real = tokens != self.pad
        states = np.cumsum(np.where(real, self.increments(tokens), 0), axis=1) % self.num_states
        scored = real.copy()
        if self.scored == "last":
            scored[:, :-1] &= ~real[:, 1:]
        return np.where(scored, states, IGNORE_INDEX)


@dataclass(frozen=True)
class Parity(Counter):
    """Bits; the target is the number of ones so far, modulo 2.

    `Parity(seq_len=6)`: the pad is 2.

        tokens     1  0  1  1  2  2
        targets    1  1  0  1  .  .

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest; lengths are uniform.
        scored: "every" position, or the "last" of each sequence.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: parity check in Deletang et al. 2023 (arXiv 2207.02098), where the last position is scored.
    """

    name: ClassVar[str] = "parity"

    @property
    def num_inputs(self) -> int:
        """0 and 1."""
        return 2

    @property
    def num_states(self) -> int:
        """Even and odd."""
        return 2

    def increments(self, tokens: Tokens) -> Tokens:
        """The bits."""
        return tokens


@dataclass(frozen=True)
class ModularCounting(Counter):
    """Digits; the target is their sum so far, modulo k.

    `ModularCounting(seq_len=6, modulus=3)`: digits 0-2, pad 3.

        tokens     2  2  0  1  3  3
        targets    2  1  1  2  .  .

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest; lengths are uniform.
        scored: "every" position, or the "last" of each sequence.
        modulus: k, at least 2. Digits are [0, k).

    Raises:
        TypeError, ValueError: an option is out of range.
    """

    name: ClassVar[str] = "modular-counting"

    modulus: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("modulus", least=2)

    @property
    def num_inputs(self) -> int:
        """The digits."""
        return self.modulus

    @property
    def num_states(self) -> int:
        """The sums modulo k."""
        return self.modulus

    def increments(self, tokens: Tokens) -> Tokens:
        """The digits."""
        return tokens


@dataclass(frozen=True)
class CycleNavigation(Counter):
    """Steps of -1, 0 and +1, as tokens 0, 1 and 2, on a cycle of k places; the target is the place, from 0.

    `CycleNavigation(seq_len=6, cycle_length=5)`: places 0-4, pad 5.

        tokens     0  2  2  1  2  5
        targets    4  0  1  1  2  .

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest; lengths are uniform.
        scored: "every" position, or the "last" of each sequence.
        cycle_length: k, at least 2.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Deletang et al. 2023 (arXiv 2207.02098), where the last position is scored.
    """

    name: ClassVar[str] = "cycle-navigation"

    cycle_length: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("cycle_length", least=2)

    @property
    def num_inputs(self) -> int:
        """Back, stay, forward."""
        return 3

    @property
    def num_states(self) -> int:
        """The places."""
        return self.cycle_length

    def increments(self, tokens: Tokens) -> Tokens:
        """-1, 0 or +1."""
        return tokens - 1
