"""Regular languages that count: parity, even pairs, modular counting, cycle navigation."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from statemix.analysis import Automaton
from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.variable_length import SCORED, VariableLength, last_only


@dataclass(frozen=True)
class Counter(VariableLength):
    """Uniform inputs, each of which adds a number to a state modulo `num_states`, zero at first: the target."""

    seq_len: int = 40
    min_len: int = 3
    scored: str = "every"
    start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.check_int("min_len", least=1)
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
    def symbols(self) -> int:
        """The inputs or the targets, whichever are more."""
        return max(self.num_inputs, self.num_states)

    @property
    def chance(self) -> float:
        """One in the number of states."""
        return 1 / self.num_states

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """Uniform inputs and padding."""
        lengths = self.lengths(rng, count)
        return self.padded(rng.integers(self.num_inputs, size=(count, self.seq_len)), lengths)

    def answers(self, words: Tokens) -> Tokens:
        """The state after each token, or after the last one only."""
        real = words != self.pad
        states = np.cumsum(np.where(real, self.increments(words), 0), axis=1) % self.num_states
        answers = np.where(real, states, IGNORE_INDEX)
        return last_only(answers) if self.scored == "last" else answers

    def automaton(self) -> Automaton:
        """The sums are the states, zero the first; see `Task.automaton`."""
        states, inputs = np.arange(self.num_states), np.arange(self.num_inputs)
        transitions = (states[:, None] + self.increments(inputs[:, None])[:, 0]) % self.num_states
        return self.automaton_of_words(transitions, transitions)


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
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.

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
class EvenPairs(Parity):
    """Bits; the target is the number of neighbours so far that differ, 01 or 10, modulo 2.

    `EvenPairs(seq_len=6)`: the pad is 2.

        tokens     1  1  0  1  2  2
        targets    0  0  1  0  .  .

    So it is 0 where the last bit is the first one.

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest; lengths are uniform.
        scored: "every" position, or the "last" of each sequence.
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Deletang et al. 2023 (arXiv 2207.02098), where the last position is scored.
    """

    name: ClassVar[str] = "even-pairs"

    def increments(self, tokens: Tokens) -> Tokens:
        """1 where a bit is not the one before it."""
        return np.pad(tokens[:, 1:] != tokens[:, :-1], ((0, 0), (1, 0))).astype(np.int64)

    def automaton(self) -> Automaton:
        """A state for each first bit, 1 and 2, behind that of the empty word, 0; see `Task.automaton`."""
        transitions = np.array([[1, 2], [1, 1], [2, 2]])
        differs = np.array([[0, 0], [0, 1], [1, 0]])
        return self.automaton_of_words(transitions, differs)


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
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.
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
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.
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
