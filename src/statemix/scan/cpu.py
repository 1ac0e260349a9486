"""The scans of the compiled kernels of csrc/ as torch operators: forward and first derivative.

The kernels read float32, float64 and bfloat16 as they are, and write states in float32 or wider.
"""

from typing import Any

import torch
from torch import Tensor

from statemix.kernels.library import KINDS, MAX_ORDER, NORMALIZATIONS, STORAGES, ScanCall, library, load_problem
from statemix.kernels.memory import address, dense
from statemix.kernels.operators import Operator, no_second_derivative, save_nothing
from statemix.scan.problem import Problem

Gradients = tuple[Tensor, Tensor, Tensor]  # of raw gates, values and initial state


def unserved(problem: Problem) -> str | None:
    """Why the kernels are not here or do not serve the problem; None if they do."""
    missing = load_problem()
    if missing is not None:
        return missing
    if problem.values.device.type != "cpu":
        return f"it needs CPU tensors, got device {problem.values.device}."
    order = problem.initial_state.shape[1]
    return f"it serves M up to {MAX_ORDER}, got M = {order}." if order > MAX_ORDER else None


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """In one pass over time: the states, and the state (B, M, N) after the last step."""
    if problem.values.dtype not in STORAGES:
        problem = problem.widened()
    return _scan(*problem)


def _forward(
    kind: str, raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    problem = _readable(Problem(kind, raw_gates, values, initial_state, reset, normalization))
    states, final_state = _results_like(kind, values, initial_state)
    call = _call(problem, states)
    call.final_state = address(final_state)
    library().run("statemix_scan_forward", call)
    return states, final_state


def _forward_fake(
    kind: str, raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    return _results_like(kind, values, initial_state)


def _backward(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
) -> Gradients:
    problem = _readable(Problem(kind, raw_gates, values, initial_state, reset, normalization))
    grad_states = dense(grad_states)
    grads = _gradients_like(raw_gates, values, initial_state)
    call = _call(problem, states)
    call.grad_states = address(grad_states)
    if grad_final_state is not None:
        grad_final_state = dense(grad_final_state)
        call.grad_final_state = address(grad_final_state)
    call.grad_raw_gates, call.grad_values, call.grad_initial_state = (address(x) for x in grads)
    library().run("statemix_scan_backward", call)
    return grads


def _backward_fake(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
) -> Gradients:
    return _gradients_like(raw_gates, values, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.kind, raw_gates, values, initial_state, reset, ctx.normalization = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(raw_gates, values, initial_state, reset, output[0])


def _derivative(ctx: Any, grad_states: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    raw_gates, values, initial_state, reset, states = ctx.saved_tensors
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    problem = Problem(ctx.kind, raw_gates, values, initial_state, reset, ctx.normalization)
    grads = _differentiate(grad_states, grad_final_state, states, *problem)
    return None, *grads, None, None


def _forward_flops(kind: str, raw_gates: Tensor, *others: Any, out_val: Any) -> int:
    """Each gate is in one multiplication and one addition. (Torch, too, counts no FLOPs for what a softmax does.)"""
    return 2 * raw_gates.numel()


def _backward_flops(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    kind: str,
    raw_gates: Tensor,
    *others: Any,
    out_val: Any,
) -> int:
    """As many for the gradients of states and values, and as many for those of the gates."""
    return 4 * raw_gates.numel()


_scan = Operator("scan_forward", _forward, _forward_fake, _save, _derivative, flops=_forward_flops)
_differentiate = Operator(
    "scan_backward",
    _backward,
    _backward_fake,
    save_nothing,
    no_second_derivative,
    flops=_backward_flops,
)


def _results_like(kind: str, values: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what the scan returns, contiguous: the kept state of every step, and the state to go on from.

    Both are float32 or wider, also where raw gates and values are not: the backward wants what the scan had.
    """
    batch, length, blocks = values.shape[0], values.shape[1], values.shape[-1]
    order = initial_state.shape[1]
    shape = (batch, length, blocks) if kind == "companion" else (batch, length, order, blocks)
    return initial_state.new_empty(shape), initial_state.new_empty(initial_state.shape)


def _gradients_like(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> Gradients:
    """Room for the three gradients, contiguous also where an input was expanded."""
    return (
        raw_gates.new_empty(raw_gates.shape),
        values.new_empty(values.shape),
        initial_state.new_empty(initial_state.shape),
    )


def _readable(problem: Problem) -> Problem:
    """The problem in a layout that the kernels take: everything below a time step contiguous."""
    return problem._replace(
        raw_gates=_strided(problem.raw_gates),
        values=_strided(problem.values),
        initial_state=dense(problem.initial_state),
        reset=None if problem.reset is None else dense(problem.reset),
    )


def _strided(x: Tensor) -> Tensor:
    """`x` itself if everything below a time step is contiguous (the kernel takes batch and time strides), or a copy."""
    x = x.resolve_neg()  # its memory may hold the numbers with the other sign
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _call(problem: Problem, states: Tensor) -> ScanCall:
    """The struct of the kernels, without what only one direction has."""
    raw_gates, values = problem.raw_gates, problem.values
    return ScanCall(
        batch=values.shape[0],
        length=values.shape[1],
        order=problem.initial_state.shape[1],
        blocks=values.shape[-1],
        gate_batch_stride=raw_gates.stride(0),
        gate_time_stride=raw_gates.stride(1),
        value_batch_stride=values.stride(0),
        value_time_stride=values.stride(1),
        kind=KINDS[problem.kind],
        normalization=NORMALIZATIONS[problem.normalization],
        storage=STORAGES[values.dtype],
        threads=torch.get_num_threads(),
        raw_gates=address(raw_gates),
        values=address(values),
        initial_state=address(problem.initial_state),
        reset=address(problem.reset),
        states=address(states),
    )
