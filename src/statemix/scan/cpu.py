"""The fused C++ kernels of csrc/ as torch custom operators: float32, float64 and bfloat16, forward and first
derivative.
"""

from typing import Any

import torch
from torch import Tensor

from statemix.kernels.library import KINDS, NORMALIZATIONS, STORAGES, Scan, library
from statemix.kernels.memory import address, dense
from statemix.kernels.operators import Operator, no_second_derivative, save_nothing


def block_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    """h_t = A_t h_{t-1} + a0_t * v_t. Shapes: `statemix.scan.block_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "block")


def companion_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    """h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t. Shapes: `statemix.scan.companion_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "companion")


def observer_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    """h'[0] = a_1 h[0] + h[1] + a_0 v, h'[i] = a_{i+1} h[0] + h[i+1]. Shapes: `statemix.scan.observer_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "observer")


def _scan_forward(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str, kind: str
) -> tuple[Tensor, Tensor]:
    raw_gates, values = _strided(raw_gates), _strided(values)
    initial_state = dense(initial_state)
    reset = reset if reset is None else dense(reset)
    states, final_state = _states_like(values, initial_state, kind)
    problem = _scan_problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    problem.final_state = address(final_state)
    library().run("statemix_scan_forward", problem)
    return states, final_state


def _scan_forward_fake(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str, kind: str
) -> tuple[Tensor, Tensor]:
    return _states_like(values, initial_state, kind)


def _scan_backward(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    raw_gates, values = _strided(raw_gates), _strided(values)
    initial_state, grad_states = dense(initial_state), dense(grad_states)
    grad_final_state = grad_final_state if grad_final_state is None else dense(grad_final_state)
    reset = reset if reset is None else dense(reset)
    grads = _grads_like(raw_gates, values, initial_state)
    problem = _scan_problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    problem.grad_states, problem.grad_final_state = address(grad_states), address(grad_final_state)
    problem.grad_raw_gates, problem.grad_values, problem.grad_initial_state = map(address, grads)
    library().run("statemix_scan_backward", problem)
    return grads


def _scan_backward_fake(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads_like(raw_gates, values, initial_state)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    raw_gates, values, initial_state, reset, ctx.normalization, ctx.kind = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(raw_gates, values, initial_state, reset, output[0])


def _scan_derivative(
    ctx: Any, grad_states: Tensor | None, grad_final_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    raw_gates, values, initial_state, reset, states = ctx.saved_tensors
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    grads = _differentiate_scan(
        *(grad_states, grad_final_state, raw_gates, values, initial_state, reset, states),
        *(ctx.normalization, ctx.kind),
    )
    return *grads, None, None, None


_scan = Operator("scan_forward", _scan_forward, _scan_forward_fake, _save_scan, _scan_derivative)
_differentiate_scan = Operator("scan_backward", _scan_backward, _scan_backward_fake, save_nothing, no_second_derivative)


def _states_like(values: Tensor, initial_state: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Room for what the scan returns, contiguous: the kept state of every step, and the state to go on from.

    Both are float32 or wider, also where raw gates and values are not: the backward wants what the scan had.
    """
    batch, length, blocks = values.shape[0], values.shape[1], values.shape[-1]
    order = initial_state.shape[1]
    shape = (batch, length, blocks) if kind == "companion" else (batch, length, order, blocks)
    return initial_state.new_empty(shape), initial_state.new_empty(initial_state.shape)


def _grads_like(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the three gradients, contiguous also where an input was expanded."""
    return tuple(x.new_empty(x.shape) for x in (raw_gates, values, initial_state))  # type: ignore[return-value]


def _strided(x: Tensor) -> Tensor:
    """`x` itself if everything below a time step is contiguous (the kernel takes batch and time strides), or a copy."""
    x = x.resolve_neg()
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _scan_problem(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
) -> Scan:
    return Scan(
        *(values.shape[0], values.shape[1], initial_state.shape[1], values.shape[-1]),
        *(*raw_gates.stride()[:2], *values.stride()[:2]),
        *(KINDS[kind], NORMALIZATIONS[normalization], STORAGES[values.dtype], torch.get_num_threads()),
        *(address(raw_gates), address(values), address(initial_state), address(reset), address(states)),
    )
