"""Vectors scaled to a length."""

from torch import Tensor


def rms_normalize(x: Tensor) -> Tensor:
    """x / sqrt(mean x^2 + 1e-5) over the last axis: a root mean square of 1."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def unit_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis: a norm of at most 1, and a finite gradient at x = 0."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
