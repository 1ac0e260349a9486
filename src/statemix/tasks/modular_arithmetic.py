"""Modular arithmetic: expressions with brackets, and without."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.variable_length import SCORED, VariableLength, last_only

SYMBOLS = "+-*()="


@dataclass(frozen=True)
class ModularArithmetic(VariableLength):
    """An expression with brackets, then "=", whose target is its value modulo m.

    `ModularArithmetic(seq_len=11)`: digits 0-4, + 5, - 6, * 7, ( 8, ) 9, = 10, pad 11.

                   (  3  -  (  -  4  )  )  =
        tokens     8  3  6  8  6  4  9  9 10 11 11
        targets    .  .  .  .  .  .  .  .  2  .  .        3 + 4 = 7, modulo 5

    An expression of 1 to 4 tokens is d, -d, (d) or (-d) with a uniform digit d; a longer one is (x+y), (x-y) or (x*y),
    where the operator and the length of x are uniform, and x and y are expressions. Every operator has its brackets, so
    that no rule of precedence is needed. With "*" the value is 0 more often than anything else (in about 3 of 10
    expressions at modulus 5): always answering 0 beats `chance` in token accuracy, but not in macro accuracy.

    Args:
        seq_len: the longest length, in tokens, with the "=". `with_seq_len(n)` has sequences of length n only.
        min_len: the shortest, at least 2; lengths are uniform.
        modulus: m, at least 2. Digits are [0, m).
        multiplication: whether there is "*"; the vocabulary is the same without.
        start: put one more token, the last of the vocabulary, before each sequence: see `VariableLength`.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Deletang et al. 2023 (arXiv 2207.02098): this grammar, with "*".
    """

    name: ClassVar[str] = "modular-arithmetic"

    seq_len: int = 40
    min_len: int = 3
    modulus: int = 5
    multiplication: bool = True
    start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("min_len", least=2)
        self.check_int("modulus", least=2)
        if not isinstance(self.multiplication, bool):
            raise TypeError(f"{self.name}: `multiplication` must be a bool, got {self.multiplication!r}.")

    def symbol(self, character: str) -> int:
        """The token of one of + - * ( ) =."""
        return self.modulus + SYMBOLS.index(character)

    @property
    def symbols(self) -> int:
        """Digits and six symbols."""
        return self.modulus + 6

    @property
    def symbol_names(self) -> tuple[str, ...]:
        """The digits, then + - * ( ) =."""
        return (*map(str, range(self.modulus)), *SYMBOLS[: self.symbols - self.modulus])

    @property
    def chance(self) -> float:
        """One in m."""
        return 1 / self.modulus

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """All expressions grow at once, from the outer brackets inwards."""
        tokens = np.full((count, self.seq_len), self.symbols)
        rows, starts, sizes = np.arange(count), np.zeros(count, dtype=np.int64), self.lengths(rng, count) - 1
        tokens[rows, sizes] = self.symbol("=")
        operators = np.array([self.symbol(c) for c in ("+-*" if self.multiplication else "+-")])
        while len(rows):
            bracketed = sizes >= 3
            tokens[rows[bracketed], starts[bracketed]] = self.symbol("(")
            tokens[rows[bracketed], (starts + sizes)[bracketed] - 1] = self.symbol(")")
            short = sizes <= 4
            negative = short & (sizes % 2 == 0)
            tokens[rows[negative], (starts + bracketed)[negative]] = self.symbol("-")
            tokens[rows[short], (starts + bracketed + negative)[short]] = rng.integers(self.modulus, size=short.sum())

            rows, starts, sizes = rows[~short], starts[~short], sizes[~short]
            left = rng.integers(1, sizes - 3)
            tokens[rows, starts + 1 + left] = operators[rng.integers(len(operators), size=len(rows))]
            rows, starts = np.tile(rows, 2), np.concatenate((starts + 1, starts + 2 + left))
            sizes = np.concatenate((left, sizes - 3 - left))
        return tokens

    def answers(self, words: Tokens) -> Tokens:
        """From left to right, with a stack: for each open bracket the value so far, its operator and its sign."""
        plus, minus, times, opening, closing, equals = (self.symbol(c) for c in SYMBOLS)
        depth = np.zeros(len(words), dtype=np.int64)
        most = int((words == opening).sum(1).max()) + 1
        value, operator = np.zeros((len(words), most), dtype=np.int64), np.full((len(words), most), plus)
        negative = np.zeros((len(words), most), dtype=bool)
        operand_before = np.zeros(len(words), dtype=bool)
        targets = np.full_like(words, IGNORE_INDEX)
        for t, token in enumerate(words.T):
            rows = np.flatnonzero(token == opening)
            depth[rows] += 1
            value[rows, depth[rows]], operator[rows, depth[rows]], negative[rows, depth[rows]] = 0, plus, False

            operand = token.copy()
            rows = np.flatnonzero(token == closing)
            operand[rows] = value[rows, depth[rows]]
            depth[rows] -= 1
            is_operand = (token < self.modulus) | (token == closing)
            rows = np.flatnonzero(is_operand)
            at = rows, depth[rows]
            x, y = value[at], np.where(negative[at], -operand[rows], operand[rows])
            done = np.select([operator[at] == plus, operator[at] == minus], [x + y, x - y], x * y)
            value[at] = done % self.modulus

            is_sign = (token == minus) & ~operand_before
            rows = np.flatnonzero(is_sign)
            negative[rows, depth[rows]] = True
            rows = np.flatnonzero(((token == plus) | (token == minus) | (token == times)) & ~is_sign)
            operator[rows, depth[rows]], negative[rows, depth[rows]] = token[rows], False
            rows = np.flatnonzero(token == equals)
            targets[rows, t] = value[rows, 0]
            operand_before = is_operand
        return targets


@dataclass(frozen=True)
class ModularArithmeticSimple(VariableLength):
    """Digits with operators between them; the target at each digit is the value of what ends there, modulo m.

    `ModularArithmeticSimple(seq_len=8)`: digits 0-4, + 5, - 6, * 7, pad 8.

                   3  -  2  *  4  +  1
        tokens     3  6  2  7  4  5  1  8
        targets    3  .  1  .  0  .  1  .       3 - 2 = 1, 3 - 8 = -5, -5 + 1 = -4, modulo 5

    "*" binds before "+" and "-", and there are no brackets, so that a finite automaton can follow. A word of k digits
    has 2 k - 1 tokens: where a length is even, the word is one token shorter. Digits and operators are uniform.

    Args:
        seq_len: the longest length, in tokens. `with_seq_len(n)` has words of length n only.
        min_len: the shortest; the numbers of digits are uniform.
        scored: "every" digit, or the "last" of each word.
        modulus: m, at least 2. Digits are [0, m).
        start: put one more token, the last of the vocabulary, before each word: see `VariableLength`.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: modular arithmetic (simple) in Deletang et al. 2023 (arXiv 2207.02098), where the last digit is scored.
    """

    name: ClassVar[str] = "modular-arithmetic-simple"

    seq_len: int = 40
    min_len: int = 3
    scored: str = "every"
    modulus: int = 5
    start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.check_int("min_len", least=1)
        super().__post_init__()
        self.check_choice("scored", SCORED)
        self.check_int("modulus", least=2)

    @property
    def symbols(self) -> int:
        """Digits and three operators."""
        return self.modulus + 3

    @property
    def symbol_names(self) -> tuple[str, ...]:
        """The digits, then + - *."""
        return (*map(str, range(self.modulus)), *SYMBOLS[: self.symbols - self.modulus])

    @property
    def chance(self) -> float:
        """One in m."""
        return 1 / self.modulus

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """Digits at even places, operators at odd ones."""
        digits = rng.integers((self.min_len + 1) // 2, (self.seq_len + 1) // 2 + 1, size=count)
        words = rng.integers(self.modulus, size=(count, self.seq_len))
        words[:, 1::2] = self.modulus + rng.integers(3, size=(count, self.seq_len // 2))
        return self.padded(words, 2 * digits - 1)

    def answers(self, words: Tokens) -> Tokens:
        """From left to right, with the sum of the finished products and what the next digit is multiplied with."""
        total, factor = np.zeros(len(words), dtype=np.int64), np.ones(len(words), dtype=np.int64)
        answers = np.full_like(words, IGNORE_INDEX)
        for t, token in enumerate(words.T):
            if t % 2 == 0:
                product = factor * token % self.modulus
                answers[:, t] = np.where(token == self.pad, IGNORE_INDEX, (total + product) % self.modulus)
            else:
                times = token == self.modulus + 2
                total = np.where(times, total, (total + product) % self.modulus)
                factor = np.where(times, product, np.where(token == self.modulus, 1, -1))
        return last_only(answers) if self.scored == "last" else answers

    def automaton(self) -> Automaton:
        """After a digit the sum of the finished products and the last one, after an operator their value and a factor.

        States: (total, product) after a digit; (total, factor) before one. See `Task.automaton`.
        """
        m = self.modulus
        total, product = np.divmod(np.arange(m * m), m)
        before = m * m  # the first of the states before a digit
        transitions = np.full((2 * m * m, self.symbols), NONE)
        outputs = np.full_like(transitions, NONE)
        value = (total + product) % m
        for digit in range(m):
            transitions[before:, digit] = m * total + product * digit % m  # where `product` is the factor
        outputs[before:, :m] = value[transitions[before:, :m]]
        transitions[:before, m] = before + m * value + 1
        transitions[:before, m + 1] = before + m * value + m - 1
        transitions[:before, m + 2] = before + m * total + product
        return self.automaton_of_words(transitions, outputs, before + 1)  # total 0, factor 1
