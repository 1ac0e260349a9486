"""The fused Triton kernels as torch custom operators: float32 and bfloat16, M up to 16, forward and first derivative.

A kernel reads the raw gates and normalises them in registers; a transition is never in memory, forward or backward.
The modules of this package that import triton are imported at the first call. With TRITON_INTERPRET=1 in the
environment, triton's interpreter runs them on CPU tensors: slowly, for tests. More: docs/gpu.md.
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statemix.scan.gpu_model import MAX_ORDER, Card, Configuration, Scan, card_of, choose
from statemix.scan.problem import Problem

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up now: torch.compile could not trace that


class Launch(NamedTuple):
    """A kernel and what it is compiled with.

    constants: of its tl.constexpr parameters. pointers: dtype behind each pointer parameter. All others are integers.
    per: what an iteration of its loop takes, a "step" or a "chunk".
    """

    kernel: Any
    constants: dict[str, Any]
    pointers: dict[str, torch.dtype]
    num_warps: int
    num_stages: int
    per: str = "step"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved(problem: Problem) -> str | None:
    """Why the kernels are not here or do not serve the problem; None if they do.

    The interpreter serves tensors of a CPU alone.
    """
    if not _HAS_TRITON:
        return "it needs triton, which is not installed: pip install 'statemix[gpu]'."
    if not torch.cuda.is_available() and not _interpreted():
        return "it needs a GPU, and torch finds none here."
    device, order = problem.values.device, problem.initial_state.shape[1]
    if device.type != ("cpu" if _interpreted() else "cuda"):
        return f"it needs {'CPU' if _interpreted() else 'CUDA'} tensors, got device {device}."
    if problem.values.dtype == torch.float64:
        return f"it computes in float32, got {problem.values.dtype}."
    return f"it serves M up to {MAX_ORDER}, got M = {order}." if order > MAX_ORDER else None


def launches(
    kind: str,
    direction: str,
    order: int,
    dtype: torch.dtype,
    configuration: Configuration,
    normalization: str = "softmax",
    reset: bool = False,
    blocks: int = 512,
    keep: bool = True,
) -> list[Launch]:
    """The kernels that a scan of this configuration runs, in their order, each with what it is compiled with.

    Args:
        kind: "block", "companion" or "observer".
        direction: "forward" or "backward".
        order: M.
        dtype: of raw gates, values and states.
        configuration: from `statemix.scan.gpu_model`.
        normalization: of the raw gates.
        reset: whether there is a reset mask.
        blocks: N.
        keep: whether a forward keeps what its backward needs.

    Returns:
        One launch for each kernel; in chunks of time these are a summary, a relay and the scan.
    """
    from statemix.scan.gpu import block, lagged, tiles

    forward, wide = direction == "forward", torch.float32
    family = "lagged" if kind != "block" else "tile" if configuration.tile else "block"
    kernel = getattr({"block": block, "lagged": lagged, "tile": tiles}[family], f"{family}_{direction}")
    constants: dict[str, Any] = {"M": order, "N": blocks, "BLOCK_N": configuration.block_n}
    constants |= {"NORMALIZATION": normalization, "HAS_RESET": reset}
    constants |= {"HAS_RESIDUAL": dtype != wide and (keep or not forward)}
    if family == "tile":
        constants |= {"STEPS": configuration.tile, "STAGES": configuration.num_stages}
    else:
        constants |= {"AHEAD": configuration.num_stages - 1}
    if family == "block":
        constants |= {"GROUPS": _groups(order, configuration.block_n)}
    elif family == "lagged":
        constants |= {"OBSERVER": kind == "observer"}
    pointers = {"raw_gates_ptr": dtype, "values_ptr": dtype, "carry_ptr": wide, "reset_ptr": torch.uint8}
    pointers |= {"states_ptr": dtype, "residual_ptr": dtype}
    if forward:
        pointers |= {"final_state_ptr": wide}
    else:
        pointers |= {"initial_state_ptr": wide, "grad_states_ptr": dtype, "grad_initial_state_ptr": wide}
        pointers |= {"grad_raw_gates_ptr": dtype, "grad_values_ptr": dtype}
    scan = Launch(kernel, constants, pointers, configuration.num_warps, 1)
    return [*_carry_launches(kind, scan, configuration, not forward), scan] if configuration.chunk_size else [scan]


def _groups(order: int, block_n: int) -> int:
    """Lanes that share out the rows of a block: those of a warp that the blocks leave free."""
    return max(1, min(32 // block_n, 1 << (order - 1).bit_length()))


def _carry_launches(kind: str, scan: Launch, configuration: Configuration, adjoint: bool) -> list[Launch]:
    """The summary and the relay that make the carries of a scan in chunks."""
    from statemix.scan.gpu import chunks

    order, wide = scan.constants["M"], torch.float32
    shared = {"M": order, "N": scan.constants["N"], "ADJOINT": adjoint}
    constants = shared | {name: scan.constants[name] for name in ("NORMALIZATION", "HAS_RESET")}
    constants |= {"COLUMNS": 1 << (order - 1).bit_length(), "AHEAD": configuration.num_stages - 1}
    if kind == "block":
        kernel = chunks.block_summary
        constants |= {"BLOCK_N": configuration.block_n, "GROUPS": _groups(order, configuration.block_n)}
    else:
        kernel = chunks.lagged_summary
        # above M 8 the columns of the product are more than a lane has registers for
        constants |= {"BLOCK_N": min(configuration.block_n, 32 if order <= 8 else 8), "OBSERVER": kind == "observer"}
    pointers = {name: scan.pointers[name] for name in ("raw_gates_ptr", "values_ptr", "reset_ptr")} | {"maps_ptr": wide}
    summary = Launch(kernel, constants, pointers, 1, 1)

    groups = _groups(order, 8)  # 8 lanes and more read whole sectors of the maps
    loads = -(-order // groups) * (order + 1)
    constants = shared | {"BLOCK_N": 32 // groups, "GROUPS": groups, "AHEAD": max(1, 32 // loads)}
    pointers = dict.fromkeys(("maps_ptr", "start_ptr", "carry_ptr"), wide)
    return [summary, Launch(chunks.relay, constants, pointers, 1, 1, "chunk")]


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """In one pass over time, or in chunks of it: the states, and the state (B, M, N) after the last step."""
    if problem.values.dtype == torch.float16:
        problem = problem.widened()
    kind, raw_gates, values, initial_state, reset, normalization = problem
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (raw_gates, values, initial_state))
    states, final_state, _ = _forward(raw_gates, values, initial_state, reset, normalization, kind, keep)
    return states, final_state


_choose = functools.cache(choose)


@functools.cache
def _card(device: torch.device) -> Card:
    return card_of(torch.cuda.get_device_properties(device))


def configure(kind: str, direction: str, values: Tensor, order: int) -> Configuration:
    """The configuration that a scan runs with: the model's choice for the card.

    In the interpreter, where an operation takes the same time at any width, it is one wide program.
    """
    batch, length, blocks = values.shape[0], values.shape[1], values.shape[-1]
    if _interpreted():
        return Configuration(max(8, 1 << (blocks - 1).bit_length()), 1, 2)
    dtype = str(values.dtype).removeprefix("torch.")
    return _choose(Scan(kind, direction, order, dtype, batch, length, blocks), _card(values.device))


def _run(
    launch: Launch, tensors: dict[str, Tensor | None], integers: tuple[int, ...], batch: int, chunks: int = 1
) -> None:
    """Launch a kernel on tensors named like its pointers; for one that is None any other stands in, and is not read."""
    grid = (-(-launch.constants["N"] // launch.constants["BLOCK_N"]), batch, chunks)
    some = next(x for x in tensors.values() if x is not None)
    names = [name for name in launch.kernel.arg_names if name.endswith("_ptr")]
    pointers = [some if tensors[name] is None else tensors[name] for name in names]
    with torch.cuda.device_of(some):
        launch.kernel[grid](
            *pointers, *integers, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def _carry(
    before: list[Launch], raw_gates: Tensor, values: Tensor, reset: Tensor | None, start: Tensor, chunk_size: int
) -> Tensor:
    """What enters each chunk, (B, C, M, N), with `start` for the first: by a summary and a relay, where C is above 1.

    In a backward `values` are the gradients of the states, and the first chunk is the last.
    """
    (batch, order, blocks), length = start.shape, values.shape[1]
    chunks = -(-length // chunk_size)
    if chunks == 1:
        return start
    summary, relay = before
    maps = start.new_empty(batch, chunks - 1, order, order + 1, blocks)
    carry = start.new_empty(batch, chunks, order, blocks)
    tensors = {"raw_gates_ptr": raw_gates, "values_ptr": values, "reset_ptr": _bytes(reset), "maps_ptr": maps}
    integers = (length, chunk_size, *raw_gates.stride()[:2], *values.stride()[:2])
    _run(summary, tensors, integers, batch, chunks - 1)
    _run(relay, {"maps_ptr": maps, "start_ptr": start, "carry_ptr": carry}, (chunks,), batch)
    return carry


def _scan_forward(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    raw_gates, values = _strided(raw_gates), _strided(values)
    states, final_state, residual = _states_like(values, initial_state, kind, keep)
    length, blocks, order = values.shape[1], values.shape[-1], initial_state.shape[1]
    configuration = configure(kind, "forward", values, order)
    *before, launch = launches(
        kind, "forward", order, values.dtype, configuration, normalization, reset is not None, blocks, keep
    )
    chunk_size = configuration.chunk_size or length
    carry = _carry(before, raw_gates, values, reset, initial_state.contiguous(), chunk_size)
    tensors = {
        "raw_gates_ptr": raw_gates,
        "values_ptr": values,
        "carry_ptr": carry,
        "reset_ptr": _bytes(reset),
        "states_ptr": states,
        "residual_ptr": residual,
        "final_state_ptr": final_state,
    }
    integers = (length, chunk_size, *raw_gates.stride()[:2], *values.stride()[:2])
    _run(launch, tensors, integers, values.shape[0], -(-length // chunk_size))
    return states, final_state, residual


def _scan_forward_fake(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _states_like(values, initial_state, kind, keep)


def _scan_backward(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    residual: Tensor,
    normalization: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    raw_gates, values = _strided(raw_gates), _strided(values)
    grads = _grads_like(raw_gates, values, initial_state)
    length, blocks, order = values.shape[1], values.shape[-1], initial_state.shape[1]
    configuration = configure(kind, "backward", values, order)
    *before, launch = launches(
        kind, "backward", order, values.dtype, configuration, normalization, reset is not None, blocks
    )
    chunk_size, grad_states = configuration.chunk_size or length, grad_states.contiguous()
    start = initial_state.new_zeros(initial_state.shape) if grad_final_state is None else grad_final_state.contiguous()
    carry = _carry(before, raw_gates, grad_states, reset, start, chunk_size)
    tensors = {
        "raw_gates_ptr": raw_gates,
        "values_ptr": values,
        "initial_state_ptr": initial_state.contiguous(),
        "reset_ptr": _bytes(reset),
        "states_ptr": states,
        "residual_ptr": residual,
        "grad_states_ptr": grad_states,
        "carry_ptr": carry,
        "grad_raw_gates_ptr": grads[0],
        "grad_values_ptr": grads[1],
        "grad_initial_state_ptr": grads[2],
    }
    integers = (length, chunk_size, *raw_gates.stride()[:2], *values.stride()[:2])
    _run(launch, tensors, integers, values.shape[0], -(-length // chunk_size))
    return grads


def _scan_backward_fake(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    residual: Tensor,
    normalization: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads_like(raw_gates, values, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, ctx.kind, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[0], output[2])


def _derivative(
    ctx: Any, grad_states: Tensor | None, grad_final_state: Tensor | None, unused: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_states is None:
        grad_states = torch.zeros_like(saved[4])
    grads = _backward(grad_states, grad_final_state, *saved, ctx.normalization, ctx.kind)
    return *grads, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("scan: the 'gpu' backend has no second derivative. Use backend='associative'.")


_forward = torch.library.custom_op("statemix::gpu_scan_forward", _scan_forward, mutates_args=())
_forward.register_fake(_scan_forward_fake)
_backward = torch.library.custom_op("statemix::gpu_scan_backward", _scan_backward, mutates_args=())
_backward.register_fake(_scan_backward_fake)
_forward.register_autograd(_derivative, setup_context=_save)
_backward.register_autograd(_no_second_derivative, setup_context=_save_nothing)


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _strided(x: Tensor) -> Tensor:
    """`x` itself if everything below a time step is contiguous (the kernels take batch and time strides), or a copy."""
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _states_like(values: Tensor, initial_state: Tensor, kind: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the states, the state to go on from, and what rounding the states to bfloat16 left, if it is kept."""
    batch, length, blocks = values.shape[0], values.shape[1], values.shape[-1]
    shape = (batch, length, blocks) if kind == "companion" else (batch, length, initial_state.shape[1], blocks)
    kept = shape if keep and values.dtype != torch.float32 else (0,)
    return values.new_empty(shape), initial_state.new_empty(initial_state.shape), values.new_empty(kept)


def _grads_like(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the three gradients, contiguous also where an input was expanded."""
    return tuple(x.new_empty(x.shape) for x in (raw_gates, values, initial_state))  # type: ignore[return-value]
