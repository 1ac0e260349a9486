"""Log-depth scans in plain torch: any device and dtype, double backward, torch.export. The published approach.

The maps h -> A h + b compose associatively: (A2, b2) after (A1, b1) is (A2 A1, A2 b1 + b2). Pairs of neighbouring steps
are composed, the half-length problem is solved, and the skipped steps are filled in: O(T) work and O(log T) dependent
operations, at the price of holding all T transitions of M x M numbers. A product of companion blocks is dense,
so H-LRU costs as much as BD-LRU here. The maps are float64, since a product of T transitions near one holds the
rounding of each of them.
"""

import torch
from torch import Tensor

from statemix.scan.problem import Problem


def unserved(problem: Problem) -> str | None:
    """It serves every problem."""
    return None


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """The states by a tree of maps, and the state (B, M, N) after the last step."""
    weights, values, initial_state = problem.exact()
    if problem.kind == "block":
        transition, entering = weights[:, :, :, :-1], weights[:, :, :, -1] * values
    else:
        transition = _companion(weights[:, :, :-1])
        entering = _first_component(weights[:, :, -1] * values, initial_state.shape[1])
        if problem.kind == "observer":
            transition = transition.transpose(2, 3)
    blocks = _affine_scan(transition, entering, initial_state, problem.reset)
    states = blocks[:, :, 0] if problem.kind == "companion" else blocks
    return states, blocks[:, -1].to(problem.initial_state.dtype)


def _companion(coefficients: Tensor) -> Tensor:
    """(B, T, M, N) -> (B, T, M, M, N): the coefficients in row 0, ones below the diagonal; [i, j] carries j to i."""
    order = coefficients.shape[2]
    shift = torch.eye(order, dtype=coefficients.dtype, device=coefficients.device)[:-1]  # row i is e_i: h'[i+1] = h[i]
    below = shift[:, :, None].expand(*coefficients.shape[:2], order - 1, order, coefficients.shape[3])
    return torch.cat([coefficients[:, :, None], below], dim=2)


def _first_component(entering: Tensor, order: int) -> Tensor:
    """(B, T, N) -> (B, T, M, N), zero but in component 0."""
    return torch.nn.functional.pad(entering[:, :, None], (0, 0, 0, order - 1))


def _affine_scan(transition: Tensor, entering: Tensor, initial_state: Tensor, reset: Tensor | None) -> Tensor:
    """States (B, T, M, N) of h_t = A_t h_{t-1} + b_t for A (B, T, M, M, N), b (B, T, M, N), h_0 (B, M, N)."""
    if reset is not None:
        transition = transition.masked_fill(reset[:, :, None, None, None], 0)
        initial_state = initial_state.masked_fill(reset[:, :1, None], 0)
        reset = reset[:, :, None, None, None]
    first = (transition[:, 0] * initial_state[:, None]).sum(2) + entering[:, 0]
    entering = torch.cat([first[:, None], entering[:, 1:]], dim=1)
    # N before the matrix axes, for batched products: (B, T, N, M, M) and (B, T, N, M, 1)
    states = _prefix(transition.movedim(-1, 2), entering.movedim(-1, 2)[..., None], reset)
    return states[..., 0].movedim(2, -1)


def _prefix(transition: Tensor, entering: Tensor, reset: Tensor | None) -> Tensor:
    """h_t = A_t h_{t-1} + b_t from h_{-1} = 0, by odd-even reduction. The time axis is 1; A_t is zero at a reset."""
    length = entering.shape[1]
    if length == 1:
        return entering
    later, earlier = transition[:, 1::2], transition[:, : length - 1 : 2]
    cut = None if reset is None else reset[:, 1::2]
    any_cut = None if reset is None else reset[:, 1::2] | reset[:, : length - 1 : 2]
    moved = _product(later, entering[:, : length - 1 : 2], cut)
    odd = _prefix(_product(later, earlier, cut), moved + entering[:, 1::2], any_cut)
    cut = None if reset is None else reset[:, 2::2]
    inner = _product(transition[:, 2::2], odd[:, : (length - 1) // 2], cut) + entering[:, 2::2]
    even = torch.cat([entering[:, :1], inner], dim=1)
    # interleave: even, odd, even, ... with one even step left over at an odd length
    pairs = torch.stack([even[:, : length // 2], odd], dim=2).flatten(1, 2)
    return pairs if length % 2 == 0 else torch.cat([pairs, even[:, -1:]], dim=1)


def _product(left: Tensor, right: Tensor, reset: Tensor | None) -> Tensor:
    """left @ right, where left is zero at a reset: what is not finite in right must not pass it as 0 * NaN."""
    return left @ (right if reset is None else right.masked_fill(reset, 0))
