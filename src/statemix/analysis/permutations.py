"""Of transitions as permutations: the nearest one, its distance, and the components that are permuted on their own."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from statemix.analysis.spectra import MAX_SUBSETS, check_square

MAX_ORDER = 16  # of the assignment: it goes through 2^M sets of columns

Table = np.ndarray[tuple[int, int], np.dtype[np.integer]]


def nearest_permutation(transition: Tensor, *, signed: bool = False) -> Tensor:
    """The permutation matrix P with the smallest Frobenius norm of A - P, exactly.

    ||A - P||^2 = ||A||^2 + M - 2 sum_i A[i, p(i)]: a linear assignment, solved over the 2^M sets of used columns.

    Args:
        transition: A, (..., M, M), finite, M up to 16.
        signed: entries of P may be -1 too: then P is nearest among the signed permutations.

    Returns:
        P, (..., M, M), in the dtype of A; row i has its one entry at column p(i). Of several the nearest, any one.

    Raises:
        ValueError: A is not square, not finite, or M is above 16.
    """
    check_square("nearest_permutation", transition)
    order = transition.shape[-1]
    if order > MAX_ORDER:
        raise ValueError(f"nearest_permutation: `transition` must have M of at most {MAX_ORDER}, got {order}.")
    if not transition.isfinite().all():
        raise ValueError("nearest_permutation: `transition` must be finite, got NaN or infinity.")
    gains = (transition.abs() if signed else transition).double().reshape(-1, order, order)
    chunk = max(1, 2**22 >> order)  # matrices at once: tables of 32 MB
    columns = torch.cat([_assignment(part) for part in gains.split(chunk)]).view(transition.shape[:-1])
    permutation = torch.nn.functional.one_hot(columns, order).to(transition.dtype)
    return torch.where(transition < 0, -permutation, permutation) if signed else permutation


def _assignment(gains: Tensor) -> Tensor:
    """Columns (B, M), one for each row and each once, with the largest sum of gains (B, M, M)."""
    batch, order, _ = gains.shape
    sets = torch.arange(2**order)
    sizes = sum((sets >> column) & 1 for column in range(order))
    best = gains.new_full((batch, 2**order), -math.inf)  # of the first |set| rows, in the columns of the set
    best[:, 0] = 0
    last = torch.zeros(batch, 2**order, dtype=torch.int64)  # the column of row |set| - 1 in it
    for row in range(order):
        level = sets[sizes == row + 1]
        for column in range(order):
            to = level[(level >> column) & 1 == 1]
            gain = best[:, to ^ (1 << column)] + gains[:, row, column, None]
            better = gain > best[:, to]
            best[:, to] = torch.where(better, gain, best[:, to])
            last[:, to] = torch.where(better, column, last[:, to])
    left, chosen = torch.full((batch, 1), 2**order - 1), []
    for _ in range(order):
        chosen.append(last.gather(1, left))
        left = left ^ (1 << chosen[-1])
    return torch.cat(chosen[::-1], dim=1)


def distance_to_permutation(transition: Tensor, *, signed: bool = False) -> Tensor:
    """Frobenius norm of A - P, (...), for the nearest permutation P of A (..., M, M).

    Two permutations are at least 2 apart, so below 1 there is no other as near; an even block is sqrt(M - 1) away.
    """
    return torch.linalg.matrix_norm(transition - nearest_permutation(transition, signed=signed))


def relabel(transition: Tensor, action: Table) -> tuple[int, ...]:
    """Which component of a block plays which point that the tokens permute: the most weight where it should be.

    Args:
        transition: of each token, (X, M, M), M up to 8.
        action: (X, n), action[x, i] = x(i), n <= M.

    Returns:
        c (n,): sum_x,i A_x[c[i], c[x(i)]] is the largest there is. It is X n where new c[i] is a copy of old c[x(i)],
        as in a state that follows x_1 o ... o x_t: with h_t[c[i]] = h_0[c[p(i)]], p o x comes after p.

    Raises:
        ValueError: there are more points than components, or M is above 8.
    """
    check_square("relabel", transition)
    images = torch.as_tensor(np.asarray(action), dtype=torch.int64)
    order, points = transition.shape[-1], images.shape[1]
    if points > order or order > MAX_SUBSETS:
        raise ValueError(f"relabel: `transition` must have {points} <= M <= {MAX_SUBSETS}, got M = {order}.")
    places = torch.tensor(list(itertools.permutations(range(order), points)))  # (candidates, n)
    weight = torch.zeros(len(places), dtype=torch.float64)
    for matrix, image in zip(transition.double(), images, strict=True):
        weight += matrix[places, places[:, image]].sum(1)
    return tuple(places[weight.argmax()].tolist())


def permuted(transition: Tensor, within: float) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Sets of components that every token permutes on their own: the set, the signed permutations, the distances."""
    order = transition.shape[-1]
    for size in range(1, order + 1) if order <= MAX_SUBSETS else (order,):
        for components in itertools.combinations(range(order), size):
            chosen = list(components)
            rows = transition[:, chosen].double()
            inside = rows[:, :, chosen]
            # no permutation is nearer than the largest entries of the rows allow: most sets end here
            if (1 - inside.abs().amax(-1)).clamp_min(0).square().sum(-1).max() >= within**2:
                continue
            kept = torch.zeros_like(rows)
            kept[:, :, chosen] = permutations = nearest_permutation(inside, signed=True)
            distance = torch.linalg.matrix_norm(rows - kept)
            if distance.max() < within:
                yield components, permutations, distance
