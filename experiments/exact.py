"""Claim 7, exact state tracking: can one BD-LRU layer learn S3, S4, S5 and not err at 64 times its longest length?

    statemix sweep experiments/exact.py --budget quick --out runs/exact
    python experiments/results.py --collect exact

The recipe: a start token, so that the state is written once; short lengths first, 64 last; in the second half of the
steps a penalty on the entropy of the rows of gates, on batches without an error; on S5 half of the blocks are hidden
from the read-out in the first half. On S3 each of the first three is also left out. Without a start token the penalty
may make the layer forget, so that is tried without the penalty too.
"""

from dataclasses import replace

from statemix import TrainConfig
from statemix.runs.presets import preset_config

SEEDS = {"quick": 3, "full": 10}


def recipe(group: str, seed: int) -> TrainConfig:
    """State tracking that stays exact: `statemix train --preset exact-s3`."""
    return replace(preset_config(f"exact-{group.lower()}"), seed=seed)


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
