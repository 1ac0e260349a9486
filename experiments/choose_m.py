"""Which block size does a task need? One model with larger blocks than that is trained, and says it.

    python experiments/choose_m.py                        the tasks on which the method was made
    python experiments/choose_m.py --tasks held-out       others; Z7 needs more than the model has
    python experiments/choose_m.py --check                also trains blocks of the size it says, and of one less

A trained block permutes some of its components on their own, and no more of them than the task needs (`inside.py`
shows it). `analysis.needed_block_size` finds these sets, and how large they must be to tell all states of the task
apart. It is given what the task's examples show, its states and how tokens move them, and no group. The answer is
"unknown" where the model found another way, as by counting the steps of short sequences. The method does not apply
where a target does not say the state, or where the state is not permuted, as in recall. The runs are in runs/choose-m.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from inside import token_gates

from statemix import TrainConfig, load_model, train
from statemix.analysis import Table, needed_block_size
from statemix.checkpoint import RunFolder
from statemix.config import OptimizerConfig
from statemix.report import align
from statemix.tasks import IGNORE_INDEX, build_task
from statemix.tasks.base import Task
from statemix.train import Result

LARGE = 6  # M of the one model
BASE = TrainConfig(
    mixer={"name": "bd_lru", "num_blocks": 16, "block_size": LARGE},
    optimizer=OptimizerConfig(lr=6e-3),
    steps=2000,
    stop_accuracy=0.999,
)


def permutation(group: str) -> dict[str, Any]:
    """The spec of the task of a group."""
    return {"name": "permutation", "group": group, "seq_len": 12}


TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "made-on": {group: permutation(group) for group in ("S2", "S3", "Z3")},
    "held-out": {group: permutation(group) for group in ("Z2xZ2", "Z4", "Z5", "Z6", "Z7", "Z2xS3", "A4", "S4")}
    | {
        "parity": {"name": "parity", "seq_len": 12},
        "cycle of 5": {"name": "cycle-navigation", "seq_len": 12, "cycle_length": 5},
    },
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


def trained(label: str, spec: dict[str, Any], block_size: int, out: Path) -> Result:
    """The result of a run, done before or now."""
    config = replace(BASE, task=spec, mixer=BASE.mixer | {"block_size": block_size})
    return train(config, out / f"{label.replace(' ', '-')}-block-size-{block_size}", progress=False)


def main() -> None:
    """Train a model per task, print what it says, and with --check whether it is so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=sorted(TASKS), default="made-on")
    parser.add_argument("--out", type=Path, default=Path("runs/choose-m"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = [["", "states", f"accuracy, M {LARGE}", "steps", "says M", *(["that M", "one less"] * arguments.check)]]
    for label, spec in TASKS[arguments.tasks].items():
        result = trained(label, spec, LARGE, arguments.out)
        checkpoint = RunFolder(result.out).checkpoint("best")
        assert checkpoint is not None
        moves, start = moves_of(build_task(spec))
        transition = token_gates(load_model(checkpoint)).transition[: moves.shape[1]]
        size = needed_block_size(transition, moves, start)
        accuracy = f"{result.summary['valid']['token_accuracy']:.3f}"
        rows.append(
            [
                label,
                str(len(np.unique(moves))),
                accuracy,
                str(result.summary["steps"]),
                "unknown" if size is None else str(size),
            ]
        )
        for less in (0, 1) if arguments.check else ():
            smaller = None if size is None or size - less < 1 else trained(label, spec, size - less, arguments.out)
            rows[-1].append("" if smaller is None else f"{smaller.summary['valid']['token_accuracy']:.3f}")
        print(f"{label}: {rows[-1][2:]}", flush=True)
    print(f"\n{align(rows, markdown=False)}")


if __name__ == "__main__":
    main()
