"""Word problems from a CSV file, as they are handed about: words of any group or automaton, with their answers."""

import csv
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from statemix.tasks.base import IGNORE_INDEX, Tokens
from statemix.tasks.variable_length import SCORED, VariableLength, last_only

COLUMNS = ("input", "target")


class Words(NamedTuple):
    """What a file has: different words, their answers, both (words, longest) with -1 behind a word, and its digest."""

    words: Tokens
    answers: Tokens
    digest: str


@dataclass(frozen=True)
class WordProblem(VariableLength):
    """Words of a CSV file, drawn uniformly among those that differ; the targets are the file's own.

    The file has the columns `input` and `target`, of as many numbers each, with spaces between them; others, such as
    `seed`, are not read:

        seed,input,target
        7,2 4 4 0 1,2 5 1 1 0

    Words are divided among the splits as those of every task are, by a hash. Word, targets and vocabulary begin at 0.

    Args:
        path: of the file.
        seq_len: the longest length, in tokens. None: that of the file's longest word.
        min_len: the shortest. None: that of the file's shortest word, where its words differ in length.
        scored: "every" position, or the "last" of each word.
        start: put one more token, the last of the vocabulary, before each word: see `VariableLength`.

    Raises:
        TypeError, ValueError: an option is out of range, or the file is not as said; the message names its line.

    Source: the format of Merrill et al. 2024 (arXiv 2404.08819).
    """

    name: ClassVar[str] = "word-problem"

    path: str
    seq_len: int | None = None  # type: ignore[assignment]  # an int from the start on
    min_len: int | None = None
    scored: str = "every"
    start: bool = False

    def __post_init__(self) -> None:
        lengths = (self._table.words >= 0).sum(1)
        longest = int(lengths.max()) if self.seq_len is None else self.seq_len
        object.__setattr__(self, "seq_len", longest)
        if self.min_len is None and lengths.min() < lengths.max():
            object.__setattr__(self, "min_len", min(int(lengths.min()), longest))
        super().__post_init__()
        self.check_choice("scored", SCORED)
        if not len(self._rows):
            wanted = f"a length of its words, in [{lengths.min()}, {lengths.max()}]"
            raise ValueError(f"{self.name}: `seq_len` must be {wanted}, got {self.seq_len}.")

    @property
    def symbols(self) -> int:
        """One more than the largest number of the file."""
        return int(max(self._table.words.max(), self._table.answers.max())) + 1

    @property
    def chance(self) -> float:
        """One in the number of different targets."""
        return 1 / len(np.unique(self._table.answers[self._table.answers >= 0]))

    @property
    def fingerprint(self) -> str:
        """The file's SHA-256."""
        return self._table.digest

    def words(self, rng: np.random.Generator, count: int) -> Tokens:
        """Uniform over the file's words of these lengths."""
        found = self._table.words[rng.choice(self._rows, count)][:, : self.seq_len]
        return found if self.pad is None else np.where(found < 0, self.pad, found)

    def answers(self, words: Tokens) -> Tokens:
        """Those of the file. Raises ValueError if it has no such word."""
        rows, answers = _rows_of(self.path, self._table.digest), np.full_like(words, IGNORE_INDEX)
        for i, word in enumerate(words):
            real = word[word != self.pad].tolist()
            row = rows.get(tuple(real))
            if row is None:
                raise ValueError(f"{self.name}: '{self.path}' has no word {real}.")
            answers[i, : len(real)] = self._table.answers[row, : len(real)]
        return last_only(answers) if self.scored == "last" else answers

    @property
    def _table(self) -> Words:
        if not isinstance(self.path, str):
            raise TypeError(f"{self.name}: `path` must be a str, got {self.path!r}.")
        try:
            stat = Path(self.path).stat()
        except OSError as error:
            raise ValueError(
                f"{self.name}: `path` must name a file that can be read, got '{self.path}': {error}."
            ) from None
        return _read(self.path, stat.st_mtime_ns, stat.st_size)

    @property
    def _rows(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Of the words of lengths from `min_len` to `seq_len`."""
        lengths = (self._table.words >= 0).sum(1)
        shortest = self.seq_len if self.min_len is None else self.min_len
        return np.flatnonzero((shortest <= lengths) & (lengths <= self.seq_len))


@functools.lru_cache(maxsize=4)
def _read(path: str, modified: int, size: int) -> Words:
    """The file's words. Raises ValueError, naming the line."""
    try:
        content = Path(path).read_bytes()
        lines = csv.DictReader(content.decode().splitlines())
        if not set(COLUMNS) <= set(lines.fieldnames or ()):
            wanted = " and ".join(COLUMNS)
            raise ValueError(f"word-problem: '{path}' must have the columns {wanted}, got {lines.fieldnames}.")
        found: dict[tuple[int, ...], tuple[int, ...]] = {}
        for line in lines:
            word, answers = (_numbers(line[column], f"'{path}', line {lines.line_num}, {column}") for column in COLUMNS)
            if len(word) != len(answers):
                wanted = f"as many numbers as `input` = {len(word)}"
                raise ValueError(
                    f"word-problem: '{path}', line {lines.line_num}, target: must have {wanted}, got {len(answers)}."
                )
            if found.setdefault(word, answers) != answers:
                raise ValueError(
                    f"word-problem: '{path}', line {lines.line_num}, target: the same word had others before."
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"word-problem: '{path}' cannot be read as CSV: {error}.") from error
    if not found:
        raise ValueError(f"word-problem: '{path}' must have at least one word, got none.")
    longest = max(map(len, found))
    tables = [np.full((len(found), longest), -1) for _ in COLUMNS]
    for row, pair in enumerate(found.items()):
        for table, numbers in zip(tables, pair, strict=True):
            table[row, : len(numbers)] = numbers
    return Words(tables[0], tables[1], hashlib.sha256(content).hexdigest())


def _numbers(text: str | None, where: str) -> tuple[int, ...]:
    """Those of a cell, at least one."""
    parts = (text or "").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise ValueError(f"word-problem: {where}: must be whole numbers in [0, 10^6), got {text!r:.60}.")
    return tuple(map(int, parts))


@functools.lru_cache(maxsize=4)
def _rows_of(path: str, digest: str) -> dict[tuple[int, ...], int]:
    """Which row of the table each word is."""
    stat = Path(path).stat()
    words = _read(path, stat.st_mtime_ns, stat.st_size).words
    return {tuple(word[word >= 0].tolist()): row for row, word in enumerate(words)}
