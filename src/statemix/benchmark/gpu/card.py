"""What `statemix bench gpu` measures on a card: scans, layers and training steps; of scans the values first."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from statemix.benchmark.contender import Shape
from statemix.benchmark.gpu.peers import PEERS, ROUNDS, Peers
from statemix.benchmark.gpu.records import Records
from statemix.benchmark.measure import relative_error
from statemix.benchmark.scans import SCANS
from statemix.mixers import build_mixer
from statemix.runs.presets import LANGUAGE_MIXERS, paper_model
from statemix.scan import gpu
from statemix.scan.gpu.compile import headers
from statemix.scan.gpu.plan import filled_order

WIDTH, VOCABULARY, TOKENS = 768, 50_280, 16 * 2048  # of the paper's models; tokens of a step
LENGTHS = (2048, 8192)  # of layers
ENOUGH = 0.05  # seconds of calls in a row
SLICE = 4  # blocks whose values are held to float64
# of a value, over the largest; of the half types what rounding the states costs a gradient at most, and twice that
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}
PAPER = ((1, 2112), (2, 844), (4, 302), (8, 96), (16, 28))

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]


class Card:
    """Times calls on the GPU of the moment. rounds: those whose median counts."""

    device = "cuda"
    copied = 1 << 30  # bytes of the copy that the others are compared to

    def __init__(self, rounds: int = ROUNDS) -> None:
        self._rounds = rounds

    def name(self) -> str:
        """As NVIDIA calls it."""
        return torch.cuda.get_device_name()

    def alone(self, call: Callable[[], object], calls: int = 10) -> float:
        """Seconds of the kernels that a call runs, without the host: from a graph of several calls."""
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
        return self._median(graph.replay) / calls

    def with_host(self, call: Callable[[], object]) -> float:
        """Seconds of a call, one after the other as a program makes them.

        Of so many that what the host does before the first kernel, while the card waits, hardly counts.
        """
        call()
        calls = math.ceil(ENOUGH / self._seconds(call))

        def several() -> None:
            for _ in range(calls):
                call()

        return self._median(several) / calls

    def _median(self, call: Callable[[], object]) -> float:
        return statistics.median(self._seconds(call) for _ in range(self._rounds))

    def _seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began


@dataclass(frozen=True)
class Measurement:
    """Something to measure. part: its table; name: what it is there; run: measures it, see the functions below."""

    part: str
    name: str
    run: Callable[[], dict[str, Any]]

    def key(self, conditions: str) -> str:
        """Of its record."""
        return f"{self.part}: {self.name}; {conditions}"


def scan_shapes() -> list[Shape]:
    """The paper's, and others: many blocks, long ones, and one sequence that only chunks can fill a card with."""
    paper = [Shape(order, blocks, 16, 2048) for order, blocks in PAPER]
    lagged = [Shape(16, 242, 16, 2048, kind=kind) for kind in ("companion", "observer")]
    others = [Shape(order, 512, 8, 4096) for order, _ in PAPER]
    long = [Shape(1, 1946, 4, 16384), Shape(4, 302, 1, 65536)]
    shapes = [*paper, *lagged, *long, *others]
    return [replace(shape, dtype=dtype) for dtype in ("bfloat16", "float32") for shape in shapes]


def least_bytes(shape: Shape) -> tuple[int, int]:
    """Of the forward and of the backward: each input read once, each output written once; M not filled up."""
    rows = shape.order if shape.kind == "block" else 1
    inputs = rows * (shape.order + 2)  # raw gates and values of a block and step
    states = 1 if shape.kind == "companion" else shape.order
    read = 1 if shape.kind == "observer" else states  # of the states, by a backward
    size = torch.empty(0, dtype=getattr(torch, shape.dtype)).element_size()
    unit = size * shape.batch * shape.length * shape.blocks
    return unit * (inputs + states), unit * (2 * inputs + states + read)


def scan_name(shape: Shape) -> str:
    """Of a record."""
    return f"{shape.kind} M {shape.order} {shape.dtype} ({shape.batch}, {shape.length}, {shape.blocks})"


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers whose steps in time are whole 16 bytes apart, as a layer's product makes them."""
    size = math.prod(shape[2:])
    generator = torch.Generator(device).manual_seed(size)
    columns = torch.randn((*shape[:2], -(-size // 8) * 8), generator=generator, device=device, dtype=dtype)
    return columns[..., :size].unflatten(2, shape[2:])


def leaves(shape: Shape, device: str) -> Leaves:
    """Gates, input gates, values and initial state in the kernels' own order."""
    dtype, filled = getattr(torch, shape.dtype), filled_order(shape.order)
    rows = (filled,) if shape.kind == "block" else ()
    step = (shape.batch, shape.length, shape.blocks)
    sizes = [(*step, *rows, filled), (*step, *rows), (*step, *rows)]
    gates, input_gates, values = (normal(size, dtype, device).requires_grad_() for size in sizes)
    initial_state = normal((shape.batch, shape.blocks, filled), torch.float32, device).contiguous()
    return gates, input_gates, values, initial_state.requires_grad_()


def scan(shape: Shape, inputs: Leaves) -> Tensor:
    """Its states."""
    return gpu.scan_blocks(*inputs, None, "softmax", shape.kind, shape.order)[0]


def scan_error(shape: Shape, inputs: Leaves, states: Tensor, cotangent: Tensor) -> float:
    """The largest relative error of states and gradients, of some blocks, against the associative scan in float64."""
    grads = torch.autograd.grad(states, inputs, cotangent, retain_graph=True)
    sequences = sorted({0, shape.batch - 1})
    blocks = sorted({*range(shape.blocks)[: SLICE // 2], *range(shape.blocks)[-SLICE // 2 :]})
    M = shape.order

    def part(x: Tensor, of_time: bool = True) -> Tensor:
        x = x.detach()[sequences]
        return (x[:, :, blocks] if of_time else x[:, blocks]).double()

    def public(states: Tensor) -> Tensor:  # (B, T, N, M) to (B, T, M, N)
        return states if shape.kind == "companion" else states[..., :M].transpose(2, 3)

    over_time = (True, True, True, False)
    exact = [part(x, of_time).requires_grad_() for x, of_time in zip(inputs, over_time, strict=True)]
    gates, input_gates, values, initial_state = exact
    if shape.kind == "block":  # (B, T, N, M, M) to (B, T, M, M + 1, N)
        raw = torch.cat([gates[..., :M, :M], input_gates[..., :M, None]], -1).permute(0, 1, 3, 4, 2)
        values = values[..., :M].transpose(2, 3)
    else:
        raw = torch.cat([gates[..., :M], input_gates[..., None]], -1).transpose(2, 3)
    expected = SCANS[shape.kind](raw, values, initial_state[..., :M].transpose(1, 2), backend="associative")
    wanted = torch.autograd.grad(expected, exact, public(part(cotangent)))
    errors = [relative_error(public(part(states)), expected)]
    errors += [relative_error(part(x, t), y) for x, y, t in zip(grads, wanted, over_time, strict=True)]
    return max(errors)


def measure_scan(card: Card, shape: Shape) -> dict[str, Any]:
    """Its values, then seconds of the kernels alone and with the host. A wrong scan is not timed."""
    inputs = leaves(shape, card.device)
    states = scan(shape, inputs)
    cotangent = normal(tuple(states.shape), states.dtype, card.device)
    error = scan_error(shape, inputs, states, cotangent)
    record: dict[str, Any] = {"kind": shape.kind, "order": shape.order, "dtype": shape.dtype, "error": error}
    record["bytes"] = least_bytes(shape)
    if not error <= TOLERANCES[shape.dtype]:
        return {**record, "wrong": f"relative error {error:.3g}"}
    bare, kept = [tensor.detach() for tensor in inputs], states.detach()
    operators, how = torch.ops.statemix, ("softmax", shape.kind, shape.order)

    def forward() -> object:
        return operators.gpu_scan_forward(*bare, None, *how)

    def backward() -> object:
        return operators.gpu_scan_backward(cotangent, None, *bare, None, kept, *how)

    def derivative() -> object:
        return torch.autograd.grad(states, inputs, cotangent, retain_graph=True)

    record["forward"], record["backward"] = card.alone(forward), card.alone(backward)
    record["forward_with_host"] = card.with_host(lambda: scan(shape, inputs))
    record["backward_with_host"] = card.with_host(derivative)
    return record


def copy_speed(card: Card) -> dict[str, Any]:
    """Bytes a second that are read and written, together, by the faster of torch's copy and a kernel that negates.

    The copy alone reached 2.77 TB/s on an H200 on which a scan moved 3.83.
    """
    source = torch.zeros(card.copied // 4, device=card.device)
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return {"bytes_per_second": 2 * card.copied / min(card.alone(call) for call in calls)}


class Products(nn.Module):
    """The products alone that a layer cannot avoid: to raw gates and values, and from the states back."""

    def __init__(self, d_model: int, columns: int, states: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(d_model, columns), nn.Linear(states, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D)."""
        return self.outward(self.inward(x)[..., : self.outward.in_features])


class CausalAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention."""

    def __init__(self, d_model: int, num_heads: int = 12) -> None:
        super().__init__()
        self.inward, self.outward, self.num_heads = (
            nn.Linear(d_model, 3 * d_model),
            nn.Linear(d_model, d_model),
            num_heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D)."""
        q, k, v = self.inward(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outward(mixed.transpose(1, 2).flatten(2))


def layer_builders(d_model: int = WIDTH) -> dict[str, Callable[[], nn.Module]]:
    """Ours and the LSTM of the paper's models, their bare products, and attention."""
    builders: dict[str, Callable[[], nn.Module]] = {}
    for name, spec in LANGUAGE_MIXERS.items():
        builders[name] = partial(build_mixer, spec, d_model)
    for order, blocks in PAPER:
        numbers = blocks * order
        builders[f"products of paper-bd{order}"] = partial(Products, d_model, numbers * (order + 2), numbers)
    # 242 channels, filled up to a multiple of 8: cuBLAS takes twice the time for sizes that are none
    builders["products of paper-h16"] = partial(Products, d_model, 248 * 18, 248 * 16)
    builders["attention"] = partial(CausalAttention, d_model)
    return builders


def measure_layer(
    card: Card, build: Callable[[], nn.Module], batch: int, length: int, d_model: int = WIDTH
) -> dict[str, Any]:
    """Seconds of forward, and of forward and backward, in bfloat16 by autocast, with the host."""
    torch.manual_seed(0)
    module = build().to(card.device)
    x = torch.randn(batch, length, d_model, device=card.device, requires_grad=True)
    wanted = [x, *module.parameters()]
    cotangent = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.autocast(card.device, torch.bfloat16):
            y = module(x)
        return y[0] if isinstance(y, tuple) else y

    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "forward": card.with_host(forward),
        "forward_backward": card.with_host(lambda: torch.autograd.grad(forward(), wanted, cotangent)),
    }


def measure_step(card: Card, build: Callable[[], nn.Module], batch: int, length: int) -> dict[str, Any]:
    """A training step of a language model, in bfloat16 by autocast, with AdamW."""
    torch.manual_seed(0)
    model = build().to(card.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=card.device == "cuda")
    tokens = torch.randint(VOCABULARY, (batch, length + 1), device=card.device)

    def step() -> None:
        with torch.autocast(card.device, torch.bfloat16):
            logits, _ = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = card.with_host(step)
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "seconds": seconds, "tokens_per_second": batch * length / seconds}


def measurements(card: Card, peers: Peers) -> list[Measurement]:
    """All, what matters most first."""
    found = [Measurement("copy", "copy", partial(copy_speed, card))]
    found += [Measurement("scan", scan_name(shape), partial(measure_scan, card, shape)) for shape in scan_shapes()]
    for length in LENGTHS:
        batch = TOKENS // length
        for name, build in layer_builders().items():
            run = partial(measure_layer, card, build, batch, length)
            found.append(Measurement("layer", f"{name}, T {length}", run))
    for name in LANGUAGE_MIXERS:
        run = partial(measure_step, card, partial(paper_model, name), 16, 2048)
        found.append(Measurement("step", name, run))
    for length in LENGTHS:
        for name in PEERS:
            run = partial(peers.measure, name, TOKENS // length, length)
            found.append(Measurement("layer", f"fla {name}, T {length}", run))
    return found


def measure_all(
    wanted: Sequence[Measurement],
    records: Records,
    conditions: str,
    seconds: float,
    show: Callable[[Any], object],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Measure what the records lack. conditions: the card and the sources; seconds: nothing is begun after them.

    Returns:
        The records of all that was wanted, as far as time has gone. What failed is shown, not kept, and tried again
        by the same command.
    """
    began, cut = clock(), []
    for one in wanted:
        if one.key(conditions) in records:
            continue
        if clock() - began >= seconds:
            cut.append(one.name)
            continue
        try:
            result = one.run()
        except Exception as error:  # whatever one of many does must not take the others' time on a card
            show(f"FAILED {one.name}: {type(error).__name__}: {error}")
            continue
        records.add({"key": one.key(conditions), "part": one.part, "name": one.name, **result})
        show(f"{clock() - began:4.0f} s  {one.name}" + (f"  WRONG: {result['wrong']}" if "wrong" in result else ""))
    if cut:
        show(f"CUT OFF after {seconds:.0f} s: {'; '.join(cut)}. The same command goes on.")
    keys = [one.key(conditions) for one in wanted]
    return [records[key] for key in keys if key in records]


def sources() -> str:
    """A few digits of all kernels."""
    return hashlib.sha256("".join(headers().values()).encode()).hexdigest()[:12]
