"""Of transitions as matrices: their eigenvalues, half-lives, entropies, singular values, and where their states lie."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from statemix.gates import check_normalization, normalize

KINDS = ("block", "companion", "observer")
MAX_SUBSETS = 8  # M up to which every set of components is tried


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
    check_square("eigenvalues", transition)
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
    check_square("leak", transition)
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
    check_square("log_singular_values", transition)
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


def check_square(owner: str, transition: Tensor) -> None:
    """Raise ValueError in the name of `owner` unless the shape is (..., M, M)."""
    shape = tuple(transition.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ValueError(f"{owner}: `transition` must have shape (..., M, M) with M of at least 1, got {shape}.")
