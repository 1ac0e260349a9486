"""Of a task as an automaton: how large blocks must be to follow its states, read off one trained model."""

import torch
from torch import Tensor

from statemix.analysis.groups import images_of
from statemix.analysis.permutations import Table, permuted
from statemix.analysis.spectra import check_square


def needed_block_size(transition: Tensor, moves: Table, start: int, *, within: float = 1.4) -> int | None:
    """The smallest M with which blocks could follow what these larger ones follow: read off one trained model.

    Each set of components that the tokens permute on their own, in any block, is a part of the model that a block of
    that size could hold. It follows the task if its permutations are a function of the task's state. M is the size up
    to which these sets together tell all states apart.

    Args:
        transition: of each token, (X, N, M, M), M up to 8.
        moves: (S, X), the state of the task after each token in each of its states.
        start: the state in which a sequence begins.
        within: as in `representation`, but looser: two permutations are 2 apart, and that they are a function of the
            state for all of its words is no accident.

    Returns:
        M, or None if even all together do not tell the states apart: the model has not learned them, or not like this.
    """
    check_square("needed_block_size", transition)
    signatures: dict[int, list[dict[int, Tensor]]] = {}
    for block in transition.unbind(1):
        for components, permutations, _ in permuted(block, within):
            images = images_of(permutations, moves, start, "antihomomorphism")
            if images is not None:
                signatures.setdefault(len(components), []).append(images)
    classes: dict[int, tuple[int, ...]] = dict.fromkeys(_reached(moves, start), ())
    for size in sorted(signatures):
        for images in signatures[size]:
            kinds = torch.stack(list(images.values())).flatten(1).unique(dim=0, return_inverse=True)[1].tolist()
            classes = {state: (*classes[state], kind) for state, kind in zip(images, kinds, strict=True)}
        if len(set(classes.values())) == len(classes):
            return size
    return None


def _reached(moves: Table, start: int) -> set[int]:
    """The states that some word leads to."""
    reached, frontier = {start}, [start]
    while frontier:
        new = set(moves[frontier.pop()].tolist()) - reached
        reached |= new
        frontier += new
    return reached
