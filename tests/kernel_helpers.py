"""What the tests of the fused kernels share with sanitize.py: problems of a layer, residual pairs, logits, SwiGLUs."""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers import TOLERANCE, make_raw_gates, relative_error
from torch import Tensor, nn
from torch.func import functional_call

from statemix import BDLRU, HLRU, kernels
from statemix.backbone import Layer
from statemix.mixers.linear_recurrence import LinearRecurrence

WEIGHTS = ("raw_gates.projection.weight", "raw_gates.projection.bias", "values.weight", "output.weight")


def make_layer(kind: str, blocks: int, width: int, order: int, **options) -> LinearRecurrence:
    """The mixer whose scan is of this kind."""
    if kind == "block":
        return BDLRU(width, blocks, order, **options)
    return HLRU(width, blocks, order, form=kind, **options)


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """A layer, its inputs by name (x, the weights, perhaps a state), and the cotangents of y and of the final state."""

    mixer: LinearRecurrence  # without weights of its own, and its products are torch's
    inputs: dict[str, Tensor]
    reset: Tensor | None
    cotangents: tuple[Tensor, Tensor]
    visibility: Tensor | None = None
    places: Tensor | None = None  # then x is a table of its rows

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerProblem":
        inputs = {name: function(x) for name, x in self.inputs.items()}
        cotangents = tuple(function(x) for x in self.cotangents)
        visibility = None if self.visibility is None else function(self.visibility)
        return LayerProblem(self.mixer, inputs, self.reset, cotangents, visibility, self.places)

    def split(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        return inputs["x"], tuple(inputs[name] for name in WEIGHTS), inputs.get("state")

    def fused(self, inputs: dict[str, Tensor] | None = None, recompute: bool | None = None) -> tuple[Tensor, Tensor]:
        options = {"normalization": self.mixer.normalization, "kind": self.mixer.kind, "recompute": recompute}
        order, given = self.mixer.state_shape[0], self.split(self.inputs if inputs is None else inputs)
        return kernels.layer(*given, self.reset, self.visibility, self.places, order=order, **options)

    def by_the_mixer(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, weights, state = self.split(inputs)
        x = x if self.places is None else x[self.places]
        self.mixer._visibility = lambda x: self.visibility  # in place of one that is drawn
        return functional_call(self.mixer, dict(zip(WEIGHTS, weights, strict=True)), (x, state, self.reset))

    def results(self, function: Callable, *options, outputs: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
        """y, the final state, and the gradient of the sum of the chosen `outputs` * cotangents in every input."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        made = function(leaves, *options)
        chosen = [made[i] for i in outputs], [self.cotangents[i] for i in outputs]
        unused = 0 not in outputs  # only y is read through the output weight
        gradients = torch.autograd.grad(chosen[0], list(leaves.values()), chosen[1], materialize_grads=unused)
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {"y": made[0].detach(), "final state": made[1].detach()} | named

    def expected(self, **options) -> dict[str, Tensor]:
        return self.map(Tensor.double).results(self.by_the_mixer, **options)


def make_layer_problem(
    generator: torch.Generator,
    kind: str,
    *,
    order: int = 3,
    blocks: int = 17,
    width: int = 5,
    length: int = 31,
    batch: int = 2,
    normalization: str = "softmax",
    with_state: bool = True,
    with_reset: bool = False,
    with_visibility: bool = False,
    table_rows: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LayerProblem:
    """Random weights and inputs, rounded to `dtype`. In every other block the decay is slow: see `make_raw_gates`."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = order if kind == "block" else 1
    bias = make_raw_gates(generator, normalization, (2, 1, rows, order + 1, blocks))[order % 2]
    slow = (torch.arange(blocks) + order) % 2 == 0
    scale = torch.where(slow, 1e-4, 0.3 / (order + 1) if normalization == "none" else 1.0)
    weights = (
        (normal(rows * (order + 1), blocks, width) * scale[:, None]).flatten(0, 1) / width**0.5,
        bias.flatten(),
        normal(rows * blocks, width) / width**0.5,
        normal(width, order * blocks) / (order * blocks) ** 0.5,
    )
    inputs = {"x": normal(batch, length, width)} | dict(zip(WEIGHTS, weights, strict=True))
    if with_state:
        inputs["state"] = normal(batch, order, blocks)
    reset = None
    if with_reset:
        reset = torch.rand(batch, length, generator=generator) < 0.05
        reset[0, -1] = reset[-1, 0] = reset[0, length // 2] = True
    with torch.device("meta"):
        mixer = make_layer(kind, blocks, width, order, normalization=normalization, backend="reference")
    cotangents = normal(batch, length, width), normal(batch, order, blocks)
    visibility = None
    if with_visibility:
        visibility = normal(batch, blocks) * (torch.rand(batch, blocks, generator=generator) < 0.5)
    places = None
    if table_rows:
        inputs["x"] = normal(table_rows, width)
        places = torch.randint(table_rows, (batch, length), generator=generator)
    return LayerProblem(mixer, inputs, reset, cotangents, visibility, places).map(lambda x: x.to(dtype))


class LayerCase(NamedTuple):
    """The axes of one comparison of a layer with the loop."""

    order: int
    blocks: int
    width: int
    length: int
    batch: int
    normalization: str
    with_state: bool
    with_reset: bool

    def problem(self, generator: torch.Generator, kind: str, dtype: torch.dtype, **options) -> LayerProblem:
        return make_layer_problem(generator, kind, dtype=dtype, **self._asdict(), **options)


SHIFTED = {"odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}


# ---- steps of residual pairs, and logits

STEPPED = {
    "block": {"name": "bd_lru", "num_blocks": 5, "block_size": 3},
    "companion": {"name": "h_lru", "num_channels": 7, "order": 4},
    "observer": {"name": "h_lru", "num_channels": 7, "order": 4, "form": "observer"},
}


def make_pair(mixer: dict, width: int = 20, mlp_size: int = 33) -> Layer:
    """A residual pair, every weight of which shows in the result."""
    torch.manual_seed(0)
    pair = Layer(width, mixer, mlp_size)
    for norm in (pair.mixer_norm, pair.mlp_norm):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return pair


def pair_by_the_modules(pair: Layer, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What forward makes of one token in float64; with gradients no kernel of a step serves."""
    pair = copy.deepcopy(pair).double()
    y, state = pair(x.double()[:, None], None if state is None else state.double(), None)
    return y[:, 0].detach(), state.detach()


def assert_step(pair: Layer, x: Tensor, state: Tensor | None) -> None:
    """Hold one step of the pair to what its modules do."""
    expected = pair_by_the_modules(pair, x, state)
    with torch.no_grad():
        actual = pair.step(x, state)
    for what, got, wanted in zip(("y", "state"), actual, expected, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[x.dtype], what


def assert_readout(x: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
    """Hold a model without layers to its modules; a `Decoder` calls it: embedding, last norm and head. Returns y."""
    tokens = torch.arange(len(x)).flip(0)
    y = kernels.ModelStep(x, [], norm.weight, norm.eps, head.weight, len(x))(tokens)
    wanted = copy.deepcopy(head).double()(copy.deepcopy(norm).double()(x[tokens].double())).detach()
    assert relative_error(y, wanted) <= TOLERANCE[x.dtype]
    return y


def make_readout(width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[nn.RMSNorm, nn.Linear]:
    """The last norm and the head of a model."""
    norm, head = nn.RMSNorm(width, eps=0.1, dtype=dtype), nn.Linear(width, count, bias=False, dtype=dtype)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm, head


READOUTS = [(1, 1, 1), (2, 5, 3), (3, 16, 8), (1, 33, 65)]  # batch, width, vocabulary


# ---- the product of a SwiGLU

GATED_SHAPES = [(1, 1), (3, 15), (2, 16), (5, 17), (4, 33), (70, 500)]  # rows and H; the last is for several threads


def gated_by_torch(x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The product and its gradient in float64."""
    x = x.detach().double().requires_grad_()
    gate, inner = x.chunk(2, dim=-1)
    y = nn.functional.silu(gate) * inner
    return y.detach(), torch.autograd.grad(y, x, cotangent.double())[0]


# ---- faults of the kernels for GPUs


class GpuFault(NamedTuple):
    """Something that is wrong in a file of csrc/gpu, a scan that comes by, and what sanitize_gpu.py then tells."""

    file: str
    right: str
    wrong: str
    kind: str
    order: int
    told: str

    def planted(self, texts: dict[str, str]) -> dict[str, str]:
        """The sources by name, this one with the fault."""
        assert self.right in texts[self.file]
        return texts | {self.file: texts[self.file].replace(self.right, self.wrong)}


RACE, COPY, INDEX = "no barrier after lane", "does not wait for a copy", "outside of its array"
GPU_FAULTS = (
    # at 16 the exchanges of a row are barriers, too
    GpuFault("rows.cuh", "          __syncwarp();\n", "", "block", 8, RACE),
    GpuFault("slabs.cuh", "    __syncthreads();\n\n    State h;", "\n    State h;", "block", 4, RACE),
    GpuFault("lags.cuh", "      __syncwarp();\n  }", "      ;\n  }", "companion", 4, RACE),  # of `meet`
    GpuFault("rows.cuh", "    wait<slots - 2>();\n", "", "block", 16, COPY),
    GpuFault("slabs.cuh", "    wait<D - 1>();\n", "", "block", 2, COPY),
    GpuFault("lags.cuh", "    wait<slots - 2>();\n", "", "observer", 4, COPY),
)
