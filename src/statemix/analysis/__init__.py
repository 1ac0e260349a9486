"""What a linear recurrence does to its state, from its transitions: pure functions of arrays.

A transition A is a real M x M matrix in the last two axes, [..., i, j] carries old component j to new component i.
Rows of an L1 norm of at most 1, which all normalisations but "none" make, never enlarge the largest entry of a state.
So where the transitions of a block form a group, none may shrink that entry either, or its inverse would enlarge it:
they are signed permutations. What a block has learned of a group is read off the permutations nearest to its
transitions.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from statemix.gates import check_normalization, normalize

KINDS = ("block", "companion", "observer")
MAX_ORDER = 16  # of the assignment: it goes through 2^M sets of columns
MAX_SUBSETS = 8  # M up to which every set of components is tried
ORDERS = ("antihomomorphism", "homomorphism")

Table = np.ndarray[tuple[int, int], np.dtype[np.integer]]


def transitions(raw_gates: Tensor, *, normalization: str, kind: str) -> tuple[Tensor, Tensor]:
    """A_t and a0_t of h_t = A_t h_{t-1} + a0_t * v_t, as dense blocks, from the raw gates of a scan.

    Args:
        raw_gates: (..., M, M+1, N) for "block", (..., M+1, N) for "companion" and "observer".
        normalization: a name in `NORMALIZATIONS`.
        kind: of the scan. "companion": the coefficients are row 0 and ones are below the diagonal; its state is
            (h_t, ..., h_{t-M+1}). "observer": the transposed block.

    Returns:
        Transitions (..., N, M, M), [..., i, j] carries old component j to new component i, and input gates (..., N, M):
        of "companion" and "observer", whose v_t has one number per channel, all but component 0 are zero.

    Raises:
        ValueError: a name is unknown, or the shape is not of that kind.

    Source: Dubinin et al. 2026 (arXiv 2602.12021), equations of BD-LRU and H-LRU.
    """
    check_normalization("transitions", normalization)
    if kind not in KINDS:
        raise ValueError(f"transitions: `kind` must be one of {sorted(KINDS)}, got {kind!r}.")
    shape = tuple(raw_gates.shape)
    axes = 3 if kind == "block" else 2
    if len(shape) < axes or shape[-2] < 2 or (kind == "block" and shape[-2] != shape[-3] + 1):
        layout = "(..., M, M+1, N)" if kind == "block" else "(..., M+1, N)"
        raise ValueError(f"transitions: `raw_gates` of kind {kind!r} must have shape {layout}, got {shape}.")
    weights = normalize(raw_gates, normalization, dim=-2).movedim(-1, -axes)  # (..., N, [M,] M+1)
    coefficients, input_gate = weights[..., :-1], weights[..., -1]
    if kind == "block":
        return coefficients, input_gate
    order = coefficients.shape[-1]
    transition = torch.diag(weights.new_ones(order - 1), -1).repeat(*coefficients.shape[:-1], 1, 1)
    transition[..., 0, :] = coefficients
    input_gate = torch.nn.functional.pad(input_gate[..., None], (0, order - 1))
    return (transition if kind == "companion" else transition.mT), input_gate


def eigenvalues(transition: Tensor) -> Tensor:
    """Eigenvalues (..., M) of transitions (..., M, M), complex128, the largest absolute value first."""
    _check_square("eigenvalues", transition)
    values = torch.linalg.eigvals(transition.double())
    return values.gather(-1, values.abs().argsort(-1, descending=True))


def half_life(transition: Tensor) -> Tensor:
    """Steps until the slowest part of a state has halved, ln 2 / -ln max|eigenvalue|, of transitions (..., M, M).

    inf where the largest eigenvalue is 1 or more, 0 where all are zero; float64.
    """
    largest = eigenvalues(transition)[..., 0].abs()
    # of a permutation it is 1 but for rounding: test_a_permutation_has_no_half_life
    never = largest >= 1 - 8 * transition.shape[-1] * torch.finfo(torch.float64).eps
    steps = math.log(2) / -largest.log()
    return torch.where(never, math.inf, steps)


def gate_entropy(weights: Tensor, dim: int = -1) -> Tensor:
    """-sum_j p_j ln p_j in nats of p_j = |w_j| / sum |w| along `dim`: 0 for a row with one entry, ln of their number
    for an even one. 0 for a row of zeros.

    Rows of BD-LRU are torch.cat([transition, input_gate[..., None]], -1), of H-LRU the normalised gates of a channel.
    """
    sizes = weights.abs()
    shares = sizes / sizes.sum(dim, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.special.entr(shares).sum(dim)


def leak(transition: Tensor) -> Tensor:
    """1 - max_j |A[i, j]| of every row, (..., M): the share of a new component that is no copy of one old component."""
    _check_square("leak", transition)
    return 1 - transition.abs().amax(-1)


def log_singular_values(transition: Tensor) -> Tensor:
    """Natural logarithms of the singular values of the product A_T ... A_1, the largest first.

    The product of the k largest singular values is the largest one of the k-th compound matrix (its entries are the
    k x k minors), and compounds multiply as the matrices do. Their products are rescaled at every step: so values
    that differ by hundreds of orders of magnitude, of which the product itself would hold the largest alone, all
    come out right.

    Args:
        transition: A_1..A_T, (T, ..., M, M), M up to 8.

    Returns:
        (..., M) float64; -inf for a singular value of zero.

    Raises:
        ValueError: the matrices are not square, T = 0, or M is above 8.
    """
    _check_square("log_singular_values", transition)
    order = transition.shape[-1]
    if transition.ndim < 3 or len(transition) == 0 or order > MAX_SUBSETS:
        shape = tuple(transition.shape)
        raise ValueError(
            f"log_singular_values: `transition` must have shape (T, ..., M, M), T >= 1, M <= {MAX_SUBSETS}, "
            f"got {shape}."
        )
    sums = [transition.new_zeros(transition.shape[1:-2], dtype=torch.float64)]
    for size in range(1, order + 1):
        product, log_scale = None, torch.zeros_like(sums[0])
        for compound in _compound(transition.double(), size):
            product = compound if product is None else compound @ product
            largest = product.abs().amax((-2, -1))
            product = product / torch.where(largest == 0, 1, largest)[..., None, None]
            log_scale = log_scale + largest.log()
        assert product is not None
        sums.append(log_scale + torch.linalg.matrix_norm(product, 2).log())
    logs = [torch.where(total.isinf(), total, total - before) for before, total in itertools.pairwise(sums)]
    return torch.stack(logs, dim=-1)


def _compound(matrices: Tensor, size: int) -> Iterator[Tensor]:
    """The matrix of all size x size minors of each of the matrices along the first axis."""
    subsets = torch.tensor(list(itertools.combinations(range(matrices.shape[-1]), size)), device=matrices.device)
    rows, columns = subsets[:, None, :, None], subsets[None, :, None, :]
    minors = (len(subsets) * size) ** 2 * matrices[0].numel() // matrices.shape[-1] ** 2  # numbers for one step
    for part in matrices.split(max(1, 2**20 // max(minors, 1))):
        yield from torch.linalg.det(part[..., rows, columns])


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
    _check_square("nearest_permutation", transition)
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
    found = {order: _images(permutations, moves, neutral, order) for order in ORDERS}
    holding = {order: images for order, images in found.items() if images is not None}
    if not holding:
        return None
    order, images = next(iter(holding.items()))
    kernel = tuple(sorted(element for element, image in images.items() if torch.equal(image, images[neutral])))
    return Composition(order if len(holding) == 1 else "both", images, kernel)


def _images(permutations: Tensor, moves: Table, start: int, order: str) -> dict[int, Tensor] | None:
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
    _check_square("representation", transition)
    found = []
    for components, permutations, distance in _permuted(transition, within):
        if (composed := composition(permutations, table, elements)) is not None:
            found.append(Representation(components, composed, distance))
    # more elements, fewer components, sharper
    rank = [(r.composition.image_order, -len(r.components), -float(r.distance.max())) for r in found]
    return found[rank.index(max(rank))] if found else None


def _permuted(transition: Tensor, within: float) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
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
    _check_square("needed_block_size", transition)
    signatures: dict[int, list[dict[int, Tensor]]] = {}
    for block in transition.unbind(1):
        for components, permutations, _ in _permuted(block, within):
            images = _images(permutations, moves, start, "antihomomorphism")
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


def joint_kernel(compositions: Sequence[Composition]) -> tuple[int, ...]:
    """Elements that are the identity in all of them: only the neutral one if together they tell all elements apart."""
    kernels = [set(each.kernel) for each in compositions]
    return tuple(sorted(set.intersection(*kernels))) if kernels else ()


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
    _check_square("relabel", transition)
    images = torch.as_tensor(np.asarray(action), dtype=torch.int64)
    order, points = transition.shape[-1], images.shape[1]
    if points > order or order > MAX_SUBSETS:
        raise ValueError(f"relabel: `transition` must have {points} <= M <= {MAX_SUBSETS}, got M = {order}.")
    places = torch.tensor(list(itertools.permutations(range(order), points)))  # (candidates, n)
    weight = torch.zeros(len(places), dtype=torch.float64)
    for matrix, image in zip(transition.double(), images, strict=True):
        weight += matrix[places, places[:, image]].sum(1)
    return tuple(places[weight.argmax()].tolist())


def discriminants(states: Tensor, labels: Tensor) -> Tensor:
    """Directions in which the means of the labels are far apart, next to the spread around them: the best first.

    Args:
        states: (B, K), of which B is well above K.
        labels: (B,) integers.

    Returns:
        (K, k), k the lesser of K and the number of labels that occur. In these coordinates the spread is the same in
        all directions, so that the nearest mean is the likeliest label.

    Source: Fisher 1936, linear discriminants of several classes.
    """
    kinds, index = labels.unique(return_inverse=True)
    counts = torch.bincount(index)[:, None]
    means = torch.zeros(len(kinds), states.shape[1], dtype=states.dtype).index_add(0, index, states) / counts
    around = states - means[index]
    # a state that is exactly a function of its label has no spread: test_states_without_spread
    floor = 1e-9 * states.var(0).sum() * torch.eye(states.shape[1], dtype=states.dtype)
    spread = torch.linalg.cholesky(around.T @ around / len(states) + floor)
    apart = torch.linalg.solve_triangular(spread, (means - means.mean(0)).T, upper=False)
    directions = torch.linalg.svd(apart, full_matrices=False).U
    return torch.linalg.solve_triangular(spread.T, directions, upper=True)


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


def _check_square(owner: str, transition: Tensor) -> None:
    shape = tuple(transition.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ValueError(f"{owner}: `transition` must have shape (..., M, M) with M of at least 1, got {shape}.")
