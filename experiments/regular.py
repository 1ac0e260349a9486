"""Claim 10, regular languages: which need negative or complex eigenvalues, and which normalisations have them.

    statemix sweep experiments/regular.py --budget quick --out runs/regular
    python experiments/results.py --collect regular

One BD-LRU layer of width 64 (two for modular arithmetic), about 18,000 parameters a layer; the lengths of each task's
own protocol: trained short, tested long. softmax rows are nonnegative: the eigenvalues of a single number (M 1) cannot
be negative, those of a block can. tanh and linear rows are signed.
"""

import functools

from statemix import TrainConfig
from statemix.sizing import solve
from statemix.training.config import ModelConfig, OptimizerConfig

SOLVE = functools.cache(solve)  # the same for every seed

TASKS = ("parity", "modular-counting", "cycle-navigation", "modular-arithmetic")
NORMALIZATIONS, BLOCK_SIZES = ("softmax", "tanh", "linear"), (1, 5)
SEEDS, STEPS = {"quick": 3, "full": 5}, {"quick": 300, "full": 4000}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every language with every normalisation, block size and seed."""
    return {
        f"{task}, {normalization}, M {m}, seed {seed}": TrainConfig(
            task={"name": task},
            mixer=SOLVE("bd_lru", 64, budget=18_000, block_size=m, normalization=normalization).spec,
            model=ModelConfig(num_layers=2 if task == "modular-arithmetic" else 1),
            optimizer=OptimizerConfig(lr=6e-3),
            steps=STEPS[budget],
            batch_size=64,
            seed=seed,
            eval_every=100,
            eval_sequences=512,
            test_lengths=(40, 80, 160),
        )
        for task in TASKS
        for m in BLOCK_SIZES
        for normalization in NORMALIZATIONS
        for seed in range(SEEDS[budget])
    }
