"""Permutation composition: the state-tracking task over finite groups."""

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.analysis import NONE, Automaton
from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.variable_length import SCORED, VariableLength, last_only

Table = np.ndarray[tuple[int, int], np.dtype[np.int16]]
Elements = np.ndarray[tuple[int], np.dtype[np.int64]]

MAX_GROUP_SIZE = 5040  # S7: a table of 50 MB
INPUTS = ("all", "transpositions")


@dataclass(frozen=True)
class PermutationComposition(VariableLength):
    """Tokens x_1..x_L are uniform in a group G; the target at position t is x_1 o x_2 o ... o x_t.

    S3, L = 5. Elements of S3 in lexicographic order: 0 = 012, 1 = 021, 2 = 102, 3 = 120, 4 = 201, 5 = 210.

        tokens    2   4   4   0   1
        targets   2   5   1   1   0        2 o 4 = 5, 5 o 4 = 1, 1 o 0 = 1, 1 o 1 = 0

    Args:
        group: S<n> (all permutations), A<n> (the even ones), Z<n> (addition modulo n), or a product such as A4xZ5. In a
            product the element (a, b) has the number a * |second| + b.
        seq_len: L, in tokens.
        generators: the inputs: "all", or "transpositions", those of S<n>, which generate it, or k: so many distinct
            elements of G, drawn at random. They need not generate G.
        start: put one more token, the last of the vocabulary, before the sequence: see `VariableLength`.
        min_len: the shortest length; lengths are uniform in [min_len, seq_len]. None: all are of seq_len.
        scored: "every" position, or the "last" of each sequence.
        generators_seed: of the draw of k elements.

    Raises:
        TypeError, ValueError: the group is not of that form or has more than 5040 elements, a length is out of range,
            or `generators` does not fit the group.

    Source: state tracking as in Dubinin et al. 2026 (arXiv 2602.12021).
    """

    name: ClassVar[str] = "permutation"
    later: ClassVar[tuple[str, ...]] = ("min_len", "scored", "generators_seed")

    group: str = "S3"
    seq_len: int = 16
    generators: int | str = "all"
    start: bool = False
    min_len: int | None = None
    scored: str = "every"
    generators_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("scored", SCORED)
        self.check_int("generators_seed", least=0)
        _factors(self.group)
        if self.generators != "all":  # whose table need not be there yet
            _inputs(self.group, self.generators, self.generators_seed)

    @property
    def symbols(self) -> int:
        """Number of elements of the group: both tokens and targets."""
        return len(group_table(self.group))

    @property
    def symbol_names(self) -> tuple[str, ...]:
        """Where a permutation takes 0, 1, ..., digit by digit; numbers of Z<n>; both with a comma in a product."""
        factors = [
            range(n) if kind == "Z" else ["".join(map(str, x)) for x in _permutations(kind, n).tolist()]
            for kind, n in _factors(self.group)
        ]
        return tuple(",".join(map(str, names)) for names in itertools.product(*factors))

    @property
    def chance(self) -> float:
        """One in the number of elements of the group."""
        return 1 / len(group_table(self.group))

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """Uniform over the inputs."""
        lengths = self.lengths(rng, count)
        inputs = _inputs(self.group, self.generators, self.generators_seed)
        return self.padded(inputs[rng.integers(len(inputs), size=(count, self.seq_len))], lengths)

    def answers(self, words: Tokens) -> Tokens:
        """The products, from the multiplication table."""
        table = group_table(self.group)
        answers = np.full_like(words, IGNORE_INDEX)
        product = np.zeros_like(words[:, 0])  # the identity is element 0 of every group
        for t, token in enumerate(words.T):
            real = token != self.pad
            answers[:, t] = np.where(real, table[product, np.where(real, token, 0)], IGNORE_INDEX)
            product = np.where(real, answers[:, t], 0)
        return last_only(answers) if self.scored == "last" else answers

    def automaton(self) -> Automaton:
        """The products are the states, the identity the first; see `Task.automaton`."""
        table, inputs = group_table(self.group), _inputs(self.group, self.generators, self.generators_seed)
        transitions = np.full(table.shape, NONE)
        transitions[:, inputs] = table[:, inputs]
        return self.automaton_of_words(transitions, transitions)


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


def _inputs(group: str, generators: int | str, seed: int) -> Elements:
    """Numbers of the elements of the group that words are made of."""
    size = len(group_table(group))
    if generators == "all":
        return np.arange(size)
    if generators == "transpositions":
        return _transpositions(group)
    if not isinstance(generators, int) or isinstance(generators, bool):
        allowed = f"one of {sorted(INPUTS)} or a number of elements"
        raise ValueError(f"permutation: `generators` must be {allowed}, got {generators!r}.")
    if not 1 <= generators <= size:
        raise ValueError(f"permutation: `generators` must be in [1, {size}], as {group} has, got {generators}.")
    return np.sort(np.random.default_rng(seed).permutation(size)[:generators])


def _transpositions(group: str) -> Elements:
    """Numbers of the elements of S_n that swap two points."""
    (kind, n), *rest = _factors(group)
    if kind != "S" or n < 2 or rest:
        raise ValueError(f"permutation: generators='transpositions' needs a group S<n> with n >= 2, got {group!r}.")
    moved = (_permutations("S", n) != np.arange(n)).sum(1)
    return np.flatnonzero(moved == 2)
