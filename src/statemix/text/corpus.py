"""Text to tokens on disk: copied from its source, cut in three parts by position, encoded, and memory-mapped.

    CACHE/text/KEY/tokens.bin       the tokens of all documents, as uint8, uint16 or uint32
    CACHE/text/KEY/documents.bin    where each document begins in them, as int64
    CACHE/text/KEY/tokenizer.json   what encoded them
    CACHE/text/KEY/corpus.json      the parts, and KEY
    CACHE/text/KEY/manifest.json    the sha256 of the other files; written last

CACHE is $STATEMIX_CACHE, or else statemix in $XDG_CACHE_HOME or ~/.cache. KEY is of the text that was copied, the
tokenizer and the cuts, so a source that changed is another corpus. A cache that is not whole is made again, and one
that another user can write to is refused: tokens are mapped into memory as they are.
"""

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import re
import stat
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from statemix import records
from statemix.files import (
    MANIFEST_FILE,
    check_manifest,
    delete_partials,
    digest_of,
    manifest_of,
    partial_of,
    sync,
    write_whole,
)
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
TOKENS_FILE, DOCUMENTS_FILE, CORPUS_FILE = "tokens.bin", "documents.bin", "corpus.json"
FILES = (TOKENS_FILE, DOCUMENTS_FILE, TOKENIZER_FILE, CORPUS_FILE)
PARTS = ("train", "valid", "test")
CORPUS = {"key": str, "parts": {part: [int] for part in PARTS}}  # the form of corpus.json, see records.py
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
            written, or can be by another user.
    """
    size = bpe_vocab_size if tokenizer == "bpe" else 0
    digest = copied = _digest(source, column)
    begins: list[int] = []
    with contextlib.ExitStack() as open_files:
        raw = None
        while True:
            options = [VERSION, digest, tokenizer, size, shares]
            folder = cache_folder() / "text" / hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
            try:
                _make_own(folder)
                with _alone(folder):
                    if (corpus := _read(folder)) is not None:
                        return corpus
                    if raw is None:  # it has no name, and ends with the process
                        raw = open_files.enter_context(tempfile.TemporaryFile(dir=folder))
                        copied, begins = _copy(raw, source, column)
                    if copied == digest:
                        _make(folder, raw, begins, source, column, tokenizer, size, shares)
                        corpus = _read(folder)
                        break
            except OSError as error:
                raise ValueError(
                    f"text: the cache '{folder}' cannot be written: {error}. Set {CACHE_VARIABLE} to another folder."
                ) from error
            digest = copied  # the source has changed since: what counts is what was copied
    if corpus is None:
        raise ValueError(f"text: the cache '{folder}' is not what was written to it. Try again, or on another disk.")
    return corpus


def cache_folder() -> Path:
    """The folder of all caches of this user."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statemix"


def _make_own(folder: Path) -> None:
    """Make a folder of the cache that nobody else can read or write. Raises ValueError if another user can write."""
    for part in (folder.parents[1], folder.parent, folder):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = part.stat()
        if not hasattr(os, "geteuid"):  # Windows
            continue
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
            raise ValueError(
                f"text: the cache '{part}' must be a folder that no other user can write to, but it is of user "
                f"{about.st_uid} with the mode {stat.filemode(about.st_mode)}. Take that right away with "
                f"`chmod go-w`, or set {CACHE_VARIABLE} to a folder of your own."
            )


def _digest(source: str, column: str) -> str:
    """The sha256 of a source: of its documents, or of a data set's files, where they are not here of their versions."""
    digest = hashlib.sha256()
    if not source.startswith(DATA_SET):
        for _, content in _documents(source, column):
            _add(digest, content)
        return digest.hexdigest()
    splits = _data_set("load_dataset_builder", source).config.data_files or {}
    if "train" not in splits:
        raise ValueError(f"text: the data set '{source}' must have a split 'train', it has {sorted(map(str, splits))}.")
    files = splits["train"]
    for file, version in itertools.zip_longest(files, files.origin_metadata):
        local = Path(file)
        what = digest_of(local) if local.is_file() else repr((str(file), version))
        digest.update(what.encode())
    digest.update(column.encode())
    return digest.hexdigest()


def _add(digest: Any, content: bytes) -> None:
    """Add a document to a sha256, so that no other documents have the same."""
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _copy(raw: IO[bytes], source: str, column: str) -> tuple[str, list[int]]:
    """Write the documents of a source into a file. Returns the digest of what was written, and where each begins."""
    digest, begins = hashlib.sha256(), [0]
    for _, content in _documents(source, column):
        raw.write(content)
        begins.append(begins[-1] + len(content))
        _add(digest, content)
    raw.flush()
    return _digest(source, column) if source.startswith(DATA_SET) else digest.hexdigest(), begins


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
        if not (root.is_dir() or root.is_file()):
            raise ValueError(
                f"text: `source` must be a file or a folder, but '{source}' is a pipe or a device, which can be read "
                "only once. Write its text to a file."
            )
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
        if column in row and row[column] is None:
            continue
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
    parts = re.fullmatch(r"((?:[A-Za-z]:(?=[\\/]))?[^:]*):?(.*)", source.removeprefix(DATA_SET), re.DOTALL)
    assert parts is not None, "any text is of this form"
    name, config = parts.groups()  # the colon of C:\\data is of the name
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
    """The corpus in a folder of the cache; None if it is not there, or is none in any way."""
    try:
        check_manifest(folder, FILES, "text")
        about = records.read(folder / CORPUS_FILE, CORPUS, "text")
        found = about["parts"]
        parts = {part: (begin, end) for part, (begin, end) in zip(PARTS, map(found.get, PARTS), strict=True)}
        tokenizer = load_tokenizer(folder)
        tokens = np.memmap(folder / TOKENS_FILE, dtype=_dtype(tokenizer), mode="r")
        documents = np.memmap(folder / DOCUMENTS_FILE, dtype=np.int64, mode="r")
    except (OSError, ValueError):
        return None
    cuts = [0, *(end for _, end in parts.values())]
    whole = list(parts.values()) == list(itertools.pairwise(cuts)) and cuts == sorted(cuts) and cuts[-1] == len(tokens)
    own = about["key"] == folder.name  # not a whole corpus of another text
    begin, in_order = documents[0] == 0, (np.diff(documents) > 0).all() and documents[-1] < len(tokens)
    if not (own and whole and begin and in_order and tokens.max() < tokenizer.vocab_size):
        return None
    return Corpus(tokens, documents, parts, tokenizer, folder.name)


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest unsigned integers that hold all tokens."""
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1))


def _make(
    folder: Path,
    raw: IO[bytes],
    begins: list[int],
    source: str,
    column: str,
    tokenizer: str,
    bpe_vocab_size: int,
    shares: tuple[float, float],
) -> None:
    """Learn the tokenizer of a text in a file, encode it, and write manifest.json last."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    delete_partials(folder, ".*")
    with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as text:
        cuts = [_cut(text, 1 - sum(shares)), _cut(text, 1 - shares[1]), len(text)]
        pieces = sorted({*begins, *cuts})  # each document, or what a cut leaves of it on either side
        read = _Pieces(text, pieces, begins, source, column, tokenizer)
        chosen = _learn(read, tokenizer, bpe_vocab_size, pieces.index(cuts[0]))
        dtype = _dtype(chosen)
        first = [0]  # token of each piece
        partial = partial_of(folder / TOKENS_FILE)
        with partial.open("xb") as file:
            for number in range(len(pieces) - 1):
                is_bytes = isinstance(chosen, Bytes)
                ids = read.raw(number) if is_bytes else chosen.encode(read.text(number)).astype(dtype).tobytes()
                file.write(ids)
                first.append(first[-1] + len(ids) // dtype.itemsize)
    sync(partial)
    partial.replace(folder / TOKENS_FILE)
    write_whole(folder / DOCUMENTS_FILE, np.array(first[:-1], dtype=np.int64).tobytes())
    save_tokenizer(chosen, folder)
    ends = [first[pieces.index(cut)] for cut in cuts]
    parts = dict(zip(PARTS, zip([0, *ends], ends, strict=False), strict=True))
    about = {"key": folder.name, "parts": parts}
    write_whole(folder / CORPUS_FILE, (json.dumps(about, indent=2) + "\n").encode())
    write_whole(folder / MANIFEST_FILE, manifest_of({name: digest_of(folder / name) for name in FILES}))


def _cut(text: mmap.mmap, share: float) -> int:
    """The byte behind the first share of a text, moved on to the end of a character of UTF-8."""
    cut = int(len(text) * share)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


class _Pieces:
    """The pieces of the text, as bytes and as characters; what has none is told with the name of its document."""

    def __init__(
        self, text: mmap.mmap, bounds: list[int], begins: list[int], source: str, column: str, tokenizer: str
    ) -> None:
        self.all, self.bounds, self.begins = text, bounds, begins
        self.source, self.column, self.tokenizer = source, column, tokenizer

    def raw(self, number: int) -> bytes:
        """Bytes."""
        return self.all[self.bounds[number] : self.bounds[number + 1]]

    def text(self, number: int) -> str:
        """Characters. Raises ValueError where there are none."""
        content = self.raw(number)
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
