"""What holds for every task: its docstring, its streams, its splits, chance, finite training sets, and the presets."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import statemix.tasks
from statemix.tasks import (
    IGNORE_INDEX,
    PRESETS,
    SPLITS,
    TASKS,
    InContextRecall,
    Memorization,
    ModularArithmetic,
    Parity,
    PermutationComposition,
    Task,
    build_task,
    complete_task,
    finite_batch,
    settings,
)
from statemix.tasks.base import sequence_hash

X = IGNORE_INDEX
FROM_FILES = ("text", "word-problem")  # test_text.py, test_word_problem.py
DRAWN = [name for name in TASKS if name not in FROM_FILES]
each_task = pytest.mark.parametrize("name", DRAWN)
each_split = pytest.mark.parametrize("split", SPLITS)

# ---- the contract


def test_the_registry():
    assert list(TASKS) == [*PINNED, *FROM_FILES]
    for name, task in TASKS.items():
        assert issubclass(task, Task)
        assert task.name == name
        assert task.__name__ in statemix.tasks.__all__


@each_task
def test_a_task_is_its_options(name):
    task = build_task({"name": name})
    completed = complete_task({"name": name})
    assert json.loads(json.dumps(completed)) == completed
    assert completed == {"name": name, **dataclasses.asdict(task)}
    assert build_task(completed) == task
    assert hash(build_task(completed)) == hash(task)
    assert task.autoencoder == (name == "compression")
    with pytest.raises(dataclasses.FrozenInstanceError, match="seq_len"):
        task.seq_len = 3
    longer = task.with_seq_len(2 * task.seq_len)
    assert longer.seq_len == 2 * task.seq_len
    assert type(longer) is type(task)
    assert task == build_task({"name": name})
    for each in (task, longer):
        tokens, targets, _ = each.sample("valid", 5)
        assert tokens.shape == targets.shape == (5, each.length)
        assert tokens.dtype == targets.dtype == torch.int64


@each_task
@each_split
def test_targets_are_the_oracles_and_within_the_vocabulary(name, split):
    task = build_task({"name": name})
    tokens, targets, _ = task.sample(split, 300, seed=1, index=2)
    before = tokens.clone()
    assert np.array_equal(task.oracle(tokens.numpy()), targets.numpy())
    assert torch.equal(tokens, before)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < task.vocab_size
    scored = targets[targets != X]
    assert 0 <= int(scored.min()) <= int(scored.max()) < task.vocab_size
    assert (targets != X).any(1).all()


@each_task
def test_every_token_has_a_name_of_its_own(name):
    for options in ({}, {"start": True}) if "start" in TASKS[name].__dataclass_fields__ else ({},):
        task = build_task({"name": name, **options})
        assert len(set(task.token_names)) == len(task.token_names) == task.vocab_size


NAMES = [
    ({"name": "permutation", "group": "S3", "start": True}, "012 021 102 120 201 210 start"),
    ({"name": "permutation", "group": "A3xZ2", "min_len": 1}, "012,0 012,1 120,0 120,1 201,0 201,1 pad"),
    ({"name": "parity", "start": True}, "0 1 pad start"),
    ({"name": "modular-arithmetic", "modulus": 3}, "0 1 2 + - * ( ) = pad"),
    ({"name": "modular-arithmetic-simple", "modulus": 2}, "0 1 + - * pad"),
]


@pytest.mark.parametrize(("spec", "names"), NAMES, ids=str)
def test_what_the_tokens_are_called(spec, names):
    assert " ".join(build_task(spec).token_names) == names


@each_task
def test_chance_is_one_in_the_number_of_targets(name):
    task = build_task({"name": name})
    targets = task.sample("train", 2000).targets
    assert task.chance == 1 / len(targets[targets != X].unique())


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "permutation"])  # whose example test_tasks.py holds
def test_the_example_of_the_docstring(name):
    text = TASKS[name].__doc__
    options = re.search(r"`\w+\(([^)`]*)\)`", text)[1]
    task = TASKS[name](**{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", options)})
    rows = {}
    for key in ("tokens", "targets"):
        cells = re.search(rf"^        {key} +((?:[\d.]+ +)*[\d.]+)", text, flags=re.MULTILINE)[1].split()
        rows[key] = [X if cell == "." else int(cell) for cell in cells[: task.length]]
    assert len(rows["tokens"]) == task.length
    assert len(rows["targets"]) == task.length
    assert task.oracle(np.array([rows["tokens"]])).tolist() == [rows["targets"]]
    assert max(rows["tokens"]) < task.vocab_size
    # columns are aligned: each target ends below its token
    lines = [re.search(rf"^        {key} .*$", text, flags=re.MULTILINE)[0] for key in ("tokens", "targets")]
    ends = [[m.end() for m in re.finditer(r"[\d.]+", line)][: task.length] for line in lines]
    assert ends[0] == ends[1]


def test_more_of_the_docstrings():
    characters = re.search(r"^ +(\(.*=)$", ModularArithmetic.__doc__, flags=re.MULTILINE)[1].split()
    tokens = [int(c) if c.isdigit() else ModularArithmetic().symbol(c) for c in characters]
    assert tokens == [8, 3, 6, 8, 6, 4, 9, 9, 10]
    shown = re.findall(r"(\d) -> (\d)", Memorization.__doc__)
    assert [(int(k), int(v)) for k, v in shown] == list(enumerate(Memorization(vocab_size=9).value_of.tolist()))


# ---- streams


def digest(batches) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for batch in batches for tensor in batch[:2])).hexdigest()


def digests() -> str:
    tasks = [build_task({"name": name}) for name in DRAWN]
    return " ".join(digest(task.sample(split, 9, seed=5, index=2) for split in SPLITS)[:10] for task in tasks)


def test_another_process_draws_the_same_bytes():
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    command = [sys.executable, "-c", "import test_tasks_all; print(test_tasks_all.digests())"]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digests()


PINNED = {
    "permutation": "f3ebdbc2a4bf0d81",
    "in-context-recall": "e6650c85b55fffae",
    "noisy-in-context-recall": "ffea3899cc4ba862",
    "fuzzy-in-context-recall": "37cdb7e5d528780e",
    "memorization": "f2f9512ed233436b",
    "selective-copying": "bda7e257518d85e4",
    "compression": "d025aa73f6f65f91",
    "parity": "bde5283150494221",
    "modular-counting": "987185e345a2ad5d",
    "cycle-navigation": "d0043de777d7ad82",
    "modular-arithmetic": "a1380f50ca95b7ba",
    "even-pairs": "9a873065aa191f83",
    "modular-arithmetic-simple": "c3c023c85269f019",
    "random-automaton": "0f673929e86004f7",
}


@each_task
def test_the_stream_stays_as_it_is(name):
    # a change here changes the data of every published number: it needs a reason, and new numbers
    task = build_task({"name": name})
    assert digest(task.sample(split, 4, seed=7, index=1) for split in SPLITS)[:16] == PINNED[name]


@each_task
def test_seeds_indices_and_splits_are_separate_streams(name):
    task, seen = build_task({"name": name}), {}
    # beyond 2^32: a seed sequence splits numbers into words of 32 bits
    numbers = (0, 1, 2, 1000, 2**32, 2**32 + 1, 2**33)
    for arguments in itertools.product(SPLITS, numbers, numbers):
        split, seed, index = arguments
        tokens = tuple(task.sample(split, 4, seed=seed, index=index).tokens.flatten().tolist())
        assert tokens not in seen, f"{arguments} draws what {seen[tokens]} draws"
        seen[tokens] = arguments


# ---- splits

SMALL = {  # so few sequences that all are drawn again and again
    "permutation": {"group": "Z2", "seq_len": 8},
    "in-context-recall": {"vocab_size": 4, "seq_len": 8},
    "noisy-in-context-recall": {"vocab_size": 5, "seq_len": 8, "noise_vocab_size": 1},
    "fuzzy-in-context-recall": {"vocab_size": 5, "seq_len": 9, "k_motif_size": 1, "v_motif_size": 1},
    "memorization": {"vocab_size": 5, "seq_len": 14},
    "selective-copying": {"vocab_size": 4, "seq_len": 11, "num_tokens_to_copy": 3},
    "compression": {"vocab_size": 3, "seq_len": 9},
    "parity": {"seq_len": 7},
    "modular-counting": {"seq_len": 5, "modulus": 3},
    "cycle-navigation": {"seq_len": 5},
    "modular-arithmetic": {"seq_len": 7, "modulus": 2},
    "even-pairs": {"seq_len": 7},
    "modular-arithmetic-simple": {"seq_len": 5, "modulus": 3},
    "random-automaton": {"seq_len": 7},
}


def overlaps(name: str) -> list[tuple[str, str]]:
    """Pairs of splits that have a sequence in common, over many draws."""
    task = build_task({"name": name, **SMALL[name]})
    sets = {}
    for i, split in enumerate(SPLITS):
        batches = [task.sample(split, 500, seed=10 * i + seed, index=index) for seed in range(2) for index in range(3)]
        sets[split] = {tuple(row) for batch in batches for row in batch.tokens.tolist()}
        assert len(sets[split]) < 1500  # each was drawn twice and more, on average
    return [(a, b) for a, b in itertools.combinations(SPLITS, 2) if sets[a] & sets[b]]


@each_task
def test_no_sequence_is_in_two_splits(name):
    assert overlaps(name) == []


@each_task
def test_a_planted_overlap_is_noticed(name, monkeypatch):
    monkeypatch.setitem(SPLITS, "test", (1, 7))
    assert overlaps(name) == [("train", "test")]


@each_task
def test_splits_of_the_baseline_have_other_hashes(name):
    task = build_task({"name": name})
    tokens = {split: task.sample(split, 500).tokens.numpy() for split in SPLITS}
    hashes = {split: set(sequence_hash(rows, task.pad).tolist()) for split, rows in tokens.items()}
    assert all(hashes[a].isdisjoint(hashes[b]) for a, b in itertools.combinations(SPLITS, 2))


def test_the_hash_leaves_padding_out():
    rows = np.array([[1, 2, 3, 9, 9], [9, 9, 1, 2, 3], [1, 2, 9, 3, 9]])
    assert len(set(sequence_hash(rows, 9).tolist())) == 1
    assert sequence_hash(rows[:, :4], 9)[0] == sequence_hash(rows, 9)[0] == sequence_hash(np.array([[1, 2, 3]]))[0]
    assert len(set(sequence_hash(rows).tolist())) == 3
    assert len(set(sequence_hash(np.array([[1, 2, 3], [1, 3, 2], [3, 1, 2]]), 9).tolist())) == 3


# ---- speed


SECONDS = [({"name": name}, 2) for name in DRAWN]
SECONDS += [({"name": "permutation", "group": "S5", "seq_len": 128}, 2)]
SECONDS += [({"name": "fuzzy-in-context-recall", "vocab_size": 128}, 10)]


@pytest.mark.parametrize(("spec", "limit"), SECONDS, ids=str)
def test_12800_sequences_take_few_seconds(spec, limit):
    task, seconds = build_task(spec), []
    while not seconds or (min(seconds) > limit and len(seconds) < 3):  # another process may be in the way
        begin = time.process_time()
        assert task.sample("train", 12_800, seed=len(seconds)).tokens.shape == (12_800, task.length)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < limit


# ---- finite training sets


@pytest.mark.parametrize("batch_size", [1, 7, 30, 41, 100])
def test_a_finite_set_is_drawn_in_epochs(batch_size):
    task, size = InContextRecall(seq_len=32), 30
    everything = task.sample("train", size, seed=3)
    number = {tuple(row): i for i, row in enumerate(everything.tokens.tolist())}
    assert len(number) == size
    batches = [finite_batch(task, size, batch_size, seed=3, step=step) for step in range(-(-90 // batch_size))]
    assert all(batch.tokens.shape == (batch_size, task.length) for batch in batches)
    tokens, targets = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
    order = [number[tuple(row)] for row in tokens.tolist()]
    assert torch.equal(targets, everything.targets[order])
    epochs = [order[i : i + size] for i in (0, 30, 60)]  # also where a batch goes over the end of one
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * 3
    assert len(set(map(tuple, [*epochs, list(range(size))]))) == 4  # in another order each time


def test_a_finite_batch_depends_on_its_arguments_alone():
    task = Parity()
    batches = {step: finite_batch(task, 100, 32, seed=1, step=step) for step in (9, 0, 4)}
    for step in (0, 9, 4):
        finite_batch(Parity(seq_len=20), 50, 8, seed=2, step=step)  # something else in between
        finite_batch(Parity(seq_len=21), 50, 8, seed=2, step=step)
        again = finite_batch(task, 100, 32, seed=1, step=step)
        assert all(map(torch.equal, again[:2], batches[step][:2]))
    others = [finite_batch(task, 100, 32, seed=2), finite_batch(task, 101, 32, seed=1), finite_batch(task, 100, 32)]
    for other in others:
        assert not torch.equal(other.tokens, batches[0].tokens)
    # the order of a set differs between seeds too, not only the set
    orders = []
    for seed in (1, 2):
        rows = task.sample("train", 100, seed=seed).tokens.tolist()
        orders.append([rows.index(row) for row in finite_batch(task, 100, 32, seed=seed).tokens.tolist()])
    assert orders[0] != orders[1]


def test_a_caller_may_change_its_finite_batch():
    task = Parity(seq_len=12)
    batch = finite_batch(task, 10, 10)
    before = batch.tokens.clone()
    batch.tokens.zero_()
    batch.targets.zero_()
    assert torch.equal(finite_batch(task, 10, 10).tokens, before)


def test_late_steps_of_a_finite_set():
    step = 2**40
    rows = finite_batch(Parity(), 8, 8, step=step).tokens.tolist()
    assert sorted(rows) == sorted(Parity().sample("train", 8).tokens.tolist())
    assert rows != finite_batch(Parity(), 8, 8, step=step + 1).tokens.tolist()


FINITE = {"task": Parity(), "sequences": 10, "batch_size": 4}
BAD_FINITE = [  # changes of these arguments, and the error
    ({"sequences": 0}, ValueError, "`sequences` must be at least 1 and below 2^64, got 0."),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1 and below 2^64, got 0."),
    ({"step": -1}, ValueError, "`step` must be at least 0 and below 2^64, got -1."),
    ({"seed": -1}, ValueError, "`seed` must be at least 0 and below 2^64, got -1."),
    ({"sequences": 10.0}, TypeError, "`sequences` must be an int, got 10.0."),
    ({"batch_size": True}, TypeError, "`batch_size` must be an int, got True."),
    ({"step": None}, TypeError, "`step` must be an int, got None."),
    ({"seed": False}, TypeError, "`seed` must be an int, got False."),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_FINITE)
def test_bad_finite_batches(arguments, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'finite_batch: {text}')}$"):
        finite_batch(**(FINITE | arguments))


# ---- bad input


BAD_SAMPLES = [  # changes of the arguments, and the error
    ({"split": "dev"}, ValueError, "`split` must be one of ['test', 'train', 'valid'], got 'dev'."),
    ({"split": None}, ValueError, "`split` must be one of ['test', 'train', 'valid'], got None."),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1 and below 2^64, got 0."),
    ({"batch_size": -1}, ValueError, "`batch_size` must be at least 1 and below 2^64, got -1."),
    ({"seed": -1}, ValueError, "`seed` must be at least 0 and below 2^64, got -1."),
    ({"index": -1}, ValueError, "`index` must be at least 0 and below 2^64, got -1."),
    ({"batch_size": 4.0}, TypeError, "`batch_size` must be an int, got 4.0."),
    ({"batch_size": True}, TypeError, "`batch_size` must be an int, got True."),
    ({"seed": 1.0}, TypeError, "`seed` must be an int, got 1.0."),
    ({"index": "0"}, TypeError, "`index` must be an int, got '0'."),
]


@pytest.mark.parametrize("name", ["permutation", "memorization", "compression"])  # drawn in two ways, one of them twice
@pytest.mark.parametrize(("arguments", "error", "text"), BAD_SAMPLES)
def test_bad_samples(name, arguments, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'sample: {text}')}$"):
        build_task({"name": name}).sample(**({"split": "train", "batch_size": 4} | arguments))


# ---- presets


FEWER = {"train_sequences": "6400 3200 1600 800"}
WORDS, LENGTHS = {"vocab_size": "32 64 128"}, {"seq_len": "256 512 1024"}
MAD = {  # what differs from the baseline, one factor at a time
    "in-context-recall": WORDS | LENGTHS | FEWER,
    "noisy-in-context-recall": LENGTHS | FEWER | {"vocab_size": "48 80 144", "frac_noise": "0.4 0.6 0.8"},
    "fuzzy-in-context-recall": WORDS | LENGTHS | FEWER,
    "memorization": {"vocab_size": "512 1024 2048 4096 8192"},
    "selective-copying": WORDS | FEWER | {"seq_len": "512 1024", "num_tokens_to_copy": "32 64 96"},
    "compression": WORDS | FEWER | {"seq_len": "64 128 256"},
}


def test_mad_has_66_settings():
    assert PRESETS["mad"].keys() == MAD.keys()
    assert sum(len(settings("mad", name)) for name in MAD) == 66


@pytest.mark.parametrize("name", MAD)
def test_the_numbers_of_mad(name):
    baseline, *others = settings("mad", name)
    assert baseline.train_sequences == (256 if name == "memorization" else 12_800)
    wanted = [f"{key}={value}" for key, values in MAD[name].items() for value in values.split()]
    assert sorted(setting.changed for setting in others) == sorted(wanted)


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in PRESETS for name in PRESETS[preset]])
def test_settings_change_one_factor_of_the_baseline(preset, name):
    baseline, *others = settings(preset, name)
    assert baseline.changed == "baseline"
    if preset == "exact":  # its words are unlike those of the others
        assert baseline.task.items() >= {"min_len": 1, "start": True, "scored": "last"}.items()
    else:  # the class has the same defaults, so that a task without options is the baseline
        assert build_task(baseline.task) == build_task({"name": name})
    seen = {json.dumps(setting[:2]) for setting in (baseline, *others)}
    assert len(seen) == len(others) + 1
    for setting in others:
        key, value = setting.changed.split("=")
        if key == "train_sequences":
            assert (setting.train_sequences, setting.task) == (int(value), baseline.task)
        else:
            assert setting.train_sequences == baseline.train_sequences
            own = value if value[0].isalpha() else json.loads(value)
            assert setting.task == baseline.task | {key: own}
            assert build_task(setting.task) != build_task(baseline.task)
        assert setting.test_sequences == baseline.test_sequences == 1280


def test_a_setting_is_the_callers_own():
    settings("mad", "compression")[0].task["vocab_size"] = 99
    assert settings("mad", "compression")[0].task["vocab_size"] == 16


def test_unknown_presets_and_tasks_are_refused():
    text = r"^settings: `preset` must be one of \['exact', 'formal', 'mad'\], got 'MAD'\.$"
    with pytest.raises(ValueError, match=text):
        settings("MAD", "compression")
    names = re.escape(str(sorted(PRESETS["mad"])))
    with pytest.raises(ValueError, match=rf"^settings: `task` must be one of {names}, got 'permutation'\.$"):
        settings("mad", "permutation")


def test_a_permutation_can_have_another_length():
    assert PermutationComposition("A5", 8).with_seq_len(32) == PermutationComposition("A5", 32)
