"""What the tests of the models share: small models, tokens, and the comparison of logits and states."""

import pytest
import torch
from torch import Tensor

from statemix import SequenceModel

V, D, T = 11, 12, 9
MIXERS = {
    "bd_lru": {"name": "bd_lru", "num_blocks": 5, "block_size": 3},
    "bd_lru fixed": {"name": "bd_lru", "num_blocks": 5, "block_size": 3, "selective": False},
    "h_lru": {"name": "h_lru", "num_channels": 5, "order": 3},
    "observer": {"name": "h_lru", "num_channels": 5, "order": 3, "form": "observer", "normalization": "tanh"},
    "lstm": {"name": "lstm", "hidden_size": 7},
}
each_mixer = pytest.mark.parametrize("mixer", MIXERS)
# Largest difference over the largest entry: the linear maps, and the fused step, sum their products in another order.
CLOSE = {torch.float32: 4e-6, torch.float64: 1e-14}


def build(generator: torch.Generator, mixer: str = "bd_lru", *, dtype=torch.float64, **options) -> SequenceModel:
    """A model of three layers (unless told) with every weight from the generator."""
    model = SequenceModel(V, D, options.pop("num_layers", 3), MIXERS[mixer], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(normal / D**0.5 if parameter.ndim > 1 else 1 + normal / 4)
    return model.to(dtype)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=generator)


def assert_same(actual, expected, what: str = "result") -> None:
    """Hold logits, or logits and states, to others that were summed in another order."""
    if not isinstance(actual, Tensor):
        assert len(actual) == len(expected)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{what}[{i}]")
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= CLOSE[actual.dtype], f"{what}: relative error {error:.3g}"
