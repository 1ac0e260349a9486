"""The layers against the published ones: outputs and every gradient of 60 files of numbers, on every engine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import each_instruction_set
from kernel_helpers import make_layer
from torch import Tensor

from statemix import available_backends
from statemix.mixers import Mixer

FOLDER = Path(__file__).parent / "data"
NORMALIZATIONS = ("linear", "none", "relu", "sigmoid", "silu", "softmax", "tanh")
PUBLISHED = tuple(name for name in NORMALIZATIONS if name != "silu")  # there are no numbers for silu
NAMES = [f"{kind}_{norm}_m{order}" for kind in ("bd", "h") for norm in PUBLISHED for order in range(1, 6)]
each_name = pytest.mark.parametrize("name", NAMES)
TOLERANCE = 1e-10  # absolute
CHANNELS = 3

# published name: (our name, "rows" or "columns" of the matrix that hold the channels)
WEIGHTS = {
    "proj_gates.weight": ("raw_gates.projection.weight", "rows"),
    "proj_gates.bias": ("raw_gates.projection.bias", "rows"),
    "proj_v.weight": ("values.weight", "rows"),
    "proj_out.weight": ("output.weight", "columns"),
}


def read(name: str) -> dict[str, Tensor]:
    """The arrays of a file, weights and their gradients in our names and layout."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    result = {key: arrays.pop(key) for key in ("x", "cotangent", "y", "grad_x")}
    for key, array in arrays.items():
        kind, published = key.split(".", 1)
        ours, side = WEIGHTS[published]
        result[f"{kind}.{ours}"] = channels_last(array) if side == "rows" else channels_last(array.T).T
    return result


def channels_last(rows: Tensor) -> Tensor:
    """Rows in the published order [n, ...] to ours, [..., n]."""
    return rows.unflatten(0, (CHANNELS, -1)).transpose(0, 1).flatten(0, 1)


def build(name: str, golden: dict[str, Tensor], backend: str = "reference", form: str = "companion") -> Mixer:
    """The layer of a file, with its weights."""
    kind, normalization, order = name.split("_")
    size, d_model = int(order[1:]), golden["x"].shape[2]
    scan = "block" if kind == "bd" else form
    layer = make_layer(scan, CHANNELS, d_model, size, normalization=normalization, backend=backend)
    layer.double().load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    return layer


def assert_golden(layer: Mixer, golden: dict[str, Tensor]) -> None:
    x = golden["x"].clone().requires_grad_()
    y, _ = layer(x)
    (y * golden["cotangent"]).sum().backward()
    actual = {"y": y, "grad_x": x.grad} | {f"grad.{key}": p.grad for key, p in layer.named_parameters()}
    wanted = {key for key in golden if key not in ("x", "cotangent") and not key.startswith("param.")}
    assert actual.keys() == wanted
    for key, value in actual.items():
        assert value.shape == golden[key].shape, key
        error = (value - golden[key]).abs().max().item()
        assert error <= TOLERANCE, f"{key}: error {error:.3g} is above {TOLERANCE:g}"


def test_every_file_is_read():
    assert sorted(path.stem for path in FOLDER.glob("*.npz")) == sorted(NAMES)
    assert len(NAMES) == 60


@pytest.mark.parametrize("backend", [name for name in available_backends("cpu") if name != "cpu"])
@each_name
def test_the_numbers_of_torch_are_the_published_ones(name, backend):
    golden = read(name)
    assert_golden(build(name, golden, backend), golden)


@each_instruction_set
@each_name
def test_the_numbers_of_the_kernels_are_the_published_ones(name, instruction_set):
    golden = read(name)
    assert_golden(build(name, golden, "cpu"), golden)


# ---- what is wrong is rejected

BLOCKS, CHANNEL_FILES = ([n for n in NAMES if n.startswith(k) and not n.endswith("m1")] for k in ("bd", "h"))


def with_gates(golden: dict[str, Tensor], change) -> dict[str, Tensor]:
    """The numbers with the rows of the gate projection permuted by `change`."""
    keys = ("param.raw_gates.projection.weight", "param.raw_gates.projection.bias")
    return golden | {key: change(golden[key]) for key in keys}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_transposed_block_is_rejected(name):
    golden, size = read(name), int(name[-1])

    def transpose(rows):
        gates = rows.unflatten(0, (size, size + 1, CHANNELS)).clone()
        gates[:, :-1] = gates[:, :-1].transpose(0, 1).clone()
        return gates.flatten(0, 2)

    wrong = with_gates(golden, transpose)
    with pytest.raises(AssertionError, match="y: error"):
        assert_golden(build(name, wrong), golden)
    assert_golden(build(name, with_gates(wrong, transpose)), golden)  # twice is not at all


@pytest.mark.parametrize("name", CHANNEL_FILES)
def test_a_swapped_lag_order_is_rejected(name):
    golden, size = read(name), int(name[-1])

    def reverse(rows):
        gates = rows.unflatten(0, (size + 1, CHANNELS)).clone()
        gates[:-1] = gates[:-1].flip(0)
        return gates.flatten(0, 1)

    with pytest.raises(AssertionError, match="y: error"):
        assert_golden(build(name, with_gates(golden, reverse)), golden)
    output = golden["param.output.weight"].unflatten(1, (size, CHANNELS)).flip(1).flatten(1)
    with pytest.raises(AssertionError, match="y: error"):
        assert_golden(build(name, golden | {"param.output.weight": output}), golden)


@pytest.mark.parametrize("name", CHANNEL_FILES)
def test_the_observer_form_is_rejected(name):
    golden = read(name)
    with pytest.raises(AssertionError, match="y: error"):
        assert_golden(build(name, golden, form="observer"), golden)


@pytest.mark.parametrize("kind", ["bd", "h"])
@pytest.mark.parametrize("order", [1, 3])
def test_every_other_normalization_is_rejected(kind, order):
    golden = read(f"{kind}_softmax_m{order}")
    for normalization in set(NORMALIZATIONS) - {"softmax"}:
        with pytest.raises(AssertionError, match="y: error"):
            assert_golden(build(f"{kind}_{normalization}_m{order}", golden), golden)


@pytest.mark.parametrize("name", ["bd_softmax_m3", "h_softmax_m3"])
def test_an_error_of_ten_tolerances_is_rejected_in_every_array(name):
    golden = read(name)
    for key in (key for key in golden if key.startswith(("y", "grad"))):
        damaged = golden[key].clone()
        damaged[..., -1] += 10 * TOLERANCE
        with pytest.raises(AssertionError, match=f"^{key}: error 1e-09 is above"):
            assert_golden(build(name, golden), golden | {key: damaged})
