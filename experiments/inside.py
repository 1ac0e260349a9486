"""What did it learn? The inside of a model that follows a group: its numbers, a verdict per block, and pictures.

    python experiments/inside.py runs/quickstart/bd-lru-block-size-3-seed-0
    python experiments/inside.py RUN --out FOLDER      the pictures are in FOLDER, RUN/inside if it is left out

RUN is the folder of a run of `permutation`, `parity`, `modular-counting` or `cycle-navigation`, with a BD-LRU
or an H-LRU in its first layer: there a transition depends on nothing but its token. Deeper layers are not read.
"""

import argparse
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from statemix import TrainConfig, load_model
from statemix.analysis import (
    MAX_SUBSETS,
    Table,
    distance_to_permutation,
    gate_entropy,
    half_life,
    joint_kernel,
    leak,
    log_singular_values,
)
from statemix.backbone import Layer
from statemix.files import write_whole
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import TokenModel
from statemix.report.inside import Block, Group, figures, read_blocks
from statemix.report.tables import align
from statemix.style import render
from statemix.tasks import build_task
from statemix.tasks.base import Task
from statemix.tasks.permutation import PermutationComposition, group_table
from statemix.tasks.regular import Counter
from statemix.training.checkpoint import CONFIG_FILE, RunFolder


class TokenGates(NamedTuple):
    """Of each of X tokens in the first layer: transition (X, N, M, M), input gate (X, N, M), values (X, N, M or 1)."""

    transition: Tensor
    input_gate: Tensor
    values: Tensor


@torch.no_grad()
def token_gates(model: TokenModel) -> TokenGates:
    """What the first layer does at each token of the vocabulary, float64.

    Raises:
        ValueError: that layer is no BD-LRU or H-LRU.
    """
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    mixer = layer.mixer
    if not isinstance(mixer, LinearRecurrence):
        raise ValueError(f"inside: the first mixer must be a BD-LRU or an H-LRU, got {type(mixer).__name__}.")
    x = layer.mixer_norm(model.embedding(torch.arange(model.config["vocab_size"])))[None]
    transition, input_gate = mixer.transitions(x)
    values = mixer.values(x)
    values = values.unflatten(2, mixer.state_shape).mT if mixer.kind == "block" else values[..., None]
    return TokenGates(transition[0].double(), input_gate[0].double(), values[0].double())


def group_of(task: Task) -> tuple[list[int], Group]:
    """The tokens of a task that stand for elements of a group, and what they stand for.

    Raises:
        ValueError: the task follows no group.
    """
    if isinstance(task, Counter):
        name, tokens = f"Z{task.num_states}", list(range(task.num_inputs))
        steps = task.increments(np.arange(task.num_inputs)[None])[0].tolist()
        elements, labels = [step % task.num_states for step in steps], [f"{step:+d}" for step in steps]
    elif isinstance(task, PermutationComposition):
        name = task.group
        tokens = list(range(len(group_table(name))))
        if task.generators == "transpositions":
            tokens = [x for x, points in enumerate(group_action(name)) if sum(points != np.sort(points)) == 2]
        elements, labels = tokens, [group_labels(name)[x] for x in tokens]
    else:
        raise ValueError(f"inside: the task must follow a group, got {task.name!r}.")
    return tokens, Group(name, group_table(name), tuple(elements), tuple(labels), group_action(name)[elements])


def group_action(name: str) -> Table:
    """(G, n): where each element takes the points of S_n, A_n and Z_n; a product has the points of all its factors."""
    action: Table = np.zeros((1, 0), dtype=np.int64)
    for kind, digits in re.findall(r"([SAZ])(\d+)", name):
        n = int(digits)
        every = list(itertools.permutations(range(n)))
        even = [x for x in every if sum(a > b for a, b in itertools.combinations(x, 2)) % 2 == 0]
        cyclic = [tuple((i + x) % n for i in range(n)) for x in range(n)]
        factor = np.array({"S": every, "A": even, "Z": cyclic}[kind])
        action = np.array([[*first, *(second + action.shape[1])] for first in action for second in factor])
    return action


def group_labels(name: str) -> list[str]:
    """Cycles of permutations, "(0 1)(2 3)" and "e"; numbers in a cyclic group; both with a comma in a product."""
    labels = [
        [str(x) for x in range(int(factor[1:]))]
        if factor[0] == "Z"
        else [cycles(x) for x in group_action(factor).tolist()]
        for factor in re.findall(r"[SAZ]\d+", name)
    ]
    return [", ".join(parts) for parts in itertools.product(*labels)]


def cycles(permutation: Sequence[int]) -> str:
    """A permutation as its cycles: [1, 0, 2] is "(0 1)"; "e" for the identity."""
    text, seen = "", set()
    for start in range(len(permutation)):
        cycle = [start]
        while (following := permutation[cycle[-1]]) != start:
            cycle.append(following)
        if start not in seen and len(cycle) > 1:
            text += f"({' '.join(map(str, cycle))})"
        seen.update(cycle)
    return text or "e"


def read_words(
    gates: TokenGates, tokens: Sequence[int], group: Group, start: int | None, lengths: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """States (B, M, N) after uniform words of each length, and the products (B,) of their elements.

    A plain loop over h_t = A_t h_{t-1} + a0_t * v_t, from zero, or from what the token `start` makes of it.
    """
    rng, drive = np.random.default_rng(0), gates.input_gate * gates.values
    table, elements = group.table, np.array(group.elements)
    count = max(2000, 40 * len(table))  # of which a half decides what the other half is measured by
    state = torch.zeros(count, *drive.shape[1:], dtype=torch.float64)
    if start is not None:
        state = state + drive[start]
    products = np.full(count, (table == np.arange(len(table))).all(1).argmax())
    read = {}
    for length in range(1, max(lengths) + 1):
        drawn = rng.integers(len(tokens), size=count)
        token = torch.tensor(tokens)[drawn]
        state = (gates.transition[token] @ state[..., None])[..., 0] + drive[token]
        products = table[products, elements[drawn]]
        if length in lengths:
            read[length] = state.mT, torch.from_numpy(products.astype(np.int64))
    return read


def number_rows(transition: Tensor, input_gate: Tensor, blocks: Sequence[Block]) -> list[list[str]]:
    """A head and a row per verdict: how many blocks, and means over their tokens and rows; of half-lives the median.

    The singular values are those of products of 64 uniform tokens between the components that represent something, or
    between all: the largest and the smallest, geometric means over blocks and words.
    """
    rows = [["act as", "blocks", "distance", "leak", "entropy", "half-life", "after 64 steps: largest", "smallest"]]
    distance = distance_to_permutation(transition, signed=True)
    entropy = gate_entropy(torch.cat([transition, input_gate[..., None]], dim=-1))
    drawn = torch.randint(len(transition), (64, 16), generator=torch.Generator().manual_seed(0))
    singular: dict[int, Tensor] = {}
    for block in blocks:
        matrices = transition[:, block.number]
        if block.found is not None:
            distance[:, block.number] = block.found.distance
            matrices = matrices[:, block.found.components][:, :, block.found.components]
        if matrices.shape[-1] <= MAX_SUBSETS:
            singular[block.number] = log_singular_values(matrices[drawn]).mean(0)
    for verdict in dict.fromkeys(block.verdict for block in blocks):
        chosen = [block.number for block in blocks if block.verdict == verdict]
        means = [f"{float(each[:, chosen].mean()):.3f}" for each in (distance, leak(transition), entropy)]
        lives = half_life(transition[:, chosen]).flatten().sort().values
        known = [singular[number] for number in chosen if number in singular]
        ends = [f"{math.exp(sum(float(logs[end]) for logs in known) / len(known)):.2g}" for end in (0, -1) if known]
        rows.append([verdict, str(len(chosen)), *means, f"{float(lives[len(lives) // 2]):,.0f}", *(ends or ["", ""])])
    return rows


def main() -> None:
    """Read the run, print its numbers, write its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    task = build_task(TrainConfig.load(arguments.run / CONFIG_FILE).task)
    checkpoint = RunFolder(arguments.run).checkpoint("best")
    if checkpoint is None:
        raise ValueError(f"inside: there is no checkpoint in '{arguments.run}' yet.")
    model = load_model(checkpoint)
    tokens, group = group_of(task)
    gates = token_gates(model)
    transition, input_gate = gates.transition[tokens], gates.input_gate[tokens]
    # a token beyond the group's begins each sequence: it loads the state, which the others permute
    size = len(group.table)
    start = size if isinstance(task, PermutationComposition) and len(gates.transition) == size + 1 else None

    blocks = read_blocks(transition, group)
    count, order = transition.shape[1], transition.shape[2]
    print(f"{arguments.run}: {group.name}, {len(tokens)} tokens, {count} blocks of {order}", end="")
    print(f", layer 1 of {len(model.layers)}, the state loaded by {'a token' if start is not None else 'the inputs'}\n")
    print(align(number_rows(transition, input_gate, blocks), markdown=False), end="\n\n")
    for block in blocks:
        if block.found is not None and block.found.composition.image_order > 1:
            at = " ".join(map(str, sorted(block.found.components)))
            worst, how = float(block.found.distance.max()), block.found.composition.order
            print(f"block {block.number} composes as {block.verdict}: components {at}, {how}, distances to {worst:.3f}")
    apart = size // max(1, len(joint_kernel([block.found.composition for block in blocks if block.found])) or size)
    print(f"together they tell {apart} of {size} elements apart")

    out = arguments.out or arguments.run / "inside"
    out.mkdir(parents=True, exist_ok=True)
    lengths = (max(task.seq_len // 4, 2), task.seq_len, 4 * task.seq_len)
    states = read_words(gates, tokens, group, start, lengths)
    for name, figure in figures(transition, input_gate, group, states).items():
        for kind in ("png", "svg"):
            write_whole(out / f"{name}.{kind}", render(figure, kind))
    print(f"pictures: {out}")


if __name__ == "__main__":
    main()
