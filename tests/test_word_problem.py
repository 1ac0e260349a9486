"""The task word-problem: files as others write them, words of many lengths, splits, and files that are damaged."""

import re

import numpy as np
import pytest
from run_helpers import run, small_config

from statemix.tasks import PermutationComposition, WordProblem, build_task
from statemix.tasks.base import in_split


def write(path, words, answers, *, header="seed,input,target", seed="7,"):
    lines = [f"{seed}{' '.join(map(str, w))},{' '.join(map(str, a))}" for w, a in zip(words, answers, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


@pytest.fixture
def s3(tmp_path):
    """A file of 400 words of S3 of 3 to 9 tokens."""
    task = PermutationComposition(group="S3", seq_len=9, min_len=3)
    words = task.words(np.random.default_rng(0), 400)
    lengths = (words != task.pad).sum(1)
    cut = [word[:n].tolist() for word, n in zip(words, lengths, strict=True)]
    answers = [row[:n].tolist() for row, n in zip(task.answers(words), lengths, strict=True)]
    return write(tmp_path / "S3.csv", cut, answers)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("scored", ["every", "last"])
def test_the_files_answers_are_those_of_the_group(s3, start, scored):
    task = WordProblem(s3, scored=scored, start=start)
    assert (task.seq_len, task.min_len, task.symbols, task.pad, task.chance) == (9, 3, 6, 6, 1 / 6)
    same = PermutationComposition(group="S3", seq_len=9, min_len=3, scored=scored, start=start)
    for split in ("train", "valid", "test"):
        batch = task.sample(split, 50, seed=1)
        assert np.array_equal(same.oracle(batch.tokens.numpy()), batch.targets.numpy())
        assert in_split(batch.tokens.numpy(), split, task.pad).all()


def test_words_of_some_lengths(s3):
    task = WordProblem(s3)
    five = task.with_seq_len(5)
    assert ((five.sample("train", 40).tokens != five.pad).sum(1) == 5).all()
    some = task.with_lengths(4, 6)
    assert set((some.sample("train", 200).tokens != some.pad).sum(1).tolist()) == {4, 5, 6}
    text = r"^word-problem: `seq_len` must be a length of its words, in \[3, 9\], got 2.$"
    with pytest.raises(ValueError, match=text):
        WordProblem(s3, seq_len=2)


def test_words_of_one_length_have_no_padding(tmp_path):
    path = write(tmp_path / "b.csv", [[0, 1, 0], [1, 1, 0]], [[0, 1, 1], [1, 0, 1]], header="input,target", seed="")
    task = WordProblem(path)
    assert (task.pad, task.vocab_size, task.length) == (None, 2, 3)
    assert task.oracle(np.array([[1, 1, 0]])).tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match=re.escape(f"word-problem: '{path}' has no word [1, 1, 1].")):
        task.oracle(np.array([[1, 1, 1]]))


def test_columns_are_read_by_their_names(tmp_path):
    path = write(tmp_path / "a.csv", [[0, 1, 0], [1, 1, 0]], [[0, 1, 1], [1, 0, 1]], header="target,input", seed="")
    assert WordProblem(path).oracle(np.array([[1, 0, 1]])).tolist() == [[1, 1, 0]]


def test_a_run_of_it_trains_and_is_refused_with_another_file(s3, tmp_path):
    config = small_config(task={"name": "word-problem", "path": s3, "start": True}, steps=4, eval_every=2)
    result = run(tmp_path / "run", config)
    assert result.summary["data"] == build_task(config.task).fingerprint
    with open(s3, "a") as file:
        file.write("7,0 0 0,0 0 0\n")
    with pytest.raises(ValueError, match="was made with another text"):
        run(tmp_path / "run", config)


GOOD = "7,2 4,2 5\n"
BAD_FILES = [
    ("", "must have the columns input and target, got None."),
    ("seed,input\n7,1 2\n", "must have the columns input and target, got ['seed', 'input']."),
    ("seed,input,target\n", "must have at least one word, got none."),
    (f"seed,input,target\n{GOOD}7,1 2,1\n", ", line 3, target: must have as many numbers as `input` = 2, got 1."),
    (f"seed,input,target\n{GOOD}7,1 b,1 1\n", ", line 3, input: must be whole numbers in [0, 10^6), got '1 b'."),
    (f"seed,input,target\n{GOOD}7,1 -2,1 1\n", ", line 3, input: must be whole numbers in [0, 10^6), got '1 -2'."),
    (f"seed,input,target\n{GOOD}7,1 2,9999999 1\n", ", line 3, target: must be whole numbers in [0, 10^6), got "),
    (f"seed,input,target\n{GOOD}7\n", ", line 3, input: must be whole numbers in [0, 10^6), got None."),
    (f"seed,input,target\n{GOOD}7,2 4,2 4\n", ", line 3, target: the same word had others before."),
]


@pytest.mark.parametrize(("content", "text"), BAD_FILES, ids=[case[1][:40] for case in BAD_FILES])
def test_a_bad_file_is_refused_by_its_line(tmp_path, content, text):
    path = tmp_path / "words.csv"
    path.write_text(content)
    between = "" if text.startswith(",") else " "
    with pytest.raises(ValueError, match="^" + re.escape(f"word-problem: '{path}'{between}{text}")):
        WordProblem(str(path))


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"^word-problem: `path` must name a file that can be read, got 'nowhere': "):
        WordProblem("nowhere")
    with pytest.raises(TypeError, match=r"^word-problem: `path` must be a str, got 3.$"):
        WordProblem(3)
    (tmp_path / "bytes.csv").write_bytes(b"input,target\n\xff,1\n")
    with pytest.raises(ValueError, match=r"bytes.csv' cannot be read as CSV: "):
        WordProblem(str(tmp_path / "bytes.csv"))
    with pytest.raises(ValueError, match="cannot be read as CSV: "):
        WordProblem(str(tmp_path))
