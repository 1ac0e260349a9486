"""Claim 1, state tracking: one BD-LRU layer with blocks of n solves S_n; no diagonal layer does, at any width.

    statemix sweep experiments/state_tracking.py --budget quick --out runs/state_tracking
    python experiments/results.py --collect state_tracking

One layer of width 64, every mixer with as many parameters in a group's table; a start token before each sequence (why:
docs/results.md, claim 7). Trained at length 16, tested at 16, 32 and 64; a run ends at a validation accuracy of 0.9999.
quick: S2, S3, S4 with every mixer, 3 seeds. full: A5, S5 and Z60 too, five seeds, four times as long.
"""

import functools
from typing import Any

from statemix import TrainConfig
from statemix.config import OptimizerConfig
from statemix.sizing import solve

SOLVE = functools.cache(solve)  # the same for every seed

D_MODEL, LENGTH = 64, 16
# group -> parameters of the mixer, optimizer steps
GROUPS = {
    "quick": {"S2": (18_000, 300), "S3": (18_000, 600), "S4": (30_000, 600)},
    "full": dict.fromkeys(("S2", "S3", "S4", "A5", "S5", "Z60"), (82000, 2400)),
}
SEEDS = {"quick": 3, "full": 5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"BD-LRU, M {m}": ("bd_lru", {"block_size": m}) for m in range(1, 7)},
    **{f"H-LRU, M {m}": ("h_lru", {"order": m}) for m in range(1, 7)},
    "LRU (complex)": ("lru", {}),
    "LSTM": ("lstm", {}),
    "Mamba-2": ("mamba2", {"state_dim": 16, "chunk_size": 32}),
    "DeltaNet": ("delta_net", {"negative_eigenvalues": True, "chunk_size": 32}),
    "DeltaProduct, rank 2": ("delta_product", {"rank": 2, "chunk_size": 32}),
    "DeltaProduct, rank 3": ("delta_product", {"rank": 3, "chunk_size": 32}),
}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every mixer on every group with every seed."""
    return {
        f"{group}, {label}, seed {seed}": TrainConfig(
            task={"name": "permutation", "group": group, "seq_len": LENGTH, "start": True},
            mixer=SOLVE(mixer, D_MODEL, budget=parameters, **options).spec,
            optimizer=OptimizerConfig(lr=6e-3),
            steps=steps,
            batch_size=64,
            seed=seed,
            eval_every=100,
            stop_accuracy=0.9999,
            test_lengths=(LENGTH, 2 * LENGTH, 4 * LENGTH),
        )
        for seed in range(SEEDS[budget])
        for group, (parameters, steps) in GROUPS[budget].items()
        for label, (mixer, options) in VARIANTS.items()
    }
