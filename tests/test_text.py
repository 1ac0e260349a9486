"""tasks/text.py and corpus.py: what is read, where it is cut, which windows are seen, and the cache.

Most texts here have each character once, so that with the tokenizer "characters" a token is its own position.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import stat
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from run_helpers import seal

from statemix.tasks import IGNORE_INDEX, Text, build_task, complete_task, finite_batch
from statemix.text import corpus as module
from statemix.text.tokenizer import load_tokenizer

X = IGNORE_INDEX


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("STATEMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def counting(length: int, begin: int = 0) -> str:
    """Characters of three bytes in the order of their code points: the tokens are begin, begin + 1, ..."""
    return "".join(chr(0x4E00 + begin + i) for i in range(length))


def folder_of(path: Path, *lengths: int) -> str:
    """A folder of documents of these lengths, whose tokens count on from one to the next."""
    path.mkdir()
    begins = [0, *itertools.accumulate(lengths)]
    for number, length in enumerate(lengths):
        (path / f"{number:03}.txt").write_text(counting(length, begins[number]), encoding="utf-8")
    return str(path)


def file_of(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def ordered(source: str, **options) -> Text:
    return Text(source=source, **{"tokenizer": "characters", "seq_len": 7, "valid": 0.2, "test": 0.1} | options)


def assert_refused(message: str, **options) -> None:
    """Reading the text raises the message."""
    with pytest.raises(ValueError, match=f"^text: {message}"):
        Text(**options).vocab_size  # noqa: B018


def rows_of(batches) -> list[list[list[int]]]:
    return [batch.tokens.tolist() for batch in batches]


# ---- the task


def test_the_example_of_the_docstring(tmp_path):
    (tmp_path / "text").mkdir()
    for name, content in (("a", "abcd"), ("b", "ef"), ("c", "x" * 100)):
        (tmp_path / "text" / name).write_text(content)
    batch = Text(source=str(tmp_path / "text"), seq_len=5)._batch(np.arange(6)[None])
    shown = {}
    for key in ("tokens", "reset", "targets"):
        cells = re.search(rf"^ +{key} +((?:[\dx.]+ +){{4}}[\dx.]+)", Text.__doc__, flags=re.MULTILINE)[1].split()
        shown[key] = [
            {".": X if key == "targets" else False, "x": True}.get(c) or int(c.strip(".") or 0) for c in cells
        ]
    shown["targets"] = [target or X for target in shown["targets"]]
    assert batch.tokens.tolist() == [shown["tokens"]] == [[97, 98, 99, 100, 101]]
    assert batch.reset.tolist() == [list(map(bool, shown["reset"]))] == [[True, False, False, False, True]]
    assert batch.targets.tolist() == [shown["targets"]] == [[98, 99, 100, X, 102]]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.reset.dtype == torch.bool


def test_a_task_is_its_options(tmp_path):
    task = Text(source=file_of(tmp_path / "text", "ab" * 300), valid=0.2, test=0)
    completed = complete_task({"name": "text", "source": task.source, "valid": 0.2, "test": 0})
    assert completed == {"name": "text", **dataclasses.asdict(task)}
    assert json.loads(json.dumps(completed)) == completed
    assert build_task(completed) == task
    assert hash(build_task(completed)) == hash(task)
    assert (task.vocab_size, task.length, task.chance) == (256, 256, 0.0)
    assert task == build_task(completed)  # also after the text was read


def test_the_usual_split_of_a_text(tmp_path):
    """The first 90 % to train, the last 10 % to validate, as in `data[:int(0.9 * len(data))]`."""
    task = ordered(file_of(tmp_path / "text", "0123456789" * 111 + "abcd"), valid=0.1, test=0.0)
    assert task.corpus.parts == {"train": (0, 1002), "valid": (1002, 1114), "test": (1114, 1114)}
    assert task.splits == ("train", "valid")
    assert task.vocab_size == 14
    assert ordered(task.source).splits == ("train", "valid", "test")
    with pytest.raises(ValueError, match=r"^text: `split` must be one of \['train', 'valid'\], got 'test'\.$"):
        task.sample("test", 1)


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "bpe"])
def test_a_part_is_the_same_text_whatever_the_tokenizer(tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers", reason="BPE needs the tokenizers library")
    text = "aé😀" * 301  # 7 bytes each; the cuts are in the middle of one
    task = ordered(file_of(tmp_path / "text", text), tokenizer=tokenizer, valid=0.123, test=0.234, bpe_vocab_size=270)
    size, parts = len(text.encode()), {}
    for split, (begin, end) in task.corpus.parts.items():
        parts[split] = task.vocabulary.decode_bytes(task.corpus.tokens[begin:end])
        parts[split].decode()  # whole characters
    assert b"".join(parts.values()) == text.encode()
    assert list(map(len, parts.values())) == [pytest.approx(size * share, abs=4) for share in (0.643, 0.123, 0.234)]
    assert task.corpus.tokens.dtype == (np.uint16 if tokenizer == "bpe" else np.uint8)
    assert (task.vocab_size, len(task.corpus.tokens)) == {
        "bytes": (256, size),
        "characters": (3, len(text)),
        "bpe": (task.vocabulary.vocab_size, len(task.corpus.tokens)),
    }[tokenizer]


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the tokenizers library")
    task = ordered(file_of(tmp_path / "text", "ab " * 700 + "xy " * 300), tokenizer="bpe", bpe_vocab_size=400)
    assert b"ab" in task.vocabulary.token_bytes()
    assert b"xy" not in task.vocabulary.token_bytes()


DOCUMENTS = (30, 1, 25, 44, 60, 11, 80, 49)  # 300 tokens: the parts end at 210 and 270, within documents
BEGINS = {0, 30, 31, 56, 100, 160, 171, 210, 251, 270}  # of documents, and of what a cut leaves of one


@pytest.fixture
def documents(tmp_path) -> Text:
    return ordered(folder_of(tmp_path / "folder", *DOCUMENTS))


def assert_windows(batch, begin: int, end: int) -> None:
    """Each row counts on within [begin, end), the last target too; documents begin, and are not predicted, at BEGINS.

    Behind end - 1 comes begin: a row may be of a ring.
    """
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        following = [begin + (token + 1 - begin) % (end - begin) for token in row]
        assert all(begin <= token < end for token in row)
        assert row[1:] == following[:-1]
        assert targets == [X if token in BEGINS else token for token in following]
    begins = torch.tensor([[token in BEGINS for token in row] for row in batch.tokens.tolist()])
    assert (batch.reset is None) == (not begins.any())
    if batch.reset is not None:
        assert torch.equal(batch.reset, begins)


def test_documents_and_cuts(documents):
    assert documents.corpus.parts == {"train": (0, 210), "valid": (210, 270), "test": (270, 300)}
    assert set(documents.corpus.documents.tolist()) == BEGINS
    assert documents.corpus.tokens.tolist() == list(range(300))


@pytest.mark.parametrize(("split", "begin", "end"), [("train", 0, 210), ("valid", 210, 270), ("test", 270, 300)])
def test_samples_are_windows_of_their_part(documents, split, begin, end):
    batch = documents.sample(split, 2000, seed=1, index=2)
    assert batch.tokens.shape == batch.targets.shape == (2000, 7)
    assert_windows(batch, begin, end)
    assert set(batch.tokens[:, 0].tolist()) == set(range(begin, end - 7))  # every window whose last target is inside
    again = build_task(complete_task({"name": "text", **dataclasses.asdict(documents)})).sample(
        split, 2000, seed=1, index=2
    )
    assert torch.equal(again.tokens, batch.tokens)
    others = [documents.sample(split, 2000, seed=seed, index=index).tokens for seed, index in ((1, 3), (2, 2))]
    assert not any(torch.equal(other, batch.tokens) for other in others)
    tokens = documents.draw(split, 2000, 1, 2)
    assert np.array_equal(tokens, batch.tokens.numpy())
    assert np.array_equal(documents.oracle(tokens)[:, :-1], tokens[:, 1:])
    assert (documents.oracle(tokens)[:, -1] == X).all()


@pytest.mark.parametrize(("sequences", "batch_size"), [(100, 3), (8, 8), (8, 3), (5, 2), (1, 9), (100, 1), (7, 100)])
def test_an_evaluation_reads_the_first_windows_once_each_row_on_end(documents, sequences, batch_size):
    batches = list(documents.evaluation("valid", sequences, batch_size))
    windows = min(sequences, 59 // 7)
    read = [row for rows in rows_of(batches) for row in rows]
    assert sorted(row[0] for row in read) == [210 + 7 * i for i in range(windows)]
    for batch in batches:
        assert_windows(batch, 210, 270)
        assert len(batch.tokens) <= batch_size
    for before, after in itertools.pairwise(rows_of(batches)):
        assert len(after) <= len(before)
        assert [row[0] for row in after] == [row[-1] + 1 for row in before[: len(after)]]
    assert rows_of(documents.evaluation("valid", sequences, batch_size)) == rows_of(batches)


def test_rows_that_go_on_read_the_training_part_as_a_ring(documents):
    batches = [documents.carried(4, seed=3, index=index) for index in range(70)]
    for batch in batches:
        assert_windows(batch, 0, 210)
    for before, after in itertools.pairwise(rows_of(batches)):
        assert [row[0] for row in after] == [(row[-1] + 1) % 210 for row in before]
    first = [row[0] for row in rows_of(batches)[0]]
    assert [(row - first[0]) % 210 for row in first] == [0, 52, 105, 157]
    starts = {documents.carried(4, seed=seed).tokens[0, 0].item() for seed in range(20)}
    assert len(starts) > 10
    far = documents.carried(4, seed=3, index=2**60).tokens[:, 0].tolist()
    assert far == [(row + 7 * 2**60) % 210 for row in first]


def test_a_window_may_be_longer_than_a_share_of_the_ring_but_not_than_the_ring(documents):
    assert_windows(documents.with_seq_len(209).carried(300), 0, 210)
    with pytest.raises(ValueError, match=r"more than `seq_len` = 210 tokens in the part for 'train', but .* has 210\."):
        documents.with_seq_len(210).carried(1)


def test_a_finite_training_set_keeps_its_documents(documents):
    whole = documents.sample("train", 30, seed=4)
    batch = finite_batch(documents, 30, 30, seed=4)
    assert_windows(batch, 0, 210)
    assert sorted(batch.tokens.tolist()) == sorted(whole.tokens.tolist())
    assert int(batch.reset.sum()) == int(whole.reset.sum()) > 5


def test_a_finite_training_set_is_of_the_text_as_it_is(tmp_path):
    source = file_of(tmp_path / "text", counting(100))
    before = finite_batch(ordered(source), 5, 5)
    file_of(tmp_path / "text", counting(100)[::-1])
    after = finite_batch(ordered(source), 5, 5)
    assert (before.tokens.diff() == 1).all()
    assert (after.tokens.diff() == -1).all()


def test_another_length_is_of_the_same_text(documents):
    documents.corpus  # noqa: B018 - read now
    shutil.rmtree(documents.source)
    longer = documents.with_seq_len(20)
    assert (longer.seq_len, longer.corpus) == (20, documents.corpus)
    assert_windows(longer.sample("test", 50), 270, 300)


SHARES = "`valid` must be above 0, `test` at least 0, and their sum below 1"
WRONG_OPTIONS = [
    ({"source": 3}, TypeError, "`source` must be a text, got 3."),
    ({"source": ""}, ValueError, "`source` must be a path, 'stdlib' or 'hf:NAME', got ''."),
    ({"column": None}, TypeError, "`column` must be a text, got None."),
    ({"tokenizer": "words"}, ValueError, "`tokenizer` must be one of ['bpe', 'bytes', 'characters'], got 'words'."),
    ({"bpe_vocab_size": 255}, ValueError, "`bpe_vocab_size` must be at least 256, got 255."),
    ({"seq_len": 0}, ValueError, "`seq_len` must be at least 1, got 0."),
    ({"seq_len": 8.0}, TypeError, "`seq_len` must be an int, got 8.0."),
    ({"valid": "0.1"}, TypeError, "`valid` must be a number, got '0.1'."),
    ({"test": True}, TypeError, "`test` must be a number, got True."),
    ({"valid": 0, "test": 0.1}, ValueError, SHARES),
    ({"valid": 0.1, "test": -0.1}, ValueError, SHARES),
    ({"valid": 0.5, "test": 0.5}, ValueError, SHARES),
    ({"valid": float("nan"), "test": 0}, ValueError, SHARES),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS, ids=[str(o) for o, *_ in WRONG_OPTIONS])
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"^text: {re.escape(message)}"):
        Text(**options)


# ---- sources


def test_the_standard_library():
    task = Text()
    sizes = {split: end - begin for split, (begin, end) in task.corpus.parts.items()}
    assert sizes["train"] > 2_000_000
    assert sizes["valid"] == pytest.approx(sizes["train"] / 18, rel=0.01)
    root, paths = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in module.NOT_STDLIB]
        own = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")
        paths += [Path(folder) / name for name in names if name.endswith(".py") and not name.startswith(own)]
    assert {root / "argparse.py", root / "json" / "decoder.py"} <= set(paths)
    paths = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    begins = np.cumsum([0, *(path.stat().st_size for path in paths)])
    assert len(task.corpus.tokens) == begins[-1]
    assert set(begins[:-1]) <= set(task.corpus.documents)
    number = paths.index(root / "argparse.py")
    assert task.corpus.tokens[begins[number] : begins[number + 1]].tobytes() == paths[number].read_bytes()


def test_a_python_without_sources_of_its_library(tmp_path):
    with mock.patch.object(module.sysconfig, "get_paths", return_value={"stdlib": str(tmp_path)}):
        assert_refused(f"this Python has no sources of its library in '{tmp_path}'\\. Use a")


def test_a_folder_is_read_in_the_order_of_names_without_hidden_or_empty_files(tmp_path):
    for name, content in {"b/a": "2", "a": "1", "b.txt": "3", "c": "", ".hidden": "no", "b/.git/x": "no"}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(content)
    task = Text(source=str(tmp_path / "folder"), valid=0.01, test=0)
    assert task.corpus.tokens.tobytes() == b"132"  # "b.txt" is before "b/a"
    assert task.corpus.documents.tolist() == [0, 1, 2]


@pytest.fixture
def data_set(tmp_path):
    """A local data set in Parquet, by default of two texts."""
    pytest.importorskip("datasets", reason="data sets need the datasets library")
    pyarrow = pytest.importorskip("pyarrow", reason="the data set is Parquet")
    from pyarrow import parquet

    def write(rows=(None, "Ein Text", "", None, "é" * 40)):
        (tmp_path / "rows").mkdir(exist_ok=True)
        table = pyarrow.table({"text": list(rows), "number": [1] * len(rows)})
        parquet.write_table(table, tmp_path / "rows" / "train.parquet")
        return f"hf:{tmp_path / 'rows'}"

    return write


def test_the_rows_of_a_data_set_with_a_text_are_documents(data_set):
    task = Text(source=data_set(), valid=0.1, test=0)
    assert task.corpus.tokens.tobytes() == ("Ein Text" + "é" * 40).encode()
    assert task.corpus.documents.tolist() == [0, 8, 80]  # int(0.9 * 88) = 79 is within a character
    before = task.fingerprint
    with mock.patch.object(module, "_make", side_effect=AssertionError):
        assert Text(source=data_set(), valid=0.1, test=0).fingerprint == before  # from the cache
    changed = Text(source=data_set(("Zwei Texte", "x" * 40)), valid=0.1, test=0)
    assert changed.corpus.tokens.tobytes() == b"Zwei Texte" + b"x" * 40


@pytest.mark.parametrize(
    ("source", "name", "config"),
    [
        ("a/b", "a/b", None),
        ("a/b:de", "a/b", "de"),
        ("C:\\data", "C:\\data", None),
        ("C:/data:de", "C:/data", "de"),
        ("c:de", "c", "de"),
    ],
)
def test_the_colon_of_a_drive_is_of_the_name(source, name, config):
    datasets = pytest.importorskip("datasets", reason="data sets need the datasets library")
    with mock.patch.object(datasets, "load_dataset_builder", side_effect=ConnectionError("no")) as load:
        assert_refused(r"the data set .* cannot be read: no$", source=f"hf:{source}")
    assert load.call_args.args == (name, config)


def test_a_data_set_that_cannot_be_read_is_named(data_set, tmp_path):
    source = data_set()
    for column in ("number", "texts"):
        told = rf"`column` must be one with text, got '{column}'; row 0 of '{source}' has \['number', 'text'\]"
        assert_refused(told, source=source, column=column)
    assert_refused(rf"the data set '{source}:de' cannot be read: .*'de' not found", source=f"{source}:de")
    (tmp_path / "rows" / "train.parquet").rename(tmp_path / "rows" / "test.parquet")
    told = rf"the data set '{source}' must have a split 'train', it has \['test'\]\.$"
    assert_refused(told, source=source)
    import datasets

    with mock.patch.object(datasets, "load_dataset_builder", side_effect=ConnectionError("no network")):
        assert_refused(r"the data set 'hf:a/b' cannot be read: no network$", source="hf:a/b")


def test_without_the_library_a_data_set_is_refused():
    with (
        mock.patch.dict(sys.modules, {"datasets": None}),
        pytest.raises(RuntimeError, match=r"^text: a source 'hf:...' needs .*: pip install 'statemix\[text\]'\.$"),
    ):
        Text(source="hf:a/b").vocab_size  # noqa: B018


# ---- what is no text


def test_a_missing_or_empty_source_is_refused(tmp_path):
    assert_refused(r"`source` must be 'stdlib', 'hf:NAME' or a path, but there is no 'no'", source="no")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/file"):
        (tmp_path / name).touch()
    for source in (tmp_path / "file", tmp_path / "folder"):
        assert_refused(rf"`source` must hold text, but '{source}' is empty\.$", source=str(source))


@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
@pytest.mark.parametrize(
    ("content", "what"),
    [(b"caf\xe9 " * 300, "is not UTF-8 at byte 3"), (b"abc\0" * 300, "is binary: it has a zero at byte 3")],
)
def test_what_is_no_text_is_named_with_its_place_and_bytes_still_work(tmp_path, cache, tokenizer, content, what):
    (tmp_path / "folder").mkdir()
    file_of(tmp_path / "folder" / "1", "text " * 300)
    file_of(tmp_path / "folder" / "2", content)
    source = str(tmp_path / "folder")
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers", reason="BPE needs the tokenizers library")
    told = rf"`source` must be text for the tokenizer '{tokenizer}', but '{source}/2' {what}\. The tokenizer"
    assert_refused(told, source=source, tokenizer=tokenizer)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == []
    task = Text(source=source, seq_len=8)
    assert task.corpus.tokens.tobytes() == b"text " * 300 + content
    assert task.sample("train", 4).tokens.shape == (4, 8)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_part_shorter_than_a_sequence_is_refused(tmp_path, split):
    task = Text(source=file_of(tmp_path / "text", "a" * 100), seq_len=100, valid=0.3, test=0.2)
    has = {"train": 50, "valid": 30, "test": 20}[split]
    message = (
        f"text: `source` must have more than `seq_len` = 100 tokens in the part for '{split}', but of '{task.source}' "
        f"it has {has}. Use a longer text, shorter sequences, or another share."
    )
    draws = [
        task.sample,
        lambda split, n: next(task.evaluation(split, n, n)),
        lambda split, n: task.draw(split, n, 0, 0),
    ]
    for draw in draws:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            draw(split, 2)


# ---- the cache


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(documents, cache) -> Path:
    """The cache of the documents, made."""
    documents.corpus  # noqa: B018
    [made] = cache.iterdir()
    return made


def test_the_cache_is_made_once_and_read_again(documents, folder):
    assert folder.name == documents.fingerprint
    assert set(contents(folder)) == set(FILES)
    assert load_tokenizer(folder) == documents.vocabulary
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = dataclasses.replace(documents)
    assert again.corpus.tokens.tolist() == documents.corpus.tokens.tolist()
    assert isinstance(again.corpus.tokens, np.memmap)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="read-only"):
        again.corpus.tokens[0] = 1


def test_another_text_or_cut_or_tokenizer_is_another_cache(documents, cache):
    seen = {documents.fingerprint}
    for change in ({"valid": 0.3}, {"tokenizer": "bytes"}, {"test": 0.0}):
        seen.add(dataclasses.replace(documents, **change).fingerprint)
    for change in ({"seq_len": 3}, {"bpe_vocab_size": 999}):  # these change no token
        assert dataclasses.replace(documents, **change).fingerprint == documents.fingerprint
    (Path(documents.source) / "000.txt").write_text(counting(29) + "z")
    assert dataclasses.replace(documents).corpus.tokens[:30].tolist() == [*range(1, 30), 0]
    seen.add(dataclasses.replace(documents).fingerprint)
    (Path(documents.source) / "001.txt").rename(Path(documents.source) / "000.z")  # the same order: the same text
    assert dataclasses.replace(documents).fingerprint in seen
    assert len(seen) == 5 == len(list(cache.iterdir()))


FILES = ["tokens.bin", "documents.bin", "tokenizer.json", "corpus.json", "manifest.json"]
DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "another object": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_found_and_made_again(documents, name, damage, folder):
    whole = contents(folder)
    DAMAGES[damage](folder / name)
    assert contents(folder) != whole
    again = dataclasses.replace(documents)
    assert again.corpus.tokens.tolist() == list(range(300))
    assert contents(folder) == whole


def tokens_to(numbers):
    return lambda folder: np.array(numbers, dtype=np.uint16).tofile(folder / "tokens.bin")


def documents_to(numbers):
    return lambda folder: np.array(numbers, dtype=np.int64).tofile(folder / "documents.bin")


def parts_to(**changes):
    def change(folder):
        content = json.loads((folder / "corpus.json").read_text())
        content["parts"] |= changes
        (folder / "corpus.json").write_text(json.dumps(content))

    return change


def another_text(folder):
    """Whole, under the name of this one."""
    text = folder.parents[2] / "another"
    text.write_text("another")
    module.open_corpus(str(text), "characters", 0, "text", (0.2, 0.2))
    [other] = [path for path in folder.parent.iterdir() if path != folder]
    shutil.rmtree(folder)
    other.rename(folder)


FORGERIES = {  # each with a manifest that is true of it
    "a token outside the vocabulary": tokens_to([*range(299), 300]),
    "half a token": lambda folder: (folder / "tokens.bin").write_bytes(bytes(599)),
    "a token less": tokens_to(range(299)),
    "documents out of order": documents_to([0, 50, 30, 100, 210, 240, 270]),
    "a document twice": documents_to([0, 30, 30, 100, 210, 240, 270]),
    "a document outside the text": documents_to([0, 30, 100, 300]),
    "a document before the text": documents_to([-8, 0, 30, 100]),
    "no document at the beginning": documents_to([30, 100]),
    "a gap between two parts": parts_to(train=[0, 209]),
    "parts that overlap": parts_to(valid=[209, 270]),
    "a part that is beyond the text": parts_to(test=[270, 2**40]),
    "a part that ends before it begins": parts_to(train=[0, 280], valid=[280, 270]),
    "a part of three numbers": parts_to(train=[0, 100, 210]),
    "a part of objects": parts_to(train=["0", "210"]),
    "a corpus of another text": another_text,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_cache_is_made_again(documents, folder, forgery):
    whole = contents(folder)
    FORGERIES[forgery](folder)
    seal(folder)
    assert contents(folder) != whole
    assert dataclasses.replace(documents).corpus.tokens.tolist() == list(range(300))
    assert contents(folder) == whole


def test_a_cache_says_nothing_of_the_type_of_its_tokens(documents, folder):
    """Of objects, numpy would take the bytes for their addresses."""
    content = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(content | {"dtype": "O"}))
    seal(folder)
    assert dataclasses.replace(documents).corpus.tokens.dtype == np.uint16


def test_a_cache_is_of_its_user_alone(documents, cache, folder):
    for path in (folder, cache, cache.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (folder, cache, cache.parent):
        for mode in (0o720, 0o702):
            path.chmod(mode)
            message = rf"^text: the cache '{path}' must be a folder that no other user can write to, .* `chmod go-w`"
            with pytest.raises(ValueError, match=message):
                dataclasses.replace(documents).corpus  # noqa: B018
        path.chmod(0o755)
    assert dataclasses.replace(documents).corpus.tokens.tolist() == list(range(300))
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        with pytest.raises(ValueError, match="but it is of user 12345"):
            dataclasses.replace(documents).corpus  # noqa: B018


def test_links_with_the_names_of_partial_files_are_not_followed(documents, folder, tmp_path):
    file_of(tmp_path / "mine", "mine")
    for name in FILES:
        (folder / f".{name}.partial").symlink_to(tmp_path / "mine")
    (folder / "manifest.json").unlink()
    assert dataclasses.replace(documents).corpus.tokens.tolist() == list(range(300))
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("whose", ["another file of the same text", "a longer text"])
def test_a_file_that_grows_is_known_by_what_was_read(tmp_path, cache, whose):
    """It grows after its digest was taken, before it is copied."""
    copy, text = module._copy, counting(100)
    source = file_of(tmp_path / "text", text)
    if whose == "another file of the same text":  # what it grows to is in the cache
        whole = ordered(file_of(tmp_path / "whole", text + text))
        whole.corpus  # noqa: B018

    def growing(raw, source, column):
        file_of(tmp_path / "text", text + text)
        return copy(raw, source, column)

    with mock.patch.object(module, "_copy", growing):
        task = ordered(source)
        assert task.corpus.tokens.tolist() == [*range(100), *range(100)]
    assert ordered(source).fingerprint == task.fingerprint
    assert ordered(file_of(tmp_path / "before", text)).fingerprint != task.fingerprint


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading, writing = os.pipe()
    try:
        for source in (tmp_path / "pipe", f"/dev/fd/{reading}"):  # the second is what <(command) is
            assert_refused(rf"`source` must be a file or .*, but '{source}' is a pipe", source=str(source))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_cache_that_was_killed_while_it_was_made_is_made_again(documents, cache):
    """corpus.json is written last: at each write before it the process stops, and leaves what it had."""
    made = []

    class Killed(Exception):
        pass

    def stopping(stop):
        write = module.write_whole

        def call(path, content):
            made.append(path.name)
            if len(made) == stop:
                raise Killed
            write(path, content)

        return mock.patch.object(module, "write_whole", call)

    for stop in (1, 2, 3):
        made.clear()
        with stopping(stop), pytest.raises(Killed):
            dataclasses.replace(documents).corpus  # noqa: B018
    assert made == ["documents.bin", "corpus.json", "manifest.json"]
    [folder] = cache.iterdir()
    (folder / ".tokens.bin.0123456789abcdef.partial").write_bytes(b"left by a kill")
    assert documents.corpus.tokens.tolist() == list(range(300))
    assert set(contents(folder)) == set(FILES)


def test_processes_that_begin_together_make_it_once(documents):
    """A lock is of an open file, so that threads stand for processes."""
    made, make = [], module._make

    def slow(*args):
        made.append(args)
        make(*args)

    with mock.patch.object(module, "_make", slow), ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda thread: dataclasses.replace(documents).corpus, range(6), timeout=60))
    assert len(made) == 1
    assert [corpus.tokens.tolist() for corpus in found] == [list(range(300))] * 6


def test_where_the_cache_is(documents, tmp_path, monkeypatch):
    assert module.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("STATEMIX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module.cache_folder() == tmp_path / "xdg" / "statemix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert module.cache_folder() == tmp_path / "home" / ".cache" / "statemix"
    file_of(tmp_path / "file", "mine")
    monkeypatch.setenv("STATEMIX_CACHE", str(tmp_path / "file"))
    told = rf"^text: the cache '{tmp_path}/file/text/.*File exists.* Set STATEMIX_CACHE to"
    with pytest.raises(ValueError, match=told):
        documents.corpus  # noqa: B018
    assert set(os.listdir(tmp_path)) == {"folder", "file"}
