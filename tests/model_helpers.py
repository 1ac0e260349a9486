"""What the tests of the models share: small models, tokens, and the comparison of logits and states."""

import itertools

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


def assert_same(actual, expected, what: str = "result", limit: float | None = None) -> None:
    """Hold logits, or logits and states, to others that were summed in another order."""
    if not isinstance(actual, Tensor):
        assert len(actual) == len(expected)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{what}[{i}]", limit)
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= (CLOSE[actual.dtype] if limit is None else limit), f"{what}: relative error {error:.3g}"


ONE_HOT = 1000.0  # raw gates that far above the others


def natural(n: int) -> list[tuple[int, ...]]:
    """The elements of S_n in the order of their numbers."""
    return list(itertools.permutations(range(n)))


def solved_model(n: int, blocks: int = 1, layers: int = 1, *, gap: float = ONE_HOT, rows: dict | None = None):
    """A model that follows S_n behind a start token, written down: h_t[i] = h_{t-1}[x_t[i]], h_0 = (1, ..., n).

    So h_t[i] = p[i] + 1 for the product p of all tokens, and of all permutations q it is p for which
    sum_i h_t[i] (q[i] + 1) is largest. A second layer remembers the last token, for which the head has no weight.

    Args:
        n: of S_n.
        blocks: all alike.
        layers: 1 or 2.
        gap: of the largest raw gate of a row above the others.
        rows: {(token, i): source} in place of x_t[i]; n is the input.
    """
    elements = natural(n)
    tokens = len(elements) + 1
    mixer = {"name": "bd_lru", "num_blocks": blocks, "block_size": n}
    model = SequenceModel(tokens, tokens + n, layers, mixer, mlp_size=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in model.layers:
            layer.mixer_norm.weight.fill_((tokens + n) ** -0.5)
            layer.mlp_norm.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.embedding.weight[:, :tokens] = torch.eye(tokens)
        first = model.layers[0].mixer
        gates = first.raw_gates.projection.weight.view(n, n + 1, blocks, -1)
        for token in range(tokens):
            for i in range(n):
                source = elements[token][i] if token < len(elements) else n
                gates[i, (rows or {}).get((token, i), source), :, token] = gap
        first.values.weight.view(n, blocks, -1)[:, :, tokens - 1] = torch.arange(1.0, n + 1)[:, None]
        first.output.weight.view(-1, n, blocks)[tokens:] = torch.eye(n)[:, :, None] / blocks
        model.head.weight[: len(elements), tokens:] = torch.tensor(elements) + 1.0
        if layers == 2:
            second = model.layers[1].mixer
            second.raw_gates.projection.bias.view(n, n + 1, blocks)[:, n] = ONE_HOT
            second.values.weight.view(n, blocks, -1)[0, 0, :tokens] = torch.arange(1.0, tokens + 1)
            second.output.weight[0, 0] = 1
    return model
