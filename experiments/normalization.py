"""Claim 4, normalisation: L1-normalised gates train at every block size; without, training breaks as M grows.

    statemix sweep experiments/normalization.py --budget quick --out runs/normalization
    python experiments/results.py --collect normalization

S3 with one BD-LRU layer of width 64 and about 18,000 parameters, a start token, at two lengths. A run that diverges
fails, with the step in its error: the table counts it.
"""

import functools

from statemix import TrainConfig
from statemix.gates import NORMALIZATIONS
from statemix.sizing import solve
from statemix.training.config import OptimizerConfig

SOLVE = functools.cache(solve)  # the same for every seed

BLOCK_SIZES, LENGTHS = (1, 3, 8), (16, 128)
SEEDS, STEPS = {"quick": 3, "full": 5}, {"quick": 300, "full": 2000}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every normalisation at every M, length and seed; as many tokens in a step at both lengths."""
    return {
        f"{normalization}, M {m}, length {length}, seed {seed}": TrainConfig(
            task={"name": "permutation", "group": "S3", "seq_len": length, "start": True},
            mixer=SOLVE("bd_lru", 64, budget=18_000, block_size=m, normalization=normalization).spec,
            optimizer=OptimizerConfig(lr=6e-3),
            steps=STEPS[budget],
            batch_size=64 * 16 // length,
            seed=seed,
            eval_every=100,
            eval_sequences=256,
        )
        for seed in range(SEEDS[budget])
        for length in LENGTHS
        for m in BLOCK_SIZES
        for normalization in NORMALIZATIONS
    }
