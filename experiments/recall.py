"""In-context recall, MAD's baseline (16 tokens, length 128): every mixer, with as many parameters in each.

    statemix sweep experiments/recall.py --out runs/recall
    statemix report runs/recall --out runs/recall-report

Two (mixer, SwiGLU) pairs of width 64, 600 steps of 128 sequences at most: a run ends at a validation accuracy of 0.999.
"""

from typing import Any

from statemix import TrainConfig
from statemix.sizing import solve
from statemix.training.config import ModelConfig

D_MODEL, PARAMETERS = 64, 17_000  # of each mixer; their widths follow
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BD-LRU, M 1": ("bd_lru", {"block_size": 1}),
    "BD-LRU, M 2": ("bd_lru", {"block_size": 2}),
    "BD-LRU, M 4": ("bd_lru", {"block_size": 4}),
    "H-LRU, M 2": ("h_lru", {"order": 2}),
    "H-LRU, M 4": ("h_lru", {"order": 4}),
    "LRU": ("lru", {}),
    "GRU": ("gru", {}),
    "LSTM": ("lstm", {}),
    "mLSTM": ("mlstm", {}),
    "Mamba-2": ("mamba2", {"state_dim": 16}),
    "DeltaNet": ("delta_net", {}),
    "Gated DeltaNet": ("gated_delta_net", {}),
    "DeltaProduct, rank 2": ("delta_product", {}),
    "attention": ("attention", {"context": 128}),
}

configs = {
    label: TrainConfig(
        task={"name": "in-context-recall"},
        mixer=solve(mixer, D_MODEL, budget=PARAMETERS, **options).spec,
        model=ModelConfig(d_model=D_MODEL, num_layers=2),
        steps=600,
        eval_every=50,
        stop_accuracy=0.999,
    )
    for label, (mixer, options) in VARIANTS.items()
}
