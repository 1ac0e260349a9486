"""Modular arithmetic with brackets."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.regular import VariableLength

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

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Deletang et al. 2023 (arXiv 2207.02098): this grammar, with "*".
    """

    name: ClassVar[str] = "modular-arithmetic"

    modulus: int = 5
    multiplication: bool = True

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
    def vocab_size(self) -> int:
        """Digits, six symbols and the pad."""
        return self.modulus + 7

    @property
    def pad(self) -> int:
        """The last token."""
        return self.modulus + 6

    @property
    def chance(self) -> float:
        """One in m."""
        return 1 / self.modulus

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """All expressions grow at once, from the outer brackets inwards."""
        tokens = np.full((count, self.seq_len), self.pad)
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

    def oracle(self, tokens: Tokens) -> Tokens:
        """From left to right, with a stack: for each open bracket the value so far, its operator and its sign."""
        plus, minus, times, opening, closing, equals = (self.symbol(c) for c in SYMBOLS)
        depth = np.zeros(len(tokens), dtype=np.int64)
        most = int((tokens == opening).sum(1).max()) + 1
        value, operator = np.zeros((len(tokens), most), dtype=np.int64), np.full((len(tokens), most), plus)
        negative = np.zeros((len(tokens), most), dtype=bool)
        operand_before = np.zeros(len(tokens), dtype=bool)
        targets = np.full_like(tokens, IGNORE_INDEX)
        for t, token in enumerate(tokens.T):
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
