"""SequencePredictor: what it predicts is written out row by row, padding changes no bit, it learns, bad input."""

import re

import pytest
import torch
from mixer_helpers import SPECS, normal
from torch import Tensor, nn

from statemix import Backbone, SequencePredictor
from statemix.predictor import POOLINGS

F, K, D, T, LENGTHS = 4, 3, 6, 9, [4, 7, 1]
each_pooling = pytest.mark.parametrize("pooling", POOLINGS)
each_direction = pytest.mark.parametrize("bidirectional", [False, True])


def build(pooling: str, bidirectional: bool, mixer: str = "bd_lru") -> SequencePredictor:
    torch.manual_seed(0)
    backbone = Backbone(D, 2, SPECS[mixer], bidirectional=bidirectional)
    return SequencePredictor(F, K, backbone, pooling=pooling).double()


def one_row(model: SequencePredictor, x: Tensor) -> Tensor:
    """x (T, F) to (K,), by the equations."""
    y = model.backbone((x @ model.input.weight.T + model.input.bias)[None])[0][0]
    if model.pooling == "mean":
        pooled = sum(y) / len(y)
    elif model.pooling == "last":
        pooled = torch.cat([y[-1, :D], y[0, D:]])
    else:
        weights = torch.exp(y @ model.score.weight[0])
        pooled = sum(weight / weights.sum() * step for weight, step in zip(weights, y, strict=True))
    return model.output.weight @ pooled + model.output.bias


@each_pooling
@each_direction
@pytest.mark.parametrize("mixer", ["bd_lru", "lstm", "attention"])
def test_a_row_is_what_the_equations_say(generator, pooling, bidirectional, mixer):
    model, x = build(pooling, bidirectional, mixer), normal(generator, 3, T, F)
    for lengths in (None, LENGTHS):
        actual = model(x, None if lengths is None else torch.tensor(lengths))
        expected = torch.stack([one_row(model, x[row, :length]) for row, length in enumerate(lengths or [T] * 3)])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@each_pooling
@each_direction
def test_what_is_behind_an_end_changes_no_bit(generator, pooling, bidirectional):
    model, lengths, x = build(pooling, bidirectional), torch.tensor(LENGTHS), normal(generator, 3, T, F)

    def everything(x: Tensor) -> list[Tensor]:
        model.zero_grad()
        y = model(x, lengths)
        y.square().sum().backward()
        return [y, *(parameter.grad for parameter in model.parameters())]

    expected = everything(x)
    for value in (torch.nan, 1e300, None):
        other = normal(generator, 3, T + 4, F) if value is None else torch.full((3, T, F), value, dtype=x.dtype)
        for row, length in enumerate(LENGTHS):
            other[row, :length] = x[row, :length]
        assert all(map(torch.equal, everything(other), expected))
    x[0, LENGTHS[0] - 1] += 1
    assert not torch.equal(everything(x)[0][0], expected[0][0])


def test_it_learns_which_came_first(generator):
    """Two events in either order, anywhere in sequences of unequal length: what no mean of the inputs tells."""
    lengths = torch.randint(4, 12, (64,), generator=generator)
    x, targets = torch.zeros(64, 12, 2), torch.randint(2, (64,), generator=generator)
    for row, (length, first) in enumerate(zip(lengths.tolist(), targets.tolist(), strict=True)):
        early, late = sorted(torch.randperm(length, generator=generator)[:2].tolist())
        x[row, early, first] = x[row, late, 1 - first] = 1
    torch.manual_seed(0)
    model = SequencePredictor(2, 2, Backbone(16, 1, SPECS["bd_lru"]), pooling="last")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x, lengths), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x, lengths).argmax(1) == targets).float().mean() > 0.95


X = "`x` must have shape (B, T, F) with F = 4 and B, T of at least 1, got "
LENGTH = "`lengths` must be in [1, T] = [1, 5], got "
WRONG = {  # of a call with x (2, 5, 4): what is given, and what is said
    "width": ({"x": torch.zeros(2, 5, 6)}, X + "(2, 5, 6)."),
    "axes": ({"x": torch.zeros(5, 4)}, X + "(5, 4)."),
    "no step": ({"x": torch.zeros(2, 0, 4)}, X + "(2, 0, 4)."),
    "long": ({"lengths": torch.tensor([5, 6])}, LENGTH + "6 in row 1."),
    "empty": ({"lengths": torch.tensor([5, 0])}, LENGTH + "0 in row 1."),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_calls(case):
    given, text = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(f'SequencePredictor: {text}')}$"):
        build("mean", False)(**{"x": torch.zeros(2, 5, F, dtype=torch.float64)} | given)


def test_bad_options():
    backbone = Backbone(D, 1, SPECS["bd_lru"])
    poolings = r"^SequencePredictor: `pooling` must be one of \['attention', 'last', 'mean'\]"
    with pytest.raises(ValueError, match=poolings):
        SequencePredictor(F, K, backbone, pooling="max")
    with pytest.raises(ValueError, match=r"^SequencePredictor: `output_size` must be at least 1, got 0\.$"):
        SequencePredictor(F, 0, backbone)
    with pytest.raises(TypeError, match=r"^SequencePredictor: `backbone` must be a Backbone, got BDLRU\.$"):
        SequencePredictor(F, K, backbone.mixers[0])
