"""Layers, training steps and decoding: ours, the matrix products that a layer cannot avoid, and other networks."""

import bisect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from statemix.benchmark.contender import Contender, Results, Shape, UnavailableError, Work, imported, inputs
from statemix.decoder import Decoder
from statemix.mixers import BDLRU, HLRU, build_mixer
from statemix.mixers.base import Rows
from statemix.model import SequenceModel

VOCABULARY, DECODED = 64, 200


def own(
    name: str, work: Callable[[Shape, Callable[[], nn.Module]], Work], build: Callable[..., nn.Module], **options: Any
) -> Contender:
    """A module of this package, held to itself with the loop. `build` takes the shape and options."""

    def make(shape: Shape, **changed: Any) -> Work:
        return work(shape, partial(build, shape, **options | changed))

    return Contender(name, make, partial(make, backend="reference"))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _built(shape: Shape, build: Callable[[], nn.Module]) -> Any:
    """The module with the same first weights every time, whatever the dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    return module.double() if shape.dtype == "float64" else module


def nearest_width(target: int, build: Callable[[int], nn.Module]) -> int:
    """The width at which the number of parameters is nearest to `target`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return _parameters(build(width))

    widths = range(1, 1 << 14)
    above = bisect.bisect_left(widths, target, key=count)
    return min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(count(width) - target))


def _autocast(shape: Shape) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=shape.dtype == "bfloat16")


def _bd_lru(shape: Shape, **options: Any) -> BDLRU:
    return BDLRU(shape.d_model, shape.blocks, shape.order, **options)


class _FewRows(nn.Module):
    """A layer of x with but a few different rows, as where it is the embedding of so many tokens."""

    def __init__(self, layer: BDLRU) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of all rows of x, (B, T, D), the first come again and again."""
        table = x.flatten(0, 1)[:VOCABULARY]
        places = torch.arange(x.shape[0] * x.shape[1]) % len(table)
        return self.layer(x, None, None, Rows(table, places.view(x.shape[:2])))


def _of_few_rows(shape: Shape, **options: Any) -> _FewRows:
    return _FewRows(_bd_lru(shape, **options))


def _h_lru(shape: Shape, **options: Any) -> HLRU:
    return HLRU(shape.d_model, shape.blocks, shape.order, **options)


def layer_work(shape: Shape, build: Callable[[], nn.Module]) -> Work:
    """Forward and backward of a layer: the outputs, the gradients of x and of every parameter."""
    module = _built(shape, build)

    def output(x: Tensor) -> Tensor:
        with _autocast(shape):
            y = module(x)
        return y[0] if isinstance(y, tuple) else y

    (x,) = inputs(shape, (shape.batch, shape.length, shape.d_model))
    leaves = (x, *module.parameters())
    few = output(x[:, :1])  # its width and dtype are the layer's own
    _, cotangent = inputs(shape, x.shape, (*x.shape[:2], few.shape[2]))
    cotangent = cotangent.detach().to(few.dtype)

    def call() -> Results:
        y = output(x)
        return y, *torch.autograd.grad(y, leaves, cotangent)

    return Work(call, note=f"{_parameters(module):,} parameters")


def products(shape: Shape) -> Work:
    """The products that a BD-LRU layer cannot avoid, at full length, and nothing else.

    Forward: raw gates with bias, values, and outputs from states that are there. Backward: two for each of them, from
    gradients that are there; not even the sum of the bias's gradient or of the two gradients of x.
    """
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32
    time, width, inner = (shape.batch, shape.length), shape.d_model, shape.order * shape.blocks
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    leaves, cotangents = [], []
    for columns, rows in ((width, inner * (shape.order + 1)), (width, inner), (inner, width)):
        drawn = inputs(shape, (*time, columns), (rows, columns), (*time, rows), (rows,))
        x, weight, cotangent, bias = (tensor.detach().to(dtype) for tensor in drawn)
        leaves += [x.requires_grad_(), weight.requires_grad_()]
        cotangents.append(cotangent)
        calls.append((x, weight, None if calls else bias))

    def call() -> Results:
        outputs = [nn.functional.linear(*arguments) for arguments in calls]
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return Work(call)


def _torch_rnn(name: str, kind: type[nn.LSTM] | type[nn.GRU]) -> Contender:
    """torch.nn.LSTM or GRU, the bare module, with as many parameters as the BD-LRU layer."""

    def make(shape: Shape) -> Work:
        if kind is nn.GRU and shape.dtype == "bfloat16":
            raise UnavailableError("stays in float32 under autocast")
        with torch.device("meta"):
            target = _parameters(_bd_lru(shape))
        build = partial(kind, shape.d_model, batch_first=True)
        width = nearest_width(target, lambda width: build(hidden_size=width))
        try:
            return layer_work(shape, partial(build, hidden_size=width))
        except RuntimeError as error:  # oneDNN's, which has no bfloat16 LSTM where there is no AVX-512
            if shape.dtype != "bfloat16" or "could not create a primitive" not in str(error):
                raise
            raise UnavailableError("torch has none in bfloat16 for this processor") from error

    return Contender(name, make)


def _mamba2(shape: Shape) -> Work:
    if shape.d_model % 16:
        raise UnavailableError("D a multiple of 16 only")
    name = "transformers.models.mamba2"
    config = imported(name, "Mamba2Config")(
        hidden_size=shape.d_model,
        expand=2,
        head_dim=32,
        num_heads=shape.d_model // 16,
        state_size=64,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
    )
    return layer_work(shape, partial(imported(f"{name}.modeling_mamba2", "Mamba2Mixer"), config, layer_idx=0))


LAYER_CONTENDERS = (
    own("bdlru", layer_work, _bd_lru),
    own("bdlru keep", layer_work, _bd_lru, recompute=False),
    own("bdlru recompute", layer_work, _bd_lru, recompute=True),
    own("associative", layer_work, _bd_lru, backend="associative"),
    own("hlru", layer_work, _h_lru),
    own("bdlru few rows", layer_work, _of_few_rows),
    Contender("products", products),
    _torch_rnn("lstm", nn.LSTM),
    _torch_rnn("gru", nn.GRU),
    Contender("mamba2", _mamba2),
)


def _model(shape: Shape, layers: int = 1, **options: Any) -> SequenceModel:
    """A model of BD-LRU layers."""
    spec = {"name": "bd_lru", "num_blocks": shape.blocks, "block_size": shape.order} | options
    return SequenceModel(VOCABULARY, shape.d_model, layers, spec)


def _rival_model(shape: Shape, width: str, **spec: Any) -> SequenceModel:
    """A model of one layer whose mixer has as many parameters as the BD-LRU's, by its option `width`."""
    with torch.device("meta"):
        target = _parameters(_bd_lru(shape))
    spec[width] = nearest_width(target, lambda number: build_mixer(spec | {width: number}, shape.d_model))
    return SequenceModel(VOCABULARY, shape.d_model, 1, spec)


def _h_lru_model(shape: Shape, **options: Any) -> SequenceModel:
    return _rival_model(shape, "num_channels", name="h_lru", order=shape.order, **options)


def _lstm_model(shape: Shape) -> SequenceModel:
    return _rival_model(shape, "hidden_size", name="lstm")


def _mamba2_model(shape: Shape) -> SequenceModel:
    return _rival_model(shape, "head_dim", name="mamba2")


def train_work(shape: Shape, build: Callable[[], nn.Module], *, as_first: bool = False) -> Work:
    """A training step of a SequenceModel: cross entropy, its backward, clipping, AdamW.

    `as_first`: the layer may read a table of the few tokens, as a first one can and no other.
    """
    model = _built(shape, build)
    if not as_first:
        model.embedding.register_forward_hook(lambda *_: None)  # where something comes between, there is no table
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    size = (shape.batch, shape.length + 1)
    tokens = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(0))

    def call() -> Results:
        with _autocast(shape):
            logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss, *(p.grad for p in parameters if p.grad is not None)

    return Work(call, note=f"{_parameters(model):,} parameters")


TRAIN_CONTENDERS = (
    own("bdlru", train_work, _model),
    own("bdlru first layer", partial(train_work, as_first=True), _model),
    own("hlru", train_work, _h_lru_model),
    Contender("lstm", lambda shape: train_work(shape, partial(_lstm_model, shape))),
    Contender("mamba2", lambda shape: train_work(shape, partial(_mamba2_model, shape))),
)


def decode_work(shape: Shape, build: Callable[[], nn.Module]) -> Work:
    """Steps of one sequence by a mixer or SequenceModel, each with the state of the last; contiguous, no gradients."""
    module = _built(shape, build)
    (x,) = inputs(shape, (1, shape.d_model))
    x = torch.zeros(1, dtype=torch.int64) if isinstance(module, SequenceModel) else x.detach()

    def call() -> Results:
        state = None
        with torch.inference_mode():
            for _ in range(DECODED):
                y, state = module.step(x, state)
        return y, *(state if isinstance(state, tuple) else (state,))

    return Work(call, per=DECODED)


def decoder_work(shape: Shape, build: Callable[[], nn.Module]) -> Work:
    """The same tokens by a Decoder, which is made anew, with its preparations, for every call."""
    model = _built(shape, build)
    token = torch.zeros(1, dtype=torch.int64)

    def call() -> Results:
        decoder = Decoder(model)
        for _ in range(DECODED):
            logits = decoder.step(token)
        return logits, *decoder.state

    return Work(call, per=DECODED)


def _lstm_cell(shape: Shape) -> Work:
    """Steps of an LSTMCell with as large a state h as the BD-LRU's."""
    cell = _built(shape, partial(nn.LSTMCell, shape.d_model, shape.order * shape.blocks))
    (x,) = inputs(shape, (1, shape.d_model))
    x = x.detach()

    def call() -> None:
        state = None
        with torch.inference_mode():
            for _ in range(DECODED):
                state = cell(x, state)

    return Work(call, per=DECODED)


DECODE_CONTENDERS = (
    own("bdlru", decode_work, _bd_lru),
    own("hlru", decode_work, _h_lru),
    Contender("lstm cell", _lstm_cell),
    own("model of 4 layers", decode_work, _model, layers=4),
    own("Decoder of 4 layers", decoder_work, _model, layers=4),
)
