"""Whole layers in one call of the kernels: forward and backward over a sequence, and one token without gradients."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statemix.kernels.library import (
    KINDS,
    NORMALIZATIONS,
    STORAGES,
    Gated,
    Layer,
    Model,
    Pair,
    Readout,
    instruction_set,
    library,
)
from statemix.kernels.operators import Operator, no_second_derivative, save_nothing

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # see `layer`

KEPT_BYTES = 2**28  # 256 MiB: a layer keeps up to this much of raw gates for its backward, and recomputes more


def layer(
    x: Tensor,
    weights: Weights,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    normalization: str,
    kind: str,
    order: int,
    recompute: bool | None,
) -> tuple[Tensor, Tensor]:
    """A whole layer: raw gates W x_t + b and values from x, the scan, and the read-out, chunk of time by chunk of time.

    Args:
        x: (B, T, D), float32 or float64, contiguous or not.
        weights: of the raw gates (rows (M+1) N, D), their bias, of the values (rows N, D) and of the output (D, M N),
            rows = M for a block scan and 1 otherwise, all in the dtype of x.
        state, reset: as in `Mixer.forward`.
        normalization: of the raw gates.
        kind: "block", "companion" or "observer".
        order: M.
        recompute: True: the backward computes the raw gates again, and they never exist at full length. False: they
            are kept for it. None: kept up to `KEPT_BYTES`.

    Returns:
        y (B, T, D) and the state after the last step (B, M, N).
    """
    if state is None:
        state = x.new_zeros(x.shape[0], order, weights[3].shape[1] // order)
    gates = x.shape[0] * x.shape[1] * weights[0].shape[0] * x.element_size()
    keep = not recompute if recompute is not None else gates <= KEPT_BYTES
    keep = keep and torch.is_grad_enabled()
    y, final_state, _, _ = _layer(x, *weights, state.to(x.dtype), reset, normalization, kind, keep)
    return y, final_state


def layer_step(x: Tensor, weights: Weights, state: Tensor, *, normalization: str, kind: str) -> tuple[Tensor, Tensor]:
    """One step of `layer` for x (B, D) and a state, without gradients. It allocates its two results, nothing else."""
    y, final_state = torch.empty_like(x), torch.empty_like(state)
    problem = _step_problem(x, weights, state, y, final_state, normalization, kind)
    library().run("statemix_layer_step", problem)
    return y, final_state


class PairInputs(NamedTuple):
    """What a step of z = x + mixer(norm(x)) and z + SwiGLU(norm(z)) needs besides x.

    weights, state, normalization, kind: of the mixer, as in `layer_step`. others: weights of the two RMS norms, (D,),
    and of the SwiGLU, (2 H, D) with the gates first, and (D, H). epsilons: of the two norms.
    """

    weights: Weights
    state: Tensor
    others: tuple[Tensor, ...]
    epsilons: tuple[float, float]
    normalization: str
    kind: str


def pair_step(x: Tensor, inputs: PairInputs) -> tuple[Tensor, Tensor]:
    """One step for x (B, D) to y (B, D) and the next state, without gradients."""
    y, final_state = torch.empty_like(x), torch.empty_like(inputs.state)
    library().run("statemix_pair_step", _pair_problem(x, inputs, y, final_state))
    return y, final_state


class ModelStep:
    """Tokens (B,) to logits (B, V) of a whole model, one token of each row at a call, without gradients.

    The places of weights and states, and so the weights, are those of this moment: what is later put in a weight's
    place is not seen. The states are changed in place.

    Args:
        embedding: (V, D).
        pairs: of each layer, its state (B, M, N) contiguous.
        norm: weight of the last RMS norm (D,).
        epsilon: of it.
        head: (V, D).
        batch: B.
    """

    def __init__(
        self, embedding: Tensor, pairs: Sequence[PairInputs], norm: Tensor, epsilon: float, head: Tensor, batch: int
    ) -> None:
        stream = embedding.new_empty(batch, embedding.shape[1])
        self._pairs = (Pair * len(pairs))(*(_pair_problem(stream, inputs, stream, inputs.state) for inputs in pairs))
        self._problem = Model(
            *(embedding.shape[0], len(pairs), None, embedding.data_ptr(), stream.data_ptr()),
            ctypes.addressof(self._pairs),
            Readout(
                *(batch, embedding.shape[1], head.shape[0], STORAGES[head.dtype], torch.get_num_threads(), epsilon),
                *(t.data_ptr() for t in (stream, norm, head)),
            ),
        )
        self._logits = head.new_empty(0)
        # an alias keeps the memory, also where `parameter.data` is exchanged
        weights = [t for inputs in pairs for t in (*inputs.weights, *inputs.others, inputs.state)]
        self._kept = [t.detach() for t in (embedding, stream, norm, head, *weights)]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B,), int64 on the CPU. Raises IndexError, before anything changes, if one is outside [0, V)."""
        tokens, problem = tokens.contiguous(), self._problem
        logits = self._logits.new_empty(problem.readout.batch, problem.readout.count)
        problem.tokens, problem.readout.y = tokens.data_ptr(), logits.data_ptr()
        if (row := library().run("statemix_model_step", problem)) >= 0:
            raise IndexError(f"step: `tokens` must be in [0, {problem.vocabulary}), got {tokens[row]}.")
        return logits


def gated(x: Tensor) -> Tensor:
    """silu(gate) * inner for x (..., 2 H), contiguous, the gates first, to (..., H); without gradients."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    library().run("statemix_gated", _gated_problem(x, y=y.data_ptr()))
    return y


def gated_backward(grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient of x of `gated` from that of its result."""
    grad_y, grad_x = grad_y.contiguous(), torch.empty_like(x)
    library().run("statemix_gated", _gated_problem(x, grad_y=grad_y.data_ptr(), grad_x=grad_x.data_ptr()))
    return grad_x


def _gated_problem(x: Tensor, **addresses: int) -> Gated:
    size = x.shape[-1] // 2
    return Gated(x.numel() // (2 * size), size, STORAGES[x.dtype], torch.get_num_threads(), x.data_ptr(), **addresses)


def _pair_problem(x: Tensor, inputs: PairInputs, y: Tensor, final_state: Tensor) -> Pair:
    weights, state, others, epsilons, normalization, kind = inputs
    return Pair(
        _step_problem(x, weights, state, y, final_state, normalization, kind),
        *(others[3].shape[1], *epsilons, *(weight.data_ptr() for weight in others)),
    )


def _step_problem(
    x: Tensor, weights: Weights, state: Tensor, y: Tensor, final_state: Tensor, normalization: str, kind: str
) -> Layer:
    (batch, width), (_, order, blocks) = x.shape, state.shape
    gates, bias, values, output = weights
    # one by one: unpacking generators would take longer than the rest of a short step's preparations
    return Layer(
        batch,
        1,
        width,
        order,
        blocks,
        KINDS[kind],
        NORMALIZATIONS[normalization],
        STORAGES[x.dtype],
        torch.get_num_threads(),
        x.data_ptr(),
        gates.data_ptr(),
        bias.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        state.data_ptr(),
        None,
        y.data_ptr(),
        final_state.data_ptr(),
    )


def _layer_forward(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    output_weight: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    normalization: str,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [_dense(t) for t in (x, gate_weight, gate_bias, value_weight, output_weight, initial_state, reset)]
    results = _layer_results(x, initial_state, kind, keep)
    problem = _layer_problem(inputs, initial_state, normalization, kind)
    problem.y, problem.final_state, problem.states, problem.kept = (_address(t) for t in results)
    library().run("statemix_layer_forward", problem)
    return results


def _layer_forward_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    initial_state, (kind, keep) = others[4], others[-2:]
    return _layer_results(x, initial_state, kind, keep)


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
    states: Tensor,
    kept: Tensor,
    normalization: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if states.shape != _layer_shapes(x, initial_state, kind)[0]:
        raise RuntimeError(
            "layer: the backward must run with the instruction set of its forward, but "
            f"{instruction_set()!r} was chosen in between."
        )
    inputs = [_dense(t) for t in (x, gate_weight, gate_bias, value_weight, output_weight, initial_state, reset)]
    grad_y, grad_final_state = grad_y.contiguous(), _dense(grad_final_state)
    problem = _layer_problem(inputs, initial_state, normalization, kind)
    problem.states, problem.kept = states.data_ptr(), _address(kept)
    problem.grad_y, problem.grad_final_state = grad_y.data_ptr(), _address(grad_final_state)
    grads = _layer_grads(x, gate_weight, gate_bias, value_weight, output_weight, initial_state)
    problem.grad_x, problem.grad_gate_weight, problem.grad_gate_bias = (t.data_ptr() for t in grads[:3])
    problem.grad_value_weight, problem.grad_output_weight, problem.grad_initial_state = (
        t.data_ptr() for t in grads[3:]
    )
    library().run("statemix_layer_backward", problem)
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
        grad_y = torch.zeros_like(saved[0])
    grads = _differentiate_layer(grad_y, grad_final_state, *saved, ctx.normalization, ctx.kind)
    return *grads, None, None, None, None


_layer = Operator("layer_forward", _layer_forward, _layer_forward_fake, _save_layer, _layer_derivative)
_differentiate_layer = Operator(
    "layer_backward", _layer_backward, _layer_backward_fake, save_nothing, no_second_derivative
)


def _layer_shapes(x: Tensor, state: Tensor, kind: str) -> tuple[torch.Size, torch.Size]:
    """Shapes of the states and of the kept raw gates and values: `Shape` of csrc/layer.h.

    Blocks lie in vectors of the instruction set in use, the last axis; the third last is how many hold all of them.
    """
    batch, length, order, blocks = x.shape[0], x.shape[1], state.shape[1], state.shape[2]
    lanes = library().vector_bytes[instruction_set()] // x.element_size()
    tiles, rows = -(-blocks // lanes), order if kind == "block" else 1
    margin, shown = (order, 1) if kind == "companion" else (1, order)
    return (
        torch.Size((batch, margin + length, tiles, shown, lanes)),
        torch.Size((batch, length, tiles, rows * (order + 2), lanes)),
    )


def _layer_results(x: Tensor, state: Tensor, kind: str, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, kept = _layer_shapes(x, state, kind)
    return x.new_empty(x.shape), state.new_empty(state.shape), x.new_empty(states), x.new_empty(kept if keep else (0,))


def _layer_grads(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in inputs)  # type: ignore[return-value]


def _layer_problem(inputs: list[Tensor | None], state: Tensor, normalization: str, kind: str) -> Layer:
    x = inputs[0]
    assert x is not None
    return Layer(
        *(*x.shape, state.shape[1], state.shape[2]),
        *(KINDS[kind], NORMALIZATIONS[normalization], STORAGES[x.dtype], torch.get_num_threads()),
        *(_address(t) for t in inputs),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()
