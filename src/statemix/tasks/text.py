"""Text: the next token of a file, a folder, a data set, or the sources of Python's own library."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from statemix.tasks.base import IGNORE_INDEX, SPLITS, Batch, Task, Tokens, stream, to_batch
from statemix.text.corpus import Corpus, open_corpus
from statemix.text.tokenizer import TOKENIZERS, Tokenizer

Positions = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Text(Task):
    """The next token of a text, which is cut by position into training, validation and test.

    A window of 5 bytes on two documents, "abcd" and "ef":

        tokens      97   98   99  100  101
        reset        x    .    .    .    x      a document begins: the state is zero before it
        targets     98   99  100    .  102      what follows the end of a document is not predicted

    A file is one document; so is each file of a folder and each row of a data set. Validation and test read their parts
    from the beginning, window by window. Training draws windows anywhere in its part; with carried state each row of
    the batch reads on from a place of its own, and goes on at the beginning behind the end.

    Args:
        source: "stdlib": the Python sources of the standard library of this Python, without its tests. "hf:NAME" or
            "hf:NAME:CONFIG": the split "train" of a Hugging Face data set, by its name on the hub or a local path. Else
            the path of a file or a folder, whose files are read in the order of their names, but for hidden ones.
        tokenizer: "bytes", "characters" (those of the whole text), or "bpe", learned from the training part.
        bpe_vocab_size: tokens of BPE, at least 256; of a short text it has fewer.
        seq_len: L, in tokens, of a window.
        valid: share of the text that validates, above 0.
        test: share of the text that tests, behind the validation. 0: there is no test.
        column: of a data set, the one with the text.

    Raises:
        TypeError, ValueError: an option is out of range. What is wrong with the source is raised when it is first read.
    """

    name: ClassVar[str] = "text"
    can_carry: ClassVar[bool] = True

    source: str = "stdlib"
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 256
    valid: float = 0.05
    test: float = 0.05
    column: str = "text"

    def __post_init__(self) -> None:
        for option in ("source", "column"):
            if not isinstance(getattr(self, option), str):
                raise TypeError(f"text: `{option}` must be a text, got {getattr(self, option)!r}.")
        if not self.source:
            raise ValueError("text: `source` must be a path, 'stdlib' or 'hf:NAME', got ''.")
        self.check_choice("tokenizer", tuple(TOKENIZERS))
        self.check_int("bpe_vocab_size", least=256)
        self.check_int("seq_len", least=1)
        for option in ("valid", "test"):
            share = getattr(self, option)
            if not isinstance(share, int | float) or isinstance(share, bool):
                raise TypeError(f"text: `{option}` must be a number, got {share!r}.")
        if not (self.valid > 0 and self.test >= 0 and self.valid + self.test < 1):
            raise ValueError(
                "text: `valid` must be above 0, `test` at least 0, and their sum below 1, "
                f"got {self.valid} and {self.test}."
            )

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The tokens, read when they are first asked for. Raises as `open_corpus`."""
        shares = (float(self.valid), float(self.test))
        return open_corpus(self.source, self.tokenizer, self.bpe_vocab_size, self.column, shares)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.corpus.tokenizer.vocab_size

    @property
    def chance(self) -> float:
        """0: no text is guessed uniformly; its loss is the measure."""
        return 0.0

    @property
    def splits(self) -> tuple[str, ...]:
        """Without "test" if its share is 0."""
        return tuple(split for split in SPLITS if split != "test" or self.test > 0)

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer."""
        return self.corpus.tokenizer

    @property
    def fingerprint(self) -> str:
        """Of text, tokenizer and cuts."""
        return self.corpus.fingerprint

    def with_seq_len(self, seq_len: int) -> Self:
        """The same text in windows of another length."""
        other = dataclasses.replace(self, seq_len=seq_len)
        if "corpus" in vars(self):  # not read again: the source may have changed
            vars(other)["corpus"] = self.corpus
        return other

    def sample(self, split: str, batch_size: int, *, seed: int = 0, index: int = 0) -> Batch:
        """Windows drawn uniformly from a part. Raises as `Task.sample`."""
        rng = stream(split, batch_size, seed, index)
        return self._batch(self._windows(rng, batch_size, split))

    def draw(self, split: str, count: int, seed: int, index: int) -> Tokens:
        """See `Task.draw`."""
        return self.generate(stream(split, count, seed, index), count, split)

    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """Windows of the split's part: there is nothing to drop."""
        return self.corpus.tokens[self._windows(rng, count, split)[:, :-1]].astype(np.int64)

    def oracle(self, tokens: Tokens) -> Tokens:
        """The next token; what the tokens alone do not tell is not scored: that after the last."""
        return np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)

    def evaluation(self, split: str, sequences: int, batch_size: int) -> Iterator[Batch]:
        """The first windows of a part, each once, the same for any batch size: each row reads as many on end.

        Args:
            split: "train", "valid" or "test".
            sequences: windows, at most; what does not fill one at the end of the part is left out.
            batch_size: rows, at most.

        Raises:
            ValueError: the part is shorter than one window and its last target.
        """
        begin, end = self._part(split)
        windows = min(sequences, (end - begin - 1) // self.seq_len)
        rows = min(batch_size, windows)
        whole, longer = divmod(windows, rows)  # the first rows have one more
        first = np.arange(rows) * whole + np.minimum(np.arange(rows), longer)
        for step in range(whole + (longer > 0)):
            starts = begin + self.seq_len * (first[: rows if step < whole else longer] + step)
            yield self._batch(starts[:, None] + np.arange(self.seq_len + 1))

    def carried(self, batch_size: int, *, seed: int = 0, index: int = 0) -> Batch:
        """Windows of the training part as a ring, row r a share of r / batch_size behind row 0. Raises as `sample`."""
        begin, end = self._part("train")
        size = end - begin
        first = int(stream("train", batch_size, seed, 0).integers(size))
        stream("train", batch_size, seed, index)  # checks the index
        starts = first + np.arange(batch_size) * size // batch_size + index * self.seq_len % size
        return self._batch(begin + (starts[:, None] + np.arange(self.seq_len + 1)) % size)

    def _part(self, split: str) -> tuple[int, int]:
        """First token of a part, and the one behind its last. Raises ValueError if they are not enough for a window."""
        if split not in self.splits:
            raise ValueError(f"text: `split` must be one of {sorted(self.splits)}, got {split!r}.")
        begin, end = self.corpus.parts[split]
        if end - begin <= self.seq_len:
            raise ValueError(
                f"text: `source` must have more than `seq_len` = {self.seq_len} tokens in the part for {split!r}, but "
                f"of '{self.source}' it has {end - begin}. Use a longer text, shorter sequences, or another share."
            )
        return begin, end

    def _windows(self, rng: np.random.Generator, count: int, split: str) -> Positions:
        """Positions of the tokens of windows and of their last targets, (count, L + 1)."""
        begin, end = self._part(split)
        starts: Positions = rng.integers(begin, end - self.seq_len, size=(count, 1))
        return starts + np.arange(self.seq_len + 1)

    def _batch(self, positions: Positions) -> Batch:
        """The batch of windows at positions (B, L + 1)."""
        corpus = self.corpus
        tokens = corpus.tokens[positions].astype(np.int64)
        begins = corpus.documents[np.searchsorted(corpus.documents, positions, side="right") - 1] == positions
        batch = to_batch(tokens[:, :-1], np.where(begins[:, 1:], IGNORE_INDEX, tokens[:, 1:]))
        reset = begins[:, :-1]
        return batch._replace(reset=torch.from_numpy(reset.copy())) if reset.any() else batch
