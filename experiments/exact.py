"""Claim 7, exact state tracking: one BD-LRU layer learns S3, S4 and S5 and does not err at 64 times its longest length.

    statemix sweep experiments/exact.py --budget quick --out runs/exact
    python experiments/results.py --collect exact

The recipe: a start token, so that the state is written once; short lengths first, and for the second half of the steps
64; with it comes the penalty on the entropy of the rows of gates, on batches without an error. On S3 each of the three
is also left out. Without a start token the penalty may make the layer forget, so that is tried without the penalty too.
"""

from dataclasses import replace

from statemix import TrainConfig
from statemix.config import ModelConfig, OptimizerConfig

LENGTH = 64
GROUPS = {"S3": 3, "S4": 4, "S5": 6}  # -> block size: S5 has one to spare
WIDTH = {"S3": (64, 16), "S4": (64, 32), "S5": (128, 48)}  # d_model, num_blocks
STEPS = {"S3": 600, "S4": 1600, "S5": 2000}
LENGTHS = {"S3": (4, 16, 64, 64), "S4": (4, 16, 64, 64), "S5": (4, 8, 16, 32, 64, 64)}  # in equal shares of the steps
SEEDS = {"quick": 3, "full": 10}


def recipe(group: str, seed: int) -> TrainConfig:
    """State tracking that stays exact."""
    d_model, num_blocks = WIDTH[group]
    return TrainConfig(
        task={"name": "permutation", "group": group, "seq_len": LENGTH, "start": True},
        mixer={"name": "bd_lru", "num_blocks": num_blocks, "block_size": GROUPS[group]},
        model=ModelConfig(d_model=d_model),
        optimizer=OptimizerConfig(lr=6e-3),
        steps=STEPS[group],
        train_lengths=LENGTHS[group],
        row_entropy=0.1,
        batch_size=32,
        seed=seed,
        eval_every=100,
        eval_sequences=256,
        test_lengths=(LENGTH, 4 * LENGTH, 16 * LENGTH, 64 * LENGTH),
    )


def ablations(config: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe with parts left out."""
    bare = {**config.task, "start": False}
    return {
        "no penalty": replace(config, row_entropy=0.0),
        "no shorter lengths": replace(config, train_lengths=()),
        "no start token": replace(config, task=bare),
        "no start token, no penalty": replace(config, task=bare, row_entropy=0.0),
        "none of the three": replace(config, task=bare, row_entropy=0.0, train_lengths=()),
    }


def configs(budget: str) -> dict[str, TrainConfig]:
    """The recipe on every group; on S3 also without its parts."""
    seeds = range(SEEDS[budget])
    made = {f"{group}, the recipe, seed {seed}": recipe(group, seed) for group in ("S3", "S4") for seed in seeds}
    for seed in seeds:
        for label, config in ablations(recipe("S3", seed)).items():
            made[f"S3, {label}, seed {seed}"] = config
    return made | {f"S5, the recipe, seed {seed}": recipe("S5", seed) for seed in seeds}
