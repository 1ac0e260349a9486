"""The curriculum: packing, growing lengths, wrong words again, its end; tests over ranges, and with sharpened gates."""

import dataclasses
import itertools
import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from run_helpers import (
    DAMAGED_TENSORS,
    LSTM,
    TRAIN,
    WIDE,
    assert_same_files,
    each_kind_of_rows,
    edit_json,
    refused,
    run,
    run_in_parts,
    seal,
    small_config,
    stopped,
)

from statemix import SequenceModel, TrainConfig, records
from statemix.search import Verdict, WrongWord, explore
from statemix.tasks import IGNORE_INDEX, Batch, build_task
from statemix.tasks.base import Task, in_split
from statemix.training.config import CurriculumConfig, ModelConfig, OptimizerConfig
from statemix.training.curriculum import STATE, Curriculum, Word
from statemix.training.evaluate import evaluate
from statemix.training.pruning import (
    Piece,
    heard_blocks,
    least_needed,
    one_hot_copy,
    prune,
    restore,
    silence,
    without_silent_blocks,
)
from statemix.training.pruning import snapshot as weights_and_moments
from statemix.training.regularization import Strengths, one_hot_gates, regularized, strengths
from statemix.verify import verify

X = IGNORE_INDEX
WORDS = {"name": "permutation", "group": "S3", "seq_len": 9, "min_len": 2, "start": True, "scored": "last"}
PAD, START = 6, 7


def curriculum(seed=0, task=WORDS, batch_size=4, **options) -> Curriculum:
    options = {"first": 3, "row": 20} | options
    config = small_config(task=task, batch_size=batch_size, seed=seed, curriculum=CurriculumConfig(**options))
    return Curriculum(config, build_task(config.task))


def saved(learner) -> dict:
    """Its state, as a checkpoint keeps it and as it is read where a run resumes."""
    state = json.loads(json.dumps(learner.state()))
    records.check(state, STATE)
    return state


def words_of(batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of every word, the last of each row maybe cut."""
    found = []
    for tokens, targets, reset in zip(*(part.tolist() for part in batch), strict=True):
        assert reset[0]
        begins = [t for t, is_begin in enumerate(reset) if is_begin]
        for begin, end in itertools.pairwise([*begins, len(tokens)]):
            found.append((tokens[begin:end], targets[begin:end]))
    return found


def answered(batch, wrong=()) -> torch.Tensor:
    """Predictions that are right but at the words of these tokens."""
    predictions = batch.targets.clone()
    for row, t in (batch.targets != X).nonzero().tolist():
        begin = max(i for i in range(t + 1) if batch.reset[row, i])
        if batch.tokens[row, begin : t + 1].tolist() in wrong:
            predictions[row, t] += 1
    return predictions


# ---- packing


@pytest.mark.parametrize("scored", ["every", "last"])
def test_rows_are_full_of_words_and_the_last_is_cut(scored):
    learner = curriculum(task=WORDS | {"scored": scored})
    task = learner.task.with_lengths(2, 3)
    seen = set()
    for step in range(20):
        batch = learner.batch(step)
        assert batch.tokens.shape == batch.targets.shape == batch.reset.shape == (4, 20)
        assert not (batch.tokens == PAD).any()
        assert torch.equal(batch.reset, batch.tokens == START)
        for tokens, targets in words_of(batch):
            padded = np.array([tokens + [PAD] * (4 - len(tokens))])
            if len(tokens) == 4 or (scored == "last" and targets[-1] != X):  # a word that was cut may be anyone's
                assert in_split(padded, "train", PAD).all()
                assert task.oracle(padded)[0, : len(tokens)].tolist() == targets
                seen.add(len(tokens))
    assert seen == ({3, 4} if scored == "last" else {4})


def test_a_cut_word_has_no_answer_at_its_cut():
    for step in range(20):
        batch = curriculum(row=21).batch(step)
        for tokens, targets in words_of(batch):
            assert len(tokens) <= 4
            assert targets[:-1] == [X] * (len(tokens) - 1)
    ends = [targets[-1] for step in range(20) for _, targets in words_of(curriculum(row=21).batch(step))]
    assert X in ends  # some are cut


def test_a_batch_is_a_function_of_seed_step_and_state():
    first = curriculum().batch(3)
    assert all(map(torch.equal, first, curriculum().batch(3)))
    others = [curriculum(seed=1).batch(3), curriculum().batch(4), curriculum(first=4).batch(3)]
    assert not any(torch.equal(first.tokens, other.tokens) for other in others)


# ---- lengths


def test_lengths_grow_where_answers_are_right():
    learner = curriculum(task=WORDS | {"seq_len": 40, "min_len": 1}, first=1, row=64, batch_size=2)
    lengths = [learner.longest]
    for step in range(400):
        batch = learner.batch(step)
        longest = max(len(tokens) - 1 for tokens, _ in words_of(batch))
        assert longest <= learner.longest
        learner.observe(batch.targets, batch.targets)
        lengths.append(learner.longest)
    stages = [(length, len(list(steps))) for length, steps in itertools.groupby(lengths)]
    assert [length for length, _ in stages] == [1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 40]
    # 1 - 0.9^n is above 0.95 from n = 29 on
    assert {steps for _, steps in stages[1:-1]} == {29}
    assert [task.seq_len for task in learner.tasks()] == [40]
    assert [task.seq_len for task in curriculum(first=3).tasks()] == [3, 4, 5, 7, 9]


def test_lengths_stay_where_answers_are_wrong():
    learner = curriculum()
    for step in range(60):
        batch = learner.batch(step)
        wrong = [tokens for tokens, _ in words_of(batch)][:3]
        learner.observe(answered(batch, wrong), batch.targets)
    assert learner.longest == 3
    assert not learner.wrong  # they are of no use before the last length
    scored = (batch.targets != X).sum()
    right = (answered(batch, wrong) == batch.targets)[batch.targets != X].sum()
    assert 0 < right < scored


@pytest.mark.parametrize(("accuracy", "longest"), [(0.95, 3), (0.951, 9)])
def test_a_validation_leads_to_the_last_length(accuracy, longest):
    learner = curriculum(first=3)
    learner.judge(accuracy)
    assert learner.longest == longest
    learner.observe(*[learner.batch(0).targets] * 2)
    assert learner.quiet == (longest == 9)


# ---- wrong words


def test_a_wrong_word_comes_again_until_it_was_right_often_enough():
    learner = curriculum(first=9, again=0.5, rights=3)
    batch = learner.batch(0)
    tokens, targets = words_of(batch)[0]
    learner.observe(answered(batch, [tokens]), batch.targets)
    assert [(list(word.tokens), list(word.targets)) for word in learner.wrong] == [(tokens, targets)]
    again = words_of(learner.batch(1))
    assert again.count((tokens, targets)) > 1
    rights, step = 0, 1
    while learner.wrong:
        batch = learner.batch(step)
        rights += words_of(batch).count((tokens, targets))
        learner.observe(batch.targets, batch.targets)
        step += 1
    assert 4 <= rights < 20
    assert step < 20


def test_the_share_of_words_that_come_again():
    learner = curriculum(first=9, again=0.25, batch_size=64, row=100)
    batch = learner.batch(0)
    wrong = [tokens for tokens, _ in words_of(batch)][:5]
    learner.observe(answered(batch, wrong), batch.targets)
    assert len(learner.wrong) == 5
    words = [tokens for tokens, targets in words_of(learner.batch(1)) if targets[-1] != X]
    assert sum(tokens in wrong for tokens in words) / len(words) == pytest.approx(0.25, abs=0.05)


def test_the_oldest_wrong_words_give_way():
    learner = curriculum(first=9, kept=3)
    batch = learner.batch(0)
    wrong = [tokens for tokens, targets in words_of(batch) if targets[-1] != X][:5]
    assert len({tuple(tokens) for tokens in wrong}) == 5
    learner.observe(answered(batch, wrong), batch.targets)
    assert [list(word.tokens) for word in learner.wrong] == wrong[2:]


# ---- the end


def test_it_ends_after_batches_without_an_error():
    learner = curriculum(first=9, quiet=4)
    for step, right in enumerate([True, True, True, False, True, True, True]):
        batch = learner.batch(step)
        wrong = [] if right else [words_of(batch)[0][0]]
        learner.observe(answered(batch, wrong), batch.targets)
        assert not learner.has_ended
    assert learner.figures() == {"longest": 9, "quiet": 3, "wrong_words": 1}
    batch = learner.batch(7)
    learner.observe(batch.targets, batch.targets)
    assert learner.has_ended
    assert not curriculum(first=9).has_ended


@pytest.mark.parametrize("scored", ["every", "last"])
def test_a_state_goes_through_json(scored):
    learner, other = (curriculum(first=8, task=WORDS | {"scored": scored}) for _ in range(2))
    for step in range(60):
        batch = learner.batch(step)
        wrong = [words_of(batch)[0][0]] if step > 40 else []
        learner.observe(answered(batch, wrong), batch.targets)
    other.restore(saved(learner), SequenceModel(8, 4, 1, WIDE))
    assert (other.longest, other.quiet, other.accuracy) == (learner.longest, learner.quiet, learner.accuracy)
    assert len(other.wrong) > 3
    assert list(other.wrong.items()) == list(learner.wrong.items())
    assert all(map(torch.equal, learner.batch(60), other.batch(60)))


# ---- pruning


def copied(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_weights(model, wanted: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())


class Blockwise:
    """Two layers of four blocks of two: needed are the second component of block 0 or 1, and the first of block 2."""

    def __init__(self, more_states):
        self.model = SequenceModel(3, 4, 2, {"name": "bd_lru", "num_blocks": 4, "block_size": 2})
        self.more_states = more_states  # the block that has more different ones
        self.mixers = self.model.mixers
        for mixer in self.mixers:
            mixer.output.weight.data[:] = 1

    def __call__(self, tokens):
        for mixer in self.mixers:
            states = torch.ones(*tokens.shape, 2, 4)
            states[..., self.more_states] = tokens[..., None].float()
            mixer.output(states.flatten(2))
        seen = [mixer.output.weight.view(-1, 2, 4).abs().sum(0) > 0 for mixer in self.mixers]
        right = all(bool((s[1, 0] | s[1, 1]) & s[0, 2]) for s in seen)
        return torch.nn.functional.one_hot(torch.zeros_like(tokens) if right else tokens, 3).float(), ()


BATCH = Batch(torch.tensor([[1, 2, 1]]), torch.tensor([[0, X, X]]))


@pytest.mark.parametrize(("more_states", "silenced"), [(0, [0, 3]), (1, [1, 3])])
def test_pruning_takes_away_all_blocks_that_are_not_needed_of_many_states_first(more_states, silenced):
    model = Blockwise(more_states)
    order = sorted(silenced, key=lambda n: n != more_states)
    found = [Piece(layer, [n, n + 4]) for layer in (0, 1) for n in order]
    columns = sorted(n + part for n in silenced for part in (0, 4))
    assert prune(model, [BATCH, BATCH], whole_blocks=True) == found
    for mixer in model.mixers:
        assert (mixer.output.weight == 0).all(0).nonzero().flatten().tolist() == columns
        assert heard_blocks(mixer, columns) == [n for n in range(4) if n not in silenced]
    assert model(BATCH.tokens)[0].argmax(-1)[0, 0] == 0
    assert prune(model, [BATCH], whole_blocks=True) == []  # what was silenced is not named again
    for mixer in model.mixers:
        mixer.output.weight.data[:] = 1  # as where the optimizer moves it on
    silence(model, [columns, columns])
    assert prune(model, [BATCH], whole_blocks=True) == []


def test_pruning_takes_components_too_but_not_what_stays():
    model, stays = Blockwise(0), [Piece(0, [3]), Piece(1, [6])]
    found = prune(model, [BATCH], stays, whole_blocks=False)
    left = [
        set(range(8)) - {column for piece in found if piece.layer == layer for column in piece.columns}
        for layer in (0, 1)
    ]
    assert left == [{2, 3, 5}, {2, 5, 6}]


def test_nothing_is_pruned_of_a_model_that_errs():
    wrong = BATCH._replace(targets=torch.tensor([[0, 1, X]]))
    assert prune(Blockwise(0), [BATCH, wrong], whole_blocks=True) == []


class Graded(Blockwise):
    """As many wrong answers as the blocks that are missing weigh, one for each batch: 0, 2, 1 and 3, in layer 0."""

    def __call__(self, tokens):
        super().__call__(tokens)
        seen = (self.model.mixers[0].output.weight != 0).any(0).view(2, 4).any(0)
        wrong = int((torch.tensor([0, 2, 1, 3]) * ~seen).sum())
        answers = torch.zeros_like(tokens)
        answers[:, :wrong] = 1
        return torch.nn.functional.one_hot(answers, 3).float(), ()


OTHERS = [Piece(1, [n, n + 4]) for n in range(4)]  # no answer depends on layer 1


@pytest.mark.parametrize(
    ("silenced", "staying", "whole_blocks", "named"),
    [
        ([], [], True, Piece(0, [0, 4])),
        ([], [Piece(0, [0, 4])], True, Piece(1, [0, 4])),
        ([0, 4], OTHERS, True, Piece(0, [2, 6])),
        ([0, 4], [*OTHERS, Piece(0, [2, 6])], True, Piece(0, [1, 5])),
        ([0, 4, 2, 6, 1, 5], OTHERS, True, None),  # the last of its layer
        ([], [*OTHERS, *(Piece(0, [n, n + 4]) for n in range(4))], True, None),
        ([4], [], True, Piece(0, [0])),  # what is left of it
        ([0, 4], [Piece(1, [n]) for n in range(8)], False, Piece(0, [1])),  # without one of two the block is heard
        ([0, 4, 1], [Piece(1, [n]) for n in range(8)], False, Piece(0, [2])),
        ([0, 4, 1, 2, 3], [Piece(1, [n]) for n in range(8)], False, Piece(0, [6])),
        ([0, 1, 2, 3, 4, 5, 6], [Piece(1, [n]) for n in range(8)], False, None),
    ],
)
def test_what_is_needed_least_is_named(silenced, staying, whole_blocks, named):
    model = Graded(0)
    silence(model, [silenced, []])
    before = copied(model.model)
    batch = Batch(torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64))
    assert least_needed(model, [batch, batch], staying, whole_blocks=whole_blocks) == named
    assert_weights(model.model, before)


def test_a_snapshot_is_of_weights_and_moments():
    torch.manual_seed(0)
    model = SequenceModel(3, 8, 2, WIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 2]]))[0].square().sum().backward()
        optimizer.step()
        return copied(model)

    step()
    before = weights_and_moments(model, optimizer)
    wanted = [step() for _ in range(3)]
    restore(model, optimizer, before)
    for was in wanted:
        step()
        assert_weights(model, was)


@pytest.mark.parametrize("normalization", ["softmax", "tanh"])
def test_a_one_hot_copy_answers_as_one_hot_rows_do(normalization):
    torch.manual_seed(0)
    model = SequenceModel(3, 8, 2, {"name": "bd_lru", "num_blocks": 4, "block_size": 3, "normalization": normalization})
    tokens, before = torch.randint(3, (2, 20)), copied(model)
    with one_hot_gates(model, [[], []]):
        wanted = model(tokens)[0]
    torch.testing.assert_close(one_hot_copy(model)(tokens)[0], wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(tokens)[0], wanted, atol=1e-2)
    assert_weights(model, before)


# ---- one at a time

THIN = CurriculumConfig(first=9, row=20, quiet=30, prune=2, prune_after=4, prune_settle=3)


def thinning(monkeypatch, blocks, components=(), free=()):
    """A curriculum, a model of two layers, and what prunes it after a step and so many quiet batches.

    What is needed least is read from two queues, what is not needed at all from a third, after the block that is taken
    away first.
    """
    config = small_config(task=WORDS, mixer=WIDE, model=ModelConfig(d_model=8, num_layers=2), batch_size=4, steps=1000)
    config = dataclasses.replace(config, curriculum=THIN)
    learner = Curriculum(config, build_task(config.task))
    model = SequenceModel(learner.task.vocab_size, 8, 2, WIDE)

    def named(model, batches, staying, *, whole_blocks):
        queue = blocks if whole_blocks else components
        left = (part for part in queue if not set(part.columns) <= set(learner.silenced[part.layer]))
        return next((part for part in left if part not in staying), None)

    monkeypatch.setattr("statemix.training.pruning.least_needed", named)
    monkeypatch.setattr("statemix.training.pruning.errors", lambda *_: 0)
    not_needed = iter([[Piece(0, [0, 6, 12])], *free])
    monkeypatch.setattr("statemix.training.pruning.prune", lambda *_, whole_blocks: list(next(not_needed, [])))
    optimizer = torch.optim.AdamW(model.parameters())

    def prune(step, quiet=None):
        learner.quiet = learner.quiet if quiet is None else quiet
        learner.prune(model, optimizer, step)

    return learner, model, prune


def test_parts_are_taken_away_one_at_a_time_and_come_back_where_the_run_does_not_settle(monkeypatch):
    queues = [Piece(1, [4, 10, 16]), Piece(0, [2, 8, 14])], [Piece(0, [7]), Piece(1, [5]), Piece(1, [3])]
    learner, model, prune = thinning(monkeypatch, *queues)
    prune(10, quiet=3)
    assert learner.silenced is None
    prune(11, quiet=4)  # all at once
    assert (learner.silenced, learner.quiet, learner.pruning.trial) == ([[0, 6, 12], []], 0, None)
    before = copied(model)
    prune(20, quiet=3)
    assert learner.silenced == [[0, 6, 12], [4, 10, 16]]
    assert not model.mixers[1].output.weight[:, [4, 10, 16]].any()
    assert (learner.pruning.trial, learner.quiet, learner.has_ended) == ((queues[0][:1], 20), 0, False)
    prune(37, quiet=2)  # a step before six times prune_settle
    assert learner.pruning.trial is not None
    kept = learner.pruning.before
    learner.restore(saved(learner), model)  # as a run that resumes here
    learner.pruning.before = kept
    learner.wrong = {Word((START, 1), (X, 1)): 0}
    for mixer in model.mixers:
        mixer.values.weight.data.add_(1)  # in vain
    prune(38)
    assert not learner.wrong
    assert (learner.pruning.trial, learner.pruning.staying, learner.silenced) == (None, queues[0][:1], [[0, 6, 12], []])
    assert_weights(model, before)
    prune(60)  # it must settle again before the next
    assert learner.pruning.trial is None
    prune(61, quiet=3)
    assert learner.pruning.trial.pieces == queues[0][1:]
    prune(64, quiet=3)  # it did without it, and no block is left to try
    assert (learner.pruning.stage, learner.pruning.staying) == ("components", [])
    assert learner.pruning.trial.pieces == queues[1][:1]
    prune(67, quiet=3)
    assert learner.pruning.trial.pieces == queues[1][1:2]
    prune(85)  # the first component that comes back is the last that is tried
    assert (learner.pruning.stage, learner.pruning.trial, learner.pruning.before) == ("thin", None, {})
    assert learner.silenced == [[0, 2, 6, 7, 8, 12, 14], []]
    for quiet in (29, 30):
        prune(90, quiet)
        assert learner.has_ended == (quiet == 30)


def test_nothing_is_taken_away_that_the_run_has_no_steps_left_to_settle_without(monkeypatch):
    for step, tried in ((952, True), (953, False)):  # of 1,000: six times three for the trial, thirty to end
        learner, _, prune = thinning(monkeypatch, [Piece(1, [4, 10, 16])])
        learner.pruning.silenced = [[], []]
        prune(step, quiet=3)
        assert (learner.pruning.trial is not None, learner.pruning.stage) == (tried, "blocks" if tried else "thin")


def test_rows_stay_soft_where_one_hot_ones_would_err(monkeypatch):
    learner, model, prune = thinning(monkeypatch, [])
    monkeypatch.setattr("statemix.training.pruning.errors", lambda *_: 1)
    prune(11, quiet=4)
    assert (learner.silenced, learner.quiet) == (None, 0)
    assert bool(model.mixers[0].output.weight.all())


def test_what_is_not_needed_goes_along_unless_that_was_too_much(monkeypatch):
    blocks = [Piece(0, [1, 7, 13]), Piece(0, [2, 8, 14])]
    free = [Piece(1, [0, 6, 12]), Piece(1, [1, 7, 13])]
    learner, model, prune = thinning(monkeypatch, blocks, free=[free, free, [Piece(1, [3, 9, 15])]])
    prune(11, quiet=4)
    before = copied(model)
    prune(20, quiet=3)
    assert learner.pruning.trial.pieces == [*free, blocks[0]]
    assert learner.silenced == [[0, 1, 6, 7, 12, 13], [0, 1, 6, 7, 12, 13]]
    prune(38)  # in vain: all comes back, and nothing of it is to stay
    assert_weights(model, before)
    assert (learner.pruning.trial, learner.pruning.careful, learner.pruning.staying) == (None, True, [])
    assert learner.silenced == [[0, 6, 12], []]
    state = saved(learner)
    learner.pruning.careful = False
    learner.restore(state, model)
    prune(41, quiet=3)
    assert (learner.pruning.trial.pieces, learner.pruning.careful) == (blocks[:1], True)
    prune(44, quiet=3)  # it did without that one: more again
    assert (learner.pruning.trial.pieces, learner.pruning.careful) == ([*free, blocks[1]], False)


# ---- queries


def asking(monkeypatch, queries, answers):
    """A curriculum that has nothing left to take away, its model, and what searches will find."""
    learner, model, _ = thinning(monkeypatch, [])
    learner.options = dataclasses.replace(learner.options, queries=queries)
    learner.is_answered, learner.pruning.silenced, learner.pruning.stage = False, [[], []], "thin"
    found, seen = iter(answers), []

    def explored(model, automaton, *, max_states):
        seen.append((model, automaton))
        wrong = next(found)
        return Verdict(7, None if wrong is None else WrongWord(wrong, 2, 1), None)

    monkeypatch.setattr("statemix.training.curriculum.explore", explored)
    return learner, model, seen


def test_what_a_search_finds_wrong_comes_again_until_nothing_is_found(monkeypatch):
    short, longer = (START, 1), (START, 1, 3, 5)
    learner, model, seen = asking(monkeypatch, 5, [short, longer, None])
    for learner.quiet in (29, 30):  # the end of training is where it is asked
        assert not learner.has_ended
        learner.ask(model)
    assert len(seen) == 1
    assert torch.equal(seen[0][0].mixers[0].raw_gates.projection.bias, 1e4 * model.mixers[0].raw_gates.projection.bias)
    assert np.array_equal(seen[0][1].outputs, learner.task.automaton().outputs)
    assert (learner.quiet, learner.wrong) == (0, {Word(short, (X, 2)): 0})
    batch = learner.batch(3)
    assert ([*short], [X, 2]) in words_of(batch)
    learner.wrong = {Word((START, 4), (X, 4)): 3}
    for learner.quiet in (2, 3):  # as after what was taken away
        learner.ask(model)
    both = [Word(short, (X, 2)), Word(longer, (X, X, X, 2))]
    assert (len(seen), learner.given, list(learner.wrong)) == (2, both, both)
    assert learner.figures()["queries"] == 2
    again, _, _ = asking(monkeypatch, 5, [None])
    again.restore(saved(learner), model)
    assert (again.given, list(again.wrong), again.is_answered) == (both, both, False)
    again.quiet = 3
    again.ask(model)
    assert (again.is_answered, again.has_ended, again.state()["answered"]) == (True, True, True)


@pytest.mark.parametrize(
    ("queries", "found", "given"),
    [
        (1, [(START, 1)], 1),  # no search after that: no word of it could be given
        (3, [(START, *[1] * 20)], 0),  # it would be cut in every row
    ],
)
def test_searches_end_with_their_number_and_with_words_that_no_row_holds(monkeypatch, queries, found, given):
    learner, model, seen = asking(monkeypatch, queries, found)
    for _ in range(2):
        learner.quiet = 30
        learner.ask(model)
    assert (learner.has_ended, len(learner.given), len(seen)) == (True, given, 1)


# ---- short words


def test_short_words_of_all_splits_are_trained_on():
    """Of 36 words of two permutations, and six of one; and no longer word of another split."""
    learner = curriculum(task=WORDS | {"min_len": 1}, first=9, shared=2, batch_size=8)
    seen = {
        tuple(tokens) for step in range(150) for tokens, targets in words_of(learner.batch(step)) if max(targets) > X
    }
    short = {(START, *word) for size in (1, 2) for word in itertools.product(range(6), repeat=size)}
    assert short <= seen
    own = [word for word in seen if len(word) > 3]
    assert len(own) > 1000
    tokens = np.array([[*word, *[PAD] * (10 - len(word))] for word in own])
    assert in_split(tokens, "train", PAD).all()


@pytest.mark.parametrize(("first", "split"), [(1, "train"), (9, "valid")])
def test_short_words_of_other_splits_come_in_training_once_words_are_as_long(first, split):
    alone = curriculum(task=WORDS | {"min_len": 1}, first=first)
    shared = curriculum(task=WORDS | {"min_len": 1}, first=first, shared=2)
    for mine, theirs in zip(alone.batch(3, split), shared.batch(3, split), strict=True):
        assert torch.equal(mine, theirs)


@each_kind_of_rows
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_its_silent_blocks_says_the_same(mixer, tied, tmp_path):
    model = SequenceModel(5, 12, 2, mixer, tied_embedding=tied).double()
    for layer, dead in zip(model.mixers, ([0, 2, 3], [1, 5]), strict=True):
        read_out(layer).data[:, :, dead] = 0
    small = without_silent_blocks(model)
    assert [layer.state_shape[1] for layer in small.mixers] == [4, 4]
    assert small.num_parameters() < model.num_parameters()
    tokens = torch.randint(5, (3, 30))
    logits, state = model(tokens)
    said, held = small(tokens)
    assert torch.allclose(said, logits, rtol=1e-12, atol=1e-13)
    assert torch.allclose(held[1], state[1][:, :, [0, 2, 3, 4]], rtol=1e-12)
    small.save(tmp_path)
    assert torch.equal(SequenceModel.load(tmp_path)(tokens)[0], said)
    assert without_silent_blocks(small).num_parameters() == small.num_parameters()


def read_out(mixer):
    """The weight of a read-out as (D, M or 1, N)."""
    return mixer.output.weight.unflatten(1, (-1, mixer.state_shape[1]))


def test_no_blocks_to_leave_out():
    with refused(r"^without_silent_blocks: `model` must have a mixer with rows of gates, got 'lstm'.$"):
        without_silent_blocks(SequenceModel(5, 12, 1, {"name": "lstm", "hidden_size": 4}))
    dead = SequenceModel(5, 12, 1, WIDE)
    silence(dead, [list(range(18))])
    assert without_silent_blocks(dead).mixers[0].state_shape == (3, 1)


# ---- runs


def packed_config(**changes) -> TrainConfig:
    small = {
        "task": WORDS | {"group": "Z2", "seq_len": 6, "min_len": 1},
        "model": ModelConfig(d_model=8),
        "optimizer": OptimizerConfig(lr=0.02, final_lr=0.02, warmup=0.0),
        "steps": 200,
        "batch_size": 4,
        "eval_every": 10,
        "log_every": 5,
        "curriculum": CurriculumConfig(first=3, row=32, growth=1.5, accuracy=0.9, quiet=12),
        "row_entropy": 0.1,
        "block_dropout": 0.25,
        "sharpen": 100.0,
        "test_lengths": ("7-30", 12),
    }
    return small_config(**small | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("curriculum") / "run", packed_config())


def test_a_run_says_where_its_curriculum_is_and_ends_with_it(finished):
    lines = [line for line in finished.metrics if "longest" in line]
    assert [line["longest"] for line in lines] == sorted(line["longest"] for line in lines)
    assert (lines[0]["longest"], lines[-1]["longest"]) == (3, 6)
    assert lines[-1]["quiet"] == 12
    assert lines[-1]["step"] == finished.summary["steps"] == finished.summary["best_step"] < 200
    assert finished.metrics[-1]["valid_token_accuracy"] == finished.summary["valid"]["token_accuracy"]


def test_the_tests_are_of_ranges_and_once_more_with_sharpened_gates(finished):
    config = packed_config()
    assert list(finished.summary["test"]) == list(finished.summary["sharpened"]) == ["7-30", "12"]
    model = SequenceModel.load(finished.out / f"step-{finished.summary['best_step']}")
    task = build_task(config.task).with_lengths(7, 30)
    for key, factor in (("test", 1.0), ("sharpened", 100.0)):
        model.mixers[0].sharpen(factor)
        score = evaluate(model, task, "test", config.eval_sequences, 4)
        assert finished.summary[key]["7-30"]["token_accuracy"] == score["token_accuracy"]
        assert finished.summary[key]["7-30"]["loss"] == pytest.approx(score["loss"], rel=1e-5)
    assert finished.summary["test"]["12"]["loss"] != finished.summary["sharpened"]["12"]["loss"]


@pytest.mark.parametrize("stop_before", [11, 25, 38])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path, stop_before):
    assert_same_files(run_in_parts(tmp_path / "run", packed_config(), stop_before).out, finished.out)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    options = dataclasses.replace(packed_config().curriculum, prune=3, prune_after=8, prune_settle=5, prune_lr=0.5)
    config = packed_config(curriculum=options, mixer=WIDE)
    return config, run(tmp_path_factory.mktemp("pruned") / "run", config)


def test_a_run_ends_when_a_search_finds_no_wrong_word(pruned, tmp_path, monkeypatch):
    """The first one is told of a word that is right; stopped after that, the run asks again as it would have."""
    options = dataclasses.replace(pruned[0].curriculum, queries=9)
    config = dataclasses.replace(pruned[0], curriculum=options, sharpen=1e4)
    searches = []

    def explored(model, automaton, *, max_states):
        searches.append(explore(model, automaton, max_states=max_states))
        word = WrongWord((3, 0), 0, 1)
        return dataclasses.replace(searches[-1], wrong=word) if len(searches) == 1 else searches[-1]

    monkeypatch.setattr("statemix.training.curriculum.explore", explored)
    result = run(tmp_path / "run", config)
    without = pruned[1].summary["steps"]
    assert [verdict.outcome for verdict in searches] == ["equal", "equal"]
    assert (result.summary["queries"], result.summary["steps"]) == (1, without + 5)
    assert verify(result.out).outcome == "equal"
    searches.clear()
    stopped(tmp_path / "stopped", config, without + 4)
    searches.clear()
    assert_same_files(run(tmp_path / "stopped", config).out, result.out)


def test_a_run_is_pruned_at_its_end_and_goes_on(pruned):
    _, result = pruned
    lines = [line for line in result.metrics if "longest" in line]
    pruned_lines = [line for line in lines if "silenced" in line]
    assert len(lines) > len(pruned_lines) >= 12 // 5
    silenced = pruned_lines[-1]["silenced"]
    assert silenced > 0
    assert (lines[-1]["quiet"], lines[-1]["step"]) == (12, result.summary["best_step"])
    model = SequenceModel.load(result.out / f"step-{result.summary['best_step']}")
    heard = (model.mixers[0].output.weight != 0).view(8, 3, 6).any(0)
    assert result.summary["blocks"] == [int(heard.any(0).sum())]
    assert result.summary["components"] == [int(heard.sum())] == [18 - silenced]


def test_rows_are_one_hot_from_the_first_pruning_on(pruned, tmp_path):
    """What a step runs with, by the lines of the run itself."""
    config, result = pruned
    with mock.patch.object(TRAIN, "regularized", side_effect=regularized) as spy:
        run(tmp_path / "run", config)
    seen = [call.args[2] for call in spy.call_args_list]
    first = next(i for i, strong in enumerate(seen) if strong.silenced is not None)
    pressing = {(strong.hidden, strong.entropy, strong.learning_rate) for strong in seen[first:]}
    assert pressing == {(0, config.row_entropy, 0.5)}
    assert not any(strong.learning_rate != 1 for strong in seen[:first])
    rates = [line["lr"] for line in result.metrics if "lr" in line]
    assert set(rates) == {0.02, 0.01}
    assert all(strong.silenced is not None for strong in seen[first:])
    assert len(seen) - first >= 12
    lines = [line["step"] for line in result.metrics if "silenced" in line]
    assert first - 1 < lines[0] <= first + 5
    # what was trained is what the test of sharpened gates reads
    assert result.summary["sharpened"]["12"]["token_accuracy"] == 1


def test_a_pruned_run_that_was_stopped_ends_as_one_that_was_not(pruned, tmp_path):
    config, result = pruned
    for back in (2, 14):
        again = run_in_parts(tmp_path / str(back), config, result.summary["steps"] - back)
        assert_same_files(again.out, result.out)


def one_by_one():
    """Within it a run takes no blocks away all at once."""
    return mock.patch("statemix.training.pruning.prune", return_value=[])


@pytest.fixture(scope="module")
def on_trial(pruned, tmp_path_factory):
    """A run that was killed while a block was away: its config, its folder, and what it would have come to."""
    config, tmp_path = pruned[0], tmp_path_factory.mktemp("trial")
    with one_by_one():
        result = run(tmp_path / "whole", config)
    assert result.summary["blocks"] == [1]
    for stop_before in range(51, result.summary["steps"], 10):
        out = tmp_path / str(stop_before)
        with one_by_one():
            stopped(out, config, stop_before)
        if (out / f"step-{stop_before - 1}" / "trial.safetensors").exists():
            return config, out, result
    raise AssertionError("no checkpoint was on trial")


def test_a_run_that_was_stopped_on_trial_ends_as_one_that_was_not(on_trial, tmp_path):
    config, killed, result = on_trial
    out = shutil.copytree(killed, tmp_path / "run")
    with one_by_one():
        run(out, config)
    assert_same_files(out, result.out)


@pytest.mark.parametrize(("spoil", "message"), DAMAGED_TENSORS)
def test_damaged_weights_before_a_trial_are_named(on_trial, tmp_path, spoil, message):
    config, killed, _ = on_trial
    [path] = shutil.copytree(killed, tmp_path / "run").glob("step-*/trial.safetensors")
    spoil(path)
    with refused(re.escape(f"'{path}' {message}")):
        run(tmp_path / "run", config)


def test_a_checkpoint_without_its_curriculum_is_refused(tmp_path):
    checkpoint = stopped(tmp_path / "run", packed_config(), 11) / "step-10"
    edit_json(checkpoint / "train.json", lambda saved: saved.pop("curriculum"))
    seal(checkpoint)
    with refused(r"step-10.train\.json.*`curriculum` is missing"):
        run(tmp_path / "run", packed_config())


UNKNOWN = "`curriculum.pruning` names components that the model does not have"
OTHERS_PRUNING = [
    ({"stage": "knots"}, "`curriculum.pruning.stage` must be one of ['blocks', 'components', 'thin'], got 'knots'"),
    ({"silenced": [[0, 18]]}, UNKNOWN),
    ({"silenced": [[0], [1]]}, UNKNOWN),
    ({"staying": [{"layer": 1, "columns": [0]}]}, UNKNOWN),
    ({"trial": {"pieces": [{"layer": 0, "columns": [18]}], "step": 9}}, UNKNOWN),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS_PRUNING)
def test_a_curriculum_of_another_model_is_refused(on_trial, tmp_path, changes, message):
    config, killed, _ = on_trial
    [trial] = shutil.copytree(killed, tmp_path / "run").glob("step-*/trial.safetensors")
    path = trial.with_name("train.json")
    edit_json(path, lambda saved: saved["curriculum"]["pruning"].update(changes))
    seal(trial.parent)
    with refused(re.escape(f"'{path}' is damaged: {message}")):
        run(tmp_path / "run", config)


def test_what_presses_on_a_step_follows_the_curriculum():
    config = packed_config()
    learner = Curriculum(config, build_task(config.task))
    assert strengths(config, 199, learner) == Strengths(hidden=0.25, entropy=0.1)
    learner.longest = 6
    assert strengths(config, 0, learner) == Strengths(hidden=0.0, entropy=0.1)
    assert strengths(config, 0, None) == Strengths(hidden=0.25, entropy=0.0)
    assert strengths(config, 150, None) == Strengths(hidden=0.0, entropy=0.05)
    noisy = dataclasses.replace(config, gate_noise=0.5)
    assert strengths(noisy, 199, learner).noise == 0.5
    assert strengths(noisy, 199, SimpleNamespace(silenced=[[]], at_last=True)).noise == 0


# ---- config


ALONE = "`curriculum.first` must be None with `train_lengths`, `train_sequences` or `carry`, got 3."
SHORT_ROW, PRUNED = CurriculumConfig(first=3, row=6), CurriculumConfig(first=1, quiet=2, prune=2)
BAD = [
    ({"curriculum": SHORT_ROW}, "`curriculum.row` must be at least the longest word, 7 tokens, got 6."),
    ({"task": {"name": "permutation"}}, "permutation: `min_len` must be set for words of many lengths, which it pads."),
    ({"task": {"name": "memorization"}}, "memorization: its sequences have one length, not those of a range."),
    ({"train_lengths": (4,)}, ALONE),
    ({"train_sequences": 4}, ALONE),
    (
        {"mixer": LSTM, "curriculum": PRUNED, "row_entropy": 0.0},
        "`curriculum.prune` must be None for a mixer without blocks, got 2.",
    ),
    ({"test_lengths": ("9-8",)}, "`test_lengths` must end where they begin or later, got '9-8'."),
    ({"test_lengths": ("8",)}, "`test_lengths` must be numbers or ranges such as \"40-256\", got '8'."),
    ({"test_lengths": ("0-8",)}, "`test_lengths` must be all at least 1, got ('0-8',)."),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_bad_configs(changes, text):
    base = {"test_lengths": ()} if "task" in changes else {}
    with refused(f"{re.escape(text)}$"):
        packed_config(**base | changes)


def test_queries_are_of_a_task_with_an_automaton(monkeypatch):
    options = dataclasses.replace(PRUNED, queries=1)
    packed_config(curriculum=options)
    monkeypatch.setattr("statemix.tasks.PermutationComposition.automaton", Task.automaton)
    with refused(r"^permutation: no finite automaton says its targets at every length\.$"):
        packed_config(curriculum=options)
