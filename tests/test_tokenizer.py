"""tokenizer.py: text to tokens and back, by hand and against the `tokenizers` library, and what is no text or file."""

import json
import random
import re
import sys
from unittest import mock

import numpy as np
import pytest

from statemix.text import tokenizer as module
from statemix.text.tokenizer import BPE, Bytes, Characters, load_tokenizer, save_tokenizer, train_bpe

TEXT = "Zwölf Boxkämpfer jagen Eva quer über den Sylter Deich.\n\n  def f(x):\n\treturn x ** 2  # 😀 ³\n"


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers", reason="BPE needs the tokenizers library")


@pytest.fixture(scope="module")
def bpe(library):
    return train_bpe([TEXT * 3, "abab abab"], 300)


def test_bytes_by_hand():
    tokens = Bytes().encode("aé\0")
    assert tokens.tolist() == [97, 195, 169, 0]
    assert tokens.dtype == np.int64
    assert Bytes().decode(tokens) == "aé\0"
    assert Bytes().decode_bytes([195]) == b"\xc3"
    assert Bytes().decode([97, 195]) == "a\ufffd"
    assert Bytes().vocab_size == 256
    assert Bytes().byte_lengths.tolist() == [1] * 256
    assert Bytes().encode("").tolist() == []


def test_characters_by_hand():
    tokenizer = Characters("abé😀")
    tokens = tokenizer.encode("é😀ab")
    assert tokens.tolist() == [2, 3, 0, 1]
    assert tokens.dtype == np.int64
    assert tokenizer.decode(tokens) == "é😀ab"
    assert tokenizer.byte_lengths.tolist() == [1, 1, 2, 4]
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("").tolist() == []


@pytest.mark.parametrize(("text", "what", "position"), [("abc", "'c'", 2), ("é😁", "'😁'", 1), ("`", "'`'", 0)])
def test_a_character_outside_the_alphabet_is_named_with_its_position(text, what, position):
    message = f"characters: `text` must be of characters in the vocabulary, got {what} at position {position}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Characters("abé😀").encode(text)


def test_what_is_no_unicode_is_named_with_its_position():
    with pytest.raises(ValueError, match=r"^bytes: `text` must be .*, got '\\ud800' at position 2\.$"):
        Bytes().encode("ab\ud800")
    with pytest.raises(ValueError, match=r"^characters: `text` must be .*, got '\\ud800' at position 0\.$"):
        Characters("ab").encode("\ud800")
    with pytest.raises(ValueError, match=r"^characters: `alphabet` must be valid Unicode, got 'a\\ud800'\.$"):
        Characters("a\ud800")


@pytest.mark.parametrize("alphabet", ["", "ba", "aab"])
def test_bad_alphabets(alphabet):
    with pytest.raises(ValueError, match=rf"^characters: `alphabet` must hold .* once, sorted, got '{alphabet}'\.$"):
        Characters(alphabet)
    with pytest.raises(TypeError, match=r"^characters: `alphabet` must be a text, got \['a'\]\.$"):
        Characters(["a"])


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters("ab")])
def test_a_number_that_is_no_token_is_named(tokenizer):
    size = tokenizer.vocab_size
    for number in (-1, size):
        told = rf"`ids` must be in \[0, vocab_size\) = \[0, {size}\), got {number} at 1\.$"
        with pytest.raises(ValueError, match=told):
            tokenizer.decode([0, number])


def test_bpe_merges_the_most_frequent_pair(library):
    tokenizer = train_bpe(["abab abab ab"], 257)
    assert tokenizer.vocab_size == 257
    assert tokenizer.token_bytes()[256] == b"ab"
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [2]
    tokens = tokenizer.encode("abba")
    assert [tokenizer.token_bytes()[token] for token in tokens] == [b"ab", b"b", b"a"]
    assert tokens.dtype == np.int64
    assert train_bpe(["ab"], 5000).vocab_size == 257  # there is nothing more to merge


def test_bpe_is_the_library_and_every_text_comes_back(library, bpe):
    assert bpe.vocab_size == 300
    own = library.Tokenizer.from_str(bpe.json)
    for text in ("", TEXT, "日本語 ÿ \x00\x1f\u2028", "  \n\n \t x", "".join(map(chr, range(0x250)))):
        tokens = bpe.encode(text)
        assert tokens.tolist() == own.encode(text).ids
        assert bpe.decode(tokens) == text
        assert bpe.decode_bytes(tokens) == b"".join(bpe.decode_bytes([token]) for token in tokens) == text.encode()
    with pytest.raises(ValueError, match=r"^bpe: `text` must be .*, got '\\udfff' at position 1\.$"):
        bpe.encode("a\udfff")


LETTERS = ["ab", "é", "s", "日本", "ſ", "ⅷ", "7", "'", "'s", "'ll", ".", ",", "。", "_", '{"', "😀", "\x1c", "\u0301"]
SPACES = ["\n", "\r\n", " ", "  ", "\t", "\u3000", "\xa0", "\x85", "\x0b"]


def test_bpe_reads_a_text_in_pieces_without_another_token(bpe, monkeypatch):
    """100,000 random texts of all that may stand before and behind a cut, and each cut there is."""
    rng, encode = random.Random(0), vars(bpe)["_tokenizer"].encode
    texts = ["".join(rng.choices(LETTERS + SPACES, k=rng.randrange(2, 12))) for _ in range(100_000)]
    monkeypatch.setattr(module, "PIECE", 2)
    cuts = 0
    for text in texts:
        pieces = list(module._pieces(text))
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in encode(piece).ids] == encode(text).ids, text
        cuts += len(pieces) - 1
    assert cuts > 100_000


def test_a_cut_within_a_word_would_be_another_text(bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(module, "_CUT", re.compile(r"(?=b)"))
    assert bpe.encode("abab abab").tolist() != vars(bpe)["_tokenizer"].encode("abab abab").ids


LAYOUTS = {
    "lines": "some words on a line\n",
    "lines of Windows": "some words on a line\r\n",
    "empty lines": "some words on a line\n\n\n",
    "indented": "some words\n        on a line\n\t\t",
    "one line": "some words on a line. ",
    "JSON without a space": '{"some":"words","on":[1,2]},',
    "Chinese": "道可道，非常道。名可名，非常名。",
    "tabs": "some\twords\t\t\t",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_are_short_in_every_layout(layout):
    text = LAYOUTS[layout] * (5 * module.PIECE // len(LAYOUTS[layout]))
    pieces = list(module._pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= module.PIECE


def test_a_text_is_read_whole_where_tokens_were_added(library, bpe, monkeypatch):
    """Such a token may lie across any cut."""
    inner = library.Tokenizer.from_str(bpe.json)
    inner.add_special_tokens(["a.b"])
    added, text = module.BPE(inner.to_str()), "x a.b " * 50
    monkeypatch.setattr(module, "PIECE", 20)
    assert added.encode(text).tolist() == inner.encode(text).ids
    assert len(inner.encode(text).ids) < len(bpe.encode(text))


def test_bpe_is_the_same_from_the_same_texts(bpe):
    assert train_bpe(iter([TEXT * 3, "abab abab"]), 300) == bpe
    assert train_bpe([TEXT * 3, "baba"], 300) != bpe


def test_bad_bpe(library, bpe):
    with pytest.raises(ValueError, match=r"^train_bpe: `vocab_size` must be at least 256, .*, got 255\.$"):
        train_bpe(["ab"], 255)
    with pytest.raises(TypeError, match=r"^train_bpe: `vocab_size` must be an int, got 300\.0\.$"):
        train_bpe(["ab"], 300.0)
    content = json.loads(bpe.json)
    words = dict(content["pre_tokenizer"])
    for change in (
        {"pre_tokenizer": words | {"add_prefix_space": True}},
        {"pre_tokenizer": words | {"use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    ):
        with pytest.raises(ValueError, match=r"^bpe: `json` must be a byte-level BPE without a normalizer, .* are \["):
            BPE(json.dumps(content | change))
    with pytest.raises(ValueError, match=r"^bpe: `json` must be a byte-level BPE"):
        BPE("{}")
    few = content["model"] | {"vocab": {"a": 0}, "merges": []}
    with pytest.raises(ValueError, match=r"^bpe: `json` must have a token for every byte, 255 have none\.$"):
        BPE(json.dumps(content | {"model": few}))


def test_a_missing_library_is_named():
    with mock.patch.dict(sys.modules, {"tokenizers": None}):
        for needs in (lambda: train_bpe(["ab"], 300), lambda: BPE("{}")):
            with pytest.raises(RuntimeError, match=r"^tokenizer: 'bpe' needs .*: pip install 'statemix\[text\]'\.$"):
                needs()


# ---- files


def test_a_tokenizer_comes_back_from_its_file(tmp_path):
    different = [Bytes(), Characters("ab"), Characters("\nabé")]
    for tokenizer in different:
        save_tokenizer(tokenizer, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
        assert load_tokenizer(tmp_path) == tokenizer
        assert load_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in different}) == 3
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"name": "characters", "alphabet": "\nabé"}


def test_the_file_of_bpe_is_the_librarys(library, bpe, tmp_path):
    save_tokenizer(bpe, tmp_path)
    assert load_tokenizer(tmp_path) == bpe
    assert library.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == bpe.encode(TEXT).tolist()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"name": "words"}', '{"name": "bytes", "size": 3}', '{"name": "characters"}', "\udcff"],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=rf"^load_tokenizer: there is no '{path}'\.$"):
        load_tokenizer(tmp_path)
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^load_tokenizer: '{path}' is not a tokenizer: "):
        load_tokenizer(tmp_path)


def test_a_file_of_bpe_without_the_library(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with mock.patch.dict(sys.modules, {"tokenizers": None}), pytest.raises(RuntimeError, match=r"'statemix\[text\]'"):
        load_tokenizer(tmp_path)
