"""Claim 3, structure and not width: accuracy on S4 over a grid of blocks N and block sizes M.

    statemix sweep experiments/structure.py --budget quick --out runs/structure
    python experiments/results.py --collect structure

One BD-LRU layer of width 64, a start token, length 16; a run ends at a validation accuracy of 0.9999.
"""

from statemix import TrainConfig
from statemix.training.config import OptimizerConfig

NUM_BLOCKS, BLOCK_SIZES = (2, 4, 8, 16, 32), (1, 2, 3, 4, 5)
SEEDS, STEPS = {"quick": 3, "full": 5}, {"quick": 500, "full": 3000}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every N with every M and every seed."""
    return {
        f"M {m}, N {n}, seed {seed}": TrainConfig(
            task={"name": "permutation", "group": "S4", "seq_len": 16, "start": True},
            mixer={"name": "bd_lru", "num_blocks": n, "block_size": m},
            optimizer=OptimizerConfig(lr=6e-3),
            steps=STEPS[budget],
            batch_size=64,
            seed=seed,
            eval_every=100,
            stop_accuracy=0.9999,
        )
        for seed in range(SEEDS[budget])
        for m in BLOCK_SIZES
        for n in NUM_BLOCKS
    }
