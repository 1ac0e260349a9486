"""Claim 4, why relu does poorly: gates that start at zero get no gradient. Start them above zero, and it learns.

    python experiments/relu.py          writes results/relu.csv: some 3 minutes on one core

S3 at length 16 with a start token, one BD-LRU layer, 300 steps, as in normalization.py, with a number added to the
biases of all raw gates at the start. After training it counts, over the tokens of the group, the gates that are exactly
zero, and the rows in which all gates of the state are: such a component remembers nothing at that token.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from statemix import SequenceModel
from statemix.gates import normalize
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.report.tables import align
from statemix.runs.read import Row, write_table
from statemix.runs.statistics import interval
from statemix.tasks import IGNORE_INDEX, PermutationComposition
from statemix.training.config import OptimizerConfig
from statemix.training.optimizer import learning_rate

TASK = PermutationComposition("S3", seq_len=16, start=True)
STEPS, SEEDS = 300, (0, 1, 2)
TRIED = (("relu", 0.0), ("relu", 1.0), ("relu", 3.0), ("silu", 0.0), ("softmax", 0.0))


def run(normalization: str, bias: float, seed: int) -> Row:
    """Train one model; its token accuracy on the test split and its zero gates."""
    torch.manual_seed(seed)
    spec = {"name": "bd_lru", "num_blocks": 15, "block_size": 3, "normalization": normalization}
    model = SequenceModel(TASK.vocab_size, 64, 1, spec)
    layer = model.mixers[0]
    assert isinstance(layer, LinearRecurrence)
    assert layer.raw_gates.projection is not None
    biases = layer.raw_gates.projection.bias
    with torch.no_grad():
        biases.add_(bias)
    schedule = OptimizerConfig(lr=6e-3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=schedule.betas, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step, STEPS)
        tokens, targets, _ = TASK.sample("train", 64, seed=seed, index=step)
        logits, _ = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        tokens, targets, _ = TASK.sample("test", 1024)
        right = (model(tokens)[0].argmax(-1) == targets)[:, 1:].float().mean().item()
        elements = model.layers[0].mixer_norm(model.embedding.weight)[None, :-1]  # type: ignore[operator]
        zero = normalize(layer.raw_gates(elements), normalization, dim=-2) == 0
    return {
        "normalization": normalization,
        "added to the biases": bias,
        "seed": seed,
        "token accuracy": right,
        "gates at zero": zero.float().mean().item(),
        "rows that remember nothing": zero[..., :-1, :].all(-2).float().mean().item(),
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Means over the seeds, with the 95 % interval of the accuracy."""
    figures = ("token accuracy", "gates at zero", "rows that remember nothing")
    lines = [["", *figures]]
    for normalization, bias in TRIED:
        own = [row for row in rows if (row["normalization"], row["added to the biases"]) == (normalization, bias)]
        accuracy, half_width, _ = interval([row[figures[0]] for row in own])
        zeros = [f"{mean(row[key] for row in own):.2f}" for key in figures[1:]]
        lines.append([f"{normalization}, biases + {bias:g}", f"{accuracy:.3f} ± {half_width:.3f}", *zeros])
    return lines


def main() -> None:
    """Train all, write the table, print the means."""
    torch.set_num_threads(1)
    rows = [run(normalization, bias, seed) for normalization, bias in TRIED for seed in SEEDS]
    write_table(rows, Path("results"), "relu")
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
