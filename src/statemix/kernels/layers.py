"""A whole layer over a sequence in one call of the kernels, forward and backward (csrc/layer.h)."""

from typing import Any

import torch
from torch import Tensor

from statemix.kernels.library import KINDS, NORMALIZATIONS, STORAGES, LayerCall, instruction_set, library
from statemix.kernels.memory import address, dense
from statemix.kernels.operators import Operator, no_second_derivative, save_nothing

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # see `layer`

KEPT_BYTES = 2**28  # 256 MiB: a layer keeps up to this much of raw gates for its backward, and recomputes more


def layer(
    x: Tensor,
    weights: Weights,
    state: Tensor | None,
    reset: Tensor | None,
    visibility: Tensor | None = None,
    places: Tensor | None = None,
    *,
    normalization: str,
    kind: str,
    order: int,
    recompute: bool | None,
) -> tuple[Tensor, Tensor]:
    """A whole layer: raw gates W x_t + b and values from x, the scan, and the read-out, chunk of time by chunk of time.

    Args:
        x: (B, T, D), float32 or float64, contiguous or not; with `places` a table of its rows, (V, D).
        weights: of the raw gates (rows (M+1) N, D), their bias, of the values (rows N, D) and of the output (D, M N),
            rows = M for a block scan and 1 otherwise, all in the dtype of x.
        state, reset: as in `Mixer.forward`.
        visibility: (B, N), in the dtype of x: what the read-out sees of each block is multiplied by it, and nothing
            else. It has no gradient. Ones if None.
        places: (B, T), integers: which row of the table x is at each step. What is made of a row alone is then made
            once for each row, its raw gates and their weights too, and nothing of it is kept. Where this would take
            more than `KEPT_BYTES`, with the gradients that each thread adds up, x is made as long as the sequences.
        normalization: of the raw gates.
        kind: "block", "companion" or "observer".
        order: M.
        recompute: True: the backward computes the raw gates again, and they never exist at full length. False: they
            are kept for it. None: kept up to `KEPT_BYTES`.

    Returns:
        y (B, T, D) and the state after the last step (B, M, N).

    Raises:
        IndexError: a place is none of the table.
    """
    of_row = (weights[0].shape[0] + weights[2].shape[0]) * x.element_size()
    if places is not None and (1 + torch.get_num_threads()) * len(x) * of_row > KEPT_BYTES:
        x, places = torch.nn.functional.embedding(places, x), None
    batch, length = _steps(x, places)
    if state is None:
        state = x.new_zeros(batch, order, weights[3].shape[1] // order)
    gates = batch * length * weights[0].shape[0] * x.element_size()
    if recompute is None:  # an exported program is for all sizes
        recompute = not torch.compiler.is_exporting() and gates > KEPT_BYTES
    keep = not recompute and places is None and torch.is_grad_enabled()
    state = state.to(x.dtype)
    y, final_state, _, _ = _layer(x, *weights, state, reset, visibility, places, normalization, kind, keep)
    return y, final_state


def _layer_forward(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    output_weight: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    visibility: Tensor | None,
    places: Tensor | None,
    normalization: str,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, initial_state, reset = dense(x), dense(initial_state), _dense(reset)
    visibility, places = _dense(visibility), _dense(places)
    weights = dense(gate_weight), dense(gate_bias), dense(value_weight), dense(output_weight)
    used = instruction_set()  # once: another thread may choose another while this one makes room
    results = _layer_results(x, initial_state, places, kind, keep, used)
    problem = _layer_problem(x, weights, initial_state, reset, visibility, places, normalization, kind)
    problem.y, problem.final_state, problem.states, problem.kept = map(address, results)
    _run("statemix_layer_forward", problem, used, places)
    return results


def _layer_forward_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    initial_state, places, (kind, keep) = others[4], others[7], others[-2:]
    return _layer_results(x, initial_state, places, kind, keep, instruction_set())


def _layer_backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    output_weight: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    visibility: Tensor | None,
    places: Tensor | None,
    states: Tensor,
    kept: Tensor,
    normalization: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, initial_state, reset = dense(x), dense(initial_state), _dense(reset)
    visibility, places = _dense(visibility), _dense(places)
    weights = dense(gate_weight), dense(gate_bias), dense(value_weight), dense(output_weight)
    grad_y, grad_final_state = dense(grad_y), _dense(grad_final_state)
    problem = _layer_problem(x, weights, initial_state, reset, visibility, places, normalization, kind)
    problem.states, problem.kept = address(states), address(kept)
    problem.grad_y, problem.grad_final_state = address(grad_y), address(grad_final_state)
    grads = _layer_grads(x, gate_weight, gate_bias, value_weight, output_weight, initial_state)
    (
        problem.grad_x,
        problem.grad_gate_weight,
        problem.grad_gate_bias,
        problem.grad_value_weight,
        problem.grad_output_weight,
        problem.grad_initial_state,
    ) = map(address, grads)
    used = library().instruction_set_of(states.shape[-1] * states.element_size())  # that of the forward
    _run("statemix_layer_backward", problem, used, places)
    return grads


def _layer_backward_fake(
    grad_y: Tensor, grad_final_state: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _layer_grads(*others[:6])


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, ctx.kind, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _layer_derivative(
    ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = saved[0].new_zeros(*_steps(saved[0], saved[8]), saved[0].shape[-1])
    grads = _differentiate_layer(grad_y, grad_final_state, *saved, ctx.normalization, ctx.kind)
    return *grads, None, None, None, None, None, None


_layer = Operator("layer_forward", _layer_forward, _layer_forward_fake, _save_layer, _layer_derivative)
_differentiate_layer = Operator(
    "layer_backward", _layer_backward, _layer_backward_fake, save_nothing, no_second_derivative
)


def _run(function: str, problem: LayerCall, used: str, places: Tensor | None) -> None:
    if outside := library().run(function, problem, used):  # counted from 1
        assert places is not None
        rows, wrong = problem.table_rows, places.flatten()[outside - 1]
        raise IndexError(f"layer: `places` must be in [0, {rows}), got {wrong}.")


def _steps(x: Tensor, places: Tensor | None) -> tuple[int, int]:
    """B and T."""
    batch, length = x.shape[:2] if places is None else places.shape
    return batch, length


def _layer_shapes(
    x: Tensor, state: Tensor, places: Tensor | None, kind: str, used: str
) -> tuple[torch.Size, torch.Size]:
    """Shapes of the states and of the kept raw gates and values: `Shape` of csrc/layer.h.

    Blocks lie in vectors of the instruction set used, the last axis; the third last is how many hold all of them.
    """
    (batch, length), (_, order, blocks) = _steps(x, places), state.shape
    lanes = library().vector_bytes[used] // x.element_size()
    tiles, rows = -(-blocks // lanes), order if kind == "block" else 1
    margin, shown = (order, 1) if kind == "companion" else (1, order)
    return (
        torch.Size((batch, margin + length, tiles, shown, lanes)),
        torch.Size((batch, length, tiles, rows * (order + 2), lanes)),
    )


def _layer_results(
    x: Tensor, state: Tensor, places: Tensor | None, kind: str, keep: bool, used: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, kept = _layer_shapes(x, state, places, kind, used)
    y = x.new_empty(*_steps(x, places), x.shape[-1])
    return y, state.new_empty(state.shape), x.new_empty(states), x.new_empty(kept if keep else (0,))


def _layer_grads(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in inputs)  # type: ignore[return-value]


def _layer_problem(
    x: Tensor,
    weights: Weights,
    state: Tensor,
    reset: Tensor | None,
    visibility: Tensor | None,
    places: Tensor | None,
    normalization: str,
    kind: str,
) -> LayerCall:
    """The struct of a layer with its inputs, all dense."""
    gate_weight, gate_bias, value_weight, output_weight = weights
    (batch, length), (_, order, blocks) = _steps(x, places), state.shape
    return LayerCall(
        batch=batch,
        length=length,
        width=x.shape[-1],
        order=order,
        blocks=blocks,
        table_rows=0 if places is None else len(x),
        kind=KINDS[kind],
        normalization=NORMALIZATIONS[normalization],
        storage=STORAGES[x.dtype],
        threads=torch.get_num_threads(),
        x=address(x),
        gate_weight=address(gate_weight),
        gate_bias=address(gate_bias),
        value_weight=address(value_weight),
        output_weight=address(output_weight),
        initial_state=address(state),
        reset=address(reset),
        places=address(places),
        visibility=address(visibility),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)
