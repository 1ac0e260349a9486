"""Characters of Shakespeare against the clock: what each mixer makes of a few minutes on this machine.

    python experiments/shakespeare.py                  the small-transformer recipe, then every mixer in its time
    python experiments/shakespeare.py --minutes 15     one larger model

The text is karpathy's tinyshakespeare.txt (https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt), in
data/: its first 90 % train, the last 10 % validate. The recipe is that of a well-known small transformer for CPUs: 4
layers, 4 heads, width 128, windows of 64 characters, 12 of them a step, 2,000 steps. The others train right after it,
for as many steps as fit, by three short runs, in the time that its steps took, less a reserve: the speed of a machine
drifts. Those times are of training steps alone; validations and checkpoints, fewer here than in the recipe, come on
top; of the minutes of `--minutes` they are to fit into the reserve. Runs are in runs/shakespeare; what is finished
there is not done again, and rows of the table without a run there stay.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from statemix import TrainConfig, kernels, train
from statemix.files import write_whole
from statemix.runs.read import write_table
from statemix.training.config import ModelConfig, OptimizerConfig

RESULTS = Path("results")
Row = dict[str, Any]

TEXT = {"name": "text", "source": "data/tinyshakespeare.txt", "tokenizer": "characters", "valid": 0.1, "test": 0.0}
TRAINED, VALIDATED = (128, 256), 2048  # characters of a window; the first half of the steps reads the shorter ones
TRIAL, ROUNDS = 40, 3  # steps of a short run, whose second half is timed
RESERVE = 0.05  # of the time
VALIDATIONS = 5
FIRST = "the transformer recipe"

RECIPE = TrainConfig(
    task=TEXT | {"seq_len": 64},
    mixer={"name": "attention", "head_dim": 32, "context": 64, "num_heads": 4},
    model=ModelConfig(d_model=128, num_layers=4, mlp_size=352),
    optimizer=OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup=0.05, betas=(0.9, 0.99)),
    steps=2000,
    batch_size=12,
    eval_every=250,
    eval_sequences=2000,
)
OURS = TrainConfig(
    task=TEXT | {"seq_len": VALIDATED},
    mixer={"name": "h_lru", "num_channels": 150, "order": 2},
    model=ModelConfig(d_model=128, num_layers=3, mlp_size=352),
    optimizer=OptimizerConfig(lr=6e-3, warmup=0.05, muon_lr=0.02, schedule="linear"),
    train_lengths=TRAINED,
    batch_size=1,
    eval_sequences=200,
)
# every mixer in the model and the training of OURS, with as many parameters
MIXERS: dict[str, dict[str, Any]] = {
    "H-LRU, M 2": OURS.mixer,
    "H-LRU, M 4": {"name": "h_lru", "num_channels": 90, "order": 4},
    "BD-LRU, M 1": {"name": "bd_lru", "num_blocks": 225, "block_size": 1},
    "BD-LRU, M 2": {"name": "bd_lru", "num_blocks": 90, "block_size": 2},
    "BD-LRU, M 4": {"name": "bd_lru", "num_blocks": 32, "block_size": 4},
    "LSTM": {"name": "lstm", "hidden_size": 110},
    "Mamba-2": {"name": "mamba2", "head_dim": 56, "num_heads": 4, "state_dim": 64},
    "attention": {"name": "attention", "head_dim": 56, "context": TRAINED[-1], "num_heads": 4},
}
LARGER = replace(
    OURS,
    mixer={"name": "h_lru", "num_channels": 187, "order": 2},
    model=ModelConfig(d_model=160, num_layers=4, mlp_size=416, dropout=0.1),
    optimizer=replace(OURS.optimizer, weight_decay=0.3),
    batch_size=2,
)


def main() -> None:
    """Train what was asked for, then write results/shakespeare.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="train the larger model for so long")
    parser.add_argument("--only", nargs="+", choices=list(MIXERS), default=list(MIXERS), metavar="MIXER")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.minutes:
        timed(f"H-LRU, M 2, {arguments.minutes:g} minutes", LARGER, arguments)
    else:
        timed(FIRST, RECIPE, arguments)
        for label in arguments.only:
            timed(label, replace(OURS, mixer=MIXERS[label]), arguments)
    rows = [row for file in sorted(arguments.out.glob("*/clock.json")) for row in curve(file)]
    write_table(measured_elsewhere({row["label"] for row in rows}) + rows, RESULTS, "shakespeare")


def measured_elsewhere(labels: set[str]) -> list[Row]:
    """Rows of the table that there was, but for those of these labels."""
    if not (table := RESULTS / "shakespeare.csv").exists():
        return []
    with table.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["label"] not in labels]


def timed(label: str, config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Train on the clock, for as many steps as fit."""
    clock = clock_file(label, arguments)
    if clock.exists():
        return
    config, limit = replace(config, seed=arguments.seed), None
    if label != FIRST:
        limit = 60 * arguments.minutes if arguments.minutes else curve(clock_file(FIRST, arguments))[-1]["at_seconds"]
        config = fitted(config, limit, arguments.out / "trial")
    print(f"{label}: {config.steps} steps", flush=True)
    start = time.perf_counter()
    result = train(config, clock.parent, resume="never")  # a clock does not go on where a run was stopped
    whole = time.perf_counter() - start
    about = {"label": label, "seed": arguments.seed, "limit": limit, "whole_seconds": whole}
    about |= {"threads": arguments.threads, "kernels": kernels.instruction_set()}  # which tells machines apart
    write_whole(clock, json.dumps(about).encode())
    print(f"{label}: {result.summary['parameters']:,} parameters, {whole:.0f} s, {result.summary['valid']['loss']:.4f}")


def clock_file(label: str, arguments: argparse.Namespace) -> Path:
    """What a run leaves behind last."""
    name = f"{label.replace(',', '').replace(' ', '-').lower()}-seed-{arguments.seed}"
    return Path(arguments.out) / name / "clock.json"


def fitted(config: TrainConfig, seconds: float, folder: Path) -> TrainConfig:
    """The config with as many steps as fit, by the median of some short runs."""
    fits = sorted(int((1 - RESERVE) * seconds / step_seconds(config, folder)) for _ in range(ROUNDS))
    print(f"steps that fit in {seconds:.0f} s: {fits}", flush=True)
    steps = fits[ROUNDS // 2]
    return replace(config, steps=steps, eval_every=-(-steps // VALIDATIONS))


def step_seconds(config: TrainConfig, folder: Path) -> float:
    """Seconds of a step, in a short run."""
    short = replace(config, steps=TRIAL, eval_every=TRIAL, eval_sequences=1, log_every=TRIAL // 2)
    *_, speed = (
        line["tokens_per_s"]
        for line in train(short, folder, resume="never", progress=False).metrics
        if "tokens_per_s" in line
    )
    return config.batch_size * config.task["seq_len"] / speed


def curve(clock: Path) -> list[Row]:
    """Rows of a run: its validations, each after so many seconds of training steps."""
    about = json.loads(clock.read_text())
    result = json.loads((clock.parent / "result.json").read_text())
    config = TrainConfig.load(clock.parent / "config.json")
    tokens = config.batch_size * config.task["seq_len"]
    rows, seconds, before = [], 0.0, 0
    for line in map(json.loads, (clock.parent / "metrics.jsonl").read_text().splitlines()):
        if "tokens_per_s" in line:
            seconds += (line["step"] - before) * tokens / line["tokens_per_s"]
            before = line["step"]
        if "valid_loss" in line:
            rows.append(
                about
                | {"parameters": result["parameters"], "step": line["step"], "at_seconds": seconds}
                | {"valid_loss": line["valid_loss"], "config": config.to_json()}
            )
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line per run: its size, its time and its last validation."""
    head = ["", "kernels", "parameters", "steps", "seconds given", "of steps", "with all else", "validation loss"]
    lines = [head]
    for label in dict.fromkeys(row["label"] for row in rows):
        last = [row for row in rows if row["label"] == label][-1]
        sizes = f"{last['parameters']:,.0f}", f"{last['step']:,.0f}"
        given = f"{last['limit']:.0f}" if last["limit"] else ""
        times = given, f"{last['at_seconds']:.0f}", f"{last['whole_seconds']:.0f}"
        lines.append([label, last["kernels"], *sizes, *times, f"{last['valid_loss']:.4f}"])
    return lines


if __name__ == "__main__":
    main()
