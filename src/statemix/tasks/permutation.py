"""Permutation composition: the state-tracking task over finite groups."""

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.tasks.base import IGNORE_INDEX, Task, Tokens

Table = np.ndarray[tuple[int, int], np.dtype[np.int16]]

MAX_GROUP_SIZE = 5040  # S7: a table of 50 MB
INPUTS = ("all", "transpositions")


@dataclass(frozen=True)
class PermutationComposition(Task):
    """Tokens x_1..x_L are uniform in a group G; the target at position t is x_1 o x_2 o ... o x_t.

    S3, L = 5. Elements of S3 in lexicographic order: 0 = 012, 1 = 021, 2 = 102, 3 = 120, 4 = 201, 5 = 210.

        tokens    2   4   4   0   1
        targets   2   5   1   1   0        2 o 4 = 5, 5 o 4 = 1, 1 o 0 = 1, 1 o 1 = 0

    Args:
        group: S<n> (all permutations), A<n> (the even ones), Z<n> (addition modulo n), or a product such as A4xZ5. In a
            product the element (a, b) has the number a * |second| + b.
        seq_len: L, in tokens.
        generators: "all", or "transpositions": inputs restricted to the transpositions of S<n>, which generate it.
        start: put one more token, the last of the vocabulary, before the sequence; its target is not scored. A linear
            recurrence starts from a state of zeros, and gates that only see the token cannot tell the first step from
            later ones: without a start token a layer must write to its state, and so forget, all the time.

    Raises:
        TypeError, ValueError: the group is not of that form or has more than 5040 elements, L < 1, or `generators`
            does not fit the group.

    Source: state tracking as in Dubinin et al. 2026 (arXiv 2602.12021).
    """

    name: ClassVar[str] = "permutation"

    group: str = "S3"
    seq_len: int = 16
    generators: str = "all"
    start: bool = False

    def __post_init__(self) -> None:
        self.check_int("seq_len", least=1)
        self.check_choice("generators", INPUTS)
        self.check_flag("start")
        _factors(self.group)
        if self.generators == "transpositions":
            _transpositions(self.group)

    @property
    def vocab_size(self) -> int:
        """Number of elements of the group: both tokens and targets; and the start token, if there is one."""
        return len(group_table(self.group)) + self.start

    @property
    def length(self) -> int:
        """L, and the start token."""
        return self.seq_len + self.start

    @property
    def chance(self) -> float:
        """One in the number of elements of the group."""
        return 1 / len(group_table(self.group))

    @property
    def inputs(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The elements that are tokens."""
        return np.arange(len(group_table(self.group))) if self.generators == "all" else _transpositions(self.group)

    def automaton(self) -> Automaton:
        """The products are the states, the identity the first; see `Task.automaton`."""
        table, inputs = group_table(self.group), self.inputs
        transitions = np.full((len(table), self.vocab_size), NONE)
        transitions[:, inputs] = table[:, inputs]
        automaton = Automaton(transitions, transitions)
        return automaton.preceded_by(len(table)) if self.start else automaton

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Uniform over the group, or over its transpositions."""
        size, inputs = len(group_table(self.group)), self.inputs
        tokens = inputs[rng.integers(len(inputs), size=(count, self.seq_len))]
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=size) if self.start else tokens

    def oracle(self, tokens: Tokens) -> Tokens:
        """The targets (B, L) of tokens (B, L), from the multiplication table."""
        table = group_table(self.group)
        targets = np.full_like(tokens, IGNORE_INDEX)
        product = np.zeros_like(tokens[:, 0])  # the identity is element 0 of every group
        for t in range(int(self.start), tokens.shape[1]):
            targets[:, t] = table[product, tokens[:, t]]
            product = targets[:, t]
        return targets


@functools.lru_cache(maxsize=8)
def group_table(group: str) -> Table:
    """table[a, b] = a o b, where (a o b)[i] = a[b[i]] for permutations, and a + b modulo n in Z_n."""
    table: Table = np.zeros((1, 1), dtype=np.int16)
    for kind, n in _factors(group):
        factor = _factor_table(kind, n)
        size = len(table) * len(factor)
        pairs = table[:, None, :, None].astype(np.int64) * len(factor) + factor[None, :, None, :]
        table = pairs.reshape(size, size).astype(np.int16)
    table.flags.writeable = False  # it is shared by all callers
    return table


def _factors(group: str) -> list[tuple[str, int]]:
    """ "A4xZ5" -> [("A", 4), ("Z", 5)]."""
    if not isinstance(group, str) or not re.fullmatch(r"[SAZ][1-9]\d*(x[SAZ][1-9]\d*)*", group):
        raise ValueError(f"permutation: `group` must be S<n>, A<n>, Z<n> or a product such as A4xZ5, got {group!r}.")
    factors = [(part[0], int(part[1:])) for part in group.split("x")]
    size = 1
    for kind, n in factors:
        # |S_n|, |A_n|, |Z_n|; 8! is beyond the limit already, and 10000! would take a while
        size *= n if kind == "Z" else math.factorial(min(n, 8)) // (2 if kind == "A" and n > 1 else 1)
    if size > MAX_GROUP_SIZE:
        raise ValueError(f"permutation: `group` must have at most {MAX_GROUP_SIZE} elements, got {group!r}.")
    return factors


def _factor_table(kind: str, n: int) -> Table:
    if kind == "Z":
        return (np.add.outer(np.arange(n), np.arange(n)) % n).astype(np.int16)
    elements = _permutations(kind, n)
    digits = n ** np.arange(n)[::-1]  # a permutation as a number in base n: lexicographic order is numeric order
    codes = elements @ digits
    table = np.empty((len(elements), len(elements)), dtype=np.int16)
    for number, a in enumerate(elements):
        table[number] = np.searchsorted(codes, a[elements] @ digits)
    return table


def _permutations(kind: str, n: int) -> Tokens:
    """The elements of S_n or A_n in lexicographic order, (size, n)."""
    elements = np.array(list(itertools.permutations(range(n))), dtype=np.int64)
    if kind == "S":
        return elements
    i, j = np.triu_indices(n, 1)
    inversions = (elements[:, i] > elements[:, j]).sum(1)
    return elements[inversions % 2 == 0]


def _transpositions(group: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Numbers of the elements of S_n that swap two points."""
    (kind, n), *rest = _factors(group)
    if kind != "S" or n < 2 or rest:
        raise ValueError(f"permutation: generators='transpositions' needs a group S<n> with n >= 2, got {group!r}.")
    moved = (_permutations("S", n) != np.arange(n)).sum(1)
    return np.flatnonzero(moved == 2)
