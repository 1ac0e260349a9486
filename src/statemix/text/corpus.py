"""Text to tokens on disk: read once from its source, cut in three parts by position, encoded, and memory-mapped.

    CACHE/text/KEY/tokens.bin       the tokens of all documents, as uint8, uint16 or uint32
    CACHE/text/KEY/documents.bin    where each document begins in them, as int64
    CACHE/text/KEY/tokenizer.json   what encoded them
    CACHE/text/KEY/corpus.json      the parts, and the sha256 of the other files; written last

CACHE is $STATEMIX_CACHE, or else statemix in $XDG_CACHE_HOME or ~/.cache. KEY is of the text itself, the tokenizer and
the cuts, so a source that changed is another corpus. A cache that is not whole is made again.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statemix.files import sync, write_whole
from statemix.text.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZERS,
    Bytes,
    Characters,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CACHE_VARIABLE = "STATEMIX_CACHE"
STDLIB, DATA_SET = "stdlib", "hf:"  # sources that are no path
TOKENS_FILE, DOCUMENTS_FILE, CORPUS_FILE, RAW_FILE = "tokens.bin", "documents.bin", "corpus.json", ".text.partial"
VERSION = 1  # of the files and of how they are made: part of KEY

NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# of a machine, not of a version of Python: how it was built, and what a distribution or a user adds
NOT_OF_PYTHON = ("_sysconfigdata", "sitecustomize", "usercustomize")

Numbers = np.ndarray[tuple[int], np.dtype[Any]]


class Corpus(NamedTuple):
    """A text as tokens.

    tokens: (n,), unsigned integers, memory-mapped, read-only.
    documents: (d,) int64, sorted: where documents begin. Each part begins with one, also where a cut goes through it.
    parts: "train", "valid" and "test" -> the first token and the one behind the last.
    tokenizer: what encoded them.
    fingerprint: of text, tokenizer and cuts: KEY.
    """

    tokens: Numbers
    documents: Numbers
    parts: dict[str, tuple[int, int]]
    tokenizer: Tokenizer
    fingerprint: str


def open_corpus(source: str, tokenizer: str, bpe_vocab_size: int, column: str, shares: tuple[float, float]) -> Corpus:
    """The tokens of a text, from the cache where it has them.

    Args:
        source: "stdlib", "hf:NAME" or "hf:NAME:CONFIG", or the path of a file or a folder; see tasks/text.py.
        tokenizer: a name in `TOKENIZERS`. The alphabet of characters is of the whole text; BPE learns from the training
            part alone.
        bpe_vocab_size: tokens of BPE, at most; of no meaning to the others.
        column: of a data set, the one with the text.
        shares: of the bytes, those of validation and test: the last of the text, in this order, rounded to whole
            characters, so that a part is the same text whatever the tokenizer.

    Returns:
        The corpus.

    Raises:
        RuntimeError: a library that the source or the tokenizer needs is not installed.
        ValueError: the source is missing or empty, or is not text and the tokenizer needs text; or the cache cannot be
            written.
    """
    size = bpe_vocab_size if tokenizer == "bpe" else 0
    options = [VERSION, _digest(source, column), tokenizer, size, shares]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    folder = cache_folder() / "text" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            corpus = _read(folder)
            if corpus is None:
                _make(folder, source, column, tokenizer, size, shares)
                corpus = _read(folder)
    except OSError as error:
        raise ValueError(
            f"text: the cache '{folder}' cannot be written: {error}. Set {CACHE_VARIABLE} to another folder."
        ) from error
    if corpus is None:
        raise ValueError(f"text: the cache '{folder}' is not what was written to it. Try again, or on another disk.")
    return corpus


def cache_folder() -> Path:
    """The folder of all caches of this user."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statemix"


def _digest(source: str, column: str) -> str:
    """The sha256 of a source: of its documents, or of a data set's files, where they are not here of their versions."""
    digest = hashlib.sha256()
    if not source.startswith(DATA_SET):
        for _, content in _documents(source, column):
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()
    splits = _data_set("load_dataset_builder", source).config.data_files or {}
    if "train" not in splits:
        raise ValueError(f"text: the data set '{source}' must have a split 'train', it has {sorted(map(str, splits))}.")
    files = splits["train"]
    for file, version in itertools.zip_longest(files, files.origin_metadata):
        local = Path(file)
        what = _file_digest(local) if local.is_file() else repr((str(file), version))
        digest.update(what.encode())
    digest.update(column.encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _documents(source: str, column: str) -> Iterator[tuple[str, bytes]]:
    """The documents of a source and a name for each, in an order of their own; empty ones are left out."""
    try:
        found = False
        for name, content in _rows(source, column) if source.startswith(DATA_SET) else _files(source):
            if content:
                found = True
                yield name, content
    except OSError as error:
        raise ValueError(f"text: `source` '{source}' cannot be read: {error}") from error
    if not found:
        raise ValueError(f"text: `source` must hold text, but '{source}' is empty.")


def _files(source: str) -> Iterator[tuple[str, bytes]]:
    """A file, the files below a folder, or the sources of the standard library, sorted by their names."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in root.rglob("*.py") if _is_stdlib(path.relative_to(root))]
        if not paths:
            raise ValueError(f"text: this Python has no sources of its library in '{root}'. Use a file as `source`.")
    else:
        root = Path(source).expanduser()
        if not root.exists():
            raise ValueError(f"text: `source` must be 'stdlib', 'hf:NAME' or a path, but there is no '{source}'.")
        paths = [path for path in root.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(root))]
        paths = paths if root.is_dir() else [root]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        yield str(path), path.read_bytes()


def _is_hidden(path: Path) -> bool:
    """Whether the name of a file, or of a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def _is_stdlib(path: Path) -> bool:
    """Whether a file, relative to the library's folder, is a source of every Python of this version."""
    return not NOT_STDLIB & set(path.parts) and not path.name.startswith(NOT_OF_PYTHON)


def _rows(source: str, column: str) -> Iterator[tuple[str, bytes]]:
    """The rows of the split "train" of a Hugging Face data set, streamed."""
    rows = _data_set("load_dataset", source, split="train", streaming=True)
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"text: `column` must be one with text, got {column!r}; row {number} of '{source}' has {sorted(row)}."
            )
        yield f"row {number} of {source}", row[column].encode()


def _data_set(function: str, source: str, **options: Any) -> Any:
    """What a function of the `datasets` library says of "hf:NAME" or "hf:NAME:CONFIG"."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            "text: a source 'hf:...' needs the `datasets` library. Install it with: pip install 'statemix[text]'."
        ) from error
    name, _, config = source.removeprefix(DATA_SET).partition(":")
    try:
        return getattr(datasets, function)(name, config or None, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"text: the data set '{source}' cannot be read: {error}") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it lasts, other processes wait here for this folder; where the system has no locks, nothing waits."""
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _read(folder: Path) -> Corpus | None:
    """The corpus in a folder of the cache; None if it is not there, or not whole."""
    try:
        content = json.loads((folder / CORPUS_FILE).read_text())
        for name, digest in content["sha256"].items():
            if _file_digest(folder / name) != digest:
                return None
        parts = {split: (int(begin), int(end)) for split, (begin, end) in content["parts"].items()}
        tokens = np.memmap(folder / TOKENS_FILE, dtype=content["dtype"], mode="r")
        documents = np.memmap(folder / DOCUMENTS_FILE, dtype=np.int64, mode="r")
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return Corpus(tokens, documents, parts, load_tokenizer(folder), folder.name)


def _make(
    folder: Path, source: str, column: str, tokenizer: str, bpe_vocab_size: int, shares: tuple[float, float]
) -> None:
    """Read the text into a file, learn the tokenizer, encode, and write corpus.json last."""
    (folder / CORPUS_FILE).unlink(missing_ok=True)
    raw = folder / RAW_FILE
    try:
        begins = [0]
        with raw.open("wb") as file:
            for _, content in _documents(source, column):
                file.write(content)
                begins.append(begins[-1] + len(content))
        text = np.memmap(raw, dtype=np.uint8, mode="r")
        cuts = [_cut(text, 1 - sum(shares)), _cut(text, 1 - shares[1]), len(text)]
        pieces = sorted({*begins, *cuts})  # each document, or what a cut leaves of it on either side
        read = _Pieces(text, pieces, begins, source, column, tokenizer)
        chosen = _learn(read, tokenizer, bpe_vocab_size, pieces.index(cuts[0]))
        dtype = np.min_scalar_type(chosen.vocab_size - 1)
        first = [0]  # token of each piece
        partial = folder / f".{TOKENS_FILE}.partial"
        with partial.open("wb") as file:
            for number in range(len(pieces) - 1):
                ids = read.raw(number) if isinstance(chosen, Bytes) else chosen.encode(read.text(number)).astype(dtype)
                file.write(ids.tobytes())
                first.append(first[-1] + len(ids))
        sync(partial)
        partial.replace(folder / TOKENS_FILE)
    finally:
        raw.unlink(missing_ok=True)
    write_whole(folder / DOCUMENTS_FILE, np.array(first[:-1], dtype=np.int64).tobytes())
    save_tokenizer(chosen, folder)
    ends = [first[pieces.index(cut)] for cut in cuts]
    parts = dict(zip(("train", "valid", "test"), zip([0, *ends], ends, strict=False), strict=True))
    digests = {name: _file_digest(folder / name) for name in (TOKENS_FILE, DOCUMENTS_FILE, TOKENIZER_FILE)}
    form = json.dumps({"dtype": dtype.name, "parts": parts, "sha256": digests}, indent=2)
    write_whole(folder / CORPUS_FILE, f"{form}\n".encode())


def _cut(text: Numbers, share: float) -> int:
    """The byte behind the first share of a text, moved on to the end of a character of UTF-8."""
    cut = int(len(text) * share)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


class _Pieces:
    """The pieces of the text, as bytes and as characters; what has none is told with the name of its document."""

    def __init__(
        self, text: Numbers, bounds: list[int], begins: list[int], source: str, column: str, tokenizer: str
    ) -> None:
        self.all, self.bounds, self.begins = text, bounds, begins
        self.source, self.column, self.tokenizer = source, column, tokenizer

    def raw(self, number: int) -> Numbers:
        """Bytes."""
        return self.all[self.bounds[number] : self.bounds[number + 1]]

    def text(self, number: int) -> str:
        """Characters. Raises ValueError where there are none."""
        content = self.raw(number).tobytes()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise self._not_text(number, error.start, "is not UTF-8") from error
        if (zero := content.find(b"\0")) >= 0:
            raise self._not_text(number, zero, "is binary: it has a zero")
        return text

    def _not_text(self, number: int, position: int, what: str) -> ValueError:
        byte = self.bounds[number] + position
        document = int(np.searchsorted(self.begins, byte, side="right")) - 1
        name, _ = next(itertools.islice(_documents(self.source, self.column), document, None))
        return ValueError(
            f"text: `source` must be text for the tokenizer '{self.tokenizer}', but '{name}' {what} at byte "
            f"{byte - self.begins[document]}. The tokenizer 'bytes' reads any file."
        )


def _learn(pieces: _Pieces, tokenizer: str, bpe_vocab_size: int, train_pieces: int) -> Tokenizer:
    """The tokenizer for a text: bytes as they are, the characters of all of it, or BPE from its first pieces."""
    if tokenizer == "bpe":
        return train_bpe((pieces.text(number) for number in range(train_pieces)), bpe_vocab_size)
    if tokenizer == "characters":
        found: set[str] = set()
        for number in range(len(pieces.bounds) - 1):
            found |= set(pieces.text(number))
        return Characters("".join(sorted(found)))
    assert tokenizer == "bytes", f"one of {sorted(TOKENIZERS)}"
    return Bytes()
