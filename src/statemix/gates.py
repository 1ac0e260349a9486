"""Raw gates to weights: each row of raw gates z is normalised so that the absolute weights sum to one.

A row whose sum is zero or subnormal has weights of 0 instead of NaN, and finite gradients: tests/test_gates.py.
Source: Dubinin et al. 2026 (arXiv 2602.12021), section on normalisation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RELU_FLOOR = 1e-3  # added per entry to the sum of a relu row, as published


def _l1(activation: Callable[[Tensor], Tensor], floor: float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """z -> f(z) / (sum |f(z)| + floor * entries)."""

    def weights(raw: Tensor, dim: int) -> Tensor:
        numerator = activation(raw)
        total = numerator.abs().sum(dim, keepdim=True) + floor * raw.shape[dim]
        return numerator / torch.where(total < torch.finfo(raw.dtype).tiny, torch.ones_like(total), total)

    return weights


NORMALIZATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": torch.softmax,
    # s(z_j) / sum s(z_l), also where every s(z) is zero in floating point
    "sigmoid": lambda raw, dim: torch.softmax(torch.nn.functional.logsigmoid(raw), dim),
    "relu": _l1(torch.relu, floor=RELU_FLOOR),
    "tanh": _l1(torch.tanh),
    "silu": _l1(torch.nn.functional.silu),
    "linear": _l1(lambda raw: raw),
    "none": lambda raw, dim: raw,
}


def normalize(raw_gates: Tensor, normalization: str, dim: int) -> Tensor:
    """Weights f(z_j) / sum_l |f(z_l)| over `dim`; the name picks f. softmax and none are as their names say.

    Args:
        raw_gates: any shape, any real; NaN and infinities pass through.
        normalization: a name in `NORMALIZATIONS`.
        dim: the axis of a row: M + 1 entries, the input gate last.

    Returns:
        Weights in the shape and dtype of `raw_gates`.

    Raises:
        ValueError: the name is unknown.
    """
    check_normalization("normalize", normalization)
    return NORMALIZATIONS[normalization](raw_gates, dim)


def check_normalization(owner: str, normalization: str) -> None:
    """Raise ValueError, in the name of `owner`, unless the normalisation is known."""
    if not isinstance(normalization, str) or normalization not in NORMALIZATIONS:
        raise ValueError(f"{owner}: `normalization` must be one of {sorted(NORMALIZATIONS)}, got {normalization!r}.")
