"""Permutation composition: the groups, the targets, the streams and their splits, and bad input."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import chi_square, elements

from statemix.analysis import NONE
from statemix.tasks import SPLITS, PermutationComposition, build_task
from statemix.tasks.base import sequence_hash
from statemix.tasks.permutation import group_table

GROUPS = {"S1": 1, "S2": 2, "S3": 6, "S4": 24, "A1": 1, "A2": 1, "A3": 3, "A4": 12, "A5": 60, "Z1": 1, "Z2": 2}
GROUPS |= {"Z7": 7, "Z60": 60, "A4xZ5": 60, "S3xS3": 36, "Z2xS3xZ3": 36}
each_group = pytest.mark.parametrize("group", GROUPS)
each_split = pytest.mark.parametrize("split", SPLITS)

# ---- groups


@each_group
def test_group_axioms(group):
    table, n = group_table(group).astype(int), GROUPS[group]
    assert table.shape == (n, n)
    assert PermutationComposition(group).vocab_size == n
    everything = np.arange(n)
    assert (table[0] == everything).all()  # 0 is the identity
    assert (table[:, 0] == everything).all()
    assert (np.sort(table, axis=0) == everything[:, None]).all()  # a Latin square
    assert (np.sort(table, axis=1) == everything).all()
    inverse = table.argmin(axis=1)
    assert (table[everything, inverse] == 0).all()
    assert (table[inverse, everything] == 0).all()
    a, b, c = np.ogrid[:n, :n, :n]
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def compose(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """a o b: first b, then a."""
    return tuple(a[i] for i in b)


@pytest.mark.parametrize("group", ["S1", "S2", "S3", "S4", "S5", "A1", "A2", "A3", "A4", "A5"])
def test_permutation_groups_compose_permutations_in_lexicographic_order(group):
    permutations = elements(group)
    number = {p: i for i, p in enumerate(permutations)}
    expected = [[number[compose(a, b)] for b in permutations] for a in permutations]
    assert group_table(group).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_cyclic_groups_add(n):
    assert group_table(f"Z{n}").tolist() == [[(a + b) % n for b in range(n)] for a in range(n)]


@pytest.mark.parametrize(("group", "first", "second"), [("A4xZ5", "A4", "Z5"), ("S3xS3", "S3", "S3")])
def test_products_are_taken_by_component(group, first, second):
    table, left, right = (group_table(g).astype(int) for g in (group, first, second))
    size = len(right)
    for a, b in itertools.product(range(len(table)), repeat=2):
        assert table[a, b] == left[a // size, b // size] * size + right[a % size, b % size]


def test_the_largest_groups():
    PermutationComposition("S7")
    assert PermutationComposition("Z5040").vocab_size == 5040
    permutations, table = elements("S6"), group_table("S6")
    for a, b in ((123, 543), (543, 123), (719, 1), (360, 360)):
        assert permutations[table[a, b]] == compose(permutations[a], permutations[b])


# ---- targets


def slow_targets(group: str, tokens: np.ndarray) -> list[list[int]]:
    """x_1 o ... o x_t by products of permutations, or sums, from the definition."""
    if group[0] == "Z":
        return [[sum(row[: t + 1]) % int(group[1:]) for t in range(len(row))] for row in tokens.tolist()]
    permutations = elements(group)
    targets = []
    for row in tokens.tolist():
        state, targets_of_row = permutations[0], []
        for token in row:
            state = compose(state, permutations[token])
            targets_of_row.append(permutations.index(state))
        targets.append(targets_of_row)
    return targets


@each_split
@pytest.mark.parametrize("group", ["S3", "S4", "S5", "A4", "A5", "Z2", "Z7"])
def test_targets_equal_a_slow_loop(group, split):
    task = PermutationComposition(group, seq_len=23)
    tokens, targets, _ = task.sample(split, 20, seed=3)
    assert tokens.shape == targets.shape == (20, 23)
    assert tokens.dtype == targets.dtype == torch.int64
    assert targets.tolist() == slow_targets(group, tokens.numpy())


def test_the_example_of_the_docstring():
    text = PermutationComposition.__doc__
    named = {int(number): name for number, name in re.findall(r"(\d) = (\d{3})\b", text)}
    assert named == {i: "".join(map(str, p)) for i, p in enumerate(elements("S3"))}
    rows = dict(re.findall(r"^\s*(tokens|targets) +((?:\d +)*\d)\b", text, flags=re.MULTILINE))
    tokens, targets = ([int(token) for token in rows[key].split()][:5] for key in ("tokens", "targets"))
    task = PermutationComposition("S3", seq_len=len(tokens))
    assert task.oracle(np.array([tokens])).tolist() == [targets]
    products = [tuple(map(int, p)) for p in re.findall(r"(\d) o (\d) = (\d)", text)]
    assert products == list(zip(targets, tokens[1:], targets[1:], strict=False))


# ---- streams


def test_a_longer_sequence_or_another_group_is_another_stream():
    tokens = PermutationComposition("S3", 9).sample("train", 50).tokens
    other = PermutationComposition("S3", 10).sample("train", 50).tokens
    assert not torch.equal(tokens, other[:, :9])
    # a batch is not a part of a larger one, but every sequence of it belongs to the split all the same
    assert len(PermutationComposition("S3", 9).sample("train", 1).tokens) == 1


# ---- splits


def drawn(split: str, seeds: range) -> set[tuple[int, ...]]:
    """Sequences of Z2 with 10 tokens: there are 1024, so that all can be seen."""
    task = PermutationComposition("Z2", 10)
    batches = [task.sample(split, 2000, seed=seed, index=index).tokens for seed in seeds for index in range(2)]
    return set(map(tuple, torch.cat(batches).tolist()))


def test_splits_are_disjoint_and_together_everything():
    sets = {split: drawn(split, range(10 * i, 10 * i + 6)) for i, split in enumerate(SPLITS)}
    assert [(a, b) for a, b in itertools.combinations(sets, 2) if sets[a] & sets[b]] == []
    assert set().union(*sets.values()) == set(itertools.product((0, 1), repeat=10))
    shares = {split: len(found) / 1024 for split, found in sets.items()}
    assert shares == pytest.approx({"train": 6 / 8, "valid": 1 / 8, "test": 1 / 8}, abs=0.03)
    # other seeds reach the same sequences
    assert drawn("valid", range(100, 103)) == sets["valid"]


@each_split
def test_every_split_is_uniform(split):
    tokens, targets = (x.numpy() for x in PermutationComposition("S3", 16).sample(split, 20_000, seed=1)[:2])
    for values in (tokens, targets):
        assert chi_square(np.bincount(values.ravel(), minlength=6)) < 8
        for t in range(16):  # every position, and every neighbouring pair
            assert chi_square(np.bincount(values[:, t], minlength=6)) < 8
            assert chi_square(np.bincount(values[:, t] * 6 + values[:, t - 1], minlength=36)) < 8
    biased = np.where(tokens[:, 0] == 5, tokens[:, 1], tokens[:, 0])
    assert chi_square(np.bincount(biased, minlength=6)) > 50


TOO_SMALL = [  # group, inputs, every sequence there is
    ("Z2", "all", [[0], [1]]),
    ("Z1", "all", [[0] * 8]),
    ("S1", "all", [[0] * 50]),
    ("S2", "transpositions", [[1] * 8]),
]


@pytest.mark.parametrize(("group", "generators", "sequences"), TOO_SMALL)
def test_a_split_without_a_sequence_is_an_error(group, generators, sequences):
    task = PermutationComposition(group, len(sequences[0]), generators)
    owner = [int(code) % 8 for code in sequence_hash(np.array(sequences))]
    for split, buckets in SPLITS.items():
        wanted = [sequence for sequence, bucket in zip(sequences, owner, strict=True) if bucket in buckets]
        if wanted:
            assert {tuple(row) for row in task.sample(split, 40).tokens.tolist()} == set(map(tuple, wanted))
        else:
            text = f"sample: no sequence of length {task.seq_len} belongs to split '{split}': the task has too few "
            text += "sequences. Ask for longer ones or a larger vocabulary."
            with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                task.sample(split, 4)


@pytest.mark.parametrize(("group", "count"), [("S3", 3), ("S4", 6), ("S5", 10)])
def test_transpositions(group, count):
    task = PermutationComposition(group, 20, generators="transpositions")
    swaps = [i for i, p in enumerate(elements(group)) if sum(a != b for a, b in enumerate(p)) == 2]
    assert len(swaps) == count
    tokens, targets, _ = task.sample("train", 2000)
    assert sorted(set(tokens.flatten().tolist())) == swaps
    assert chi_square(np.bincount(tokens.flatten(), minlength=task.vocab_size)[swaps]) < 8
    assert targets.tolist()[:5] == slow_targets(group, tokens[:5].numpy())
    assert set(targets[:, -2:].flatten().tolist()) == set(range(task.vocab_size))  # they generate the group
    assert task.vocab_size == len(elements(group))


@pytest.mark.parametrize(("group", "count"), [("S5", 32), ("A5", 12), ("S3", 2), ("Z7", 7)])
def test_some_elements_alone(group, count):
    task = PermutationComposition(group, 12, count, start=True, min_len=1, scored="last", generators_seed=3)
    tokens, targets, _ = task.sample("train", 3000)
    size = len(group_table(group))
    assert task.vocab_size == size + 2
    inputs = sorted(set(tokens.flatten().tolist()) - {task.pad, size + 1})
    assert len(inputs) == count
    assert inputs[-1] < size
    for row, answers in zip(tokens.tolist()[:300], targets.tolist(), strict=False):
        word = [token for token in row[1:] if token != task.pad]
        assert row == [size + 1, *word, *[size] * (12 - len(word))]
        [product] = [slow_targets(group, np.array([word]))[0][-1]]
        assert answers == [-100] * len(word) + [product] + [-100] * (12 - len(word))
    assert {12 - row.count(size) for row in tokens.tolist()} == set(range(1, 13))
    again = PermutationComposition(group, 12, count, start=True, min_len=1, generators_seed=3).sample("train", 3000)
    assert torch.equal(tokens, again.tokens)


def test_the_elements_are_drawn_by_their_seed():
    drawn = {
        tuple(PermutationComposition("S5", generators=8, generators_seed=seed).automaton().transitions[0])
        for seed in range(20)
    }
    assert len(drawn) == 20
    counts = np.zeros(6)
    for seed in range(3000):
        counts += PermutationComposition("S3", generators=2, generators_seed=seed).automaton().transitions[0] != NONE
    assert chi_square(counts) < 8


def test_lengths_of_permutations():
    task = PermutationComposition("S3", 8, min_len=2)
    assert (task.vocab_size, task.pad) == (7, 6)
    assert (task.with_seq_len(5).min_len, task.with_seq_len(5).vocab_size) == (5, 7)
    ranged = task.with_lengths(3, 4)
    assert {(row != 6).sum().item() for row in ranged.sample("test", 50).tokens} == {3, 4}
    assert PermutationComposition("S3").with_seq_len(5).vocab_size == 6
    text = r"^permutation: `min_len` must be set for words of many lengths, which it pads\.$"
    with pytest.raises(ValueError, match=text):
        PermutationComposition("S3").with_lengths(2, 3)


@pytest.mark.parametrize("start", [False, True])
def test_the_automaton_of_a_group(start):
    task = PermutationComposition("S4", 9, "transpositions", start=start)
    automaton = task.automaton()
    tokens, targets, _ = task.sample("train", 200)
    said = automaton.run(tokens.numpy())
    assert (np.where(said == NONE, -100, said) == targets.numpy()).all()
    swaps = sorted(set(tokens.flatten().tolist()) - {24})
    assert len(swaps) == 6
    assert np.flatnonzero(automaton.transitions[0] != NONE).tolist() == swaps
    before = [24] if start else swaps
    assert np.flatnonzero(automaton.transitions[automaton.start] != NONE).tolist() == before


# ---- bad input

FORM = "permutation: `group` must be S<n>, A<n>, Z<n> or a product such as A4xZ5, got "
SIZE = "permutation: `group` must have at most 5040 elements, got "
SWAPS = "permutation: generators='transpositions' needs a group S<n> with n >= 2, got "
BAD_GROUPS = ["S0", "S", "X3", "S3x", "3", "", "s3", "S3xX2", "S3 x S3", "xS3", "S3xxS3", "S03", "S-3", "S3.0", "S3\n"]
FROM = "permutation: `generators` must be one of ['all', 'transpositions'] or a number of elements, got "
TRANSPOSITIONS = {"generators": "transpositions"}
LENGTH = "permutation: `seq_len` must be "
BAD_TASKS = [
    *(({"group": v}, ValueError, f"{FORM}{v!r}.") for v in [*BAD_GROUPS, 3, None, ["S3"], ("S", 3)]),
    *(({"group": v}, ValueError, f"{SIZE}{v!r}.") for v in ["S8", "S9", "A8", "Z5041", "S100000", "S5xS5"]),
    *(({"seq_len": v}, ValueError, f"{LENGTH}at least 1, got {v}.") for v in (0, -4)),
    *(({"seq_len": v}, TypeError, f"{LENGTH}an int, got {v!r}.") for v in (1.5, 16.0, True, "16", None)),
    *(({"generators": v}, ValueError, f"{FROM}{v!r}.") for v in ("swaps", "", None, ["all"], True, 2.0)),
    ({"generators": 0}, ValueError, "permutation: `generators` must be in [1, 6], as S3 has, got 0."),
    ({"group": "A5", "generators": 61}, ValueError, "permutation: `generators` must be in [1, 60], as A5 has, got 61."),
    ({"generators_seed": -1}, ValueError, "permutation: `generators_seed` must be at least 0, got -1."),
    ({"scored": "end"}, ValueError, "permutation: `scored` must be one of ['every', 'last'], got 'end'."),
    ({"min_len": 0}, ValueError, "permutation: `min_len` must be at least 1, got 0."),
    ({"min_len": 17}, ValueError, "permutation: `min_len` must be at most seq_len = 16, got 17."),
    ({"min_len": 2.0}, TypeError, "permutation: `min_len` must be an int, got 2.0."),
    *(({"group": v} | TRANSPOSITIONS, ValueError, f"{SWAPS}{v!r}.") for v in ("A4", "Z3", "S1", "S3xZ2")),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_TASKS, ids=lambda v: str(v)[:50])
def test_bad_tasks(options, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        PermutationComposition(**options)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        build_task({"name": "permutation", **options})
