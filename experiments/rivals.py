"""Claim 11, the rivals: other mixers under the protocol of the exact suite, so that recipe and architecture come apart.

    statemix sweep experiments/rivals.py --budget quick --out runs/rivals

"quick", of parity and cycle navigation, takes about 3 core hours, "full" a day.

Every mixer has the preset "exact": its curriculum, its wrong words again, its end after batches without an error, its
steps and so its budget of tokens. Rows of gates, hidden blocks and pruning are BD-LRU's own. A rival has as many
parameters as the BD-LRU of the task, and the learning rate, of the same three, with the best mean validation loss:
`statemix.runs.select.select(rows, ("optimizer.lr",))`.
"""

import dataclasses
import functools
from typing import Any

from statemix import TrainConfig
from statemix.runs.presets import preset_config
from statemix.sizing import measure, solve
from statemix.specs import Spec

SOLVE = functools.cache(solve)  # the same for every seed

TASKS: dict[str, Spec] = {
    "parity": {"name": "parity"},
    "cycle navigation": {"name": "cycle-navigation"},
    "(S5, 32)": {"name": "permutation"},
    "even pairs": {"name": "even-pairs"},
    "modular arithmetic": {"name": "modular-arithmetic-simple"},
    "(S5, 8)": {"name": "permutation", "generators": 8},
    "(A5, 12)": {"name": "permutation", "group": "A5", "generators": 12},
}
NUMBER = {"quick": 2, "full": len(TASKS)}  # of the tasks, the first
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("lstm", {}),
    "PD-SSM": ("pd_ssm", {}),
    "DeltaProduct": ("delta_product", {"rank": 2, "negative_eigenvalues": True}),
    "Mamba-2": ("mamba2", {"state_dim": 16}),
    "LRU": ("lru", {}),
}
LEARNING_RATES = (1e-3, 3e-3, 6e-3)


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every task with every mixer, learning rate and seed."""
    made = {}
    for name in list(TASKS)[: NUMBER[budget]]:
        own = preset_config("exact", TASKS[name])
        size, _ = measure(own.mixer, own.model.d_model)
        mixers: dict[str, Spec | None] = {"BD-LRU": None}
        for label, (kind, options) in RIVALS.items():
            mixers[label] = SOLVE(kind, own.model.d_model, budget=size, **options).spec
        for label, mixer in mixers.items():
            config = own if mixer is None else preset_config("exact", TASKS[name], mixer)
            for lr in LEARNING_RATES:
                optimizer = dataclasses.replace(config.optimizer, lr=lr, final_lr=lr / 20)
                for seed in range(3):
                    run = dataclasses.replace(config, optimizer=optimizer, seed=seed, test_lengths=("40-256", 1000))
                    made[f"{name}, {label}, lr {lr:g}, seed {seed}"] = run
    return made
