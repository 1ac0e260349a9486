"""Raw gates to weights: each row of raw gates z is normalised so that the absolute weights sum to one.

A row whose sum is zero or subnormal has weights of 0 instead of NaN, and finite gradients. A row whose sum overflows is
scaled before it is summed. Both hold in every engine: tests/test_gates.py, tests/test_scan.py.
Source: Dubinin et al. 2026 (arXiv 2602.12021), section on normalisation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RELU_FLOOR = 1e-3  # added per entry to the sum of a relu row, as published


class Normalization(NamedTuple):
    """All that the package knows about one normalisation. A new one is an entry here and a case in each kernel.

    weights: of raw gates, along a dim, where a sum below the third argument counts as zero.
    inverse: raw gates whose weights along the last axis are these, positive and with a sum of one. Where there is a
        floor, the last weight comes out smaller by the floor's share.
    code: `Normalization` of csrc/interface.h.
    signed: whether a weight may be negative.
    floor: added to the sum for each entry of a row.
    """

    weights: Callable[[Tensor, int, float], Tensor]
    inverse: Callable[[Tensor], Tensor]
    code: int
    signed: bool
    floor: float = 0.0


def _l1(activation: Callable[[Tensor], Tensor], floor: float = 0.0) -> Callable[[Tensor, int, float], Tensor]:
    """z -> f(z) / (sum |f(z)| + floor * entries)."""

    def weights(raw: Tensor, dim: int, least_sum: float) -> Tensor:
        numerator, entries = activation(raw), raw.shape[dim]
        # a row whose sum may overflow is scaled, by a power of two, which rounds nothing
        shrink = 0.5 ** entries.bit_length()
        largest = numerator.detach().abs().amax(dim, keepdim=True)
        numerator = torch.where(largest > torch.finfo(raw.dtype).max * shrink, numerator * shrink, numerator)
        total = numerator.abs().sum(dim, keepdim=True) + floor * entries
        return numerator / torch.where(total < least_sum, 1.0, total)

    return weights


def _inverse_silu(weights: Tensor) -> Tensor:
    low, high = torch.zeros_like(weights), 2 * weights  # z / 2 <= silu(z) <= z for z >= 0
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.nn.functional.silu(middle) > weights
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


def _inverse_relu(weights: Tensor) -> Tensor:
    """The floor takes a share of the last weight: at most half of it, for the gates are scaled until it does."""
    floor = RELU_FLOOR * weights.shape[-1]
    last = weights[..., -1:]
    scale = (2 * floor / last).clamp(min=1)
    return torch.cat([scale * weights[..., :-1], scale * last - floor], dim=-1)


NORMALIZATIONS: dict[str, Normalization] = {
    "softmax": Normalization(
        weights=lambda raw, dim, least_sum: torch.softmax(raw, dim),
        inverse=torch.log,
        code=0,
        signed=False,
    ),
    "sigmoid": Normalization(
        # s(z_j) / sum s(z_l), also where every s(z) is zero in floating point
        weights=lambda raw, dim, least_sum: torch.softmax(torch.nn.functional.logsigmoid(raw), dim),
        # any factor up to 1 would do: with a half the largest gate is at its middle
        inverse=lambda weights: torch.logit(weights / 2),
        code=1,
        signed=False,
    ),
    "relu": Normalization(
        weights=_l1(torch.relu, floor=RELU_FLOOR),
        inverse=_inverse_relu,
        code=2,
        signed=False,
        floor=RELU_FLOOR,
    ),
    "tanh": Normalization(
        weights=_l1(torch.tanh),
        inverse=lambda weights: torch.atanh(weights / 2),
        code=3,
        signed=True,
    ),
    "silu": Normalization(
        weights=_l1(torch.nn.functional.silu),
        inverse=_inverse_silu,
        code=4,
        signed=True,
    ),
    "linear": Normalization(
        weights=_l1(lambda raw: raw),
        inverse=lambda weights: weights,
        code=5,
        signed=True,
    ),
    "none": Normalization(
        weights=lambda raw, dim, least_sum: raw,
        inverse=lambda weights: weights,
        code=6,
        signed=True,
    ),
}


def normalize(raw_gates: Tensor, normalization: str, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Weights f(z_j) / sum_l |f(z_l)| over `dim`; the name picks f. softmax and none are as their names say.

    Args:
        raw_gates: any shape, any real; NaN and infinities pass through.
        normalization: a name in `NORMALIZATIONS`.
        dim: the axis of a row: M + 1 entries, the input gate last.
        dtype: of the weights and of all sums. That of `raw_gates` if None; a wider one has the same rows of zeros.

    Returns:
        Weights in the shape of `raw_gates`.

    Raises:
        TypeError: `raw_gates` is no dense tensor of floats, or `dim` is no int.
        ValueError: the name is unknown, or there is no such axis.
    """
    check_normalization("normalize", normalization)
    check_floats("normalize", "raw_gates", raw_gates)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"normalize: `dim` must be an int, got {dim!r}.")
    if not -raw_gates.ndim <= dim < raw_gates.ndim:
        raise ValueError(f"normalize: `dim` must be an axis of the shape {tuple(raw_gates.shape)}, got {dim}.")
    if raw_gates.shape[dim] == 0:
        raise ValueError(
            f"normalize: `raw_gates` must have an entry along `dim` = {dim}, got {tuple(raw_gates.shape)}."
        )
    weights = NORMALIZATIONS[normalization].weights
    return weights(raw_gates.to(dtype or raw_gates.dtype), dim, torch.finfo(raw_gates.dtype).tiny)


def check_floats(owner: str, argument: str, tensor: object) -> None:
    """Raise TypeError, in the name of `owner`, unless an argument is a dense tensor of floats of 16 bits or more."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: `{argument}` must be a tensor, got {type(tensor).__name__}.")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{owner}: `{argument}` must have a floating-point dtype of 16 bits or more, got {tensor.dtype}."
        )
    check_dense(owner, argument, tensor)


def check_dense(owner: str, argument: str, tensor: Tensor) -> None:
    """Raise TypeError, in the name of `owner`, where a tensor does not hold all its numbers, as a sparse one."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{owner}: `{argument}` must be a dense tensor, got one of the layout {tensor.layout}.")


def check_normalization(owner: str, normalization: str) -> None:
    """Raise ValueError, in the name of `owner`, unless the normalisation is known."""
    if not isinstance(normalization, str) or normalization not in NORMALIZATIONS:
        raise ValueError(f"{owner}: `normalization` must be one of {sorted(NORMALIZATIONS)}, got {normalization!r}.")
