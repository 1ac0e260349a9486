"""Claim 1, state tracking: one BD-LRU layer with blocks of n solves S_n; no diagonal layer does, at any width.

    statemix sweep experiments/state_tracking.py --budget quick --out runs/state_tracking
    python experiments/results.py --collect state_tracking

One layer, every mixer with as many parameters in a group's table; a start token before each sequence (why:
docs/claims/exact.md). Trained at length 16, in S5 and other groups of its size at shorter ones first; tested at 16,
32 and 64; a run ends at a validation accuracy of 0.9999. quick: S2, S3, S4, S5 with every mixer, 3 seeds. full: A5 and
Z60 too, five seeds, longer.
"""

import functools
from typing import Any, NamedTuple

from statemix import TrainConfig
from statemix.sizing import solve
from statemix.training.config import ModelConfig, OptimizerConfig

SOLVE = functools.cache(solve)  # the same for every seed

LENGTH = 16


class Setting(NamedTuple):
    """How the mixers are compared on a group."""

    parameters: int  # of a mixer
    steps: int
    d_model: int = 64
    train_lengths: tuple[int, ...] = ()


# blocks of 5 at width 64 learned nothing of S5 in 1,000 steps
LARGE = Setting(330_000, 900, 128, (4, 4, 8, 16))
GROUPS = {
    "quick": {"S2": Setting(18_000, 300), "S3": Setting(18_000, 600), "S4": Setting(30_000, 600), "S5": LARGE},
    "full": dict.fromkeys(("S2", "S3", "S4"), Setting(82_000, 2400))
    | dict.fromkeys(("A5", "S5", "Z60"), LARGE._replace(steps=3600)),
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
            mixer=SOLVE(mixer, setting.d_model, budget=setting.parameters, **options).spec,
            model=ModelConfig(d_model=setting.d_model),
            optimizer=OptimizerConfig(lr=6e-3),
            steps=setting.steps,
            train_lengths=setting.train_lengths,
            batch_size=64,
            seed=seed,
            eval_every=100,
            stop_accuracy=0.9999,
            test_lengths=(LENGTH, 2 * LENGTH, 4 * LENGTH),
        )
        for seed in range(SEEDS[budget])
        for group, setting in GROUPS[budget].items()
        for label, (mixer, options) in VARIANTS.items()
    }
