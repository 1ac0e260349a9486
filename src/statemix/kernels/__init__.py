"""The compiled kernels of csrc/: the library and its structs, and what runs in it as operators of torch."""

from statemix.kernels.layers import (
    ModelStep,
    PairInputs,
    Weights,
    gated,
    gated_backward,
    layer,
    layer_step,
    pair_step,
)
from statemix.kernels.library import (
    INSTRUCTION_SET_VARIABLE,
    MAX_ORDER,
    instruction_set,
    instruction_sets,
    load_problem,
    serves,
    transformed,
    use_instruction_set,
)

__all__ = [
    "INSTRUCTION_SET_VARIABLE",
    "MAX_ORDER",
    "ModelStep",
    "PairInputs",
    "Weights",
    "gated",
    "gated_backward",
    "instruction_set",
    "instruction_sets",
    "layer",
    "layer_step",
    "load_problem",
    "pair_step",
    "serves",
    "transformed",
    "use_instruction_set",
]
