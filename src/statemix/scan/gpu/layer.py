"""A whole layer on a GPU: one product makes raw gates and values, a scan reads its columns, and one product reads out.

The columns of a step are in the kernels' order: coefficients, input gates, values, of each a block's own numbers
together. M is filled up to a power of two and N until each of the three begins at a multiple of 8 columns, with weights
of zero; so a filled-up state is zero, and so is its gradient. The derivative of the scan writes the gradients of all
columns into one tensor: a product with it is the gradient of x, and one that of the weight. In between nothing but the
scan touches activations, except that the read-out of a companion takes copies of its lags.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from statemix.kernels import Weights
from statemix.kernels.operators import Operator, save_nothing
from statemix.scan.gpu import no_second_derivative, run_backward, run_forward
from statemix.scan.gpu.plan import filled_order

COLUMNS = 8  # products are fast where their sizes are multiples of it; as bfloat16 these are 16 bytes


def layer(
    x: Tensor,
    weights: Weights,
    state: Tensor | None,
    reset: Tensor | None,
    visibility: Tensor | None = None,
    *,
    normalization: str,
    kind: str,
    order: int,
) -> tuple[Tensor, Tensor]:
    """A whole layer, as `kernels.layer` on a CPU; under autocast its columns and states have the dtype of that.

    Args:
        x: (B, T, D), float32, bfloat16 or float16.
        weights, state, reset, visibility, normalization, kind, order: as in `kernels.layer`. The weights have the dtype
            of x unless autocast is on.

    Returns:
        y (B, T, D), and the state after the last step, (B, M, N), float32.
    """
    batch, length, _ = x.shape
    device, blocks = x.device.type, weights[3].shape[1] // order
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weight, bias, output_weight = _pack(*weights, kind, order, dtype)
    columns = linear(x.flatten(0, 1), weight, bias).unflatten(0, (batch, length))
    filled_blocks, filled = _filled(kind, order, blocks)
    if state is None:
        initial_state = x.new_zeros(batch, filled_blocks, filled, dtype=torch.float32)
    else:
        initial_state = pad(state.float().transpose(1, 2), (0, filled - order, 0, filled_blocks - blocks))
    states, final_state = _scan(columns, initial_state, reset, normalization, kind, order)
    if visibility is not None:
        seen = pad(visibility.to(states.dtype), (0, filled_blocks - blocks))[:, None]
        states = states * (seen if kind == "companion" else seen[..., None])
    shown = _lags(states, reset, order) if kind == "companion" else states.flatten(2)
    return linear(shown, output_weight), final_state[:, :blocks, :order].transpose(1, 2)


def _filled(kind: str, order: int, blocks: int) -> tuple[int, int]:
    """N and M filled up."""
    filled = filled_order(order)
    unit = COLUMNS // min(filled, COLUMNS) if kind == "block" else COLUMNS
    return -(-blocks // unit) * unit, filled


def _sections(columns: Tensor, dim: int, kind: str, blocks: int, filled: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (N, M, M), input gates (N, M) and values (N, M) of columns, with these axes for `dim`: views.

    For lags (N, M), (N) and (N).
    """
    rows = (filled,) if kind == "block" else ()
    shapes = [(blocks, *rows, filled), (blocks, *rows), (blocks, *rows)]
    parts = columns.split([torch.Size(shape).numel() for shape in shapes], dim)
    coefficients, input_gates, values = (part.unflatten(dim, shape) for part, shape in zip(parts, shapes, strict=True))
    return coefficients, input_gates, values


# ---- weights in the kernels' order


def _pairs(
    packed: tuple[Tensor, Tensor, Tensor], weights: Weights, kind: str, order: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of packed weights and of the weights of a layer, which hold the same numbers."""
    weight, bias, output = packed
    gate_weight, gate_bias, value_weight, output_weight = weights
    read_out = output_weight.unflatten(1, (order, -1))  # (D, M, N)
    blocks, rows = read_out.shape[2], (order,) if kind == "block" else ()
    filled_blocks, filled = _filled(kind, order, blocks)
    whole = []
    for columns, gates in ((weight, gate_weight), (bias[:, None], gate_bias[:, None])):
        coefficients, input_gates, values = _sections(columns, 0, kind, filled_blocks, filled)
        raw_gates = gates.unflatten(0, (*rows, order + 1, blocks)).movedim(-2, 0)  # (N, [M,] M + 1, D)
        whole += [(coefficients, raw_gates[..., :order, :]), (input_gates, raw_gates[..., order, :])]
        if columns is weight:
            whole.append((values, value_weight.unflatten(0, (*rows, blocks)).movedim(-2, 0)))
    if kind == "companion":  # the oldest lag first
        whole += zip(output.unflatten(1, (order, -1)).unbind(1), reversed(read_out.unbind(1)), strict=True)
    else:
        whole.append((output.unflatten(1, (-1, filled)), read_out.transpose(1, 2)))
    for target, source in whole:
        yield target[tuple(map(slice, source.shape))], source


def _pack_forward(
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    output_weight: Tensor,
    kind: str,
    order: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (gate_weight, gate_bias, value_weight, output_weight)
    packed = _packed(*weights, kind, order, dtype)
    for target, source in _pairs(packed, weights, kind, order):
        target.copy_(source)
    return packed


def _packed(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in the shapes of the weights of both products, (C, D) and (D, M N), and of the bias."""
    _, _, _, output_weight, kind, order, dtype = arguments
    width, shown = output_weight.shape
    blocks, filled = _filled(kind, order, shown // order)
    count = blocks * filled * (filled + 2) if kind == "block" else blocks * (filled + 2)
    shapes = (count, width), (count,), (width, blocks * (order if kind == "companion" else filled))
    weight, bias, output = (output_weight.new_zeros(shape, dtype=dtype) for shape in shapes)
    return weight, bias, output


def _unpack_forward(
    weight: Tensor, bias: Tensor, output: Tensor, kind: str, order: int, blocks: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _unpacked(weight, bias, output, kind, order, blocks, dtype)
    for source, target in _pairs((weight, bias, output), weights, kind, order):
        target.copy_(source)
    return weights


def _unpacked(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the weights of a layer."""
    weight, _, _, kind, order, blocks, dtype = arguments
    rows, width = (order if kind == "block" else 1) * blocks, weight.shape[1]
    shapes = ((order + 1) * rows, width), ((order + 1) * rows,), (rows, width), (width, order * blocks)
    gate_weight, gate_bias, value_weight, output_weight = (weight.new_empty(shape, dtype=dtype) for shape in shapes)
    return gate_weight, gate_bias, value_weight, output_weight


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, output_weight, ctx.kind, ctx.order, _ = inputs
    ctx.blocks, ctx.dtype = output_weight.shape[1] // ctx.order, output_weight.dtype


def _pack_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *_unpack(*grads, ctx.kind, ctx.order, ctx.blocks, ctx.dtype), None, None, None


_pack = Operator("gpu_pack", _pack_forward, _packed, _save_pack, _pack_derivative, device_types=None)
_unpack = Operator("gpu_unpack", _unpack_forward, _unpacked, save_nothing, no_second_derivative, device_types=None)


# ---- the scan of columns


def _forward(
    columns: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str, kind: str, order: int
) -> tuple[Tensor, Tensor]:
    history, final_state = _results(columns, initial_state, reset, normalization, kind, order)
    before, (_, blocks, filled) = _before(kind, order), initial_state.shape
    if before:
        history[:, :before] = initial_state[..., :before].flip(2).transpose(1, 2)
    parts = _sections(columns, 2, kind, blocks, filled)
    run_forward((history[:, before:], final_state), *parts, initial_state, reset, normalization, kind, order)
    return history, final_state


def _results(columns: Tensor, initial_state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Room for the states of every step, (B, T, N, M) or for the companion (B, M - 1 + T, N), and for the last one."""
    (batch, length, _), (_, blocks, filled), (_, _, kind, order) = columns.shape, initial_state.shape, others
    numbers = (blocks,) if kind == "companion" else (blocks, filled)
    history = columns.new_empty(batch, _before(kind, order) + length, *numbers)
    return history, initial_state.new_empty(initial_state.shape)


def _before(kind: str, order: int) -> int:
    """How many states from before the first step come first among those of every step: the read-out's older lags."""
    return order - 1 if kind == "companion" else 0


def _backward(
    grad_history: Tensor,
    grad_final_state: Tensor | None,
    columns: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    history: Tensor,
    normalization: str,
    kind: str,
    order: int,
) -> tuple[Tensor, Tensor]:
    grad_columns, grad_initial_state = _grads(grad_history, grad_final_state, columns, initial_state)
    before, (_, blocks, filled) = _before(kind, order), initial_state.shape
    run_backward(
        (*_sections(grad_columns, 2, kind, blocks, filled), grad_initial_state),
        grad_history[:, before:],
        grad_final_state,
        *_sections(columns, 2, kind, blocks, filled),
        initial_state,
        reset,
        history[:, before:],
        normalization,
        kind,
        order,
    )
    if before:
        grad_initial_state[..., :before] += grad_history[:, :before].flip(1).transpose(1, 2)
    return grad_columns, grad_initial_state


def _grads(
    grad_history: Tensor, grad_final_state: Tensor | None, columns: Tensor, initial_state: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of all columns and of the initial state."""
    return columns.new_empty(columns.shape), initial_state.new_empty(initial_state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, ctx.kind, ctx.order = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])


def _derivative(ctx: Any, grad_history: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_history is None:
        grad_history = torch.zeros_like(saved[-1])
    grads = _differentiate(grad_history, grad_final_state, *saved, ctx.normalization, ctx.kind, ctx.order)
    return *grads, None, None, None, None


_scan = Operator("gpu_columns_forward", _forward, _results, _save, _derivative, device_types=None)
_differentiate = Operator(
    "gpu_columns_backward", _backward, _grads, save_nothing, no_second_derivative, device_types=None
)


def _lags(history: Tensor, reset: Tensor | None, order: int) -> Tensor:
    """h_{t-M+1}, ..., h_t at every step, zero from before a reset: (B, M - 1 + T, N) to (B, T, M N)."""
    lags = history.unfold(1, order, 1).transpose(2, 3)  # (B, T, M, N)
    if reset is not None and order > 1:
        resets = pad(reset.cumsum(1), (order - 1, 0))  # until each step
        lags = torch.where((resets.unfold(1, order, 1) == resets[:, order - 1 :, None])[..., None], lags, 0)
    return lags.flatten(2)
