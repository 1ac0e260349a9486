"""What a linear recurrence does to its state, from its transitions: pure functions of arrays.

A transition A is a real M x M matrix in the last two axes, [..., i, j] carries old component j to new component i.
Rows of an L1 norm of at most 1, which all normalisations but "none" make, never enlarge the largest entry of a state.
So where the transitions of a block form a group, none may shrink that entry either, or its inverse would enlarge it:
they are signed permutations. What a block has learned of a group is read off the permutations nearest to its
transitions.
"""

from statemix.analysis.automata import (
    NONE,
    Automaton,
    needed_block_size,
)
from statemix.analysis.groups import (
    Composition,
    Representation,
    composition,
    conjugacy_classes,
    joint_kernel,
    representation,
)
from statemix.analysis.permutations import (
    Table,
    distance_to_permutation,
    nearest_permutation,
    relabel,
)
from statemix.analysis.spectra import (
    MAX_SUBSETS,
    discriminants,
    eigenvalues,
    gate_entropy,
    half_life,
    leak,
    log_singular_values,
    transitions,
)

__all__ = [
    "MAX_SUBSETS",
    "NONE",
    "Automaton",
    "Composition",
    "Representation",
    "Table",
    "composition",
    "conjugacy_classes",
    "discriminants",
    "distance_to_permutation",
    "eigenvalues",
    "gate_entropy",
    "half_life",
    "joint_kernel",
    "leak",
    "log_singular_values",
    "nearest_permutation",
    "needed_block_size",
    "relabel",
    "representation",
    "transitions",
]
