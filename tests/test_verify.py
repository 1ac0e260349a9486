"""verify.py: models that are right by construction, the same with one fault, and what a search may not claim."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from automata.fa.dfa import DFA
from helpers import is_word
from model_helpers import ONE_HOT, natural, solved_model

from statemix import BDLRU, SequenceModel, TrainConfig, block_scan, cli
from statemix.analysis import NONE, Automaton
from statemix.model import MODEL
from statemix.search import WRONG_STATES, ZERO_IN_FLOAT64, ZERO_WEIGHT, WrongWord, explore
from statemix.tasks import PermutationComposition
from statemix.verify import verify, write_verdict


def task(n: int) -> PermutationComposition:
    return PermutationComposition(group=f"S{n}", start=True, seq_len=6)


def first_wrong(model: SequenceModel, automaton: Automaton, longest: int) -> WrongWord | None:
    """By brute force over all words, the shortest first, each read at once from its beginning."""
    tokens = [x for x in range(automaton.transitions.shape[1]) if (automaton.transitions[:, x] != NONE).any()]
    words = [()]
    for _ in range(longest):
        longer = [(*word, x) for word in words for x in tokens]
        words = [word for word in longer if is_word(automaton, word)]
        with torch.no_grad():
            said = model(torch.tensor(words))[0][:, -1].argmax(-1).tolist()
        targets = automaton.run(np.array(words))[:, -1].tolist()
        for word, target, answer in zip(words, targets, said, strict=True):
            if target not in (NONE, answer):
                return WrongWord(word, target, answer)
    return None


def as_dfa(automaton: Automaton, output: int) -> DFA:
    """The words at whose end the automaton says this output, as another library has it."""
    rows = zip(automaton.transitions.tolist(), automaton.outputs.tolist(), strict=True)
    steps = [list(zip(*row, strict=True)) for row in rows]  # of a state and token: the state after, the output
    said = range(NONE, int(automaton.outputs.max()) + 1)
    moves = {
        (state, before): {token: step for token, step in enumerate(steps[state]) if step[0] != NONE}
        for state, before in itertools.product(range(len(steps)), said)
    }
    return DFA(
        states=set(moves),
        input_symbols=set(range(automaton.transitions.shape[1])),
        transitions=moves,
        initial_state=(automaton.start, NONE),
        final_states={end for end in moves if end[1] == output},
        allow_partial=True,
    )


# ---- right at every length


@pytest.mark.parametrize(("n", "blocks"), [(2, 1), (3, 1), (3, 17), (4, 2)])
def test_a_solved_model_is_equal(n, blocks):
    verdict = explore(solved_model(n, blocks), task(n).automaton())
    assert verdict.outcome == "equal"
    assert verdict.wrong is None
    assert verdict.states == len(natural(n)) + 1
    least = task(n).automaton().minimal()
    assert verdict.automaton.transitions.tolist() == least.transitions.tolist()
    assert verdict.automaton.outputs.tolist() == least.outputs.tolist()


@pytest.mark.parametrize("output", range(6))
def test_another_library_says_equal_too(output):
    verdict = explore(solved_model(3), task(3).automaton())
    assert as_dfa(verdict.automaton, output) == as_dfa(task(3).automaton(), output)


def test_the_states_of_all_layers_count():
    """The second layer holds the last token, so each product has as many states as tokens that lead to it."""
    verdict = explore(solved_model(3, layers=2), task(3).automaton())
    assert verdict.outcome == "equal"
    assert verdict.states == 1 + 1 + 6 * 6
    assert len(verdict.automaton.transitions) == 7


@pytest.mark.parametrize(("block", "read", "states"), [(1, False, 7), (1, True, 1 + 1 + 6 * 6), (None, True, 7)])
def test_blocks_that_are_never_read_have_no_states(block, read, states):
    """A block that holds the last token is one state more for each, unless the read-out has no weight for it."""
    model = solved_model(3, 2)
    mixer = model.layers[0].mixer
    with torch.no_grad():
        if block is not None:
            gates = mixer.raw_gates.projection
            gates.weight.view(3, 4, 2, -1)[:, :, block] = 0
            gates.bias.view(3, 4, 2)[:, 3, block] = ONE_HOT
            mixer.values.weight.view(3, 2, -1)[0, block] = torch.arange(10.0)
            mixer.output.weight.view(-1, 3, 2)[:, :, block] = 0
            mixer.output.weight.view(-1, 3, 2)[0, 0, block] = float(read)  # the head has no weight for this
    verdict = explore(model, task(3).automaton())
    assert (verdict.outcome, verdict.states) == ("equal", states)


SHIFT = {0: 3, 1: 0, 2: 1}  # the second block holds the last three tokens, the last one first
RECENT = [  # what the second block's components are made of at any token, which are read -> states
    (SHIFT, (), 7),
    (SHIFT, (0,), 1 + 1 + 6 * 6),
    (SHIFT, (1,), 1 + 1 + 6 + 6 * 36),  # made of the component before it, which thus counts
    (SHIFT, (2,), 1 + 1 + 6 + 36 + 6 * 216),
    ({0: 3, 1: 3, 2: 2}, (2,), 7),  # zero for ever
    ({0: 1, 1: 2, 2: 3}, (2,), 1 + 1 + 6 * 6),
]


@pytest.mark.parametrize(("sources", "read", "states"), RECENT, ids=str)
def test_components_that_no_answer_depends_on_have_no_states(sources, read, states):
    model = solved_model(3, 2)
    second_block(model, {(token, i): source for token in range(7) for i, source in sources.items()}, read)
    verdict = explore(model, task(3).automaton())
    assert (verdict.outcome, verdict.states) == ("equal", states)


def second_block(model: SequenceModel, rows: dict[tuple[int, int], int], read, gap: float = ONE_HOT) -> None:
    """Give the second of two blocks other rows, {(token, i): source}, and values that tell the tokens apart."""
    mixer = model.layers[0].mixer
    with torch.no_grad():
        gates = mixer.raw_gates.projection.weight.view(3, 4, 2, -1)
        gates[:, :, 1] = 0
        for (token, i), source in rows.items():
            gates[i, source, 1, token] = gap
        mixer.values.weight.view(3, 2, -1)[:, 1] = torch.arange(10.0)
        seen = mixer.output.weight.view(-1, 3, 2)
        seen[:, :, 1] = 0
        seen[0, read, 1] = 1


@pytest.mark.parametrize("gap", [60.0, 200.0])
def test_what_a_row_may_copy_counts(gap):
    """Where a raw gate is 60 below the largest, its weight is no zero: all that the block holds is kept apart."""
    model = solved_model(3, 2)
    second_block(model, {(token, i): source for token in range(7) for i, source in SHIFT.items()}, (0,), gap)
    with torch.no_grad():  # no value is zero, so that what is added with such a weight is rounded away
        model.layers[0].mixer.values.weight.view(3, 2, -1)[:, 1] += 1
    only_the_last_token = 1 + 1 + 6 * 6
    assert (explore(model, task(3).automaton()).states == only_the_last_token) == (gap > ZERO_WEIGHT)


@pytest.mark.parametrize("gap", [ONE_HOT, 1.0])  # the smaller one takes something from each component
@pytest.mark.parametrize("seed", range(12))
def test_what_is_left_out_changes_no_verdict(seed, gap):
    """A block of any rows, read in part, by a head that errs by it: as if all of it were read, by next to nothing."""
    draw = np.random.default_rng(seed)
    rows = {(token, i): int(draw.integers(4)) for token in range(7) for i in range(3)}
    read = draw.permutation(3)[: draw.integers(1, 3)].tolist()
    verdicts = []
    for least in (0.0, 1e-35):
        model = solved_model(3, 2)
        second_block(model, rows, read, gap)
        with torch.no_grad():
            unread = [i for i in range(3) if i not in read]
            model.layers[0].mixer.output.weight.view(-1, 3, 2)[0, unread, 1] = least
            model.head.weight[seed % 6, 0] = 0.5 ** (seed % 7)  # what is read of it speaks for a label, more or less
        verdicts.append(explore(model, task(3).automaton(), max_states=2_000))
    part, whole = verdicts
    assert (part.outcome, part.wrong) == (whole.outcome, whole.wrong)
    assert part.states <= whole.states
    if part.outcome == "equal":
        assert np.array_equal(part.automaton.transitions, whole.automaton.transitions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_is_zero_where_a_raw_gate_is_far_below_the_largest(dtype):
    """What the search relies on, of every kernel: a component may be anything where its weight counts as zero."""
    before = torch.zeros(3, 2, 5, dtype=dtype)
    before[:, 0] = 1e30
    values, raw_gates = torch.zeros(3, 1, 2, 5, dtype=dtype), torch.zeros(2, 3, 5, dtype=dtype)
    for backend in ("associative", "reference"):
        raw_gates[:, 0] = -ZERO_IN_FLOAT64
        assert not block_scan(raw_gates.expand(3, 1, 2, 3, 5), values, before, backend=backend).any(), backend
    raw_gates[:, 0] = -ZERO_WEIGHT if dtype == torch.float32 else -ZERO_IN_FLOAT64
    mixer = BDLRU(4, 5, 2).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.raw_gates.projection.bias.copy_(raw_gates.flatten())
        x = torch.ones(3, 40, 4, dtype=dtype)
        assert not mixer.step(x[:, 0], before)[1].any()
        assert not mixer(x, before)[1].any()


@pytest.mark.parametrize("hooked", [False, True])
def test_with_and_without_kernels(hooked):
    model = solved_model(3, layers=2)
    if hooked:
        model.norm.register_forward_hook(lambda *_: None)
    assert (MODEL.inputs(model) is None) == hooked
    assert explore(model, task(3).automaton()).states == 1 + 1 + 6 * 6


def test_in_float64():
    assert explore(solved_model(3).double(), task(3).automaton()).outcome == "equal"


def test_what_the_task_does_not_score_is_not_compared():
    """S3 asked for the products of even length alone, of a model that knows all."""
    automaton = task(3).automaton()
    inputs = automaton.transitions[:6, :6]
    gone = np.full((6, 1), NONE)
    states = np.block([[inputs + 6, gone], [inputs, gone]])
    outputs = np.block([[np.full((6, 6), NONE), gone], [inputs, gone]])
    even = Automaton(states, outputs).preceded_by(6)
    verdict = explore(solved_model(3), even)
    assert verdict.outcome == "equal"
    assert (verdict.states, len(verdict.automaton.transitions)) == (13, 13)


# ---- planted faults

# (token, component) -> what it copies instead, 3 for the input
FAULTS = [
    {(0, 0): 1},
    {(4, 2): 2},
    {(5, 1): 0},
    {(3, 0): 3},
    {(6, 2): 0},  # the start token leaves a zero
    {(1, 1): 1, (1, 2): 2, (2, 0): 0},
]


@pytest.mark.parametrize("rows", FAULTS, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_changed_gate_is_found_by_its_shortest_word(rows, layers):
    model, automaton = solved_model(3, layers=layers, rows=rows), task(3).automaton()
    verdict = explore(model, automaton)
    assert verdict.outcome == "differs"
    assert verdict.wrong == first_wrong(model, automaton, 3)
    target, said = verdict.wrong.target, verdict.wrong.said
    theirs, ours = as_dfa(verdict.automaton, target), as_dfa(automaton, target)
    assert theirs != ours
    # as the other library sees it: no shorter word tells them apart, whatever the output
    differences = [as_dfa(verdict.automaton, output) ^ as_dfa(automaton, output) for output in range(6)]
    shortest = min(each.minimum_word_length() for each in differences if not each.isempty())
    assert shortest == len(verdict.wrong.word)
    assert differences[target].accepts_input(verdict.wrong.word)
    assert differences[said].accepts_input(verdict.wrong.word)


def test_a_fault_that_only_long_words_meet():
    """A wrong label in the read-out of a state of Z_12 that eleven steps lead to, and no fewer."""
    moves = np.full((12, 13), NONE)  # for the tokens of the model, of which 0 steps and 12 starts
    moves[:, 0] = (np.arange(12) + 1) % 12
    asked = np.where(moves == 11, 0, moves)
    model = solved_cycle(12)
    right, wrong = (Automaton(moves, said).preceded_by(12) for said in (moves, asked))
    assert explore(model, right).outcome == "equal"
    assert explore(model, wrong).wrong == WrongWord((12, *[0] * 11), 0, 11)


def solved_cycle(n: int) -> SequenceModel:
    """A model of a block of n components that moves on by one at every token 0: of one 1 among zeros the place."""
    model = SequenceModel(n + 1, 2 * n + 1, 1, {"name": "bd_lru", "num_blocks": 1, "block_size": n}, mlp_size=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.layers[0].mixer_norm.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.embedding.weight[:, : n + 1] = torch.eye(n + 1)
        mixer = model.layers[0].mixer
        gates = mixer.raw_gates.projection.weight.view(n, n + 1, 1, -1)
        for i in range(n):
            gates[i, (i - 1) % n, 0, 0] = gates[i, n, 0, n] = ONE_HOT
        mixer.values.weight.view(n, 1, -1)[0, 0, n] = 1
        mixer.output.weight.view(-1, n, 1)[n + 1 :] = torch.eye(n)[:, :, None]
        model.head.weight[:n, n + 1 :] = torch.eye(n)
    return model


# ---- nothing is claimed


def test_more_states_than_asked_for():
    model, automaton = solved_model(3), task(3).automaton()
    assert explore(model, automaton, max_states=7).outcome == "equal"
    verdict = explore(model, automaton, max_states=6)
    assert (verdict.outcome, verdict.states, verdict.automaton) == ("undecided", 6, None)


def test_a_word_that_was_met_is_wrong_whatever_is_beyond():
    model = solved_model(3, gap=0.2)  # it leaks: states never come again, and in the end it errs
    verdict = explore(model, task(3).automaton())
    assert (verdict.outcome, verdict.automaton) == ("differs", None)
    assert WRONG_STATES < verdict.states < 2 * WRONG_STATES  # it does not go on to the end
    word, target, said = verdict.wrong
    state = None
    with torch.no_grad():
        for token in word:
            logits, state = model.step(torch.tensor([token]), state)
    assert int(logits.argmax()) == said != target
    assert task(3).automaton().run(np.array([word]))[0, -1] == target


def test_nan_is_no_answer():
    model = solved_model(3)
    with torch.no_grad():
        model.head.weight[2, 9] = torch.nan
    with pytest.raises(RuntimeError, match=r"^explore: the model's logits are not finite"):
        explore(model, task(3).automaton())


# ---- of a run


def write_run(folder: Path, model: SequenceModel, sharpen: float | None = None, **options) -> Path:
    """A folder with the config of a run and a model in a folder below it."""
    spec = {"name": "permutation", "group": "S3", "start": True} | options
    checkpoint = folder / "exact"
    checkpoint.mkdir()
    (folder / "config.json").write_text(TrainConfig(task=spec, sharpen=sharpen).to_json())
    model.save(checkpoint)
    return checkpoint


def call(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_says_equal(tmp_path, capsys):
    checkpoint = write_run(tmp_path, solved_model(3, layers=2))
    status, out, _ = call(capsys, checkpoint)
    assert status == 0
    assert out.startswith("equal for all lengths: 38 states explored, 7 in the least automaton with the same answers.")
    found = json.loads((checkpoint / "verify.json").read_text())
    least = task(3).automaton().minimal()
    assert (found["outcome"], found["states"], found["wrong"]) == ("equal", 38, None)
    assert found["automaton"]["transitions"] == least.transitions.tolist()
    assert found["automaton"]["outputs"] == least.outputs.tolist()
    assert (checkpoint / "verify.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_where_they_differ(tmp_path, capsys):
    checkpoint = write_run(tmp_path, solved_model(3, rows={(4, 2): 2}))
    out_folder = tmp_path / "found"
    status, out, _ = call(capsys, checkpoint, "--out", out_folder)
    assert status == 1
    word, target, said = explore(SequenceModel.load(checkpoint), task(3).automaton()).wrong
    shown = " ".join(map(str, word))
    assert out.startswith(f"differs: at the end of {shown}, a shortest wrong word, it says {said} and not {target}; ")
    found = json.loads((out_folder / "verify.json").read_text())["wrong"]
    assert found == {"word": list(word), "target": target, "said": said}
    assert not (checkpoint / "verify.json").exists()


def test_the_command_says_that_it_does_not_know(tmp_path, capsys):
    checkpoint = write_run(tmp_path, solved_model(3))
    call(capsys, checkpoint)
    status, out, _ = call(capsys, checkpoint, "--max-states", 3)
    assert status == 2
    assert out.startswith("undecided: more than 3 states, and nothing is claimed.")
    assert not (checkpoint / "verify.png").exists()  # it was of an earlier answer


def test_sharpened_on_the_way(tmp_path):
    checkpoint = write_run(tmp_path, solved_model(3, gap=8.0))
    text = (
        r"^verify: the model must have one-hot rows of gates to have few states, but their mean entropy is \S+ nats, "
        r"and there are more than 50 states. Sharpen it, as with --sharpen 100.$"
    )
    with pytest.raises(ValueError, match=text):
        verify(checkpoint, max_states=50)
    assert verify(checkpoint, sharpen=100.0).outcome == "equal"


def test_sharpened_as_in_the_test_of_the_run(tmp_path, capsys):
    checkpoint = write_run(tmp_path, solved_model(3, gap=8.0), sharpen=100.0)
    status, out, _ = call(capsys, checkpoint)
    assert status == 0
    assert ", 7 in the least automaton with the same answers, of the model sharpened by 100.\n" in out
    assert json.loads((checkpoint / "verify.json").read_text())["sharpened"] == 100
    with pytest.raises(ValueError, match=r"there are more than 50 states\. Sharpen it by more than 1\.$"):
        verify(checkpoint, sharpen=1.0, max_states=50)


BAD_RUNS = [
    ({"group": "S4"}, {}, ValueError, "explore: `task` must be of the model's 7 tokens, got 25."),
    ({}, {"max_states": 0}, ValueError, "explore: `max_states` must be at least 1, got 0."),
    ({}, {"sharpen": 0.0}, ValueError, "sharpen: `normalization` must be 'softmax' and `factor` above 0 and finite, "),
]


@pytest.mark.parametrize(("options", "how", "error", "text"), BAD_RUNS, ids=[case[3][:24] for case in BAD_RUNS])
def test_bad_calls(tmp_path, options, how, error, text):
    checkpoint = write_run(tmp_path, solved_model(3), **options)
    with pytest.raises(error, match="^" + re.escape(text)):
        verify(checkpoint, **how)


def test_what_cannot_be_verified(tmp_path, capsys):
    (tmp_path / "config.json").write_text(TrainConfig(task={"name": "modular-arithmetic"}).to_json())
    text = f"error: verify: '{tmp_path}' must be the folder of a run or of a checkpoint, but has neither "
    assert call(capsys, tmp_path)[2].startswith(text)
    solved_model(3).save(tmp_path)
    status, _, err = call(capsys, tmp_path)
    assert status == 2
    assert err == "error: modular-arithmetic: no finite automaton says its targets at every length.\n"
    other = SequenceModel(7, 8, 1, {"name": "lstm", "hidden_size": 3})
    (tmp_path / "config.json").write_text(TrainConfig(task={"name": "permutation", "start": True}).to_json())
    other.save(tmp_path)
    with pytest.raises(ValueError, match=r"^verify: `sharpen` must be None: LSTM has no rows of gates.$"):
        verify(tmp_path, sharpen=100.0)
    lone = tmp_path / "a" / "b"
    lone.mkdir(parents=True)
    other.save(lone)
    with pytest.raises(ValueError, match=r"must be the folder of a run or within one, but has no config.json.$"):
        verify(lone)


def test_a_verdict_is_written_whole(tmp_path):
    path = write_verdict(explore(solved_model(2), task(2).automaton(), max_states=2), tmp_path)
    found = json.loads(path.read_text())
    assert (found["outcome"], found["automaton"], found["states"]) == ("undecided", None, 2)
