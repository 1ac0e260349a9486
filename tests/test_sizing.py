"""Sizes and budgets: counts are those of the mixers, the width found is the best one, and its distance is told."""

import dataclasses
import json
import re

import pytest
import torch

from statemix.mixers import MIXERS, build_mixer
from statemix.sizing import Solution, measure, solve, table

each_mixer = pytest.mark.parametrize("mixer", MIXERS)


def counted(spec, d_model):
    """Parameters, and the state that a call returns."""
    mixer = build_mixer(spec, d_model)
    return sum(p.numel() for p in mixer.parameters()), mixer(torch.zeros(1, 1, d_model))[1].numel()


COUNTS = [  # mixer, its sizes from d_model on, options, state shape, parameters
    # N M ((M + 1)(D + 1) + 2 D)
    ("bd_lru", (5, 7, 1), {}, (1, 7), 7 * 1 * (2 * 6 + 10)),
    ("bd_lru", (8, 3, 4), {}, (4, 3), 3 * 4 * (5 * 9 + 16)),
    ("bd_lru", (1, 1, 2), {}, (2, 1), 1 * 2 * (3 * 2 + 2)),
    ("bd_lru", (8, 3, 4), {"selective": False}, (4, 3), 3 * 4 * (5 + 16)),
    # N (M + 1)(2 D + 1)
    ("h_lru", (5, 7, 1), {}, (1, 7), 7 * 2 * 11),
    ("h_lru", (8, 3, 4), {}, (4, 3), 3 * 5 * 17),
    ("h_lru", (8, 3, 4), {"form": "observer"}, (4, 3), 3 * 5 * 17),
    ("h_lru", (8, 3, 4), {"selective": False}, (4, 3), 3 * (5 + 5 * 8)),
    # 4 H (D + H + 2) + H D
    ("lstm", (5, 7), {}, (2, 7), 4 * 7 * 14 + 35),
    ("lstm", (8, 1), {}, (2, 1), 4 * 1 * 11 + 8),
    # 3 H (D + H + 2) + H D
    ("gru", (5, 7), {}, (1, 7), 3 * 7 * 14 + 35),
    # N (4 D + 3) + D
    ("lru", (5, 7), {}, (2, 7), 7 * 23 + 5),
    # 2 D I + (conv_size + 1) I + 12 I + 2 H (3 I + 1) + 2 I + I D, I = H P; the state is H (P (P + 1) + 1) + (K - 1) I
    ("mlstm", (5, 3), {}, (1, 4 * 13 + 3 * 12), 120 + 5 * 12 + 12 * 12 + 8 * 37 + 24 + 60),
    ("mlstm", (5, 6), {"num_heads": 2, "conv_size": 2}, (1, 2 * 43 + 12), 120 + 3 * 12 + 12 * 12 + 4 * 37 + 24 + 60),
    # D (I + J + H) + (K + 1) J + 3 H + I + I D, I = H P, J = I + 2 G N; the state is H P N + (K - 1) J
    ("mamba2", (5, 3), {}, (1, 12 * 64 + 3 * 140), 5 * (12 + 140 + 4) + 5 * 140 + 12 + 12 + 60),
    (
        "mamba2",
        (5, 3),
        {"num_heads": 6, "state_dim": 7, "num_groups": 2, "conv_size": 3},
        (1, 18 * 7 + 2 * 46),
        5 * (18 + 46 + 6) + 4 * 46 + 18 + 18 + 90,
    ),
    # D (3 H K + H) + 3 H K conv_size + K + H K D; the state is H K K + (conv_size - 1) 3 H K
    ("delta_net", (5, 3), {}, (1, 4 * 9 + 3 * 36), 5 * 40 + 36 * 4 + 3 + 60),
    ("delta_net", (5, 3), {"num_heads": 2, "conv_size": 0}, (1, 18), 5 * 20 + 3 + 30),
    # D (C + 2 H + H V) + conv_size C + V + 2 H + H V D, V = E K, C = 2 H K + H V
    ("gated_delta_net", (5, 3), {}, (1, 4 * 18 + 3 * 48), 5 * (48 + 8 + 24) + 4 * 48 + 6 + 8 + 24 * 5),
    (
        "gated_delta_net",
        (5, 3),
        {"num_heads": 2, "expand_values": 3, "conv_size": 2},
        (1, 2 * 27 + 30),
        5 * (30 + 4 + 18) + 2 * 30 + 9 + 4 + 18 * 5,
    ),
    # D (C + H R) + conv_size C + V + H V D, C = H (K + R (K + V)); gated, D (H + H V) + 2 H more
    ("delta_product", (5, 3), {}, (1, 4 * 9 + 3 * 60), 5 * (60 + 8) + 4 * 60 + 3 + 60),
    (
        "delta_product",
        (5, 3),
        {"num_heads": 2, "rank": 3, "expand_values": 2, "gated": True},
        (1, 2 * 18 + 3 * 60),
        5 * (60 + 6) + 4 * 60 + 6 + 12 * 5 + 5 * (2 + 12) + 4,
    ),
    # D K + K N^2 + 2 E N (D + 1) + 2 N (E N + 1) + D (4 N + 1)
    ("pd_ssm", (5, 3), {}, (2, 3), 5 * 8 + 8 * 9 + 12 * 6 + 6 * 7 + 5 * 13),
    ("pd_ssm", (5, 4), {"dictionary_size": 2, "expand": 3}, (2, 4), 5 * 2 + 2 * 16 + 24 * 6 + 8 * 13 + 5 * 17),
    # 4 D H P; the state is W (2 H P + 1)
    ("attention", (5, 2, 9), {}, (9, 17), 4 * 5 * 8),
    ("attention", (5, 4, 2), {"num_heads": 3}, (2, 25), 4 * 5 * 12),
]


@pytest.mark.parametrize(("mixer", "sizes", "options", "state_shape", "parameters"), COUNTS)
def test_state_and_parameter_counts(mixer, sizes, options, state_shape, parameters):
    layer = MIXERS[mixer](*sizes, **options)
    assert layer.d_model == sizes[0]
    assert layer.state_shape == state_shape
    assert layer.state_size == state_shape[0] * state_shape[1]
    assert sum(p.numel() for p in layer.parameters()) == parameters


def test_every_mixer_is_counted():
    assert {mixer for mixer, *_ in COUNTS} == set(MIXERS)


@each_mixer
def test_measure_counts_what_is_there_without_drawing_a_number(mixer):
    spec = {"name": mixer, MIXERS[mixer].width_option: 4, **MIXERS[mixer].table_options}
    before = torch.random.get_rng_state()
    measured = measure(spec, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measured == counted(spec, 8)


@each_mixer
@pytest.mark.parametrize("budget", [30_000, 200_000])
def test_parameters_come_within_2_percent_of_a_budget(mixer, budget):
    solution = solve(mixer, 64, budget=budget, **MIXERS[mixer].table_options)
    assert (solution.parameters, solution.state_size) == counted(solution.spec, 64)
    assert solution.off == pytest.approx(solution.parameters / budget - 1)
    assert abs(solution.off) <= 0.02 or nothing_nearer(solution, 64, budget, 0)
    if budget == 200_000:
        assert abs(solution.off) <= 0.02


def nothing_nearer(solution: Solution, d_model: int, budget: int, which: int) -> bool:
    """Whether no width beside the one found, nor half or twice of it, has less of a distance."""
    knob = MIXERS[solution.spec["name"]].width_option
    step, width = 2 if solution.spec["name"] == "attention" else 1, solution.spec[knob]
    others = [step * (width // step // 2), *(width + step * i for i in (-2, -1, 0, 1, 2)), 2 * width]
    sizes = [measure(solution.spec | {knob: other}, d_model)[which] for other in others if other >= step]
    return min(abs(size / budget - 1) for size in sizes) == abs(solution.off)


@each_mixer
@pytest.mark.parametrize(("what", "which", "budget"), [("parameters", 0, 3000), ("state", 1, 700)])
def test_the_nearest_width_is_found(mixer, what, which, budget):
    options = MIXERS[mixer].table_options | ({"context": 10} if mixer == "attention" else {})
    solution = solve(mixer, 8, budget=budget, what=what, **options)
    assert nothing_nearer(solution, 8, budget, which)


def test_solutions_by_hand():
    # BD-LRU: N M ((M + 1)(D + 1) + 2 D) = N 2 (3 * 5 + 8) = 46 N
    assert solve("bd_lru", 4, budget=137, block_size=2).spec["num_blocks"] == 3  # 138
    assert solve("bd_lru", 4, budget=115, block_size=2).spec["num_blocks"] == 2  # 92 and 138 are as near
    solution = solve("bd_lru", 4, budget=117, block_size=2)
    assert dataclasses.astuple(solution)[1:] == (138, 6, 138 / 117 - 1)
    assert solve("bd_lru", 4, budget=23, block_size=2).off == 1.0  # the narrowest, twice the budget
    assert solve("lstm", 4, budget=7, what="state").spec == {"name": "lstm", "hidden_size": 3}
    assert solve("attention", 4, budget=41, what="state", context=2, num_heads=1).spec["head_dim"] == 10


@pytest.mark.parametrize(("num_heads", "step"), [(1, 4), (2, 2), (3, 4), (6, 2), (8, 1)])
def test_widths_are_those_that_the_mixer_takes(num_heads, step):
    solutions = [solve("mlstm", 8, budget=budget, num_heads=num_heads) for budget in (1500, 3000, 6000, 9000)]
    found = {solution.spec["head_dim"] for solution in solutions}
    assert all(width % step == 0 for width in found)
    assert len(found) == 4


def test_a_solution_is_a_spec_that_survives_json():
    solution = solve("delta_product", 16, budget=5000, rank=3, gated=True)
    assert solution.spec["rank"] == 3
    assert solution.spec["conv_size"] == 4  # a default
    assert json.loads(json.dumps(solution.spec)) == solution.spec


@pytest.mark.parametrize("what", ["parameters", "state"])
def test_a_table_has_every_mixer_and_says_how_far_it_is(what):
    rows = table(32, 600, what)
    assert [row.spec["name"] for row in rows] == list(MIXERS)
    for row in rows:
        assert row.off == (row.parameters if what == "parameters" else row.state_size) / 600 - 1
    offs = {row.spec["name"]: row.off for row in rows}
    assert offs["attention"] > 0.5  # it has no narrower one, of 1,024 parameters or a state of 2,176
    assert rows[-1].spec["head_dim"] == 2


BAD = [  # mixer, budget, other options, exception, message
    ("bd_lru", 22, {"block_size": 2}, ValueError, "the narrowest 'bd_lru' has 46 parameters at d_model=4, more"),
    ("attention", 9, {"what": "state", "context": 2}, ValueError, "has 34 state at d_model=4, more than twice"),
    ("bdlru", 9, {}, ValueError, "mixer: `name` must be one of ['attention', 'bd_lru', "),
    ("gru", 9, {"what": "flops"}, ValueError, "`what` must be one of ['parameters', 'state'], got 'flops'."),
    ("gru", 0, {}, ValueError, "solve: `budget` must be at least 1, got 0."),
    ("gru", 1.5, {}, TypeError, "solve: `budget` must be an int, got 1.5."),
    ("gru", 9, {"d_model": 0}, ValueError, "solve: `d_model` must be at least 1, got 0."),
    ("gru", 99, {"hidden_size": 3}, ValueError, "`hidden_size` is what is solved for in 'gru', got hidden_size=3."),
    ("bd_lru", 99, {}, ValueError, "mixer: 'bd_lru' needs the option `block_size`"),
    ("gru", 99, {"depth": 3}, ValueError, "mixer: `depth` is not an option of 'gru'"),
    ("delta_product", 999, {"rank": 9}, ValueError, "DeltaProduct: `rank` must be at most 4, got 9."),
]


@pytest.mark.parametrize(("mixer", "budget", "options", "error", "text"), BAD)
def test_bad_questions(mixer, budget, options, error, text):
    options = {"d_model": 4} | options
    with pytest.raises(error, match=re.escape(text)):
        solve(mixer, budget=budget, **options)


def test_bad_tables():
    with pytest.raises(ValueError, match=r"`what` must be one of \['parameters', 'state'\], got 'size'\."):
        table(8, 100, "size")
