"""report/inside.py and experiments/inside.py: on transitions whose group is planted, so that the truth is known."""

import itertools
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from model_helpers import solved_model
from run_helpers import small_config

from statemix import SequenceModel, train
from statemix.report.inside import (
    FAITHFUL,
    NONE,
    OTHER,
    QUOTIENT,
    TRIVIAL,
    Group,
    figures,
    group_picture,
    read_blocks,
    sharpness,
    spectra,
    trajectories,
)
from statemix.style import INK, render
from statemix.tasks.base import Batch
from statemix.tasks.permutation import group_table
from statemix.training.checkpoint import RunFolder

INSIDE = Path(__file__).parents[1] / "experiments" / "inside.py"

LABELS = ("e", "(1 2)", "(0 1)", "(0 1 2)", "(0 2 1)", "(0 2)")
SIGNS = (1, -1, -1, 1, 1, -1)  # of the elements of S3


def symmetric(n: int) -> Group:
    action = np.array(list(itertools.permutations(range(n))))
    names = LABELS if n == 3 else tuple("".join(map(str, x)) for x in action)
    return Group(f"S{n}", group_table(f"S{n}"), tuple(range(len(action))), names, action)


def planted() -> torch.Tensor:
    """Four blocks of three components for the tokens of S3: mixed, its sign by 0 and 2, S3 on 2, 0, 1, and at rest."""
    action = symmetric(3).action
    blocks = torch.full((6, 4, 3, 3), 0.25, dtype=torch.float64)
    for x, image in enumerate(action):
        to = [0, 2] if SIGNS[x] > 0 else [2, 0]
        blocks[x, 1] = 0
        blocks[x, 1, [0, 2], to] = 0.95
        blocks[x, 1, 1, [0, 1]] = 0.5  # a component that only follows
        places = torch.tensor([2, 0, 1])
        blocks[x, 2] = 0.01
        blocks[x, 2, places, places[image]] = 0.98
        blocks[x, 3] = torch.eye(3)
    return blocks


def by_number(blocks):
    return {block.number: block for block in blocks}


def test_blocks_are_read():
    blocks = read_blocks(planted(), symmetric(3))
    assert [block.number for block in blocks] == [2, 1, 3, 0]
    assert [block.verdict for block in blocks] == ["S3", "its sign", TRIVIAL, NONE]
    assert [block.color for block in blocks] == [FAITHFUL, QUOTIENT, OTHER, OTHER]
    assert blocks[0].components == (2, 0, 1)
    assert blocks[1].components == (0, 2, 1)
    assert [all(block.right) for block in blocks] == [True, True, False, False]
    assert not any(blocks[3].right)


def test_a_block_that_is_wrong_at_one_token_is_right_at_the_others():
    transition = planted()[:, 2:3]
    transition[4, 0, 1] = 0  # a row that forgets: the nearest permutation is still the token's, but it is 1 away
    [block] = read_blocks(transition, symmetric(3))
    assert block.verdict == NONE
    assert block.components == (2, 0, 1)
    assert block.right == (True, True, True, True, False, True)
    [axes] = group_picture(transition, symmetric(3), [block]).axes
    assert "block 0\n5/6" in {text.get_text() for text in axes.texts}
    assert frames(axes) == {OTHER: 5}


def test_quotients_have_names():
    s4, action = symmetric(4), symmetric(4).action
    # x permutes the three ways to part four points into pairs: S4 modulo four elements is S3
    pairings = [({0, 1}, {2, 3}), ({0, 2}, {1, 3}), ({0, 3}, {1, 2})]
    block = torch.zeros(24, 1, 4, 4, dtype=torch.float64)
    for x, i in itertools.product(range(24), range(3)):
        image = {int(action[x, p]) for p in pairings[i][0]}
        [to] = [j for j, pairing in enumerate(pairings) if image in pairing]
        block[x, 0, i, to] = 1
    [found] = read_blocks(block, s4)
    assert (found.verdict, found.components, found.color) == ("S3", (0, 1, 2, 3), QUOTIENT)
    four = Group("Z4", group_table("Z4"), (0, 1, 2, 3), ("0", "1", "2", "3"), None)
    turn = torch.tensor([[[[(-1.0) ** x]]] for x in range(4)], dtype=torch.float64)
    assert [block.verdict for block in read_blocks(turn, four)] == ["Z2"]
    pair = Group("Z2xZ2xZ2", group_table("Z2xZ2xZ2"), tuple(range(8)), tuple("01234567"), None)
    signs = torch.tensor([[[[1.0 - (x & 2), 0], [0, 1.0 - 2 * (x & 1)]]] for x in range(8)], dtype=torch.float64)
    assert [block.verdict for block in read_blocks(signs, pair)] == ["order 4"]


def test_tokens_that_generate_a_part_of_the_group():
    s3 = symmetric(3)
    part = Group("S3", s3.table, (3,), ("(0 1 2)",), s3.action[[3]])
    assert [b.verdict for b in read_blocks(planted()[[3], 2:3], part)] == ["Z3"]  # a third of nothing more is seen


def frames(axes) -> dict[str, int]:
    """How many thick frames there are of each colour."""
    thick = [patch for patch in axes.patches if patch.get_linewidth() > 1]
    colors = [to_hex(patch.get_edgecolor()) for patch in thick]
    return {color: colors.count(color) for color in set(colors)}


def test_the_picture_of_the_group():
    group = symmetric(3)
    figure = group_picture(planted(), group, read_blocks(planted(), group))
    figure.draw_without_rendering()
    [axes] = figure.axes
    title = "S3 in 4 blocks: 1 act as S3, 1 as its sign, 1 as identity, 1 as no group"
    assert axes.get_title(loc="left").replace("\n", " ") == title
    assert frames(axes) == {FAITHFUL: 6, QUOTIENT: 6}
    texts = {text.get_text(): text for text in axes.texts}
    assert {*LABELS, "block 2\nS3", "block 1\nits sign", "block 3\nidentity", "block 0\n0/6"} <= texts.keys()
    heights = [texts[label].get_position()[1] for label in ("e", "(1 2)", "(0 1)", "(0 2)", "(0 1 2)", "(0 2 1)")]
    assert heights == sorted(heights)  # by class
    # the block in the order of the points looks like the group: its large weights are where those of the group are
    drawn = []
    for each in axes.collections:
        boxes = np.array([path.get_extents().p0 for path in each.get_paths()])
        drawn.append(boxes[each.get_facecolor()[:, 3] > 0.9] if len(boxes) else boxes)
    left = 3 * 1.3  # of the first block
    wanted = [boxes for boxes in drawn if len(boxes) and boxes[:, 0].max() < left]
    assert len(wanted) == 6
    for boxes in wanted:
        shifted = boxes + np.array([left, 0])
        assert any(len(b) == 3 and np.allclose(np.sort(b, axis=0), np.sort(shifted, axis=0)) for b in drawn)


def test_a_large_group_is_shown_by_some_of_each_class():
    group = symmetric(4)
    transition = torch.eye(4, dtype=torch.float64)[torch.from_numpy(group.action)][:, None].repeat(1, 20, 1, 1)
    figure = group_picture(transition, group, read_blocks(transition, group))
    [axes] = figure.axes
    rows = [text.get_text() for text in axes.texts if text.get_text() in group.labels]
    assert len(rows) == 1 + 4 * 3
    assert figure.get_figheight() < 9
    assert sum(text.get_text().startswith("block") for text in axes.texts) == 8
    assert any(text.get_text().startswith("13 of 24 tokens. Framed") for text in axes.texts)
    assert frames(axes) == {FAITHFUL: 13 * 8}


def test_the_spectra_lie_where_the_group_has_them():
    group = symmetric(3)
    transition = planted()[:, 2:3]
    figure = spectra(transition, group, read_blocks(transition, group))
    figure.draw_without_rendering()
    [axes] = figure.axes
    scatters = [c for c in axes.collections if len(c.get_offsets())]
    cycle = np.asarray(scatters[-1].get_offsets()) - [2 * 2.5, 0]  # two 3-cycles, in the third circle
    radius = 0.97  # of 0.98 at the place and 0.01 elsewhere; the mean has 1
    roots = [(1, 0), (-radius / 2, radius * math.sqrt(0.75)), (-radius / 2, -radius * math.sqrt(0.75))]
    for root in roots:
        assert np.isclose(cycle, root, atol=1e-6).all(1).sum() == 2
    assert [text.get_text() for text in axes.texts] == ["e", "(1 2) and 2 like it", "(0 1 2) and 1 like it"]


def test_histograms_count_every_token_in_every_block():
    transition = planted()
    gate = 1 - transition.sum(-1)
    figure = sharpness(transition, gate, symmetric(3), read_blocks(transition, symmetric(3)))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    counts = [sum(bar.get_height() for stack in axes.containers for bar in stack) for axes in panels]
    assert counts == [24, 24 * 3, 24 * 3, 24]
    first = panels[0].containers[0]  # the block that is S3, at distance sqrt(3 (0.02^2 + 2 0.01^2))
    [bar] = [bar for bar in first if bar.get_height()]
    assert bar.get_x() <= math.sqrt(3 * (0.02**2 + 2 * 0.01**2)) <= bar.get_x() + bar.get_width()


def test_states_of_an_exact_tracker_are_one_point_per_product():
    group = symmetric(3)
    exact = torch.eye(3, dtype=torch.float64)[torch.from_numpy(group.action)]
    transition = exact[:, None].repeat(1, 2, 1, 1)
    rng = torch.Generator().manual_seed(0)
    words = {}
    for length in (2, 8, 64):
        tokens = torch.randint(6, (600, length), generator=rng)
        state = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64).repeat(600, 1)
        product = torch.zeros(600, dtype=torch.int64)
        for token in tokens.T:
            state = (exact[token] @ state[..., None])[..., 0]
            product = torch.from_numpy(group.table.astype(np.int64))[product, token]
        words[length] = state[..., None].repeat(1, 1, 2), product
    figure = trajectories(words, group, read_blocks(transition, group))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [
        f"{view}, {length} tokens: 100%" for view in ("block 0", "all blocks") for length in (2, 8, 64)
    ]
    for axes in panels:
        [scatter] = axes.collections
        points = np.asarray(scatter.get_offsets())
        spread = np.ptp(points, axis=0).max()
        assert len(np.unique(np.round(points / spread, 6), axis=0)) == 6
    words[64] = words[64][0], words[64][1].roll(1)  # states that say nothing of the product
    figure = trajectories(words, group, read_blocks(transition, group))
    last = [axes for axes in figure.axes if axes.get_visible()][-1].get_title(loc="left")
    assert int(last.rpartition(": ")[2].rstrip("%")) < 35


def test_every_picture_is_five_inches_wide_and_takes_the_ink_of_its_page():
    transition = planted()
    states = {n: (torch.randn(200, 3, 4, dtype=torch.float64), torch.arange(200) % 6) for n in (2, 4, 8)}
    drawn = figures(transition, 1 - transition.sum(-1), symmetric(3), states)
    assert list(drawn) == ["group", "spectra", "sharpness", "states"]
    for name, figure in drawn.items():
        assert figure.get_figwidth() == 5.0, name
        svg = render(figure, "svg").decode()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert INK in svg
        assert "#000000" not in svg.replace("stroke: #000000; stroke-width: 0", ""), name
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        width, height = figure.bbox.size
        for axes in figure.axes:
            for text in (*axes.texts, axes.title, axes._left_title):
                if axes.get_visible() and text.get_text():
                    box = text.get_window_extent(renderer)
                    inside = -1 <= box.x0 < box.x1 <= width + 1 and -1 <= box.y0 < box.y1 <= height + 1
                    assert inside, (name, text.get_text())


def exact_model() -> SequenceModel:
    """S3 and a token, 6, that loads the state: block 0 follows the group and block 1 does nothing."""
    model = solved_model(3, blocks=2)
    with torch.no_grad():
        model.mixers[0].raw_gates.projection.weight.view(3, 4, 2, -1)[:, :, 1] = 0
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder in which the trained model is replaced by the exact one."""
    config = small_config(task={"name": "permutation", "group": "S3", "seq_len": 8}, steps=1)
    folder = tmp_path_factory.mktemp("inside") / "run"
    train(config, folder, progress=False)
    exact_model().save(RunFolder(folder).checkpoint("best"))
    return folder


def test_the_command_finds_the_group_in_a_model_that_has_it(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inside.py", str(run)])
    runpy.run_path(str(INSIDE), run_name="__main__")
    said = capsys.readouterr().out
    assert "S3, 6 tokens, 2 blocks of 3, layer 1 of 1, the state loaded by a token" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["S3", "1", "0.000", "0.000", "0.000", "inf", "1", "1"] in rows
    assert "block 0 composes as S3: components 0 1 2, antihomomorphism, distances to 0.000" in said
    assert "together they tell 6 of 6 elements apart" in said
    assert sorted(path.name for path in (run / "inside").iterdir()) == sorted(
        f"{name}.{kind}" for name in ("group", "spectra", "sharpness", "states") for kind in ("png", "svg")
    )


def test_the_elements_of_groups_have_their_points_and_labels():
    inside = runpy.run_path(str(INSIDE))
    for name in ("S4", "A4", "Z5", "Z2xS3", "A4xZ5"):
        table, action = group_table(name), inside["group_action"](name)
        assert len(set(map(tuple, action.tolist()))) == len(table) == len(set(inside["group_labels"](name)))
        rng = np.random.default_rng(0)
        for a, b in rng.integers(len(table), size=(200, 2)):
            assert (action[table[a, b]] == action[a][action[b]]).all()
    assert tuple(inside["group_labels"]("S3")) == LABELS
    assert inside["group_labels"]("Z2xS2") == ["0, e", "0, (0 1)", "1, e", "1, (0 1)"]
    assert inside["cycles"]([1, 0, 3, 4, 2]) == "(0 1)(2 3 4)"


def test_tasks_are_read_as_groups():
    inside = runpy.run_path(str(INSIDE))
    build = inside["build_task"]
    tokens, group = inside["group_of"](build({"name": "permutation", "group": "S3", "generators": "transpositions"}))
    assert (tokens, group.elements, group.labels) == ([1, 2, 5], (1, 2, 5), ("(1 2)", "(0 1)", "(0 2)"))
    tokens, group = inside["group_of"](build({"name": "cycle-navigation", "cycle_length": 5}))
    assert (tokens, group.name, group.elements, group.labels) == ([0, 1, 2], "Z5", (4, 0, 1), ("-1", "+0", "+1"))
    with pytest.raises(ValueError, match=r"^inside: the task must follow a group, got 'selective-copying'\.$"):
        inside["group_of"](build({"name": "selective-copying"}))
    model = SequenceModel(4, 8, 1, {"name": "lstm", "hidden_size": 8})
    with pytest.raises(ValueError, match=r"^inside: the first mixer must be a BD-LRU or an H-LRU, got LSTM\.$"):
        inside["token_gates"](model)


def test_the_moves_of_a_task_are_read_off_its_examples(monkeypatch):
    monkeypatch.syspath_prepend(INSIDE.parent)
    choose = runpy.run_path(str(INSIDE.with_name("choose_m.py")))
    moves_of, build = choose["moves_of"], choose["build_task"]
    moves, start = moves_of(build(choose["permutation"]("S3")))
    assert start == 0
    assert (moves[:6] == group_table("S3")).all()
    moves, start = moves_of(build({"name": "cycle-navigation", "seq_len": 12, "cycle_length": 5}))
    assert start == 0
    assert (moves[:5] == (np.arange(5)[:, None] + [-1, 0, 1]) % 5).all()
    for spec in ({"name": "permutation", "group": "S6", "seq_len": 2}, {"name": "parity", "scored": "last"}):
        with pytest.raises(ValueError, match=r"^choose_m: '\S+' must show every token in every state, from the first"):
            moves_of(build(spec))
    tokens = torch.randint(3, (4096, 5))
    late = SimpleNamespace(name="late", sample=lambda *_: Batch(tokens, tokens.roll(1, 1)))
    text = r"^choose_m: the targets of 'late' must be its states: one token leads to two"
    with pytest.raises(ValueError, match=text):
        moves_of(late)
