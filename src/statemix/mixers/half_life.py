"""First gates of BD-LRU and H-LRU with a memory of known length: biases whose transition decays by half in h steps.

With x = 0 the raw gates are their biases. Let s = 2^(-1/h). The biases are those of these weights, all positive, so
that s is the largest eigenvalue (Perron) and what the layer remembers goes as s^t in the end:

- block: the diagonal is s - (M - 1) o, the rest of the block o = s (1 - s) / M, the input gate 1 - s. The rows sum to
  s, the eigenvalue of the mean of a block; that of all differences in a block is s - M o = s^2. So every component
  remembers, the mean for h and the differences for h / 2 steps, and mixing starts as slow as forgetting. (Equal
  weights s / M would be a block of rank one: after one step its components were all the same.)
- companion and observer: a_i = s^i / M, the input gate the rest to one. Then s^M = sum_i a_i s^(M - i): s is a root.

This holds at x = 0. Of other x it is the typical memory as long as W x is small beside the biases, as it is in softmax
and sigmoid for a long half-life; in a signed normalisation it may turn a sign.
"""

import math

import torch
from torch import Tensor

from statemix.gates import NORMALIZATIONS
from statemix.mixers.base import check_numbers


def check_half_life(owner: str, half_life: float | None) -> None:
    """Raise, in the name of `owner`, unless it is a number above 0, or None."""
    if half_life is None:
        return
    check_numbers(owner, gate_half_life=half_life)
    if not 0 < half_life < math.inf:
        raise ValueError(f"{owner}: `gate_half_life` must be above 0 and finite, got {half_life}.")


def half_life_gates(kind: str, order: int, normalization: str, half_life: float) -> Tensor:
    """Raw gates of one block or channel whose largest eigenvalue is 2^(-1 / half_life).

    Args:
        kind: "block", "companion" or "observer".
        order: M.
        normalization: a name in `NORMALIZATIONS`; every one of them has such gates.
        half_life: h, steps, above 0.

    Returns:
        (M, M + 1) for "block", [i, j] carries old component j to new component i; (M + 1,) for the others. float64.
    """
    decay, input_gate = 2 ** (-1 / half_life), -math.expm1(-math.log(2) / half_life)
    if kind == "block":
        mixing = decay * input_gate / order
        state = torch.full((order, order), mixing, dtype=torch.float64)
        state += (decay - order * mixing) * torch.eye(order, dtype=torch.float64)
    else:
        state = decay ** torch.arange(1, order + 1, dtype=torch.float64) / order
    weights = torch.cat([state, 1 - state.sum(-1, keepdim=True)], dim=-1)  # the input gate is the rest to one
    return NORMALIZATIONS[normalization].inverse(weights)
