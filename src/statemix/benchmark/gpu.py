"""The fused GPU kernels beside others, measured where there is a card."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from statemix.benchmark.contender import (
    BACKWARD,
    Contender,
    Results,
    Shape,
    UnavailableError,
    Work,
    imported,
    inputs,
)
from statemix.benchmark.layers import VOCABULARY, nearest_width
from statemix.benchmark.scans import SCANS, sizes
from statemix.gates import normalize
from statemix.mixers import BDLRU
from statemix.model import SequenceModel

CALLS = 20  # of a kernel between two looks at the clock
LAYER, STEP = "layer", "training step"  # parts of a shape besides those of a scan
LEAST = "least bytes"  # a copy of them, where it is measured


def _on_gpu(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in tensors]


def _timed(call: Callable[[], Results], note: str = "") -> Work:
    """Several calls, one after the other, of which the last is waited for."""

    def several() -> Results:
        for _ in range(CALLS):
            results = call()
        torch.cuda.synchronize()
        return results

    return Work(several, per=CALLS, before=torch.cuda.synchronize, note=note)


def scan_work(shape: Shape, scan: Callable[..., Tensor], note: str = "") -> Work:
    """A scan from raw gates, values and initial state to states, or the gradients of all three."""
    dtype = getattr(torch, shape.dtype)
    *leaves, cotangent = _on_gpu(*inputs(shape, *sizes(shape)), dtype=dtype)
    if shape.part == BACKWARD:
        states = scan(*leaves)
        return _timed(lambda: torch.autograd.grad(states, leaves, cotangent.detach(), retain_graph=True), note)

    def forward() -> Results:
        with torch.no_grad():
            return (scan(*leaves),)

    return _timed(forward, note)


def _reference(shape: Shape) -> Work:
    return scan_work(shape, partial(SCANS[shape.kind], backend="reference"))


def _own_scan(shape: Shape) -> Work:
    return scan_work(shape, partial(SCANS[shape.kind], backend="gpu"))


def _associative(shape: Shape, *, compiled: bool) -> Work:
    scan = partial(SCANS[shape.kind], backend="associative")
    return scan_work(shape, torch.compile(scan) if compiled else scan)


def _copy(shape: Shape) -> Work:
    """A copy of as many bytes as the scan must move, half of them read and half written."""
    rows = shape.order if shape.kind == "block" else 1
    states = 1 if shape.kind == "companion" else shape.order
    forward = rows * (shape.order + 2) + states  # numbers of a block and step: raw gates and values in, states out
    # a backward reads these and the states' gradients, and writes gradients of the first two
    numbers = forward if shape.part != BACKWARD else forward + states + rows * (shape.order + 2)
    count = numbers * getattr(torch, shape.dtype).itemsize * shape.batch * shape.length * shape.blocks // 2
    source = torch.zeros(count, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    return _timed(lambda: (target.copy_(source),))


def _accelerated_scan(shape: Shape) -> Work:
    """The diagonal scan of accelerated-scan as the block scan of M = 1, with normalised gates."""
    if shape.order != 1 or shape.kind != "block" or shape.length & (shape.length - 1):
        raise UnavailableError("block scan of M = 1 and T a power of two only")
    diagonal = imported("accelerated_scan.warp", "scan")

    def states(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> Tensor:
        decay, input_gate = normalize(raw_gates[:, :, 0], "softmax", 2).unbind(2)
        entering = input_gate * values[:, :, 0]
        entering = torch.cat([entering[:, :1] + decay[:, :1] * initial_state, entering[:, 1:]], dim=1)
        scanned = diagonal(decay.transpose(1, 2).contiguous(), entering.transpose(1, 2).contiguous())  # (B, N, T)
        return scanned.transpose(1, 2)[:, :, None]

    return scan_work(shape, states)


SCAN_CONTENDERS = (
    Contender("gpu", _own_scan, _reference),
    Contender("associative", partial(_associative, compiled=False), _reference),
    Contender("associative compiled", partial(_associative, compiled=True), _reference),
    Contender(LEAST, _copy),
    Contender("accelerated-scan", _accelerated_scan, _reference),
)


def _module_work(shape: Shape, module: nn.Module) -> Work:
    """Forward and backward of a layer, or of a SequenceModel with the step of AdamW."""
    dtype = torch.float64 if shape.dtype == "float64" else torch.float32
    module = module.to("cuda", dtype)
    parameters, autocast = list(module.parameters()), shape.dtype == "bfloat16"
    optimizer = torch.optim.AdamW(parameters)
    (x,) = _on_gpu(*inputs(shape, (shape.batch, shape.length, shape.d_model)), dtype=dtype)
    tokens = torch.arange(shape.batch * (shape.length + 1), device="cuda").view(shape.batch, -1) % VOCABULARY

    def layer() -> Results:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        return y, *torch.autograd.grad(y.double().square().mean(), [x, *parameters])

    def step() -> Results:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits, _ = module(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.to(dtype).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (loss,)

    note = f"{sum(p.numel() for p in parameters):,} parameters"
    return _timed(layer if shape.part == LAYER else step, note)


def _own_module(shape: Shape, *, backend: str, compiled: bool = False) -> Work:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if shape.part == LAYER:
            module: nn.Module = BDLRU(shape.d_model, shape.blocks, shape.order, backend=backend)
        else:
            spec = {"name": "bd_lru", "num_blocks": shape.blocks, "block_size": shape.order, "backend": backend}
            module = SequenceModel(VOCABULARY, shape.d_model, 1, spec)
    return _module_work(shape, torch.compile(module) if compiled else module)  # type: ignore[arg-type]


def _lstm(shape: Shape) -> Work:
    """cuDNN's, with as many parameters as the BD-LRU."""
    with torch.device("meta"):
        target = sum(p.numel() for p in BDLRU(shape.d_model, shape.blocks, shape.order).parameters())
    build = partial(nn.LSTM, shape.d_model, batch_first=True)
    width = nearest_width(target, lambda width: build(hidden_size=width))
    if shape.part == LAYER:
        return _module_work(shape, build(hidden_size=width))
    return _module_work(shape, SequenceModel(VOCABULARY, shape.d_model, 1, {"name": "lstm", "hidden_size": width}))


def _fla(shape: Shape, name: str) -> Work:
    if shape.part != LAYER:
        raise UnavailableError("timed as a layer only")
    return _module_work(shape, imported("fla.layers", name)(hidden_size=shape.d_model))


MODULE_CONTENDERS = (
    Contender("gpu", partial(_own_module, backend="gpu"), partial(_own_module, backend="reference")),
    Contender("associative", partial(_own_module, backend="associative")),
    Contender("associative compiled", partial(_own_module, backend="associative", compiled=True)),
    Contender("lstm", _lstm),
    *(Contender(f"fla {name}", partial(_fla, name=name)) for name in ("GatedLinearAttention", "GatedDeltaNet")),
)
