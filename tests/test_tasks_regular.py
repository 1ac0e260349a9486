"""The regular languages: targets by a second, naive implementation; lengths, padding, and bad input."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import assert_solved, chi_square, is_word

from statemix.tasks import (
    IGNORE_INDEX,
    PRESETS,
    SPLITS,
    CycleNavigation,
    EvenPairs,
    ModularArithmetic,
    ModularArithmeticSimple,
    ModularCounting,
    Parity,
    build_task,
    settings,
)

X = IGNORE_INDEX
COUNTERS = [Parity, ModularCounting, CycleNavigation, EvenPairs]
REGULAR = [*COUNTERS, ModularArithmeticSimple]
LANGUAGES = [*REGULAR, ModularArithmetic]
MODULAR = [ModularCounting, ModularArithmetic, ModularArithmeticSimple]
each_language = pytest.mark.parametrize("language", LANGUAGES)
each_split = pytest.mark.parametrize("split", SPLITS)

# ---- naive solutions: a row of tokens without its padding -> its targets


def naive_arithmetic(row: list[int], task) -> list[int]:
    """By Python's own rules."""
    characters = [str(i) for i in range(task.modulus)] + list("+-*()=")
    text = "".join(characters[token] for token in row)
    assert text.count("=") == 1
    assert text.endswith("=")
    return [X] * (len(row) - 1) + [eval(text[:-1]) % task.modulus]


def naive_simple_arithmetic(row: list[int], task) -> list[int]:
    """By Python's own rules, of every beginning that ends in a digit."""
    text = "".join([*map(str, range(task.modulus)), *"+-*"][token] for token in row)
    assert re.fullmatch(r"\d([-+*]\d)*", text)
    return [eval(text[: t + 1]) % task.modulus if t % 2 == 0 else X for t in range(len(row))]


NAIVE = {
    "parity": lambda row, task: [ones % 2 for ones in itertools.accumulate(row)],
    "modular-counting": lambda row, task: [total % task.modulus for total in itertools.accumulate(row)],
    "cycle-navigation": lambda row, task: [
        place % task.cycle_length for place in itertools.accumulate({0: -1, 1: 0, 2: 1}[token] for token in row)
    ],
    "modular-arithmetic": naive_arithmetic,
    "modular-arithmetic-simple": naive_simple_arithmetic,
    # by the words themselves: how often 01 and 10 stand in them
    "even-pairs": lambda row, task: [
        sum("".join(map(str, row[: t + 1])).count(pair) for pair in ("01", "10")) % 2 for t in range(len(row))
    ],
}


def unpadded(row: list[int], task) -> list[int]:
    """The row without the padding, which may stand at its end only."""
    size = row.index(task.vocab_size - 1) if task.vocab_size - 1 in row else len(row)
    assert set(row[size:]) <= {task.vocab_size - 1}
    return row[:size]


def naive_targets(tokens, task) -> torch.Tensor:
    targets = []
    for row in tokens.tolist():
        answers = NAIVE[task.name](unpadded(row, task), task)
        targets.append(answers + [X] * (len(row) - len(answers)))
    return torch.from_numpy(np.array(targets))


@pytest.mark.parametrize("name", PRESETS["formal"])
def test_a_naive_solution_scores_1_on_10000_sequences(name):
    setting = settings("formal", name)[0]
    task = build_task(setting.task)
    assert task.length == 40
    assert_solved(task, naive_targets, seed=5)
    for length in setting.test_lengths:
        longer = task.with_seq_len(length)
        tokens, targets, _ = longer.sample("test", 30)
        assert tokens.shape == (30, length)
        assert torch.equal(naive_targets(tokens, longer), targets)


_ = X
HANDMADE = [  # task, tokens, targets
    (Parity(seq_len=5), [1, 1, 1, 0, 1], [1, 0, 1, 1, 0]),
    (Parity(seq_len=5, scored="last"), [1, 1, 1, 0, 1], [_, _, _, _, 0]),
    (Parity(seq_len=5, scored="last"), [1, 0, 0, 2, 2], [_, _, 1, _, _]),
    (ModularCounting(seq_len=5, modulus=4), [3, 3, 3, 4, 4], [3, 2, 1, _, _]),
    (ModularCounting(seq_len=3, modulus=7, scored="last"), [6, 6, 6], [_, _, 4]),
    (CycleNavigation(seq_len=6, cycle_length=3), [0, 0, 0, 1, 2, 3], [2, 1, 0, 0, 1, _]),
    (CycleNavigation(seq_len=4, cycle_length=2), [2, 2, 1, 3], [1, 0, 0, _]),
    (EvenPairs(seq_len=6), [0, 1, 1, 0, 1, 2], [0, 1, 1, 0, 1, _]),
    (EvenPairs(seq_len=4, scored="last"), [1, 0, 0, 2], [_, _, 1, _]),
    (EvenPairs(seq_len=3, start=True), [3, 1, 0, 2], [_, 0, 1, _]),
    (Parity(seq_len=3, start=True, scored="last"), [3, 1, 0, 1], [_, _, _, 0]),
    (ModularArithmeticSimple(seq_len=7), [2, 7, 3, 6, 4, 7, 2], [2, _, 1, _, 2, _, 3]),  # 2*3-4*2 = -2
    (ModularArithmeticSimple(seq_len=5, scored="last"), [4, 5, 4, 8, 8], [_, _, 3, _, _]),
    (ModularArithmeticSimple(seq_len=5, modulus=3, start=True), [7, 2, 5, 2, 4, 2], [_, 2, _, 1, _, 2]),  # 2*2-2
    (ModularArithmetic(seq_len=4, start=True), [12, 6, 3, 10, 11], [_, _, _, 2, _]),
    (ModularArithmetic(seq_len=4), [6, 3, 10, 11], [_, _, 2, _]),  # -3
    (ModularArithmetic(seq_len=8), [8, 2, 6, 6, 4, 9, 10, 11], [_, _, _, _, _, _, 1, _]),  # (2--4) = 6
    (ModularArithmetic(seq_len=6), [8, 6, 3, 9, 10, 11], [_, _, _, _, 2, _]),  # (-3)
    # (2-(3*(-4))) = 14
    (ModularArithmetic(seq_len=13), [8, 2, 6, 8, 3, 7, 8, 6, 4, 9, 9, 9, 10], [_] * 12 + [4]),
    # ((4-3)-(1+1)) = -1
    (ModularArithmetic(seq_len=15), [8, 8, 4, 6, 3, 9, 6, 8, 1, 5, 1, 9, 9, 10, 11], [_] * 13 + [4, _]),
]


@pytest.mark.parametrize(("task", "tokens", "targets"), HANDMADE, ids=lambda v: getattr(v, "name", None))
def test_targets_of_handmade_sequences(task, tokens, targets):
    assert task.oracle(np.array([tokens])).tolist() == [targets]
    # rows have nothing to do with each other
    both = np.array([tokens, task.sample("train", 1).tokens[0].tolist(), tokens])
    assert task.oracle(both)[[0, 2]].tolist() == [targets, targets]


@pytest.mark.parametrize("language", REGULAR)
def test_the_last_position_alone(language):
    tokens, targets, _ = language(seq_len=9).sample("test", 500)
    same, last, _ = language(seq_len=9, scored="last").sample("test", 500)
    assert torch.equal(tokens, same)
    assert ((last != X).sum(1) == 1).all()
    for row, all_targets, last_targets in zip(tokens.tolist(), targets.tolist(), last.tolist(), strict=True):
        end = len(unpadded(row, language(seq_len=9))) - 1
        assert last_targets[end] == all_targets[end] != X


@each_language
def test_a_start_token_goes_before_every_word(language):
    task, bare = language(seq_len=9, start=True), language(seq_len=9)
    tokens, targets, _ = task.sample("valid", 300)
    assert task.vocab_size == bare.vocab_size + 1
    assert (task.pad, task.length) == (bare.pad, 10)
    assert (tokens[:, 0] == task.vocab_size - 1).all()
    assert (tokens[:, 1:] < task.vocab_size - 1).all()
    assert (targets[:, 0] == X).all()
    assert torch.equal(naive_targets(tokens[:, 1:], bare), targets[:, 1:])


@each_language
def test_a_range_of_lengths(language):
    task = language(start=True).with_lengths(5, 8)
    assert (task.min_len, task.seq_len, task.start) == (5, 8, True)
    sizes = {len(unpadded(row, language())) for row in task.sample("test", 200).tokens[:, 1:].tolist()}
    assert sizes == ({5, 7} if language is ModularArithmeticSimple else {5, 6, 7, 8})
    with pytest.raises(ValueError, match=r"`min_len` must be at most seq_len = 4, got 5\."):
        task.with_lengths(5, 4)


# ---- automata, whose answers test_automata.py compares


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("language", REGULAR)
def test_the_words_of_the_automaton_are_those_of_the_task(language, start):
    # of three symbols: all words that the automaton lets through, against all that are ever drawn
    task = language(seq_len=3, min_len=1, start=start)
    automaton, words = task.automaton(), {()}
    for _ in range(3 + start):
        longer = {(*word, token) for word in words for token in range(task.vocab_size)}
        words = {word for word in longer if len(word) == 1 or word[:-1] in words}
        words = {word for word in words if is_word(automaton, word)}
    drawn = task.generate(np.random.default_rng(0), 20_000, "train").tolist()
    assert words == {tuple(row) for row in drawn if task.pad not in row}


@each_language
@each_split
def test_lengths_are_uniform_and_inputs_too(language, split):
    task = language(seq_len=30, min_len=16)
    tokens = task.sample(split, 10_000, seed=3).tokens.numpy()
    real = tokens != task.pad
    lengths = real.sum(1)
    assert (real == (np.arange(30) < lengths[:, None])).all()
    if language is ModularArithmeticSimple:  # 8 to 15 digits
        assert chi_square(np.bincount(lengths, minlength=31)[15::2]) < 8
        assert chi_square(np.bincount(tokens[real], minlength=9)[5:8]) < 8
    else:
        assert chi_square(np.bincount(lengths - 16, minlength=15)) < 8
    inputs = range(task.num_inputs) if language in COUNTERS else range(5)
    counts = np.bincount(tokens[real], minlength=task.vocab_size)
    assert chi_square(counts[inputs]) < 8
    if language is ModularArithmetic:
        assert (counts[:-1] > 0).all()
        at_end = tokens[np.arange(10_000), lengths - 1]
        assert (at_end == task.symbol("=")).all()
    elif language in COUNTERS:
        assert counts.sum() == counts[inputs].sum()


def test_operators_and_splits_of_expressions_are_uniform():
    task = ModularArithmetic(seq_len=12, min_len=12, modulus=3)  # 11 tokens: "(", x, operator, y, ")", |x| in 1..7
    tokens = task.generate(np.random.default_rng(0), 20_000, "train")  # of all splits: some expressions are few
    operators = [task.symbol(c) for c in "+-*"]
    places, kinds = [], []
    for row in tokens.tolist():
        depth = 0
        for t, token in enumerate(row):
            depth += (token == task.symbol("(")) - (token == task.symbol(")"))
            # the operator of the outer brackets stands behind an operand, where a sign does not
            if depth == 1 and token in operators and (row[t - 1] < 3 or row[t - 1] == task.symbol(")")):
                places.append(t)
                kinds.append(operators.index(token))
    assert len(places) == 20_000
    assert chi_square(np.bincount(places)[2:9]) < 8
    assert set(places) == set(range(2, 9))
    assert chi_square(np.bincount(kinds)) < 8


def test_without_multiplication():
    task = ModularArithmetic(multiplication=False)
    assert task.vocab_size == ModularArithmetic().vocab_size
    assert not (task.sample("train", 500).tokens == task.symbol("*")).any()
    assert (ModularArithmetic().sample("train", 500).tokens == task.symbol("*")).any()


@each_language
def test_a_test_length_is_exact(language):
    task = language().with_seq_len(64)
    assert (task.seq_len, task.min_len, task.length) == (64, 64, 64)
    padding = (task.sample("test", 100).tokens == task.pad).sum(1)
    assert (padding == (language is ModularArithmeticSimple)).all()  # whose words have odd lengths
    assert language(seq_len=20).with_seq_len(20).min_len == 20


@each_language
def test_a_sequence_is_in_one_split_whatever_it_is_padded_to(language):
    long, short = language(seq_len=9), language(seq_len=7, min_len=7)
    train = {tuple(unpadded(row, long)) for row in long.sample("train", 6000).tokens.tolist()}
    test = {tuple(row) for row in short.sample("test", 3000).tokens.tolist()}
    assert {len(row) for row in train} == set(range(3, 10, 2 if language is ModularArithmeticSimple else 1))
    assert test.isdisjoint(train)
    seen_in_training = {tuple(row) for row in short.sample("train", 3000).tokens.tolist()} & train
    assert len(seen_in_training) > 10  # so they could have met


# ---- bad input

BAD = [  # languages, options, error, text
    (LANGUAGES, {"seq_len": 0}, ValueError, "`seq_len` must be at least 1, got 0."),
    (LANGUAGES, {"seq_len": 40.0}, TypeError, "`seq_len` must be an int, got 40.0."),
    (LANGUAGES, {"seq_len": True}, TypeError, "`seq_len` must be an int, got True."),
    (LANGUAGES, {"min_len": 0}, ValueError, "`min_len` must be at least 1, got 0."),
    (LANGUAGES, {"min_len": "3"}, TypeError, "`min_len` must be an int, got '3'."),
    (LANGUAGES, {"seq_len": 8, "min_len": 9}, ValueError, "`min_len` must be at most seq_len = 8, got 9."),
    (LANGUAGES, {"min_len": None}, TypeError, "`min_len` must be an int, got None."),
    (LANGUAGES, {"start": 1}, TypeError, "`start` must be True or False, got 1."),
    (REGULAR, {"scored": "end"}, ValueError, "`scored` must be one of ['every', 'last'], got 'end'."),
    (REGULAR, {"scored": None}, ValueError, "`scored` must be one of ['every', 'last'], got None."),
    (MODULAR, {"modulus": 1}, ValueError, "`modulus` must be at least 2, got 1."),
    (MODULAR, {"modulus": 5.0}, TypeError, "`modulus` must be an int, got 5.0."),
    ([CycleNavigation], {"cycle_length": 1}, ValueError, "`cycle_length` must be at least 2, got 1."),
    ([CycleNavigation], {"cycle_length": False}, TypeError, "`cycle_length` must be an int, got False."),
    ([ModularArithmetic], {"min_len": 1}, ValueError, "`min_len` must be at least 2, got 1."),
    ([ModularArithmetic], {"multiplication": 1}, TypeError, "`multiplication` must be a bool, got 1."),
]


@pytest.mark.parametrize(
    ("language", "options", "error", "text"),
    [(language, *rest) for languages, *rest in BAD for language in languages],
    ids=lambda v: str(v)[:40],
)
def test_bad_options(language, options, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'{language.name}: {text}')}$"):
        language(**options)
