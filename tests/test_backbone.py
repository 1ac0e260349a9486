"""Backbone: one function however it is called, sequences of unequal length, both directions, memory, bad input."""

import copy
import re

import pytest
import torch
from helpers import TOLERANCE, needs_kernels
from mixer_helpers import CHUNKED, SPECS, D, each_mixer, normal
from model_helpers import assert_same
from torch import Tensor, nn

from statemix import Backbone, SequenceModel
from statemix.mixers import build_mixer

T, LENGTHS = 9, [4, 9, 1]  # of three rows: one within, the longest, the shortest
CLOSE = 2e-14  # the linear maps of other batches sum their products in another order


def build(generator: torch.Generator, mixer: str = "bd_lru", *, dtype=torch.float64, **options) -> Backbone:
    """Two pairs with every weight from the generator."""
    backbone = Backbone(D, 2, SPECS[mixer], **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(random / D**0.5 if parameter.ndim > 1 else 1 + random / 4)
    return backbone.to(dtype)


def limit(mixer: str) -> float:
    is_chunked = isinstance(build_mixer(SPECS[mixer], D), CHUNKED)
    return 10 * TOLERANCE[torch.float64] if is_chunked else CLOSE


def assert_equal(actual, expected) -> None:
    """Bit for bit, the output and every state."""
    (y, state), (other, other_state) = actual, expected
    assert torch.equal(y, other)
    assert len(state) == len(other_state)
    assert all(map(torch.equal, state, other_state))


# ---- one function


@each_mixer
@pytest.mark.parametrize("grad", [False, True])
def test_call_equals_step_repeated(generator, mixer, grad):
    backbone, x = build(generator, mixer), normal(generator, 3, T, D)
    reset = torch.rand(3, T, generator=generator) < 0.3
    reset[0, 4] = True
    y, final = backbone(x, backbone.initial_state(3), reset)
    assert y.shape == (3, T, D)
    assert backbone.state_size == sum(part[0].numel() for part in final)
    state = None
    with torch.set_grad_enabled(grad):
        for t in range(T):
            y_t, state = backbone.step(x[:, t], state, reset[:, t])
            assert_same(y_t, y[:, t], f"y at {t}", limit(mixer))
    assert_same(state, final, "state", limit(mixer))


@each_mixer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_pairs_are_what_they_say(generator, mixer, bidirectional):
    """x + mixer(norm(x)), then x + W_2 (silu(W_1 x) * W_3 x) of its norm, pair after pair, and a norm at the end."""
    backbone, x = build(generator, mixer, bidirectional=bidirectional), normal(generator, 3, T, D)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def run(layers: nn.ModuleList, weight: Tensor, x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer.mixer(norm(x, layer.mixer_norm.weight))[0]
            gate, inner = (norm(x, layer.mlp_norm.weight) @ layer.mlp.gate_and_input.weight.T).chunk(2, dim=-1)
            x = x + (gate * torch.sigmoid(gate) * inner) @ layer.mlp.output.weight.T
        return norm(x, weight)

    y, _ = backbone(x)
    assert_same(y[..., :D], run(backbone.layers, backbone.norm.weight, x), limit=limit(mixer))
    if bidirectional:
        expected = run(backbone.reverse_layers, backbone.reverse_norm.weight, x.flip(1)).flip(1)
        assert_same(y[..., D:], expected, limit=limit(mixer))
    assert y.shape[2] == backbone.output_size


def test_a_model_of_tokens_is_a_backbone_between_two_maps(generator):
    torch.manual_seed(0)
    model = SequenceModel(11, D, 2, SPECS["bd_lru"], mlp_size=32).double()
    backbone = Backbone(D, 2, SPECS["bd_lru"], mlp_size=32).double()
    weights = model.state_dict()
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    tokens = torch.randint(11, (3, T), generator=generator)
    y, state = backbone(model.embedding(tokens))
    assert_equal((model.head(y), state), model(tokens))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_first_weights_are_those_of_the_rule(bidirectional):
    torch.manual_seed(0)
    backbone = Backbone(48, 3, SPECS["h_lru"], bidirectional=bidirectional, init_std=0.02)
    branches = 0
    for name, weight in backbone.named_parameters():
        if re.search(r"layers\.\d\.(mixer|mlp)\..*weight$", name) and weight.ndim == 2:
            branch = name.endswith("output.weight")
            branches += branch
            assert weight.std().item() == pytest.approx(0.02 / 6**0.5 if branch else 0.02, rel=0.15), name
    assert branches == (12 if bidirectional else 6)
    torch.manual_seed(0)
    plain = Backbone(48, 1, SPECS["h_lru"], bidirectional=bidirectional, mlp_size=32)
    torch.manual_seed(0)
    deep = Backbone(48, 4, SPECS["h_lru"], bidirectional=bidirectional, mlp_size=32)
    first, scaled = plain.layers[0].mlp.output.weight, deep.layers[0].mlp.output.weight
    assert torch.equal(scaled, first / 2)


# ---- sequences of unequal length


@each_mixer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_of_unequal_length_are_as_alone(generator, mixer, bidirectional):
    backbone = build(generator, mixer, bidirectional=bidirectional)
    x, reset = normal(generator, 3, T, D), torch.rand(3, T, generator=generator) < 0.3
    reset[0, 2] = reset[0, 4] = True  # the second is behind the end
    for cuts in (None, reset):
        together, alone = (x.clone().requires_grad_() for _ in range(2))
        y, state = backbone(together, None, cuts, torch.tensor(LENGTHS))
        assert y.shape == (3, T, backbone.output_size)
        y.square().sum().backward()
        for row, length in enumerate(LENGTHS):
            own, last = backbone(
                alone[row : row + 1, :length], None, None if cuts is None else cuts[row : row + 1, :length]
            )
            own.square().sum().backward()
            assert_same(y[row : row + 1, :length], own, f"y of row {row}", limit(mixer))
            assert (y[row, length:] == 0).all()
            assert_same([part[row : row + 1] for part in state], last, f"state of row {row}", limit(mixer))
        assert_same(together.grad, alone.grad, "gradient", 10 * limit(mixer))


@each_mixer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_behind_an_end_changes_no_bit(generator, mixer, bidirectional):
    """Neither what it is, be it NaN, nor how much there is of it: y, the states, and the gradients of all weights."""
    backbone = build(generator, mixer, bidirectional=bidirectional)
    lengths, x = torch.tensor([4, 7, 1]), normal(generator, 3, T, D)

    def everything(x: Tensor) -> list[Tensor]:
        backbone.zero_grad()
        x = x.clone().requires_grad_()
        y, state = backbone(x, lengths=lengths)
        y.square().sum().backward()
        assert (y[:, 7:] == 0).all()
        return [y[:, :7], *state, x.grad[:, :7], *(parameter.grad for parameter in backbone.parameters())]

    expected = everything(x)
    for value in (torch.nan, torch.inf, 1e300, None):
        other = normal(generator, 3, T + 5, D) if value is None else torch.full((3, T, D), value, dtype=x.dtype)
        for row, length in enumerate(lengths):
            other[row, :length] = x[row, :length]
        assert all(map(torch.equal, everything(other), expected))
    assert all(map(torch.equal, everything(x[:, :7]), expected))


def test_a_change_within_the_lengths_is_seen(generator):
    """Which shows that the law above can fail."""
    backbone, x, lengths = build(generator, bidirectional=True), normal(generator, 3, T, D), torch.tensor(LENGTHS)
    y, state = backbone(x, lengths=lengths)
    x[0, 3] += 1
    other, other_state = backbone(x, lengths=lengths)
    assert (y[0, :4] != other[0, :4]).any(1).all()
    assert all((a[0] != b[0]).any() for a, b in zip(state, other_state, strict=True))
    assert torch.equal(y[1:], other[1:])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_full_lengths_are_none(generator, bidirectional):
    backbone, x = build(generator, bidirectional=bidirectional), normal(generator, 3, T, D)
    assert_same(backbone(x, lengths=torch.full((3,), T, dtype=torch.int32)), backbone(x), limit=CLOSE)


# ---- both directions


def directions(backbone: Backbone) -> tuple[Backbone, Backbone]:
    """The two stacks of a bidirectional backbone, as backbones of one direction."""
    weights = backbone.state_dict()
    parts = []
    for prefix in ("", "reverse_"):
        options = backbone.config | {"bidirectional": False}
        part = Backbone(**options).double()
        part.load_state_dict({name: weights[prefix + name] for name in part.state_dict()})
        parts.append(part)
    return parts[0], parts[1]


def test_each_direction_goes_on_from_its_own_state(generator):
    backbone, x = build(generator, bidirectional=True), normal(generator, 3, T, D)
    ahead, back = directions(backbone)
    _, state = backbone(normal(generator, 3, 4, D))
    y, final = backbone(x, state)
    first, after = ahead(x, state[:2])
    second, before = back(x.flip(1), state[2:])
    assert_equal((y, final), (torch.cat([first, second.flip(1)], dim=2), after + before))


@each_mixer
def test_packed_sequences_of_both_directions_equal_separate_ones(generator, mixer):
    backbone = build(generator, mixer, bidirectional=True)
    a, b = normal(generator, 1, 5, D), normal(generator, 1, 7, D)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, [0, 5]] = True
    y, state = backbone(torch.cat([a, b], dim=1), None, reset)
    (of_a, first), (of_b, second) = backbone(a), backbone(b)
    assert_same(y, torch.cat([of_a, of_b], dim=1), limit=limit(mixer))
    assert_same(state, [*second[:2], *first[2:]], limit=limit(mixer))


# ---- how it is computed


@needs_kernels
def test_a_step_of_up_to_64_rows_is_a_call_for_each_pair(generator, calls):
    backbone = build(generator, dtype=torch.float32)
    with torch.no_grad():
        for rows, expected in ((1, 2), (64, 2), (65, 0)):
            calls.clear()
            backbone.step(normal(generator, rows, D, dtype=torch.float32), None, torch.zeros(rows, dtype=torch.bool))
            assert calls.count("statemix_pair_step") == expected


@pytest.mark.parametrize("watched", ["", "norm", "layers.1", "layers.0.mixer"])
def test_a_hook_is_called_by_a_step(generator, watched):
    backbone, seen = build(generator), []
    backbone.get_submodule(watched).register_forward_hook(lambda *arguments: seen.append(watched))
    x = normal(generator, 2, D)
    with torch.no_grad():
        y, _ = backbone.step(x)
        assert seen == [watched]
        assert_same(y, backbone(x[:, None])[0][:, 0], limit=CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recomputing_changes_no_bit(generator, bidirectional):
    backbone, x = build(generator, bidirectional=bidirectional, dropout=0.5), normal(generator, 2, T, D)
    count: list[nn.Module] = []
    for layer in backbone._all_layers():
        layer.mixer.register_forward_hook(lambda module, *_: count.append(module))
    results = []
    for recompute in (False, True):
        backbone.recompute = recompute
        backbone.zero_grad()
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        y, state = backbone(given)
        before = len(count)
        (y.square().sum() + sum(part.sum() for part in state)).backward()
        assert len(count) - before == (len(backbone._all_layers()) if recompute else 0)
        results.append([y, *state, given.grad, *(parameter.grad for parameter in backbone.parameters())])
    assert all(map(torch.equal, *results))


def test_a_copy_is_the_same(generator):
    backbone, x = build(generator, bidirectional=True), normal(generator, 2, T, D)
    assert_equal(copy.deepcopy(backbone)(x), backbone(x))


# ---- bad input


X = "`x` must have shape (B, T, D) with D = 6, and the others at least 1, got "
LENGTH = "`lengths` must be in [1, T] = [1, 5], got "
NO_LENGTHS = "`lengths` must be a tensor of int64 or int32, got "
WRONG = {  # of a call of a backbone of width 6 with x (2, 5, 6): what is given, the error, and what is said
    "width": ({"x": torch.zeros(2, 5, 7)}, ValueError, X + "(2, 5, 7)."),
    "axes": ({"x": torch.zeros(5, 6)}, ValueError, X + "(5, 6)."),
    "no step": ({"x": torch.zeros(2, 0, 6)}, ValueError, X + "(2, 0, 6)."),
    "no row": ({"x": torch.zeros(0, 5, 6)}, ValueError, X + "(0, 5, 6)."),
    "dtype": (
        {"x": torch.zeros(2, 5, 6).double()},
        TypeError,
        "`x` must be torch.float32 like the parameters, got torch.float64.",
    ),
    "tokens": (
        {"x": torch.zeros(2, 5, 6, dtype=torch.int64)},
        TypeError,
        "`x` must have a floating-point dtype of 16 bits or more, got torch.int64.",
    ),
    "list": ({"x": [[1.0]]}, TypeError, "`x` must be a tensor, got list."),
    "states": ({"state": ()}, ValueError, "`state` must have one tensor per layer = 2, got 0."),
    "reset": (
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        ValueError,
        "`reset` must have shape (B, T) = (2, 5), got (2, 4).",
    ),
    "long": ({"lengths": torch.tensor([5, 6])}, ValueError, LENGTH + "6 in row 1."),
    "empty": ({"lengths": torch.tensor([0, 6])}, ValueError, LENGTH + "0 in row 0."),
    "negative": ({"lengths": torch.tensor([5, -1])}, ValueError, LENGTH + "-1 in row 1."),
    "of three": ({"lengths": torch.tensor([5, 5, 5])}, ValueError, "`lengths` must have shape (B,) = (2,), got (3,)."),
    "lengths as a mask": ({"lengths": torch.ones(2, 5)}, TypeError, NO_LENGTHS + "torch.float32."),
    "lengths as a list": ({"lengths": [5, 5]}, TypeError, NO_LENGTHS + "list."),
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_bad_calls(case, bidirectional):
    backbone = Backbone(D, 1 if bidirectional else 2, SPECS["bd_lru"], bidirectional=bidirectional)
    given, error, text = WRONG[case]
    with pytest.raises(error, match=f"^{re.escape(f'Backbone: {text}')}$"):
        backbone(**{"x": torch.zeros(2, 5, D)} | given)


def test_a_state_and_lengths_exclude_each_other():
    backbone, x = Backbone(D, 2, SPECS["bd_lru"]), torch.zeros(2, 5, D)
    with pytest.raises(ValueError, match=r"^Backbone: `state` must be None where there are `lengths`"):
        backbone(x, backbone.initial_state(2), lengths=torch.tensor([5, 4]))


BAD_STEPS = {  # of x (2, 6): what is given, and what is said
    "width": ({"x": torch.zeros(2, 7)}, r"^Backbone\.step: `x` must have shape \(B, D\) with D = 6, .* \(2, 7\)\.$"),
    "axes": ({"x": torch.zeros(2, 1, 6)}, r"^Backbone\.step: `x` must have shape \(B, D\) .* got \(2, 1, 6\)\.$"),
    "reset": (
        {"reset": torch.zeros(3, dtype=torch.bool)},
        r"^Backbone\.step: `reset` must have shape \(B,\) = \(2,\), got \(3,\)\.$",
    ),
    "state": (
        {"state": [torch.zeros(1, 3, 5)] * 2, "reset": torch.zeros(2, dtype=torch.bool)},
        r"`state` must have shape \(B, M, N\) = \(2, 3, 5\), got \(1, 3, 5\)\.$",
    ),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_steps(case):
    given, text = BAD_STEPS[case]
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        Backbone(D, 2, SPECS["bd_lru"]).step(**{"x": torch.zeros(2, D)} | given)


def test_a_backbone_of_both_directions_has_no_step():
    with pytest.raises(ValueError, match=r"^Backbone\.step: `bidirectional` must be False, got True: "):
        Backbone(D, 1, SPECS["bd_lru"], bidirectional=True).step(torch.zeros(2, D))


def test_bad_options():
    with pytest.raises(TypeError, match=r"^Backbone: `bidirectional` must be True or False, got 1\.$"):
        Backbone(D, 1, SPECS["bd_lru"], bidirectional=1)
    with pytest.raises(ValueError, match=r"^Backbone: `num_layers` must be at least 1, got 0\.$"):
        Backbone(D, 0, SPECS["bd_lru"])
