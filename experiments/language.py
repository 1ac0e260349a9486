"""Claim 6, language: the loss of a byte-level language model by block size and order, at equal parameters.

    statemix sweep experiments/language.py --budget quick --out runs/language
    python experiments/results.py --collect language

Two texts: the Python sources of the standard library, which are there, and Shakespeare, which is not: put karpathy's
tinyshakespeare.txt (https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt) into data/. Without it its
runs fail and say so. Two (mixer, SwiGLU) pairs, every mixer with as many parameters, as many tokens, one learning rate.
"""

import functools
from typing import Any

from statemix import TrainConfig
from statemix.sizing import solve
from statemix.training.config import ModelConfig, OptimizerConfig

SOLVE = functools.cache(solve)  # the same for every seed

TEXTS = {"stdlib": "stdlib", "Shakespeare": "data/tinyshakespeare.txt"}
SEQ_LEN, BATCH_SIZE = 128, 16
D_MODEL, PARAMETERS = {"quick": 96, "full": 384}, {"quick": 60_000, "full": 1_200_000}
LAYERS, STEPS, SEEDS = {"quick": 2, "full": 6}, {"quick": 500, "full": 20_000}, {"quick": 3, "full": 5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"BD-LRU, M {m}": ("bd_lru", {"block_size": m}) for m in (1, 2, 4, 8, 16)},
    **{f"H-LRU, M {m}": ("h_lru", {"order": m}) for m in (4, 16)},
    "LSTM": ("lstm", {}),
    "Mamba-2": ("mamba2", {}),
    "attention": ("attention", {"context": SEQ_LEN}),
}


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every mixer on every text with every seed."""
    return {
        f"{text}, {label}, seed {seed}": TrainConfig(
            task={"name": "text", "source": source, "tokenizer": "bytes", "seq_len": SEQ_LEN},
            mixer=SOLVE(mixer, D_MODEL[budget], budget=PARAMETERS[budget], **fixed).spec,
            model=ModelConfig(d_model=D_MODEL[budget], num_layers=LAYERS[budget]),
            optimizer=OptimizerConfig(lr=3e-3),
            steps=STEPS[budget],
            batch_size=BATCH_SIZE,
            seed=seed,
            eval_every=100,
            eval_sequences=512,
        )
        for text, source in TEXTS.items()
        for seed in range(SEEDS[budget])
        for label, (mixer, fixed) in VARIANTS.items()
    }
