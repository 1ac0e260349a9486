"""Mixing beats width: four small models learn to compose permutations of three things (S3). Run by `make quickstart`.

    python experiments/quickstart.py                 one seed, under 3 minutes on 2 cores
    python experiments/quickstart.py --seeds 0 1     the table of the README

The runs are in runs/quickstart. What is finished there is not done again.
"""

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from statemix import TrainConfig, train
from statemix.report.tables import results_table
from statemix.training.config import OptimizerConfig
from statemix.training.curves import plot_curves

LENGTHS = (16, 32, 64)  # trained at the first

BASE = TrainConfig(
    task={"name": "permutation", "group": "S3", "seq_len": LENGTHS[0]},
    optimizer=OptimizerConfig(lr=6e-3),
    steps=800,
    test_lengths=LENGTHS,
)
MIXERS = {
    "BD-LRU, block size 3": {"name": "bd_lru", "num_blocks": 16, "block_size": 3},
    "BD-LRU, block size 1, same state": {"name": "bd_lru", "num_blocks": 48, "block_size": 1},
    "BD-LRU, block size 1, same parameters": {"name": "bd_lru", "num_blocks": 72, "block_size": 1},
    "LSTM, same parameters": {"name": "lstm", "hidden_size": 39},
}
configs = {label: replace(BASE, mixer=mixer) for label, mixer in MIXERS.items()}

SUMMARY = (
    "Four models read a sequence of permutations of three things and say, after each, what all so far compose to: the "
    "linear recurrence that mixes its state in blocks of 3 solves it, the same one without mixing does not, with as "
    "large a state or as many parameters; the LSTM mixes everything too, but step by step, not as a parallel scan."
)


def main() -> None:
    """Train every model with every seed, then print the table and draw the curves of the first seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()

    results: dict[str, list[dict[str, Any]]] = {label: [] for label in configs}
    curves: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for label, config in configs.items():
            print(f"{label}, seed {seed}", flush=True)
            name = label.replace(",", "").replace(" ", "-").lower()
            result = train(replace(config, seed=seed), arguments.out / f"{name}-seed-{seed}")
            results[label].append(result.summary)
            curves.setdefault(label, result.metrics)
    picture = arguments.out / "quickstart.png"
    title = f"Composing permutations of three things (S3), length {LENGTHS[0]}, on the validation split"
    plot_curves(curves, picture, title=title, chance=1 / 6)
    print(f"\n{results_table(results, markdown=arguments.markdown)}\n")
    seeds = ", ".join(map(str, arguments.seeds))
    print(f"seeds {seeds}; {BASE.eval_sequences} test sequences at each length; ", end="")
    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}")
    print(f"{SUMMARY}\nThe curves are in {picture}.")


if __name__ == "__main__":
    main()
