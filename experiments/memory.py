"""Claim 2, memory: recall, selective copying, compression and memorization by block size and order.

    statemix sweep experiments/memory.py --budget quick --out runs/memory
    python experiments/results.py --collect memory

Two (mixer, SwiGLU) pairs of width 64, every mixer with as many parameters. quick: MAD's tasks at reduced sizes, one
learning rate. full: MAD's baselines at their sizes.
"""

import functools
from typing import Any

from statemix import TrainConfig
from statemix.sizing import solve
from statemix.training.config import ModelConfig, OptimizerConfig

SOLVE = functools.cache(solve)  # the same for every seed

D_MODEL, PARAMETERS = 64, 17_000
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "in-context-recall": {"vocab_size": 16, "seq_len": 64},
        "compression": {"vocab_size": 16, "seq_len": 16},
        "memorization": {"vocab_size": 256, "seq_len": 32},
        "selective-copying": {"vocab_size": 16, "seq_len": 64, "num_tokens_to_copy": 8},
    },
    "full": {name: {} for name in ("in-context-recall", "selective-copying", "compression", "memorization")},
}
STEPS, BATCH_SIZE, SEEDS = {"quick": 800, "full": 20_000}, {"quick": 32, "full": 64}, {"quick": 3, "full": 5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"BD-LRU, M {m}": ("bd_lru", {"block_size": m}) for m in (1, 2, 4)},
    **{f"H-LRU, M {m}": ("h_lru", {"order": m}) for m in (2, 4)},
    "LSTM": ("lstm", {}),
    "Mamba-2": ("mamba2", {"state_dim": 16}),
    "DeltaNet": ("delta_net", {}),
}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every mixer on every task with every seed."""
    return {
        f"{task}, {label}, seed {seed}": TrainConfig(
            task={"name": task, **options},
            mixer=SOLVE(mixer, D_MODEL, budget=PARAMETERS, **fixed).spec,
            model=ModelConfig(d_model=D_MODEL, num_layers=2),
            optimizer=OptimizerConfig(lr=3e-3),
            steps=STEPS[budget],
            batch_size=BATCH_SIZE[budget],
            seed=seed,
            eval_every=200,
            eval_sequences=512,
            stop_accuracy=0.999,
        )
        for task, options in TASKS[budget].items()
        for label, (mixer, fixed) in VARIANTS.items()
        for seed in range(SEEDS[budget])
    }
