"""Random automata: a machine that no one designed, to be learned from what it says of words."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from statemix.analysis import Automaton
from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.variable_length import SCORED, VariableLength, last_only

MAX_STATES = 32  # beyond, draws in which words reach all states are rare


@dataclass(frozen=True)
class RandomAutomaton(VariableLength):
    """Symbols that move an automaton drawn at random; the target is 1 where it then accepts, 0 where it does not.

    `RandomAutomaton(seq_len=6, num_states=4)`: symbols 0 and 1, pad 2.

        tokens     0  0  1  0  1  2
        targets    0  0  1  1  0  .

    The state after each symbol in each state, and whether a state accepts, are uniform, of all automata in which words
    lead to every state and no two states are alike: no smaller one does the same. Symbols are uniform.

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest; lengths are uniform.
        scored: "every" position, or the "last" of each sequence.
        num_states: S, 2 to 32.
        num_symbols: at least 2.
        number: of the draw, at least 0.
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.

    Raises:
        TypeError, ValueError: an option is out of range.
    """

    name: ClassVar[str] = "random-automaton"

    seq_len: int = 40
    min_len: int = 3
    scored: str = "every"
    num_states: int = 8
    num_symbols: int = 2
    number: int = 0
    start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.check_int("min_len", least=1)
        super().__post_init__()
        self.check_choice("scored", SCORED)
        self.check_int("num_states", least=2)
        self.check_int("num_symbols", least=2)
        self.check_int("number", least=0)
        if self.num_states > MAX_STATES:
            raise ValueError(f"{self.name}: `num_states` must be at most {MAX_STATES}, got {self.num_states}.")

    @property
    def symbols(self) -> int:
        """Those that move the automaton; the answers are the first two."""
        return self.num_symbols

    @property
    def chance(self) -> float:
        """One in two."""
        return 1 / 2

    def automaton(self) -> Automaton:
        """The one that was drawn; see `Task.automaton`."""
        drawn = self._drawn()
        return self.automaton_of_words(drawn.transitions, drawn.outputs)

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """Uniform symbols and padding."""
        lengths = self.lengths(rng, count)
        return self.padded(rng.integers(self.num_symbols, size=(count, self.seq_len)), lengths)

    def answers(self, words: Tokens) -> Tokens:
        """What the automaton says after each symbol, or after the last one only."""
        real = words != self.pad
        # it walks on through the padding by symbol 0, and what it says there is not scored
        answers = np.where(real, self._drawn().run(np.where(real, words, 0)), IGNORE_INDEX)
        return last_only(answers) if self.scored == "last" else answers

    def _drawn(self) -> Automaton:
        return drawn_automaton(self.num_states, self.num_symbols, self.number)


@functools.lru_cache(maxsize=8)
def drawn_automaton(num_states: int, num_symbols: int, number: int) -> Automaton:
    """An automaton of the symbols alone, as `RandomAutomaton` says; it begins in state 0."""
    rng = np.random.default_rng([num_states, num_symbols, number])
    while True:
        transitions = rng.integers(num_states, size=(num_states, num_symbols))
        accepts = rng.integers(2, size=num_states)
        automaton = Automaton(transitions, accepts[transitions])
        if len(automaton.in_order().transitions) == len(automaton.minimal().transitions) == num_states:
            return automaton
