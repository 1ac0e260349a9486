"""Tokenizers: text to token numbers and back. Bytes and characters need nothing; BPE needs the `tokenizers` library.

A run of text keeps its own as tokenizer.json, the form in which it is saved: {"name": "bytes"}, {"name": "characters",
"alphabet": ...}, and of BPE the file of the `tokenizers` library, which other programs read too.
"""

import functools
import hashlib
import json
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from statemix import records
from statemix.files import write_whole

TOKENIZER_FILE = "tokenizer.json"

PIECE = 1 << 20  # characters that BPE reads at a time: of each token the library keeps some 100 bytes for a while

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class Tokenizer(ABC):
    """Text to tokens 0 .. vocab_size - 1 and back. Two are equal if they are saved as the same JSON."""

    name: ClassVar[str]  # in TOKENIZERS

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The tokens of a text, (T,). Raises ValueError, naming the character and its position, if one has none."""

    @abstractmethod
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 bytes that each token stands for, (V,); of BPE and of bytes they may be a part of a character."""

    @abstractmethod
    def to_json(self) -> str:
        """What `save_tokenizer` writes."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of the JSON form, in hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @functools.cached_property
    def byte_lengths(self) -> Ids:
        """UTF-8 bytes in each token, (V,)."""
        return np.array([len(part) for part in self.token_bytes()], dtype=np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of tokens; those of a + b are those of a, then those of b, so a stream is decoded in parts.

        Raises:
            ValueError: a number is no token.
        """
        parts, found = self.token_bytes(), []
        for position, number in enumerate(ids):
            if not 0 <= number < len(parts):
                raise ValueError(
                    f"{self.name}: `ids` must be in [0, vocab_size) = [0, {len(parts)}), got {number} at {position}."
                )
            found.append(parts[int(number)])
        return b"".join(found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as a part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """Token = byte of UTF-8: 256 of them, for any text."""

    name: ClassVar[str] = "bytes"

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> Ids:
        """See `Tokenizer.encode`; only a lone surrogate has none."""
        return np.frombuffer(_utf8(self.name, text), dtype=np.uint8).astype(np.int64)

    def token_bytes(self) -> Sequence[bytes]:
        """Each byte alone."""
        return _BYTES

    def to_json(self) -> str:
        """The name."""
        return json.dumps({"name": self.name})


@dataclass(frozen=True)
class Characters(Tokenizer):
    """Token = character: its place in the alphabet.

    Args:
        alphabet: the characters there are, each once, sorted by code point.

    Raises:
        TypeError, ValueError: the alphabet is no text, empty, or not sorted.
    """

    name: ClassVar[str] = "characters"

    alphabet: str

    def __post_init__(self) -> None:
        if not isinstance(self.alphabet, str):
            raise TypeError(f"characters: `alphabet` must be a text, got {self.alphabet!r}.")
        if not self.alphabet or list(self.alphabet) != sorted(set(self.alphabet)):
            raise ValueError(
                f"characters: `alphabet` must hold at least one character, each once, sorted, got {self.alphabet!r}."
            )
        try:
            self.alphabet.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"characters: `alphabet` must be valid Unicode, got {self.alphabet!r}.") from error

    @property
    def vocab_size(self) -> int:
        """The length of the alphabet."""
        return len(self.alphabet)

    def encode(self, text: str) -> Ids:
        """See `Tokenizer.encode`."""
        known, codes = _code_points(self.alphabet), _code_points(text)
        ids = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        wrong = np.flatnonzero(known[ids] != codes)
        if len(wrong):
            raise _outside(self.name, text, int(wrong[0]))
        return ids.astype(np.int64)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return [character.encode() for character in self.alphabet]

    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 form of each character."""
        return self._token_bytes

    def to_json(self) -> str:
        """Name and alphabet."""
        return json.dumps({"name": self.name, "alphabet": self.alphabet})


@dataclass(frozen=True)
class BPE(Tokenizer):
    """Byte-pair encoding on bytes: tokens are frequent strings of bytes, and every byte is one, so any text has tokens.

    Args:
        json: of the `tokenizers` library, byte-level as GPT-2 is and without a normalizer: `train_bpe` makes one.

    Raises:
        RuntimeError: the library is not installed.
        ValueError: the JSON is not such a tokenizer.

    Source: Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2.
    """

    name: ClassVar[str] = "bpe"

    json: str = field(repr=False)

    def __post_init__(self) -> None:
        library = _library()
        try:
            content = records.parse(self.json)
            kinds = [(content[key] or {}).get("type") for key in ("model", "pre_tokenizer", "decoder", "normalizer")]
            words = content["pre_tokenizer"] or {}
            gpt2 = words.get("use_regex", True) and not words.get("add_prefix_space")
            if kinds != ["BPE", "ByteLevel", "ByteLevel", None] or not gpt2:
                raise ValueError(f"model, pre-tokenizer, decoder and normalizer are {kinds}, with the words {words}")
            tokenizer = library.Tokenizer.from_str(self.json)
            parts = [_bytes_of(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"bpe: `json` must be a byte-level BPE without a normalizer, of the `tokenizers` library: {error}."
            ) from error
        if missing := set(_BYTES) - set(parts):
            raise ValueError(f"bpe: `json` must have a token for every byte, {len(missing)} have none.")
        object.__setattr__(self, "_tokenizer", tokenizer)
        object.__setattr__(self, "_token_bytes", parts)

    @property
    def vocab_size(self) -> int:
        """The 256 bytes and the merged strings."""
        return len(self.token_bytes())

    def encode(self, text: str) -> Ids:
        """See `Tokenizer.encode`; only a lone surrogate has none."""
        tokenizer: Any = vars(self)["_tokenizer"]
        _utf8(self.name, text)
        # a token that was added may have white space or punctuation within
        pieces = [text] if tokenizer.get_added_tokens_decoder() else _pieces(text)
        encoded = (tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces)
        parts = [np.array(ids, dtype=np.int64) for ids in encoded]
        return np.concatenate(parts)

    def token_bytes(self) -> Sequence[bytes]:
        """The bytes that were merged to each token."""
        parts: list[bytes] = vars(self)["_token_bytes"]
        return parts

    def to_json(self) -> str:
        """The library's own form, as it was given."""
        return self.json


TOKENIZERS: dict[str, type[Tokenizer]] = {kind.name: kind for kind in (Bytes, Characters, BPE)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPE:
    """A BPE tokenizer with at most `vocab_size` tokens, learned from texts: the same from the same texts.

    Raises:
        RuntimeError: the `tokenizers` library is not installed.
        TypeError, ValueError: `vocab_size` is not an int of at least 256, for the bytes.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise TypeError(f"train_bpe: `vocab_size` must be an int, got {vocab_size!r}.")
    if vocab_size < 256:
        raise ValueError(f"train_bpe: `vocab_size` must be at least 256, the number of bytes, got {vocab_size}.")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(_BYTE_OF), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return BPE(tokenizer.to_str())


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json into an existing folder, whole."""
    write_whole(Path(folder) / TOKENIZER_FILE, tokenizer.to_json().encode())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote.

    Raises:
        RuntimeError: it is BPE and the `tokenizers` library is not installed.
        ValueError: the file is missing or is no tokenizer; the message names it.
    """
    path = Path(folder) / TOKENIZER_FILE
    try:
        return from_json(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise ValueError(f"load_tokenizer: there is no '{path}'.") from error
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"load_tokenizer: '{path}' is not a tokenizer: {error}") from error


def from_json(text: str) -> Tokenizer:
    """The tokenizer of its JSON form. Raises as `load_tokenizer`, without the name of a file."""
    content = records.parse(text)
    records.check(content, dict)
    if "model" in content:
        return BPE(text)
    options = {"bytes": {}, "characters": {"alphabet": str}}
    name = content.get("name")
    if not isinstance(name, str) or name not in options:
        raise ValueError(f"`name` must be one of {sorted(options)}, got {reprlib.repr(name)}; or `model` that of BPE.")
    if unknown := sorted(content.keys() - options[name].keys() - {"name"}):
        raise ValueError(f"`{unknown[0]}` is not an option of {name!r}, which has {sorted(options[name])}.")
    records.check(content, options[name])
    return Bytes() if name == "bytes" else Characters(content["alphabet"])


def _utf8(name: str, text: str) -> bytes:
    """The bytes of a text; a lone surrogate has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _outside(name, text, error.start) from error


def _outside(name: str, text: str, position: int) -> ValueError:
    return ValueError(
        f"{name}: `text` must be of characters in the vocabulary, got {text[position]!r} at position {position}."
    )


def _code_points(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters that BPE encodes to the same tokens as the whole.

    A cut is where GPT-2's pattern ends a word whatever follows, see _CUT. Only a word longer than half a piece makes a
    longer one.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = _CUT.search(text, start + PIECE // 2, start + PIECE) or _CUT.search(text, start + PIECE)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _library() -> ModuleType:
    """The `tokenizers` library."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(
            "tokenizer: 'bpe' needs the `tokenizers` library. Install it with: pip install 'statemix[text]'."
        ) from error
    return tokenizers


def _byte_characters() -> dict[str, int]:
    """The printable character by which GPT-2's files write each byte, and the byte: itself, or the next from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of(token: str) -> bytes:
    """The bytes of a token as GPT-2's files write it. Raises KeyError if it has another character."""
    return bytes(_BYTE_OF[character] for character in token)


_BYTES = [bytes([byte]) for byte in range(256)]
_BYTE_OF = _byte_characters()
# Where GPT-2's pattern, '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, ends a word:
# - before the white space that another character follows: `\s+(?!\S)` leaves this one of a run to the next word;
# - between a letter or digit and punctuation;
# - between punctuation and a letter, but not behind an apostrophe, which may have begun a word such as 's.
# Only characters are named whose kind no version of Unicode changes.
_CUT = re.compile(
    r"(?=[ \t\n\r\f\v\x85\xa0\u2028\u2029\u3000]\S)"
    r"|(?<=[0-9A-Za-z])(?=[!-/:-@\[-`{-~])"
    r"|(?<=[!-&(-/:-@\[-`{-~、。，！？；：」』）])(?=[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
)
