"""Automata: hand-made ones, words against tasks, and the least one against another library's."""

import itertools
import re

import numpy as np
import pytest
from automata.fa.dfa import DFA

from statemix.analysis import NONE, Automaton
from statemix.report.automata import draw_automaton
from statemix.style import render
from statemix.tasks import (
    TASKS,
    CycleNavigation,
    EvenPairs,
    ModularArithmeticSimple,
    ModularCounting,
    Parity,
    PermutationComposition,
    RandomAutomaton,
    build_task,
)
from statemix.tasks.random_automaton import drawn_automaton

PARITY = Automaton([[-1, -1, 1], [1, 2, -1], [2, 1, -1]], [[-1, -1, -1], [0, 1, -1], [1, 0, -1]])
REGULAR = [Parity, EvenPairs, ModularCounting, CycleNavigation, ModularArithmeticSimple]
FINITE = [
    *(language(start=start) for language in REGULAR for start in (False, True)),
    *(language(scored="last", start=True) for language in REGULAR),
    Parity(scored="last"),
    ModularArithmeticSimple(scored="last", start=True, min_len=1),
    ModularCounting(modulus=4),
    RandomAutomaton(),
    RandomAutomaton(num_states=32, num_symbols=4, number=3, scored="last", start=True),
    PermutationComposition(group="S3"),
    PermutationComposition(group="A4xZ2", start=True),
    PermutationComposition(group="S4", generators="transpositions", start=True),
    PermutationComposition(group="S5", generators=8, scored="last", start=True, min_len=1),
    ModularArithmeticSimple(modulus=3),
]
INFINITE = sorted(TASKS.keys() - {task.name for task in FINITE} - {"word-problem"})  # which needs a path


def random_automaton(seed: int, states: int, tokens: int, outputs: int, missing: float) -> Automaton:
    """With few outputs and many missing transitions it has states that are alike and some that no word leads to."""
    rng = np.random.default_rng(seed)
    transitions = rng.integers(states, size=(states, tokens))
    said = rng.integers(NONE, outputs, size=(states, tokens))
    gone = rng.random((states, tokens)) < missing
    return Automaton(np.where(gone, NONE, transitions), np.where(gone, NONE, said), int(rng.integers(states)))


RANDOM = [random_automaton(seed, 3 + seed % 9, 1 + seed % 3, seed % 3, 0.3 * (seed % 2)) for seed in range(60)]


def as_dfa(automaton: Automaton) -> DFA:
    """The language of the texts of (token, output) that the automaton has."""
    symbols = set(itertools.product(range(automaton.transitions.shape[1]), range(NONE, 3)))
    moves = {
        state: {
            (token, int(automaton.outputs[state, token])): int(after)
            for token, after in enumerate(automaton.transitions[state])
            if after != NONE
        }
        for state in range(len(automaton.transitions))
    }
    return DFA(
        states=set(moves),
        input_symbols=symbols,
        transitions=moves,
        initial_state=automaton.start,
        final_states=set(moves),
        allow_partial=True,
    )


def assert_same_tables(actual: Automaton, expected: Automaton) -> None:
    assert actual.start == expected.start
    assert actual.transitions.tolist() == expected.transitions.tolist()
    assert actual.outputs.tolist() == expected.outputs.tolist()


# ---- by hand


def test_the_example_of_the_docstring():
    table = Automaton.__doc__
    text = re.search(r"^ +Automaton\((.*)\)$", table, flags=re.MULTILINE)[1]
    transitions, outputs = eval(text)
    assert_same_tables(Automaton(transitions, outputs), PARITY)
    for state, row in enumerate(re.findall(r"^ +[012]  \w+(.*)$", table, flags=re.MULTILINE)):
        told = [(int(after), int(said or NONE)) for after, said in re.findall(r"to (\d)(?:, (\d))?", row)]
        columns = zip(transitions[state], outputs[state], strict=True)
        assert told == [(after, said) for after, said in columns if after != NONE]


def test_words_of_parity():
    words = np.array([[2, 1, 0, 1, 1], [2, 0, 0, 1, 0]])
    assert PARITY.run(words).tolist() == [[NONE, 1, 1, 0, 1], [NONE, 0, 0, 1, 1]]


@pytest.mark.parametrize("word", [[0], [2, 1, 2], [2, 2, 0]])
def test_what_is_no_word(word):
    first = next(n for n in range(1, 4) if word[:n] not in ([2], [2, 1]))
    with pytest.raises(ValueError, match=re.escape(f"`tokens` must be words of the automaton, got {word[:first]}.")):
        PARITY.run(np.array([[2] + [0] * (len(word) - 1), word]))


def test_a_token_before():
    bare = Automaton([[0, 1, -1], [1, 0, -1]], [[0, 1, -1], [1, 0, -1]])
    preceded = bare.preceded_by(2)
    assert preceded.start == 2
    assert_same_tables(preceded.in_order(), PARITY)
    assert_same_tables(PARITY.minimal(), PARITY)


def test_states_that_are_alike_become_one():
    # 1 and 3 say the same for ever; no word leads to 2
    automaton = Automaton([[1, 3], [0, 1], [2, 2], [0, 3]], [[0, 1], [1, 1], [0, 0], [1, 1]])
    assert_same_tables(automaton.minimal(), Automaton([[1, 1], [0, 1]], [[0, 1], [1, 1]]))


def test_a_missing_token_tells_states_apart():
    automaton = Automaton([[1, 2], [0, -1], [0, 0]], [[-1, -1], [-1, -1], [-1, -1]])
    assert len(automaton.minimal().transitions) == 3
    assert len(Automaton([[1, 2], [0, 1], [0, 0]], automaton.outputs).minimal().transitions) == 1


# ---- against another library, which knows languages but no outputs: of the texts of (token, output)


@pytest.mark.parametrize("number", range(len(RANDOM)))
def test_the_least_one_says_the_same(number):
    automaton = RANDOM[number]
    least = automaton.minimal()
    theirs = as_dfa(automaton).minify()
    assert as_dfa(least) == as_dfa(automaton)
    assert len(least.transitions) == len(theirs.states)
    assert_same_tables(least.minimal(), least)
    assert_same_tables(least.in_order(), least)


def test_equal_if_and_only_if_the_least_ones_are():
    """Of machines of two states that differ by their numbering, and of all others, by the library's word for it."""
    machines = [random_automaton(seed, 2, 2, 1, 0.2) for seed in range(60)]
    least = [(m.transitions.tolist(), m.outputs.tolist()) for m in (machine.minimal() for machine in machines)]
    dfas = [as_dfa(machine) for machine in machines]
    found = {True: 0, False: 0}
    for a, b in itertools.combinations(range(len(machines)), 2):
        equal = dfas[a] == dfas[b]
        found[equal] += 1
        assert (least[a] == least[b]) == equal
    assert min(found.values()) > 20


# ---- of tasks


@pytest.mark.parametrize("task", FINITE, ids=lambda task: f"{task.name} {task.vocab_size}")
def test_the_automaton_of_a_task_says_its_targets(task):
    automaton, pad = task.automaton(), task.pad
    assert automaton.transitions.shape[1] == task.vocab_size
    words = set()
    for split, length in itertools.product(("train", "valid", "test"), (5, 9)):
        tokens, targets, _ = task.with_seq_len(length).sample(split, 64)
        said = automaton.run(tokens.numpy())
        scored = targets.numpy() >= 0
        assert (said == targets.numpy())[scored].all()
        assert pad is None or not (tokens == pad).any()
        words |= set(tokens[:, :3].flatten().tolist())
        if getattr(task, "scored", "every") == "every":  # else a word may end anywhere
            assert (said[~scored] == NONE).all()
    used = (automaton.transitions != NONE).any(0)
    assert words == set(np.flatnonzero(used).tolist())


@pytest.mark.parametrize("task", FINITE, ids=lambda task: f"{task.name} {task.vocab_size}")
def test_an_automaton_of_a_task_is_minimal(task):
    automaton = task.automaton()
    assert len(automaton.minimal().transitions) == len(automaton.transitions)


@pytest.mark.parametrize(("states", "symbols"), [(2, 2), (4, 3), (8, 2), (16, 4), (32, 3)])
def test_a_drawn_automaton_needs_all_of_its_states(states, symbols):
    """As another library counts the states of the language of its words and what they say, but for the empty word."""
    tables = set()
    for draw in range(5):
        automaton = drawn_automaton(states, symbols, draw)
        assert len(as_dfa(automaton).minify().states) == states
        assert set(automaton.outputs.flatten().tolist()) == {0, 1}
        for state in range(states):  # what it says is of the state after
            assert len(set(automaton.outputs[automaton.transitions == state].tolist())) <= 1
        assert drawn_automaton.__wrapped__(states, symbols, draw).transitions.tolist() == automaton.transitions.tolist()
        tables.add(str(automaton.transitions.tolist()))
    assert len(tables) > 1


def naive_words(task: RandomAutomaton, row: list[int]) -> list[int]:
    """The targets of a row, by its automaton, token by token."""
    automaton, targets, state = drawn_automaton(task.num_states, task.num_symbols, task.number), [], 0
    real = [token < task.num_symbols for token in row]
    for t, token in enumerate(row):
        targets.append(-100)
        if real[t]:
            if task.scored == "every" or not any(real[t + 1 :]):
                targets[t] = int(automaton.outputs[state, token])
            state = int(automaton.transitions[state, token])
    return targets


@pytest.mark.parametrize("scored", ["every", "last"])
@pytest.mark.parametrize("start", [False, True])
def test_targets_of_drawn_automata(scored, start):
    task = RandomAutomaton(seq_len=12, num_states=5, num_symbols=3, number=7, scored=scored, start=start)
    tokens, targets, _ = task.sample("train", 200)
    assert tokens.shape == (200, 12 + start)
    assert targets.tolist() == [naive_words(task, row) for row in tokens.tolist()]
    assert (tokens[:, 0] == task.vocab_size - 1).all() == start
    sizes = (tokens < 3).sum(1)
    assert (int(sizes.min()), int(sizes.max())) == (3, 12)
    assert not ((tokens[:, :-1] == task.pad) & (tokens[:, 1:] < 3)).any()  # the padding is behind


BAD_TASKS = [
    ({"num_states": 1}, ValueError, "`num_states` must be at least 2, got 1."),
    ({"num_states": 33}, ValueError, "`num_states` must be at most 32, got 33."),
    ({"num_symbols": 1}, ValueError, "`num_symbols` must be at least 2, got 1."),
    ({"number": -1}, ValueError, "`number` must be at least 0, got -1."),
    ({"number": "0"}, TypeError, "`number` must be an int, got '0'."),
    ({"start": 1}, TypeError, "`start` must be True or False, got 1."),
    ({"scored": "first"}, ValueError, "`scored` must be one of ['every', 'last'], got 'first'."),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_TASKS, ids=[str(case[0]) for case in BAD_TASKS])
def test_bad_draws(options, error, text):
    with pytest.raises(error, match="^" + re.escape(f"random-automaton: {text}") + "$"):
        RandomAutomaton(**options)


@pytest.mark.parametrize("name", INFINITE)
def test_tasks_without_a_finite_automaton(name):
    with pytest.raises(ValueError, match=f"^{name}: no finite automaton says its targets at every length.$"):
        build_task({"name": name}).automaton()


# ---- pictures


def test_a_small_one_is_a_graph():
    (axes,) = draw_automaton(PARITY).axes
    arrows = {(tuple(np.round(p._posA_posB, 6).flatten()), p.get_linestyle()) for p in axes.patches}
    assert len(arrows) == len(axes.patches) == 3
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(["0", "1", "2", "2", "1: 1", "1: 0", "stays\n0: 0", "stays\n0: 1"])
    assert render(axes.figure, "png").startswith(b"\x89PNG")


def test_a_large_one_is_a_table():
    automaton = PermutationComposition(group="S4", start=True).automaton().in_order()
    figure = draw_automaton(automaton)
    (image,) = figure.axes[0].images
    shown = image.get_array()
    assert (shown.mask == (automaton.transitions == NONE)).all()
    assert (shown.filled(NONE) == automaton.transitions).all()
    assert render(figure, "png").startswith(b"\x89PNG")


# ---- bad input

TABLE = [[0, 1], [1, 0]]
BAD = [
    ([0, 1], TABLE, 0, "`transitions` must be integers of shape (S, X) with S, X of at least 1, got int64 of shape "),
    (TABLE, [[0.0, 1.0]] * 2, 0, "`outputs` must be integers of shape (S, X) with S, X of at least 1, got float64 of "),
    (np.zeros((0, 2), int), TABLE, 0, "`transitions` must be integers of shape (S, X) with S, X of at least 1, got "),
    (TABLE, [[0, 1]], 0, "`outputs` must have the shape of `transitions` = (2, 2), got (1, 2)."),
    ([[0, 2], [1, 0]], TABLE, 0, "`transitions` must be in [-1, S) = [-1, 2), got 2."),
    ([[0, -2], [1, 0]], TABLE, 0, "`transitions` must be in [-1, S) = [-1, 2), got -2."),
    (TABLE, TABLE, 2, "`start` must be in [0, S) = [0, 2), got 2."),
    (TABLE, TABLE, -1, "`start` must be in [0, S) = [0, 2), got -1."),
    (TABLE, [[0, -2], [0, 0]], 0, "`outputs` must be at least -1, and -1 where there is no transition."),
    ([[0, -1], [1, 0]], TABLE, 0, "`outputs` must be at least -1, and -1 where there is no transition."),
]


@pytest.mark.parametrize(("transitions", "outputs", "start", "text"), BAD, ids=[case[3][:24] for case in BAD])
def test_bad_tables(transitions, outputs, start, text):
    with pytest.raises(ValueError, match="^" + re.escape(f"Automaton: {text}")):
        Automaton(transitions, outputs, start)


@pytest.mark.parametrize("token", [-1, 3, 1])
def test_bad_start_tokens(token):
    text = f"Automaton: `token` must be in [0, 3) and without a transition, got {token}."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Automaton([[0, 0, -1]], [[0, 0, -1]]).preceded_by(token)
