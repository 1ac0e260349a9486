"""Exact state tracking: every task of the preset "exact" is trained until a model is verified for all lengths.

    python experiments/suite.py --out runs/suite                       all tasks, seeds 0 to 4
    python experiments/suite.py --tasks parity,s5-32 --seeds 0-2       some of them
    python experiments/suite.py --table runs/suite                     the table and results/suite.csv of what there is

A try is a run of the preset with fresh weights. It ends when enough batches in a row had no error, nothing more can be
taken away, and a search for a wrong word finds none, or after so many steps; then `statemix.verify` visits all states
of the sharpened model. Where it is not right at every length the next try begins with other weights: the seed of try k
is seed + 1000 k. No test chooses: the words of 40 to 256 tokens, and of 1,000, are read of the last try alone. A
verified model then reads words of 10^5 tokens, of groups 10^6, and is asked at each of their prefixes. What was tried
is kept, and the same command goes on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from statemix import SequenceModel, TrainConfig, train
from statemix.analysis import NONE
from statemix.files import write_whole
from statemix.report.tables import align
from statemix.runs.presets import preset_config
from statemix.runs.read import write_table
from statemix.specs import Spec
from statemix.tasks import build_task
from statemix.training.checkpoint import CONFIG_FILE, find_checkpoint
from statemix.verify import verify, write_verdict

LENGTHS = ("40-256", 1000)
MAX_STATES = 3_000_000  # of a search: about ten minutes
CHUNK = 2**13  # tokens of a long word that are read at once

SUITE: dict[str, Spec] = {
    "parity": {"name": "parity"},
    "even-pairs": {"name": "even-pairs"},
    "cycle-navigation": {"name": "cycle-navigation"},
    "modular-arithmetic": {"name": "modular-arithmetic-simple"},
    "s5-8": {"name": "permutation", "generators": 8},
    "s5-32": {"name": "permutation"},
    "a5-12": {"name": "permutation", "group": "A5", "generators": 12},
}


def attempt(task: Spec, seed: int, number: int, out: Path) -> dict[str, Any]:
    """One run, what it came to, and what the search through its states found."""
    config = dataclasses.replace(preset_config("exact", task), seed=seed + 1000 * number, test_lengths=LENGTHS)
    began = time.process_time()
    run = train(config, out)
    trained = time.process_time() - began
    found: dict[str, Any] = {"try": number} | _verdict(out)
    summary = run.summary
    found |= {
        "queries": summary["queries"],
        "steps": summary["steps"],
        "core seconds of training": trained,
        "core seconds of verification": time.process_time() - began - trained,
    }
    for how, key in (("as trained", "test"), ("sharpened", "sharpened")):
        for length in LENGTHS:
            found[f"{how} at {length}"] = summary[key][str(length)]["token_accuracy"]
    return found


def _verdict(out: Path) -> dict[str, Any]:
    """What the search says of a run."""
    try:
        verdict = verify(out, max_states=MAX_STATES)
    except ValueError as error:  # rows are still blurred, and the states too many
        return {"outcome": "undecided", "states explored": None, "states of the automaton": None, "why": str(error)}
    write_verdict(verdict, out)
    least = None if verdict.automaton is None else len(verdict.automaton.transitions)
    return {"outcome": verdict.outcome, "states explored": verdict.states, "states of the automaton": least}


@torch.no_grad()
def wrong_prefixes(out: Path, length: int) -> int:
    """At how many prefixes of four words for testing a run's sharpened model errs, where the task has an answer."""
    config = TrainConfig.load(out / CONFIG_FILE)
    task, model = build_task(config.task), SequenceModel.load(find_checkpoint(out, "suite"))
    for mixer in model.mixers:
        mixer.sharpen(config.sharpen or 1)
    tokens = task.with_seq_len(length).sample("test", 4).tokens
    targets = torch.from_numpy(task.automaton().run(tokens.numpy()))
    state, wrong = None, 0
    for begin in range(0, tokens.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        logits, state = model(tokens[:, part], state)
        wrong += int(((logits.argmax(-1) != targets[:, part]) & (targets[:, part] != NONE)).sum())
    return wrong


def solve(name: str, seed: int, tries: int, out: Path) -> dict[str, Any]:
    """Try until a model is verified. Every try is kept in `out`."""
    record = out / f"{name}-{seed}.json"
    kept: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    while len(kept) < tries and not (kept and kept[-1]["outcome"] == "equal"):
        kept.append(attempt(SUITE[name], seed, len(kept), out / f"{name}-{seed}-{len(kept)}"))
        write_whole(record, json.dumps(kept).encode())
        print(name, seed, kept[-1], flush=True)
    last = kept[-1]
    if last["outcome"] == "equal" and "wrong prefixes" not in last:
        # an odd number of tokens, as arithmetic has
        length = 10**6 + 1 if SUITE[name]["name"] == "permutation" else 10**5 + 1
        last |= {"long": length, "wrong prefixes": wrong_prefixes(out / f"{name}-{seed}-{last['try']}", length)}
        write_whole(record, json.dumps(kept).encode())
    return row_of(name, seed, kept)


def row_of(name: str, seed: int, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a task and seed: the last try, and what all of them took."""
    seconds = sum(one["core seconds of training"] + one["core seconds of verification"] for one in kept)
    return {"task": name, "seed": seed, **kept[-1], "core seconds of all tries": seconds}


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Per task: how many seeds are verified, how many tries that took, and what the last try says of long words."""
    lines = [
        [
            "task",
            "verified for all lengths",
            "tries",
            "wrong words given",
            f"least right at {LENGTHS[0]}, as trained",
            "sharpened",
            "states explored",
            "wrong prefixes of four words of 10^5 tokens, groups 10^6",
            "core seconds, of all tries",
        ]
    ]
    for name in SUITE:
        of = [row for row in rows if row["task"] == name]
        if not of:
            continue
        equal = [row for row in of if row["outcome"] == "equal"]
        least = [min(row[f"{how} at {LENGTHS[0]}"] for row in of) for how in ("as trained", "sharpened")]
        lines.append(
            [
                name,
                f"{len(equal)} of {len(of)}",
                ", ".join(f"{row['try'] + 1:.0f}" for row in of),
                ", ".join(f"{row['queries']:.0f}" for row in of),
                *(f"{100 * accuracy:.2f}" for accuracy in least),
                ", ".join(f"{row['states explored']:.0f}" for row in equal),
                ", ".join(f"{row['wrong prefixes']:.0f}" for row in equal),
                ", ".join(f"{row['core seconds of all tries']:.0f}" for row in of),
            ]
        )
    return lines


def seeds(text: str) -> range:
    """Of SEED or FROM-TO. Raises ValueError, which argparse tells."""
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError
    return found


def main() -> None:
    """Solve what is asked for, or print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(SUITE))
    parser.add_argument("--seeds", type=seeds, default="0-4", help="SEED or FROM-TO")
    parser.add_argument("--tries", type=int, default=5, help="at most, per task and seed")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"))
    parser.add_argument("--table", type=Path, help="only this: write results/suite.csv, print the table")
    given = parser.parse_args()
    names = given.tasks.split(",")
    if unknown := set(names) - SUITE.keys():
        parser.error(f"--tasks: {sorted(unknown)} are none of {list(SUITE)}")
    if given.table is None:
        given.out.mkdir(parents=True, exist_ok=True)
        for seed in given.seeds:
            for name in names:
                solve(name, seed, given.tries, given.out)
        return
    rows = []
    for name in SUITE:
        for record in sorted(given.table.glob(f"{name}-[0-9].json")):
            rows.append(row_of(name, int(record.stem.rpartition("-")[2]), json.loads(record.read_text())))
    write_table(rows, Path("results"), "suite")
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
