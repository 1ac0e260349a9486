"""The tasks of MAD: targets by a second, naive implementation; the definitions, and the traps of the public code."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import assert_solved, chi_square

from statemix.tasks import (
    IGNORE_INDEX,
    PRESETS,
    SPLITS,
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    Memorization,
    NoisyInContextRecall,
    SelectiveCopying,
    build_task,
    settings,
)
from statemix.tasks.base import sequence_hash

X = IGNORE_INDEX
RECALL = {"in-context-recall": InContextRecall, "noisy-in-context-recall": NoisyInContextRecall}
RECALL |= {"fuzzy-in-context-recall": FuzzyInContextRecall}
each_split = pytest.mark.parametrize("split", SPLITS)

# ---- naive solutions: a row of tokens -> its targets


def naive_recall(row: list[int], task) -> list[int]:
    """Pairs are read one after the other; noise has no key."""
    num_keys, known, targets = (task.vocab_size - task.noise_vocab_size) // 2, {}, [X] * len(row)
    for t in range(0, len(row), 2):
        if row[t] < num_keys:
            targets[t] = known.get(row[t], X)
            if t + 1 < len(row):
                assert known.setdefault(row[t], row[t + 1]) == row[t + 1]  # one value a key
    return targets


def parse_fuzzy(row: list[int], task) -> list[tuple[str, int, tuple[int, ...]]]:
    """Maximal runs of tokens of one kind: (kind, where it begins, tokens)."""
    num_keys = (task.vocab_size - 1) // 2
    kinds = ["pad" if x == task.vocab_size - 1 else "key" if x < num_keys else "value" for x in row]
    runs, t = [], 0
    for kind, run in itertools.groupby(kinds):
        size = len(list(run))
        runs.append((kind, t, tuple(row[t : t + size])))
        t += size
    return runs


def naive_fuzzy(row: list[int], task) -> list[int]:
    known, targets = {}, [X] * len(row)
    motifs = [run for run in parse_fuzzy(row, task) if run[0] != "pad"]
    if motifs[-1][0] == "key":
        motifs.append(("value", len(row), ()))
    for (kind, _, key), (kind_after, begin, shown) in zip(motifs[::2], motifs[1::2], strict=True):
        assert (kind, kind_after) == ("key", "value")
        if key in known:
            for i, token in enumerate(known[key]):
                if begin + i - 1 < len(row):
                    targets[begin + i - 1] = token
            assert shown == known[key][: len(shown)]  # one value a key
        else:
            known[key] = shown
    return targets


def naive_memorization(row: list[int], task) -> list[int]:
    values = task.value_of.tolist()
    return [values[row[t - 1]] if token == task.vocab_size - 1 else X for t, token in enumerate(row)]


def naive_copying(row: list[int], task) -> list[int]:
    data = [token for token in row[: row.index(task.vocab_size - 1)] if token != task.vocab_size - 2]
    return [X] * (len(row) - len(data)) + data


NAIVE = {
    "in-context-recall": naive_recall,
    "noisy-in-context-recall": naive_recall,
    "fuzzy-in-context-recall": naive_fuzzy,
    "memorization": naive_memorization,
    "selective-copying": naive_copying,
    "compression": lambda row, task: row,
}


def naive_targets(tokens, task) -> torch.Tensor:
    return torch.from_numpy(np.array([NAIVE[task.name](row, task) for row in tokens.tolist()]))


@pytest.mark.parametrize("name", NAIVE)
def test_a_naive_solution_scores_1_on_10000_sequences(name):
    assert_solved(build_task(settings("mad", name)[0].task), naive_targets, seed=11)


SETTINGS = [(name, setting) for name in PRESETS["mad"] for setting in settings("mad", name)[1:]]


@pytest.mark.parametrize(
    ("name", "setting"),
    [pair for pair in SETTINGS if not pair[1].changed.startswith("train_sequences")],
    ids=lambda v: v if isinstance(v, str) else v.changed,
)
def test_a_naive_solution_scores_1_in_every_setting(name, setting):
    task = build_task(setting.task)
    for split in ("train", "test"):
        tokens, targets, _ = task.sample(split, 40)
        assert torch.equal(naive_targets(tokens, task), targets)
        assert ((targets != X).sum(1) > 0).all()
        assert int(tokens.max()) < task.vocab_size
        assert int(targets.max()) < task.vocab_size


# ---- hand-made sequences: exactly these positions are scored

_ = X
HANDMADE = [  # task, tokens, targets
    (
        InContextRecall(vocab_size=5, seq_len=12),  # keys 0 1, values 2 3 4
        [0, 3, 0, 3, 0, 3, 1, 2, 1, 2, 0],
        [_, _, 3, _, 3, _, _, _, 2, _, 3],
    ),
    (
        NoisyInContextRecall(vocab_size=6, seq_len=12, noise_vocab_size=2),  # keys 0 1, values 2 3, noise 4 5
        [4, 4, 1, 2, 5, 4, 5, 5, 1, 2, 1],
        [_, _, _, _, _, _, _, _, 2, _, 2],
    ),
    (
        # keys of 0 1 2, values of 3 4 5 6, pad 7: 01 -> 4, 1 -> 653, 10 -> 4
        FuzzyInContextRecall(vocab_size=8, seq_len=18),
        [7, 0, 1, 4, 1, 6, 5, 3, 1, 0, 4, 1, 6, 5, 3, 1, 6, 5],
        [_, _, _, _, _, _, _, _, _, _, _, 6, 5, 3, _, 6, 5, 3],
    ),
    (
        # two values that follow each other by one token: 012 -> 3, then 012 again, whose value is the last target
        FuzzyInContextRecall(vocab_size=8, seq_len=11),
        [7, 7, 7, 7, 0, 1, 2, 3, 0, 1, 2],
        [_, _, _, _, _, _, _, _, _, _, 3],
    ),
    (
        SelectiveCopying(vocab_size=5, seq_len=8, num_tokens_to_copy=3),
        [2, 0, 3, 0, 4, 3, 3, 3],
        [_, _, _, _, _, 2, 0, 0],
    ),
    (SelectiveCopying(vocab_size=4, seq_len=3, num_tokens_to_copy=1), [1, 3, 2], [_, _, 1]),
    (Compression(vocab_size=3, seq_len=4), [0, 1, 1, 2], [0, 1, 1, 2]),
]


@pytest.mark.parametrize(("task", "tokens", "targets"), HANDMADE, ids=lambda v: getattr(v, "name", None))
def test_scored_positions_of_handmade_sequences(task, tokens, targets):
    assert task.oracle(np.array([tokens])).tolist() == [targets]
    assert NAIVE[task.name](tokens, task) == targets
    # alone or in a batch: rows have nothing to do with each other
    both = np.array([tokens, task.sample("train", 1).tokens[0].tolist(), tokens])
    assert task.oracle(both)[[0, 2]].tolist() == [targets, targets]


@each_split
@pytest.mark.parametrize("options", [{}, {"vocab_size": 144}], ids=str)
@pytest.mark.parametrize("name", RECALL)
def test_a_stream_goes_on_with_the_targets(name, options, split):
    task = build_task({"name": name} | options)
    arguments = (split,) if name == "fuzzy-in-context-recall" else ()
    streams = task.streams(np.random.default_rng(1), 1500, *arguments)
    assert streams.shape == (1500, task.length + 1)
    targets = task.oracle(streams[:, :-1])
    assert ((targets == streams[:, 1:]) | (targets == X)).all()
    assert (targets[:, -1] == streams[:, -1]).all()  # every probe was shown


# ---- in-context and noisy recall


@each_split
def test_keys_and_values_are_uniform(split):
    task = InContextRecall(vocab_size=17, seq_len=32)  # keys 0-7, values 8-16
    tokens = task.sample(split, 20_000, seed=2).tokens.numpy()
    keys, values = tokens[:, :-1:2], tokens[:, 1::2]
    assert set(keys.ravel()) == set(range(8))
    assert set(values.ravel()) == set(range(8, 17))
    for t in range(15):
        assert chi_square(np.bincount(keys[:, t], minlength=8)) < 8
        assert chi_square(np.bincount(values[:, t] - 8, minlength=9)) < 8
    # a new map for each sequence: pairs at the first place are uniform
    assert chi_square(np.bincount(keys[:, 0] * 9 + values[:, 0] - 8, minlength=72)) < 8


def test_the_probe_is_uniform_among_the_keys_shown():
    tokens = InContextRecall(vocab_size=8, seq_len=12).sample("train", 40_000).tokens.numpy()
    sets = (1 << tokens[:, 0:10:2])[..., None] & (1 << np.arange(4))  # of the 5 keys before the probe
    shown = sets.any(1)
    for keys in itertools.product((False, True), repeat=4):
        probes = tokens[(shown == keys).all(1), -1]
        assert set(probes) <= set(np.flatnonzero(keys))
        if sum(keys) > 1:  # whatever the number of times each was shown
            assert chi_square(np.bincount(probes, minlength=4)[list(keys)]) < 8, keys


@pytest.mark.parametrize("frac_noise", [0, 0.2, 0.95])
def test_the_share_of_noise(frac_noise):
    task = NoisyInContextRecall(vocab_size=20, seq_len=22, frac_noise=frac_noise)  # 10 slots, noise 4-19
    tokens = task.sample("test", 10_000).tokens.numpy()
    noise = tokens[:, :-1] >= 4
    assert (noise[:, ::2] == noise[:, 1::2]).all()  # a slot is noise or it is not
    noisy = noise[:, ::2]
    assert not noisy.all(1).any()
    # one slot of the ten, drawn at random, is never noise
    assert noisy.mean() == pytest.approx(0.9 * frac_noise, abs=0.005)
    assert np.ptp(noisy.mean(0)) < 0.04
    if frac_noise:
        assert chi_square(np.bincount(tokens[:, :-1][noise] - 4, minlength=16)) < 8
    assert (tokens[:, -1] < 2).all()


# ---- fuzzy recall


@each_split
def test_motifs_of_fuzzy_recall(split):
    task = FuzzyInContextRecall(vocab_size=12, seq_len=60, k_motif_size=3, v_motif_size=2)  # keys 0-4, values 5-10
    seen = {"key": [], "value": []}
    for row in task.sample(split, 5000).tokens.tolist():
        runs = parse_fuzzy(row, task)
        if runs[0][0] == "pad":  # on the left only
            assert len(runs.pop(0)[2]) < 5  # another pair would have fitted
        assert {kind for kind, *_ in runs} == {"key", "value"}
        for _kind, _begin, motif in runs:
            assert len(set(motif)) == len(motif)  # distinct tokens
        for kind, _begin, motif in runs[:4]:  # later ones were chosen for their size, by what still fitted
            seen[kind].append(motif)
    sizes = {kind: {len(motif) for motif in motifs} for kind, motifs in seen.items()}
    assert sizes == {"key": {1, 2, 3} if split == "train" else {3}, "value": {1, 2}}
    for kind, tokens in (("key", range(5)), ("value", range(5, 11))):
        for size in sizes[kind]:
            motifs = list(itertools.permutations(tokens, size))
            counts = np.array([seen[kind].count(motif) for motif in motifs])
            assert chi_square(counts) < 8, (kind, size)  # every ordered motif, equally often
            assert counts.sum() / len(seen[kind]) == pytest.approx(1 / len(sizes[kind]), abs=0.04)


def test_the_probe_of_fuzzy_recall_stands_anywhere():
    # one token a key of 200, so that a key is shown twice by chance in 2 % of the sequences only
    task = FuzzyInContextRecall(vocab_size=401, seq_len=19, k_motif_size=1, v_motif_size=1)
    tokens = task.sample("train", 20_000).tokens.numpy()
    keys = tokens[:, 0::2]
    assert keys.shape == (20_000, 10)
    first = (keys[:, :-1] == keys[:, -1:]).argmax(1)
    assert (keys[np.arange(20_000), first] == keys[:, -1]).all()
    assert chi_square(np.bincount(first, minlength=9)) < 8
    assert chi_square(np.bincount(keys[:, -1], minlength=200)) < 8


@each_split
def test_how_often_keys_are_repeated_in_fuzzy_recall(split):
    _, targets, _ = FuzzyInContextRecall().sample(split, 2000)
    scored = float((targets != X).sum(1).float().mean())
    # Values have 2 tokens on average, keys 2 in training, else 3; N pairs fit into 129 tokens beside the last probe. Of
    # N draws from n motifs, N - n (1 - (1 - 1/n)^N) are repetitions; and the last probe is one more.
    motifs = (7, 42, 210) if split == "train" else (210,)
    pair = 4 if split == "train" else 5
    draws = (129 - pair) / pair / len(motifs)
    repetitions = sum(draws - n * (1 - (1 - 1 / n) ** draws) for n in motifs)
    assert scored == pytest.approx(2 * (repetitions + 1), rel=0.1)


# ---- memorization


def test_the_map_is_one_to_one_and_the_same_everywhere():
    for vocab_size in (5, 6, 256, 8192):
        task = Memorization(vocab_size=vocab_size)
        keys = (vocab_size - 1) // 2
        values = task.value_of.tolist()
        assert len(values) == len(set(values)) == keys
        assert set(values) <= set(range(keys, vocab_size - 1))
        assert values != sorted(values) or vocab_size < 7
    pairs = set()
    for split, seed in itertools.product(SPLITS, range(3)):
        tokens, targets, _ = Memorization(vocab_size=64).sample(split, 50, seed=seed)
        pairs |= set(zip(tokens[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist(), strict=True))
        assert (targets[:, ::2] == X).all()
        assert (tokens[:, 1::2] == 63).all()
    assert pairs == set(enumerate(Memorization(vocab_size=64).value_of.tolist()))
    assert len(pairs) == 31
    other = Memorization(vocab_size=64, map_seed=1)
    assert other.value_of.tolist() != Memorization(vocab_size=64).value_of.tolist()
    # the other map with the same keys: what a sequence asks does not depend on the answers
    assert torch.equal(other.sample("test", 5).tokens, Memorization(vocab_size=64).sample("test", 5).tokens)


@pytest.mark.parametrize("setting", settings("mad", "memorization"), ids=lambda s: s.changed)
def test_a_training_set_lacks_no_key(setting):
    task = build_task(setting.task)
    tokens = task.sample("train", setting.train_sequences).tokens
    counts = torch.bincount(tokens[:, ::2].flatten(), minlength=task.num_keys)
    assert len(counts) == task.num_keys
    assert int(counts.min()) >= 1
    assert int(counts.max()) - int(counts.min()) <= 1


def test_a_training_set_of_mad_lacks_keys():
    task = Memorization(vocab_size=8192, compat="mad")
    counts = torch.bincount(task.sample("train", 256).tokens[:, ::2].flatten(), minlength=4095)
    assert (counts == 0).float().mean() == pytest.approx(np.exp(-4096 / 4095), abs=0.03)


@pytest.mark.parametrize("compat", ["none", "mad"])
def test_keys_of_memorization_are_uniform_at_every_place(compat):
    task = Memorization(vocab_size=17, seq_len=16, compat=compat)
    for split in SPLITS:
        keys = torch.cat([task.sample(split, 200, index=i).tokens[:, ::2] for i in range(20)]).numpy()
        for t in range(8):
            assert chi_square(np.bincount(keys[:, t], minlength=8)) < 8
        for s, t in itertools.combinations(range(8), 2):
            assert chi_square(np.bincount(8 * keys[:, s] + keys[:, t], minlength=64)) < 8


# ---- copying and compression


def test_data_tokens_stand_anywhere_before_the_marker():
    task = SelectiveCopying(vocab_size=7, seq_len=20, num_tokens_to_copy=4)  # data 0-4, blank 5, marker 6
    tokens = task.sample("test", 30_000).tokens.numpy()
    assert (tokens[:, 15] == 6).all()
    assert (tokens[:, 16:] == 5).all()
    is_data = tokens[:, :15] < 5
    assert ((tokens[:, :15] <= 5) & (is_data.sum(1) == 4)[:, None]).all()
    assert chi_square(is_data.sum(0)) < 4
    assert is_data[:, -1].mean() == pytest.approx(4 / 15, abs=0.01)  # a blank before the marker in the other 11
    places = np.sort(is_data @ (1 << np.arange(15)))
    choices = {sum(1 << i for i in places) for places in itertools.combinations(range(15), 4)}
    assert set(places.tolist()) == choices
    assert chi_square(np.unique(places, return_counts=True)[1]) < 8
    assert chi_square(np.bincount(tokens[:, :15][is_data], minlength=5)) < 8


def test_compressed_tokens_are_uniform():
    tokens, targets, _ = Compression(vocab_size=9, seq_len=12).sample("train", 20_000)
    assert torch.equal(tokens, targets)
    assert (tokens[:, -1] == 8).all()
    for t in range(11):
        assert chi_square(np.bincount(tokens[:, t], minlength=8)) < 8
    assert Compression.autoencoder
    assert not any(task.autoencoder for task in (*RECALL.values(), Memorization, SelectiveCopying))


# ---- compat


@pytest.mark.parametrize("name", RECALL)
def test_mad_trains_on_every_next_token_and_scores_as_we_do(name):
    ours, mads = build_task({"name": name}), build_task({"name": name, "compat": "mad"})
    for split in SPLITS:
        (tokens, scored, _), (same, targets, _) = ours.sample(split, 300, seed=4), mads.sample(split, 300, seed=4)
        assert torch.equal(tokens, same)
        if split == "train":
            assert torch.equal(targets[:, :-1], tokens[:, 1:])
            assert torch.equal(targets[:, -1], scored[:, -1])
            assert torch.equal(targets[scored != X], scored[scored != X])
        else:
            assert torch.equal(targets, scored)


@pytest.mark.parametrize("task", [SelectiveCopying, Compression])
def test_mad_trains_on_the_same_where_all_can_be_known(task):
    for split in SPLITS:
        assert all(map(torch.equal, task().sample(split, 20)[:2], task(compat="mad").sample(split, 20)[:2]))


# ---- bad input

NOISE = "`vocab_size` must be at least noise_vocab_size + 4 = 20, got 19."
MOTIFS = "`k_motif_size` must leave fewer than 2^40 keys, got 7 tokens of 63."
COPIES = "`num_tokens_to_copy` must be at most (seq_len - 1) / 2 = 15, to be shown and copied, got 16."
BAD = [  # task, options, error, text
    (InContextRecall, {"vocab_size": 3}, ValueError, "`vocab_size` must be at least 4, got 3."),
    (InContextRecall, {"vocab_size": 16.0}, TypeError, "`vocab_size` must be an int, got 16.0."),
    (InContextRecall, {"vocab_size": True}, TypeError, "`vocab_size` must be an int, got True."),
    (InContextRecall, {"seq_len": 127}, ValueError, "`seq_len` must be even, for pairs, got 127."),
    (InContextRecall, {"seq_len": 2}, ValueError, "`seq_len` must be at least 4, got 2."),
    (InContextRecall, {"compat": "MAD"}, ValueError, "`compat` must be one of ['mad', 'none'], got 'MAD'."),
    (InContextRecall, {"compat": None}, ValueError, "`compat` must be one of ['mad', 'none'], got None."),
    (NoisyInContextRecall, {"vocab_size": 19}, ValueError, NOISE),
    (NoisyInContextRecall, {"noise_vocab_size": 0}, ValueError, "`noise_vocab_size` must be at least 1, got 0."),
    (NoisyInContextRecall, {"noise_vocab_size": "16"}, TypeError, "`noise_vocab_size` must be an int, got '16'."),
    (NoisyInContextRecall, {"frac_noise": 1.0}, ValueError, "`frac_noise` must be in [0, 1), got 1.0."),
    (NoisyInContextRecall, {"frac_noise": -0.1}, ValueError, "`frac_noise` must be in [0, 1), got -0.1."),
    (NoisyInContextRecall, {"frac_noise": float("nan")}, ValueError, "`frac_noise` must be in [0, 1), got nan."),
    (NoisyInContextRecall, {"frac_noise": "0.2"}, TypeError, "`frac_noise` must be a number, got '0.2'."),
    (NoisyInContextRecall, {"frac_noise": True}, TypeError, "`frac_noise` must be a number, got True."),
    (NoisyInContextRecall, {"seq_len": 9}, ValueError, "`seq_len` must be even, for pairs, got 9."),
    (FuzzyInContextRecall, {"vocab_size": 6}, ValueError, "`vocab_size` must be at least 7, got 6."),
    (FuzzyInContextRecall, {"k_motif_size": 8}, ValueError, "`vocab_size` must be at least 17, got 16."),
    (FuzzyInContextRecall, {"v_motif_size": 9}, ValueError, "`vocab_size` must be at least 18, got 16."),
    (FuzzyInContextRecall, {"seq_len": 10}, ValueError, "`seq_len` must be at least 11, got 10."),
    (FuzzyInContextRecall, {"k_motif_size": 0}, ValueError, "`k_motif_size` must be at least 1, got 0."),
    (FuzzyInContextRecall, {"v_motif_size": 1.5}, TypeError, "`v_motif_size` must be an int, got 1.5."),
    (FuzzyInContextRecall, {"vocab_size": 128, "k_motif_size": 7}, ValueError, MOTIFS),
    (FuzzyInContextRecall, {"compat": "yes"}, ValueError, "`compat` must be one of ['mad', 'none'], got 'yes'."),
    (Memorization, {"vocab_size": 4}, ValueError, "`vocab_size` must be at least 5, got 4."),
    (Memorization, {"seq_len": 2}, ValueError, "`seq_len` must be at least 4, got 2."),
    (Memorization, {"seq_len": 33}, ValueError, "`seq_len` must be even, for pairs, got 33."),
    (Memorization, {"map_seed": -1}, ValueError, "`map_seed` must be at least 0, got -1."),
    (Memorization, {"compat": True}, ValueError, "`compat` must be one of ['mad', 'none'], got True."),
    (SelectiveCopying, {"vocab_size": 3}, ValueError, "`vocab_size` must be at least 4, got 3."),
    (SelectiveCopying, {"seq_len": 2}, ValueError, "`seq_len` must be at least 3, got 2."),
    (SelectiveCopying, {"num_tokens_to_copy": 0}, ValueError, "`num_tokens_to_copy` must be at least 1, got 0."),
    (SelectiveCopying, {"seq_len": 32}, ValueError, COPIES),
    (SelectiveCopying, {"compat": ""}, ValueError, "`compat` must be one of ['mad', 'none'], got ''."),
    (Compression, {"vocab_size": 2}, ValueError, "`vocab_size` must be at least 3, got 2."),
    (Compression, {"seq_len": 1}, ValueError, "`seq_len` must be at least 2, got 1."),
    (Compression, {"seq_len": None}, TypeError, "`seq_len` must be an int, got None."),
    (Compression, {"compat": ["mad"]}, ValueError, "`compat` must be one of ['mad', 'none'], got ['mad']."),
]


@pytest.mark.parametrize(("task", "options", "error", "text"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(task, options, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'{task.name}: {text}')}$"):
        task(**options)


def test_the_least_that_is_allowed_works():
    for task in (
        InContextRecall(vocab_size=4, seq_len=8),
        NoisyInContextRecall(vocab_size=5, seq_len=8, noise_vocab_size=1, frac_noise=0),
        FuzzyInContextRecall(vocab_size=7, seq_len=11),
        FuzzyInContextRecall(vocab_size=17, seq_len=21, k_motif_size=8),
        FuzzyInContextRecall(vocab_size=64, seq_len=30, k_motif_size=7),
        Memorization(vocab_size=5, seq_len=12),
        SelectiveCopying(vocab_size=4, seq_len=13, num_tokens_to_copy=6),
        Compression(vocab_size=3, seq_len=8),
    ):
        for split in SPLITS:
            tokens, targets, _ = task.sample(split, 200)
            assert torch.equal(naive_targets(tokens, task), targets)


def test_a_memory_task_without_enough_sequences_says_so(monkeypatch):
    task = Memorization(vocab_size=5, seq_len=4)  # two keys, four sequences
    bucket = next(b for b in range(8) if not any(int(h) % 8 == b for h in sequence_hash(all_rows(task))))
    text = "sample: no sequence of length 4 belongs to split 'train': the task has too few sequences. "
    monkeypatch.setitem(SPLITS, "train", (bucket,))
    for compat in ("none", "mad"):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            Memorization(vocab_size=5, seq_len=4, compat=compat).sample("train", 9)


def all_rows(task) -> np.ndarray:
    """Every sequence of a memorization task."""
    keys = itertools.product(range(task.num_keys), repeat=task.seq_len // 2)
    return np.array([[x for key in row for x in (key, task.insert)] for row in keys])


def test_memorization_serves_a_batch_of_one_sequence_of_two_keys():
    """Both orders of two keys may belong to other splits: then two other keys are drawn."""
    task = Memorization(seq_len=4)
    for index in range(50):
        assert task.sample("train", 1, index=index).tokens.shape == (1, 4)
