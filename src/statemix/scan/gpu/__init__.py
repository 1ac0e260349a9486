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


class Plan(NamedTuple):
    """The kernels of a scan in their order, for the chunks of time that it is cut into.

    numbers: B, T, N, how many chunks there are, and the steps of one.
    """

    chunks: int
    numbers: tuple[int, ...]
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]


def _plan_of(values: Tensor, reset: Tensor | None, normalization: str, kind: str, order: int) -> Plan:
    shape = values.shape
    has_reset = reset is not None
    return _plan(values.device, kind, values.dtype, order, normalization, has_reset, shape[0], shape[1], shape[2])


@functools.lru_cache(maxsize=1024)
def _plan(device: torch.device, *decisive: Any) -> Plan:
    """The plan of a signature, whose fields are `decisive`."""
    signature = Signature(*decisive)

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
    numbers = (signature.batch, signature.length, signature.blocks, chunks, chunk_size)
    if chunks == 1:
        return Plan(chunks, numbers, (forward,), (backward,))
    maps, adjoint = (launch(plan.kernel(signature, program, load), chunks) for program in ("Map", "Adjoint"))
    relay, relay_back = (launch(plan.relay(signature, back), 1) for back in (False, True))
    return Plan(chunks, numbers, (maps, relay, forward), (maps, adjoint, relay_back, backward))


def _run(
    launches: tuple[Launch, ...],
    chosen: Plan,
    arrays: list[int],
    reset: Tensor | None,
    initial_state: Tensor,
    start: Tensor | None,
    end: Tensor,
) -> None:
    """Run the kernels of a scan. arrays: three numbers of each in `Scan` in csrc/gpu/scan.cuh."""
    carry, maps, offsets, cuts = None, None, None, None
    chunks = chosen.chunks
    if chunks > 1:
        batch, blocks, filled = initial_state.shape
        carry, offsets = (initial_state.new_empty(batch, chunks, blocks, filled) for _ in range(2))
        maps = initial_state.new_empty(batch, chunks, blocks, filled, filled)
        cuts = initial_state.new_empty(batch, chunks, dtype=torch.uint8)
    pointers = (reset, initial_state, start, carry, end, maps, offsets, cuts)
    places = [0 if tensor is None else address(tensor) or 0 for tensor in pointers]
    for run, of_sequence, programs in launches:
        run(_STRUCT.pack(*arrays, *places, *chosen.numbers, of_sequence), programs)


_STRUCT = struct.Struct("35q6i")  # nine arrays, eight pointers and six numbers: `Scan` in csrc/gpu/scan.cuh
_NO_ARRAY = (0, 0, 0)


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
    chosen = _plan_of(values, reset, normalization, kind, order)
    arrays: list[int] = []
    gates, input_gates, values = _read(gates, arrays), _read(input_gates, arrays), _read(values, arrays)
    arrays += _NO_ARRAY + _NO_ARRAY
    _write(states, arrays)
    arrays += _NO_ARRAY + _NO_ARRAY + _NO_ARRAY
    initial_state, reset = dense(initial_state), None if reset is None else dense(reset)
    _run(chosen.forward, chosen, arrays, reset, initial_state, initial_state, final_state)


def _results(
    gates: Tensor, input_gates: Tensor, values: Tensor, initial_state: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Room for the states of every step, and for the state to go on from."""
    *_, kind, _ = others
    states = _room(gates if kind == "observer" else values)  # an observer has as many states as transition gates
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
    chosen = _plan_of(values, reset, normalization, kind, order)
    arrays: list[int] = []
    # of a hook of autograd the states may come back with other strides
    gates, input_gates, values, states, grad_states = [
        _read(x, arrays) for x in (gates, input_gates, values, states, grad_states)
    ]
    arrays += _NO_ARRAY
    for grad in grads[:3]:
        _write(grad, arrays)
    initial_state, reset = dense(initial_state), None if reset is None else dense(reset)
    if grad_final_state is not None:
        grad_final_state = dense(grad_final_state)
    _run(chosen.backward, chosen, arrays, reset, initial_state, grad_final_state, grads[3])


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


def _room(like: Tensor) -> Tensor:
    """An empty tensor of the same shape (B, T, ...), dense below a time step, whose steps are aligned."""
    unit, strides = ALIGNMENT // like.element_size(), like.stride()
    if strides[0] % unit == 0 == strides[1] % unit and like.is_contiguous():
        return torch.empty_like(like)
    batch, length, *step = shape = like.shape
    size = math.prod(step)
    padded = -(-size // unit) * unit
    wanted = [padded * length, padded]
    for count in step:
        size //= count
        wanted.append(size)
    return like.new_empty(batch * length * padded).as_strided(shape, wanted)


def _read(x: Tensor, arrays: list[int]) -> Tensor:
    """Adds where a kernel reads `x`, and its strides; returns what lies there, to be kept until the launch.

    That is `x` itself if it is dense below a time step and its steps are aligned, or else a copy.
    """
    unit, strides, place = ALIGNMENT // x.element_size(), x.stride(), address(x) or 0
    aligned = strides[0] % unit == 0 == strides[1] % unit and place % ALIGNMENT == 0
    # its memory may hold the numbers with the other sign
    if aligned and (x.is_contiguous() or _is_dense(x.shape[2:], strides[2:])) and not x.is_neg():
        arrays += (place, strides[0], strides[1])
        return x
    copy = _room(x).copy_(x)
    _write(copy, arrays)
    return copy


def _write(x: Tensor, arrays: list[int]) -> None:
    """Adds where a kernel writes `x`, whose steps are aligned, and its strides."""
    strides = x.stride()
    arrays += (address(x) or 0, strides[0], strides[1])


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
