"""Which block size does a task need? One model with larger blocks than that is trained, and says it.

    python experiments/choose_m.py      three seeds of every task, results/choose_m.csv; it resumes, --jobs at a time

Then blocks of the size it says are trained, and of one less, which should not do. Of the held-out tasks Z7 needs more
than the large model has.

A trained block permutes some of its components on their own, and no more of them than the task needs (`inside.py`
shows it). `analysis.needed_block_size` finds these sets, and how large they must be to tell all states of the task
apart. It is given what the task's examples show, its states and how tokens move them, and no group. The answer is
"unknown" where the model found another way, as by counting the steps of short sequences. The method does not apply
where a target does not say the state, or where the state is not permuted, as in recall. The runs are in runs/choose-m.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inside import token_gates

from statemix import TrainConfig, load_model, train
from statemix.analysis import Table, needed_block_size
from statemix.report.tables import align
from statemix.runs.read import Row, write_table
from statemix.runs.statistics import interval
from statemix.tasks import IGNORE_INDEX, build_task
from statemix.tasks.base import Task
from statemix.training.checkpoint import RunFolder
from statemix.training.config import OptimizerConfig
from statemix.training.evaluate import evaluate
from statemix.training.loop import Result

SEEDS = (0, 1, 2)
LARGE = 6  # M of the one model
LONGER = 24  # twice the length of training: a sequence too long to count through
BASE = TrainConfig(
    mixer={"name": "bd_lru", "num_blocks": 16, "block_size": LARGE},
    optimizer=OptimizerConfig(lr=6e-3),
    steps=2000,
    stop_accuracy=0.999,
)


def permutation(group: str) -> dict[str, Any]:
    """The spec of the task of a group."""
    return {"name": "permutation", "group": group, "seq_len": 12}


MADE_ON = ("S2", "S3", "Z3")  # the method was made on these
TASKS: dict[str, dict[str, Any]] = {
    **{group: permutation(group) for group in (*MADE_ON, "Z2xZ2", "Z4", "Z5", "Z6", "Z7", "Z2xS3", "A4", "S4")},
    "parity": {"name": "parity", "seq_len": 12},
    "cycle of 5": {"name": "cycle-navigation", "seq_len": 12, "cycle_length": 5},
}


def moves_of(task: Task) -> tuple[Table, int]:
    """How tokens move the states of a task, from examples: (S, X), and the state in which a sequence begins.

    A state is known by its target; the beginning is the state that goes on as it does, if there is one, else the last.

    Raises:
        ValueError: a token leads from one target to different ones, so that targets are no states, or there are states
            in which not all tokens are seen.
    """
    batch = task.sample("train", 4096)
    tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
    start = int(targets.max()) + 1
    before = np.concatenate([np.full((len(targets), 1), start), targets[:, :-1]], axis=1)
    seen = (targets != IGNORE_INDEX) & (before != IGNORE_INDEX)
    steps = np.unique(np.stack([before[seen], tokens[seen], targets[seen]]), axis=1)
    moves = np.full((start + 1, int(tokens[seen].max(initial=0)) + 1), -1)
    moves[steps[0], steps[1]] = steps[2]
    if steps.shape[1] > (moves >= 0).sum():
        raise ValueError(f"choose_m: the targets of {task.name!r} must be its states: one token leads to two of them.")
    if (moves < 0).any():
        raise ValueError(f"choose_m: {task.name!r} must show every token in every state, from the first one on.")
    [alike, *_] = np.flatnonzero((moves == moves[start]).all(1))
    return moves, int(alike)


def trained(task: str, seed: int, block_size: int, out: Path) -> Result:
    """The result of a run, done before or now."""
    mixer = BASE.mixer | {"block_size": block_size}
    config = replace(BASE, task=TASKS[task], mixer=mixer, seed=seed)
    return train(config, out / f"{task.replace(' ', '-')}-block-size-{block_size}-seed-{seed}", progress=False)


def judge(task: str, seed: int, out: Path) -> Row:
    """What the large model says of a task, and the accuracy of blocks of that size and of one less."""
    torch.set_num_threads(1)
    large = trained(task, seed, LARGE, out)
    checkpoint = RunFolder(large.out).checkpoint("best")
    assert checkpoint is not None
    moves, start = moves_of(build_task(TASKS[task]))
    transition = token_gates(load_model(checkpoint)).transition[: moves.shape[1]]
    size = needed_block_size(transition, moves, start)
    row: Row = {"task": task, "seed": seed, "states": len(np.unique(moves)), "says": size or "unknown"}
    row |= {"steps": large.summary["steps"], "large": large.summary["valid"]["token_accuracy"]}
    longer = build_task(TASKS[task] | {"seq_len": LONGER})
    for name, smaller in (("that", size), ("one less", size and size - 1)):
        result = trained(task, seed, smaller, out) if smaller else None
        best = RunFolder(result.out).checkpoint("best") if result else None
        row[name] = result.summary["valid"]["token_accuracy"] if result else ""
        row[f"{name}, longer"] = evaluate(load_model(best), longer, "valid", 512, 64)["token_accuracy"] if best else ""
    return row


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line per task: what each seed's model said, and mean validation accuracies over the seeds that said a size."""
    short = TASKS["S2"]["seq_len"]
    accuracies = {
        f"M {LARGE}, {short}": "large",
        f"that M, {short}": "that",
        f"that M, {LONGER}": "that, longer",
        f"one less, {short}": "one less",
        f"one less, {LONGER}": "one less, longer",
    }
    lines = [["", "states", "says M, by seed", *accuracies]]
    for task in TASKS:
        own = [row for row in rows if row["task"] == task]
        says = ", ".join(row["says"] if row["says"] == "unknown" else f"{row['says']:.0f}" for row in own)
        means = []
        for key in accuracies.values():
            figures = [row[key] for row in own if row[key] != ""]
            middle, half_width, _ = interval(figures) if figures else (None, None, None)
            means.append(
                "" if middle is None else f"{middle:.2f}" + (f" ± {half_width:.2f}" if half_width is not None else "")
            )
        lines.append([f"{task} (made on)" if task in MADE_ON else task, f"{own[0]['states']:.0f}", says, *means])
    return lines


def main() -> None:
    """Judge every task by every seed, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/choose-m"))
    arguments = parser.parse_args()
    asked = [(task, seed) for seed in SEEDS for task in TASKS]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(judge, task, seed, arguments.out) for task, seed in asked]
        rows = []
        for future in futures:
            rows.append(future.result())
            print(rows[-1], flush=True)
    write_table(rows, Path("results"), "choose_m")
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
