"""The fused CUDA kernels of csrc/gpu as torch custom operators: float32, bfloat16 and float16, M up to 16, forward and
first derivative.

A kernel reads the raw gates and normalises them in registers; a transition is never in memory, forward or backward.
With STATEMIX_EMULATE_GPU=1 in the environment the same sources run on a CPU, slowly, for tests. More: docs/gpu.md.
"""

import functools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statemix.kernels.memory import address, dense
from statemix.kernels.operators import Operator, save_nothing
from statemix.scan.gpu import compile, plan
from statemix.scan.gpu.compile import STORAGES, Kernel, load_problem, unserved_device
from statemix.scan.gpu.plan import MAX_ORDER, Signature, filled_order
from statemix.scan.problem import Problem

__all__ = ["MAX_ORDER", "load_problem", "scan", "scan_blocks", "unserved", "unserved_device"]

ALIGNMENT = 16  # bytes: of every array and of its steps in time, csrc/gpu/scan.cuh


def unserved(problem: Problem) -> str | None:
    """Why the kernels are not here or do not serve the problem; None if they do."""
    missing = load_problem() or unserved_device(problem.values.device)
    if missing is not None:
        return missing
    order = problem.initial_state.shape[1]
    if problem.values.dtype not in STORAGES:
        return f"it computes in float32, got {problem.values.dtype}."
    return f"it serves M up to {MAX_ORDER}, got M = {order}." if order > MAX_ORDER else None


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """The states, and the state (B, M, N) after the last step. Numbers are put in the kernels' order, one copy each."""
    kind, raw_gates, values, initial_state, reset, normalization = problem
    order = initial_state.shape[1]
    fill = filled_order(order) - order
    coefficients, input_gates = raw_gates.split([order, 1], dim=-2)
    input_gates = input_gates.squeeze(-2)
    if kind == "block":  # (B, T, N, M, M), and (B, T, N, M) for what has one number a row
        coefficients = _filled(coefficients.permute(0, 1, 4, 2, 3), fill, fill)
        input_gates, values = (_filled(x.transpose(2, 3), fill) for x in (input_gates, values))
    else:
        coefficients = _filled(coefficients.transpose(2, 3), fill)
    initial_state = _filled(initial_state.transpose(1, 2), fill)
    states, final_state = scan_blocks(
        coefficients, input_gates, values, initial_state, reset, normalization, kind, order
    )
    if kind != "companion":
        states = states[..., :order].transpose(2, 3)
    return states, final_state[..., :order].transpose(1, 2)


def _filled(x: Tensor, *fills: int) -> Tensor:
    """`x` with its last axes longer by `fills`."""
    if not any(fills):
        return x
    return torch.nn.functional.pad(x, [size for fill in fills for size in (0, fill)])


class Launch(NamedTuple):
    """A compiled kernel, and how many of its programs serve the blocks of a sequence, and how many there are."""

    run: Callable[[bytes, int], None]
    of_sequence: int
    programs: int

    def __call__(self, arguments: bytes) -> None:
        """Run it; `arguments` are all but the last field of its struct."""
        self.run(arguments + struct.pack("i", self.of_sequence), self.programs)


class Plan(NamedTuple):
    """The kernels of a scan in their order, for the chunks of time that it is cut into."""

    chunk_size: int
    chunks: int
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]


@functools.lru_cache(maxsize=1024)
def _plan(signature: Signature, device: torch.device) -> Plan:
    def launch(kernel: Kernel, chunks: int) -> Launch:
        run, size = compile.load(plan.fitting(kernel, device), device)
        of_sequence = -(-signature.blocks // size.blocks)
        return Launch(run, of_sequence, signature.batch * chunks * of_sequence)

    forward_kernel = plan.kernel(signature, "Forward", plan.Load())
    _, size = compile.load(plan.fitting(forward_kernel, device), device)
    warps = -(-signature.blocks // size.blocks) * signature.batch * size.threads // plan.WARP
    chunk_size = plan.chunk_size(signature, warps, device)
    chunks = -(-signature.length // chunk_size)

    def programs(team: int) -> int:  # of `slabs`, whose blocks are those of the lanes of a team
        return signature.batch * chunks * -(-signature.blocks * plan.WARP // (size.blocks * team))

    load = plan.Load(warps * chunks >= plan.MANY * plan.schedulers(device), plan.team(programs, device))
    forward, backward = (launch(plan.kernel(signature, program, load), chunks) for program in ("Forward", "Backward"))
    if chunks == 1:
        return Plan(chunk_size, chunks, (forward,), (backward,))
    maps, adjoint = (launch(plan.kernel(signature, program, load), chunks) for program in ("Map", "Adjoint"))
    relay, relay_back = (launch(plan.relay(signature, back), 1) for back in (False, True))
    return Plan(chunk_size, chunks, (maps, relay, forward), (maps, adjoint, relay_back, backward))


def _run(
    launches: tuple[Launch, ...],
    chosen: Plan,
    signature: Signature,
    arrays: tuple[Tensor | None, ...],
    reset: Tensor | None,
    initial_state: Tensor,
    start: Tensor | None,
    end: Tensor,
) -> None:
    """Run the kernels of a scan. arrays: those of `Scan` in csrc/gpu/scan.cuh, None where there is none."""
    carry, maps, offsets, cuts = None, None, None, None
    if chosen.chunks > 1:
        batch, blocks, filled = initial_state.shape
        carry, offsets = (initial_state.new_empty(batch, chosen.chunks, blocks, filled) for _ in range(2))
        maps = initial_state.new_empty(batch, chosen.chunks, blocks, filled, filled)
        cuts = initial_state.new_empty(batch, chosen.chunks, dtype=torch.uint8)
    fields: list[int] = []
    for array in arrays:
        if array is None:
            fields += (0, 0, 0)
        else:
            batch_stride, time_stride, *_ = array.stride()
            fields += (address(array) or 0, batch_stride, time_stride)
    for tensor in (reset, initial_state, start, carry, end, maps, offsets, cuts):
        fields.append(address(tensor) or 0)
    fields += (signature.batch, signature.length, signature.blocks, chosen.chunks, chosen.chunk_size)
    arguments = _STRUCT.pack(*fields)
    for launch in launches:
        launch(arguments)


_STRUCT = struct.Struct("35q5i")  # nine arrays, eight pointers and five numbers


def _signature(
    values: Tensor, gates: Tensor, reset: Tensor | None, normalization: str, kind: str, order: int
) -> Signature:
    batch, length, blocks = gates.shape[:3]
    return Signature(kind, values.dtype, order, normalization, reset is not None, batch, length, blocks)


def _forward(
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    order: int,
) -> tuple[Tensor, Tensor]:
    results = _results(gates, input_gates, values, initial_state, reset, normalization, kind, order)
    run_forward(results, gates, input_gates, values, initial_state, reset, normalization, kind, order)
    return results


def run_forward(
    results: tuple[Tensor, Tensor],
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    order: int,
) -> None:
    """`scan_blocks` into room for its results, whose steps are aligned."""
    states, final_state = results
    signature = _signature(values, gates, reset, normalization, kind, order)
    chosen = _plan(signature, values.device)
    gates, input_gates, values = _aligned(gates), _aligned(input_gates), _aligned(values)
    initial_state, reset = dense(initial_state), None if reset is None else dense(reset)
    arrays = (gates, input_gates, values, None, None, states, None, None, None)
    _run(chosen.forward, chosen, signature, arrays, reset, initial_state, initial_state, final_state)


def _results(
    gates: Tensor, input_gates: Tensor, values: Tensor, initial_state: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Room for the states of every step, and for the state to go on from."""
    *_, kind, _ = others
    states = _room(values, (*values.shape[:3], initial_state.shape[2])) if kind == "observer" else _room(values)
    return states, torch.empty_like(initial_state, memory_format=torch.contiguous_format)


def _backward(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _grads(grad_states, grad_final_state, gates, input_gates, values, initial_state)
    run_backward(
        grads,
        grad_states,
        grad_final_state,
        gates,
        input_gates,
        values,
        initial_state,
        reset,
        states,
        normalization,
        kind,
        order,
    )
    return grads


def run_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
    order: int,
) -> None:
    """The derivative of `scan_blocks` into room for the gradients of its first four arguments."""
    signature = _signature(values, gates, reset, normalization, kind, order)
    chosen = _plan(signature, values.device)
    gates, input_gates, values, grad_states = (_aligned(x) for x in (gates, input_gates, values, grad_states))
    initial_state, reset = dense(initial_state), None if reset is None else dense(reset)
    if grad_final_state is not None:
        grad_final_state = dense(grad_final_state)
    arrays = (gates, input_gates, values, states, grad_states, None, *grads[:3])
    _run(chosen.backward, chosen, signature, arrays, reset, initial_state, grad_final_state, grads[3])


def _grads(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of the four inputs."""
    return (
        _room(gates),
        _room(input_gates),
        _room(values),
        torch.empty_like(initial_state, memory_format=torch.contiguous_format),
    )


def _room(like: Tensor, shape: torch.Size | tuple[int, ...] | None = None) -> Tensor:
    """An empty tensor of a shape (B, T, ...), dense below a time step, whose steps are aligned."""
    shape = like.shape if shape is None else shape
    batch, length, *step = shape
    size, unit = math.prod(step), ALIGNMENT // like.element_size()
    padded = -(-size // unit) * unit
    if padded == size:
        if like.shape == shape and like.is_contiguous():
            return torch.empty_like(like)  # takes a quarter of the time of the line below
        return like.new_empty(shape)
    strides = [padded * length, padded]
    for count in step:
        size //= count
        strides.append(size)
    return like.new_empty(batch * length * padded).as_strided(shape, strides)


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if it is dense below a time step and its steps are aligned, or a copy."""
    x = x.resolve_neg()  # its memory may hold the numbers with the other sign
    unit = ALIGNMENT // x.element_size()
    batch, length, *_ = strides = x.stride()
    aligned = batch % unit == 0 == length % unit and (address(x) or 0) % ALIGNMENT == 0
    if aligned and (x.is_contiguous() or _is_dense(x.shape[2:], strides[2:])):
        return x
    return _room(x).copy_(x)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    size = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != size:
            return False
        size *= count
    return True


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, ctx.kind, ctx.order = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])


def _derivative(ctx: Any, grad_states: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_states is None:
        grad_states = torch.zeros_like(saved[-1])
    grads = _differentiate(grad_states, grad_final_state, *saved, ctx.normalization, ctx.kind, ctx.order)
    return *grads, None, None, None, None


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("scan: the 'gpu' backend has no second derivative. Use backend='associative'.")


_operator = Operator("gpu_scan_forward", _forward, _results, _save, _derivative, device_types=None)
_differentiate = Operator("gpu_scan_backward", _backward, _grads, save_nothing, no_second_derivative, device_types=None)


def scan_blocks(
    gates: Tensor,
    input_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    order: int,
) -> tuple[Tensor, Tensor]:
    """The scan of tensors in the kernels' own order: a block's numbers together, M filled up to a power of two.

    Nothing is copied if each tensor is dense below a time step, and its steps are a multiple of 16 bytes apart: columns
    of a larger tensor will do. What lies where M is filled up is not read, and has gradients of zero.

    Args:
        gates: (B, T, N, M, M), [..., i, j] carries old component j to new component i; (B, T, N, M) for lags.
        input_gates, values: (B, T, N, M); (B, T, N) for lags.
        initial_state: (B, N, M), float32.
        reset: (B, T) bool, or None.
        normalization: a name in `NORMALIZATIONS`.
        kind: "block", "companion" or "observer".
        order: M before it was filled up.

    Returns:
        The states, (B, T, N, M), for the companion (B, T, N), in the dtype of `values`, and the final state,
        (B, N, M), in float32.
    """
    return _operator(gates, input_gates, values, initial_state, reset, normalization, kind, order)
