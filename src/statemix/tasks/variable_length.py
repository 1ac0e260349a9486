"""Words of many lengths: maybe a start token before them, and padding behind them."""

from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.analysis.permutations import Table
from statemix.tasks.base import IGNORE_INDEX, Task, Tokens

SCORED = ("every", "last")

Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]


class VariableLength(Task):
    """Words with a length uniform in [min_len, seq_len], padded on the right up to seq_len.

    The padding stands behind a word and is not scored: a causal model is at each token where it would be without it.
    Nor does it count in the hash of the sequence, which is in one split whatever it is padded to. The shortest lengths
    have few words (parity has 8 of length 3), most of them for training.

    With `start` there is one more token, the last of the vocabulary, before every word; its target is not scored. A
    linear recurrence starts from a state of zeros, and gates that only see the token cannot tell the first step from
    later ones: without a start token a layer must write to its state, and so forget, all the time.

    A subclass is a frozen dataclass with these three options. It defines `symbols`, `words` and `answers`.
    """

    later: ClassVar[tuple[str, ...]] = ("start",)

    seq_len: int
    min_len: int | None  # None: every word is seq_len long, and there is no padding
    start: bool

    def __post_init__(self) -> None:
        self.check_int("seq_len", least=1)
        if self.min_len is not None:
            self.check_int("min_len", least=1)
            if self.min_len > self.seq_len:
                raise ValueError(
                    f"{self.name}: `min_len` must be at most seq_len = {self.seq_len}, got {self.min_len}."
                )
        self.check_flag("start")

    @property
    @abstractmethod
    def symbols(self) -> int:
        """Number of the tokens of words and of targets, which are the first of the vocabulary."""

    @abstractmethod
    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """`count` words (count, seq_len) with their padding, drawn independently."""

    @abstractmethod
    def answers(self, words: Tokens) -> Tokens:
        """The scored targets (B, T) of words (B, T)."""

    @property
    def vocab_size(self) -> int:
        """The symbols, then the padding and the start token where there are these."""
        return self.symbols + (self.min_len is not None) + self.start

    @property
    def symbol_names(self) -> tuple[str, ...]:
        """What the symbols are called: their numbers, if nothing else."""
        return tuple(map(str, range(self.symbols)))

    @property
    def token_names(self) -> tuple[str, ...]:
        """Those of the symbols, then "pad" and "start" where there are these."""
        return self.symbol_names + ("pad",) * (self.min_len is not None) + ("start",) * self.start

    @property
    def pad(self) -> int | None:
        """The token after the symbols."""
        return None if self.min_len is None else self.symbols

    @property
    def length(self) -> int:
        """The longest length, and the start token."""
        return self.seq_len + self.start

    def with_seq_len(self, seq_len: int) -> Self:
        """The same task with every word exactly `seq_len` tokens long: the accuracy at one length."""
        return type(self)(**(vars(self) | {"seq_len": seq_len, "min_len": self.min_len and seq_len}))

    def with_lengths(self, shortest: int, longest: int) -> Self:
        """See `Task.with_lengths`."""
        if self.min_len is None:
            raise ValueError(f"{self.name}: `min_len` must be set for words of many lengths, which it pads.")
        return type(self)(**(vars(self) | {"seq_len": longest, "min_len": shortest}))

    def lengths(self, rng: np.random.Generator, count: int) -> Lengths:
        """Of `count` words."""
        if self.min_len is None:
            return np.full(count, self.seq_len)
        return rng.integers(self.min_len, self.seq_len + 1, size=count)

    def padded(self, words: Tokens, lengths: Lengths) -> Tokens:
        """Words with the padding behind their lengths."""
        return words if self.pad is None else np.where(np.arange(words.shape[1]) < lengths[:, None], words, self.pad)

    def automaton_of_words(self, transitions: Table, outputs: Table, first: int = 0) -> Automaton:
        """An automaton of words as one of sequences: of the whole vocabulary, and with the start token if there is one.

        Args:
            transitions, outputs: (S, X), see `Automaton`; of the first X tokens alone.
            first: the state of the empty word.
        """
        more = ((0, 0), (0, self.vocab_size - transitions.shape[1]))
        automaton = Automaton(
            np.pad(transitions, more, constant_values=NONE), np.pad(outputs, more, constant_values=NONE), first
        )
        return automaton.preceded_by(self.vocab_size - 1) if self.start else automaton

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Words, after the start token if there is one."""
        words = self.words(rng, count)
        return np.pad(words, ((0, 0), (1, 0)), constant_values=self.vocab_size - 1) if self.start else words

    def oracle(self, tokens: Tokens) -> Tokens:
        """The answers of the words; nothing is scored at the start token."""
        answers = self.answers(tokens[:, int(self.start) :])
        return np.pad(answers, ((0, 0), (int(self.start), 0)), constant_values=IGNORE_INDEX)


def last_only(answers: Tokens) -> Tokens:
    """Answers (B, T) with the last one of each row alone."""
    scored = answers != IGNORE_INDEX
    later = np.cumsum(scored[:, ::-1], axis=1)[:, ::-1] - scored  # how many come after
    return np.where(scored & (later == 0), answers, IGNORE_INDEX)
