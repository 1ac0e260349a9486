"""Claim 11, the rivals: other mixers under the protocol of the exact suite, so that recipe and architecture come apart.

    python experiments/rivals.py --out runs/rivals                    parity and cycle navigation, about 2 core hours
    python experiments/rivals.py --tasks s5-32 --mixers LSTM          some of them
    python experiments/rivals.py --table runs/rivals                  the table and results/rivals.csv of what there is

Every mixer has the preset "exact": its curriculum, its wrong words again, its end after batches without an error, and
as many steps at most (`STEPS`), so the same budget of tokens. Rows of gates, hidden blocks and pruning are BD-LRU's
own. A rival has as many parameters as the BD-LRU of the task. Its learning rate is, of the same three, the one whose
run of seed 0 has the lowest loss of validation, which is of words of 1 to 40 tokens, of equals the least; seeds 1 and 2
have that one. No try begins anew and no search is asked, of BD-LRU neither, whose figures are of one-hot rows of gates,
as it has them in training from the first pruning on. The same command goes on.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import LENGTHS, SUITE

from statemix import TrainConfig, train
from statemix.report.tables import align, estimate
from statemix.runs.presets import preset_config
from statemix.runs.read import Row, write_table
from statemix.sizing import measure, solve
from statemix.specs import Spec
from statemix.training.checkpoint import CONFIG_FILE, RESULT_FILE, read_result

OWN = "BD-LRU"
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("lstm", {}),
    # a chunk changes the speed and not the result: 167 ms a step of (A5, 12), 218 with the default of 64
    "PD-SSM": ("pd_ssm", {"chunk_size": 8}),
    # 69 ms a step on cycle navigation, 109 with the default of 64
    "DeltaProduct": ("delta_product", {"rank": 2, "negative_eigenvalues": True, "chunk_size": 16}),
    "Mamba-2": ("mamba2", {"state_dim": 16}),
    "LRU": ("lru", {}),
}
MIXERS = (OWN, *RIVALS)
LEARNING_RATES = (1e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)
# at most, of 2,048 tokens: 3,000, or what the slowest first try of BD-LRU took in the suite, to the next thousand
STEPS = dict.fromkeys(SUITE, 3_000) | {"modular-arithmetic": 12_000, "s5-8": 6_000, "s5-32": 5_000, "a5-12": 4_000}


def config(task: str, mixer: str, lr: float, seed: int) -> TrainConfig:
    """That of a run. A rival is as large as the BD-LRU of the task."""
    own = preset_config("exact", SUITE[task])
    spec: Spec | None = None
    if mixer != OWN:
        size, _ = measure(own.mixer, own.model.d_model)
        name, options = RIVALS[mixer]
        spec = solve(name, own.model.d_model, budget=size, **options).spec
    fitted = preset_config("exact", SUITE[task], spec)
    optimizer = dataclasses.replace(fitted.optimizer, lr=lr, final_lr=lr / 20)
    curriculum = dataclasses.replace(fitted.curriculum, queries=0)
    return dataclasses.replace(
        fitted, optimizer=optimizer, curriculum=curriculum, steps=STEPS[task], seed=seed, test_lengths=LENGTHS
    )


def folder(out: Path, task: str, mixer: str, lr: float, seed: int) -> Path:
    """That of a run."""
    return out / f"{task}, {mixer}, lr {lr:g}, seed {seed}"


def chosen(out: Path, task: str, mixer: str) -> float | None:
    """The learning rate with the lowest loss of validation, of seed 0. None: not all have ended."""
    losses: dict[float, float] = {}
    for lr in LEARNING_RATES:
        run = folder(out, task, mixer, lr, SEEDS[0])
        if not (run / RESULT_FILE).exists():
            return None
        losses[lr] = float(read_result(run, "rivals")["valid"]["loss"])
    return min(losses, key=losses.__getitem__)


def compare(out: Path, task: str, mixer: str) -> None:
    """Make the runs of a mixer on a task that are missing."""
    for lr in LEARNING_RATES:
        _run(out, task, mixer, lr, SEEDS[0])
    best = chosen(out, task, mixer)
    assert best is not None
    for seed in SEEDS[1:]:
        _run(out, task, mixer, best, seed)


def _run(out: Path, task: str, mixer: str, lr: float, seed: int) -> None:
    run = folder(out, task, mixer, lr, seed)
    summary = train(config(task, mixer, lr, seed), run, progress=False).summary
    print(run.name, summary["steps"], [rights(summary, length) for length in LENGTHS], flush=True)


def rights(summary: dict[str, Any], length: str | int) -> float:
    """The accuracy of a run at a length of the test."""
    return float(summary.get("sharpened", summary["test"])[str(length)]["token_accuracy"])


def rows(out: Path) -> list[Row]:
    """A row for each run of the learning rate that was chosen."""
    found: list[Row] = []
    for task in SUITE:
        for mixer in MIXERS:
            if (lr := chosen(out, task, mixer)) is None:
                continue
            for seed in SEEDS:
                run = folder(out, task, mixer, lr, seed)
                if not (run / RESULT_FILE).exists():
                    continue
                summary, limit = read_result(run, "rivals"), TrainConfig.load(run / CONFIG_FILE).steps
                row: Row = {"task": task, "mixer": mixer, "lr": lr, "seed": seed, "steps": summary["steps"]}
                row |= {"quiet": int(summary["steps"] < limit), "mixer parameters": summary["mixer_parameters"]}
                row |= {f"right at {length}": rights(summary, length) for length in LENGTHS}
                found.append(row)
    return found


def table(found: Sequence[Row]) -> list[list[str]]:
    """Per task and mixer: accuracy with the interval over the seeds, and how many runs ended without an error."""
    lines = [["task", "mixer", "parameters", "lr", *(f"right at {length}" for length in LENGTHS), "ended", "steps"]]
    for task, mixer in dict.fromkeys((row["task"], row["mixer"]) for row in found):
        of = [row for row in found if (row["task"], row["mixer"]) == (task, mixer)]
        line = [str(task), str(mixer), f"{of[0]['mixer parameters']:,.0f}", f"{of[0]['lr']:g}"]
        for length in LENGTHS:
            line.append(estimate([100 * float(row[f"right at {length}"]) for row in of], ".2f"))
        quiet = sum(int(row["quiet"]) for row in of)
        lines.append([*line, f"{quiet} of {len(of)}", ", ".join(f"{row['steps']:,.0f}" for row in of)])
    return lines


def main() -> None:
    """Make the runs that are asked for and missing, or print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="parity,cycle-navigation", help="of the suite")
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--table", type=Path, help="only this: write results/rivals.csv, print the table")
    given = parser.parse_args()
    if given.table is None:
        for option, known in (("tasks", tuple(SUITE)), ("mixers", MIXERS)):
            if unknown := set(getattr(given, option).split(",")) - set(known):
                parser.error(f"--{option}: {sorted(unknown)} are none of {list(known)}")
        for task in given.tasks.split(","):
            for mixer in given.mixers.split(","):
                compare(given.out, task, mixer)
    found = rows(given.out if given.table is None else given.table)
    write_table(found, Path("results"), "rivals")
    print(align(table(found), markdown=True))


if __name__ == "__main__":
    main()
