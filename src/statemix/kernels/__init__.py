"""The compiled kernels of csrc/: the library and its structs, and what runs in it as operators of torch.

They compute with the tensors that they are given. Whether they may stand in for torch modules, fused.py decides.
"""

from statemix.kernels.gating import gated
from statemix.kernels.layers import KEPT_BYTES, Weights, layer
from statemix.kernels.library import (
    INSTRUCTION_SET_VARIABLE,
    MAX_ORDER,
    instruction_set,
    instruction_sets,
    load_problem,
    serves,
    use_instruction_set,
)
from statemix.kernels.snapshot import Snapshot
from statemix.kernels.steps import STEP_ROWS, LayerStep, ModelStep, PairStep

__all__ = [
    "INSTRUCTION_SET_VARIABLE",
    "KEPT_BYTES",
    "MAX_ORDER",
    "STEP_ROWS",
    "LayerStep",
    "ModelStep",
    "PairStep",
    "Snapshot",
    "Weights",
    "gated",
    "instruction_set",
    "instruction_sets",
    "layer",
    "load_problem",
    "serves",
    "use_instruction_set",
]
