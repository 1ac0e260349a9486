"""Of tokens as elements of a group: whether the permutations nearest to a block's transitions compose as they do."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from statemix.analysis.permutations import Table, permuted
from statemix.analysis.spectra import check_square

ORDERS = ("antihomomorphism", "homomorphism")


class Composition(NamedTuple):
    """How matrices P_x compose, for x in the group that the tokens generate.

    order: "homomorphism", P_{x o y} = P_x P_y; "antihomomorphism", P_{x o y} = P_y P_x, as of a state that is
    multiplied from the left by P of each new token; "both" of commuting matrices.
    images: element of the group -> its matrix. kernel: the elements whose matrix is the identity.
    """

    order: str
    images: dict[int, Tensor]
    kernel: tuple[int, ...]

    @property
    def image_order(self) -> int:
        """Number of different matrices: they are the group modulo the kernel."""
        return len(self.images) // len(self.kernel)

    @property
    def faithful(self) -> bool:
        """Whether different elements have different matrices."""
        return len(self.kernel) == 1


def composition(permutations: Tensor, table: Table, elements: Sequence[int] | None = None) -> Composition | None:
    """Whether x -> P_x extends to a (anti)homomorphism of the group that the tokens generate.

    From the identity on, every element reached is multiplied by every token: one that is reached with two different
    matrices is the proof that it does not.

    Args:
        permutations: P_x of every token, (X, M, M), exact: entries -1, 0 and 1.
        table: (G, G), table[a, b] = a o b.
        elements: (X,) the element of the group that each token is. None: token x is element x.

    Returns:
        None if there is no such homomorphism.

    Raises:
        ValueError: there is not one element per token, or the table has no identity.
    """
    elements = list(range(len(table))) if elements is None else list(elements)
    if len(elements) != len(permutations):
        wanted, got = len(permutations), len(elements)
        raise ValueError(f"composition: `elements` must have one entry per token = {wanted}, got {got}.")
    neutral = _neutral("composition", table)
    moves = np.asarray(table)[:, elements]
    found = {order: images_of(permutations, moves, neutral, order) for order in ORDERS}
    holding = {order: images for order, images in found.items() if images is not None}
    if not holding:
        return None
    order, images = next(iter(holding.items()))
    kernel = tuple(sorted(element for element, image in images.items() if torch.equal(image, images[neutral])))
    return Composition(order if len(holding) == 1 else "both", images, kernel)


def images_of(permutations: Tensor, moves: Table, start: int, order: str) -> dict[int, Tensor] | None:
    """The product of the matrices of all words that lead from `start` to a state, or None if a state has two."""
    images = {start: torch.eye(permutations.shape[-1], dtype=permutations.dtype)}
    frontier = [start]
    while frontier:
        state = frontier.pop()
        products = permutations @ images[state] if order == "antihomomorphism" else images[state] @ permutations
        for reached, product in zip(moves[state].tolist(), products, strict=True):
            if reached not in images:
                images[reached] = product
                frontier.append(reached)
            elif not torch.equal(images[reached], product):
                return None
    return images


class Representation(NamedTuple):
    """Components of a block that carry a group on their own: what they become depends on no others.

    components: their numbers, ascending. composition: of the signed permutations nearest to the transitions between
    them. distance: (X,) of each token's rows to those permutations, Frobenius, over all columns.
    """

    components: tuple[int, ...]
    composition: Composition
    distance: Tensor


def representation(
    transition: Tensor, table: Table, elements: Sequence[int] | None = None, *, within: float = 0.5
) -> Representation | None:
    """What a block represents of a group: the most elements told apart, by the fewest components, most sharply.

    Every set of components is tried, for M up to 8 (above, all components together): the rows of each token must be
    nearer than `within` to a signed permutation of the set and nothing from outside of it, and these must compose.

    Args:
        transition: of each token, (X, M, M).
        table, elements: as in `composition`.
        within: largest distance of a token's rows, in (0, 1]. A row of zeros is 1 away, another permutation 2.

    Returns:
        None if no set of components does. A composition whose image has order 1 holds what it has, for all tokens.
    """
    check_square("representation", transition)
    found = []
    for components, permutations, distance in permuted(transition, within):
        if (composed := composition(permutations, table, elements)) is not None:
            found.append(Representation(components, composed, distance))
    # more elements, fewer components, sharper
    rank = [(r.composition.image_order, -len(r.components), -float(r.distance.max())) for r in found]
    return found[rank.index(max(rank))] if found else None


def joint_kernel(compositions: Sequence[Composition]) -> tuple[int, ...]:
    """Elements that are the identity in all of them: only the neutral one if together they tell all elements apart."""
    kernels = [set(each.kernel) for each in compositions]
    return tuple(sorted(set.intersection(*kernels))) if kernels else ()


def conjugacy_classes(table: Table) -> list[tuple[int, ...]]:
    """The classes {g x g^-1 : g} of a group with table[a, b] = a o b, each ascending, in the order of their first."""
    everyone = np.arange(len(table))
    inverse = (np.asarray(table) == _neutral("conjugacy_classes", table)).argmax(1)
    return sorted({tuple(sorted({int(y) for y in table[table[everyone, x], inverse]})) for x in everyone})


def _neutral(owner: str, table: Table) -> int:
    """The element with e o x = x for all x."""
    neutral = np.flatnonzero((np.asarray(table) == np.arange(len(table))).all(1))
    if len(neutral) != 1:
        raise ValueError(f"{owner}: `table` must be that of a group, got one without an identity.")
    return int(neutral[0])
