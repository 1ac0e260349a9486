"""Fuzzy in-context recall: keys and values are motifs of several tokens."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from statemix.tasks.base import COMPAT, IGNORE_INDEX, Task, Tokens, next_tokens

BLOCK = 1024  # sequences generated at once: what they need stays in the cache

Motifs = np.ndarray[tuple[int, int, int], np.dtype[np.int64]]


@dataclass(frozen=True)
class FuzzyInContextRecall(Task):
    """Pairs of a key motif and its value motif; where a key was shown before, the targets are the tokens of its value.

    `FuzzyInContextRecall(vocab_size=8, seq_len=12, k_motif_size=2, v_motif_size=2)`: keys of 0-2, values of 3-6, pad 7.
    The stream is the tokens and a last 6: 02 -> 5, 1 -> 46, then both again; 1 is the probe.

        tokens     7  0  2  5  1  4  6  0  2  5  1  4
        targets    .  .  .  .  .  .  .  .  5  .  4  6

    A motif is an ordered choice of distinct tokens: 02, 20 and 2 are three keys. The size of a key is uniform in
    1..k_motif_size (in validation and test it is always k_motif_size), that of a value in 1..v_motif_size; given the
    size, all motifs are equally likely. Keys and values have tokens of their own, so that a motif ends where the kind
    of token changes. A causal model sees that one token late: in training, where the sizes of keys vary, it cannot be
    sure at the end of a key that it is the end.

    One pair, the probe, is drawn first. It stands at a random place among as many others as fit, and again at the end,
    so its key has always been shown. Padding on the left fills up L + 1 tokens; the last one is a target only: T = L.

    Args:
        vocab_size: V. Keys are of the first half of the V - 1 tokens before the pad, rounded down, values of the rest;
            there must be as many as the longest motif needs, and two of each.
        seq_len: L, in tokens, at least 2 (k_motif_size + v_motif_size) - 1: the probe twice.
        k_motif_size: tokens in the longest key.
        v_motif_size: tokens in the longest value.
        compat: "mad" trains on the next token at every position, as MAD does, most of which cannot be known. What
            validation and test score is the same. "none": training scores what they do.

    Raises:
        TypeError, ValueError: an option is out of range.

    Source: Poli et al. 2024 (arXiv 2403.17844), MAD.
    """

    name: ClassVar[str] = "fuzzy-in-context-recall"

    vocab_size: int = 16
    seq_len: int = 128
    k_motif_size: int = 3
    v_motif_size: int = 3
    compat: str = "none"

    def __post_init__(self) -> None:
        self.check_int("k_motif_size", least=1)
        self.check_int("v_motif_size", least=1)
        # keys are the smaller half
        self.check_int("vocab_size", least=1 + max(4, 2 * self.k_motif_size, 2 * self.v_motif_size - 1))
        self.check_int("seq_len", least=2 * (self.k_motif_size + self.v_motif_size) - 1)
        self.check_choice("compat", COMPAT)
        if (self.num_keys + 1) ** self.k_motif_size * self.v_motif_size > 2**40:  # keys are numbered in 64 bits
            raise ValueError(
                f"{self.name}: `k_motif_size` must leave fewer than 2^40 keys, got {self.k_motif_size} tokens of "
                f"{self.num_keys}."
            )

    @property
    def pad(self) -> int:
        """V - 1."""
        return self.vocab_size - 1

    @property
    def num_keys(self) -> int:
        """Tokens of keys are [0, num_keys)."""
        return (self.vocab_size - 1) // 2

    @property
    def num_values(self) -> int:
        """Tokens of values are [num_keys, V - 1)."""
        return self.vocab_size - 1 - self.num_keys

    @property
    def chance(self) -> float:
        """One in the number of tokens of values."""
        return 1 / self.num_values

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """The tokens of whole streams."""
        sizes = [min(BLOCK, count - start) for start in range(0, count, BLOCK)]
        return np.concatenate([self.streams(rng, size, split)[:, :-1] for size in sizes])

    def streams(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Whole streams (count, L + 1): padding, pairs, then the probe again."""
        least = 1 if split == "train" else self.k_motif_size
        most = (self.seq_len + 1) // (least + 1)  # pairs that could fit
        keys, key_sizes = _motifs(rng, (count, most), 0, self.num_keys, least, self.k_motif_size)
        values, value_sizes = _motifs(rng, (count, most), self.num_keys, self.num_values, 1, self.v_motif_size)
        first = _first_equal(_codes(keys, self.num_keys))
        values = np.take_along_axis(values, first[..., None], axis=1)  # one value a key
        value_sizes = np.take_along_axis(value_sizes, first, axis=1)

        # pair 0 is the probe; the next `others` fit beside its two showings
        sizes = key_sizes + value_sizes
        room = self.seq_len + 1 - 2 * sizes[:, :1]
        others = (sizes[:, 1:].cumsum(1) <= room).sum(1)[:, None]
        place = rng.integers(others + 1)
        column = np.arange(others.max() + 2)
        probe = (column == place) | (column == others + 1)
        order = np.where(probe, 0, np.where(column < place, column + 1, column)).clip(max=most - 1)
        tokens = np.take_along_axis(np.concatenate((keys, values), axis=2), order[..., None], axis=1)
        valid = (tokens >= 0) & (column <= others + 1)[..., None]
        padding = self.seq_len + 1 - valid.sum((1, 2))
        stream = np.full((count, self.seq_len + 1), self.pad)
        stream[np.arange(self.seq_len + 1) >= padding[:, None]] = tokens[valid]
        return stream

    def oracle(self, tokens: Tokens) -> Tokens:
        """The stream cut into motifs; at each value token but those of a key's first showing, what stood there then."""
        batch, length = tokens.shape
        # the token after the last one is of a value, as every sequence ends in one
        stream = np.concatenate((tokens, np.full((batch, 1), self.num_keys)), axis=1)
        kind = np.where(stream == self.pad, 2, stream >= self.num_keys)
        column = np.arange(length + 1)
        begins = np.ones(stream.shape, dtype=bool)
        begins[:, 1:] = kind[:, 1:] != kind[:, :-1]
        begin = np.maximum.accumulate(np.where(begins, column, 0), axis=1)  # of the motif at each column

        rows, columns = np.nonzero(kind == 1)
        starts = begin[rows, columns]
        key_ends = starts - 1
        key_begins = begin[rows, key_ends]
        codes = rows
        for i in range(self.k_motif_size):
            places = key_begins + i
            digits = np.where(places <= key_ends, stream[rows, np.minimum(places, key_ends)] + 1, 0)
            codes = codes * (self.num_keys + 1) + digits
        codes = codes * self.v_motif_size + columns - starts
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        first = first[inverse]
        again = first < np.arange(len(first))
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[rows[again], columns[again] - 1] = stream[rows[again], columns[first[again]]]
        return targets

    def targets(self, tokens: Tokens, split: str) -> Tokens:
        """The oracle's, or every next token."""
        scored = self.oracle(tokens)
        return next_tokens(tokens, scored) if self.compat == "mad" and split == "train" else scored


def _motifs(
    rng: np.random.Generator, shape: tuple[int, int], begin: int, number: int, least: int, most: int
) -> tuple[Motifs, Tokens]:
    """Motifs of distinct tokens of [begin, begin + number), (*shape, most), filled up with -1, and their sizes."""
    sizes = rng.integers(least, most + 1, size=shape)
    motifs = np.empty((*shape, most), dtype=np.int64)
    chosen: list[Tokens] = []  # in ascending order
    for i in range(most):
        token = rng.integers(number - i, size=shape)  # of those not chosen yet
        for earlier in chosen:
            token += token >= earlier
        motifs[..., i] = token
        for j, earlier in enumerate(chosen):
            chosen[j], token = np.minimum(earlier, token), np.maximum(earlier, token)
        chosen.append(token)
    motifs += begin
    motifs[np.arange(most) >= sizes[..., None]] = -1
    return motifs, sizes


def _codes(motifs: Motifs, number: int) -> Tokens:
    """A number for each motif of tokens of [0, number), another one for another motif."""
    digits = (number + 1) ** np.arange(motifs.shape[2])
    return (motifs + 1) @ digits


def _first_equal(codes: Tokens) -> Tokens:
    """first[b, i]: the least j with codes[b, j] = codes[b, i]."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    new = np.ones(codes.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = np.maximum.accumulate(np.where(new, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, start, axis=1), axis=1)
    return first
