"""Claim 7, to the end: the exact state trackers on sequences of a million tokens, as trained and with sharpened gates.

    python experiments/endless.py runs/exact          writes results/endless.csv: a minute or two

`sharpen` multiplies the raw gates by a number, so that rows that are almost one-hot become so in floating point: what
such a layer moves it moves without loss, and the length no longer matters.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from statemix import SequenceModel
from statemix.backbone import State
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.report.tables import align
from statemix.runs.read import Row, find_runs, write_table
from statemix.runs.select import group_over_seeds
from statemix.tasks import build_task

LENGTH, CHUNK, SHARPER = 2**20, 2**13, 100.0


@torch.no_grad()
def first_error(model: SequenceModel, task: dict[str, object], seed: int) -> int | None:
    """The first step, from 1, at which the model errs on a sequence of `LENGTH` tokens that continues the task's."""
    sequence = build_task({**task, "seq_len": LENGTH}).sample("test", 1, seed=seed)
    state: State | None = None
    for begin in range(0, sequence.tokens.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        logits, state = model(sequence.tokens[:, part], state)
        wrong = (logits.argmax(-1) != sequence.targets[:, part]) & (sequence.targets[:, part] >= 0)
        if wrong.any():
            return begin + int(wrong[0].nonzero()[0])
    return None


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as they are; "none" where there was no error."""

    def cell(value: str | float | None) -> str:
        return "none" if value in (None, "") else value if isinstance(value, str) else f"{value:,.0f}"

    shown = [[cell(value) for value in row.values()] for row in rows]
    return [list(rows[0]), *shown]


def main() -> None:
    """Try every run of the recipe, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    folder = parser.parse_args().runs
    rows: list[Row] = []
    for label, runs in sorted(group_over_seeds(find_runs([folder])).items()):
        if not label.endswith("the recipe"):
            continue
        for run in runs:
            model = SequenceModel.load(run.folder / f"step-{run.summary['best_step']}")
            row: Row = {"label": label, "seed": run.config.seed, "length": LENGTH}
            row["first error, as trained"] = first_error(model, run.config.task, run.config.seed)
            for mixer in model.mixers:
                assert isinstance(mixer, LinearRecurrence)
                mixer.sharpen(SHARPER)
            row["first error, sharpened"] = first_error(model, run.config.task, run.config.seed)
            rows.append(row)
    write_table(rows, Path("results"), "endless")
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
