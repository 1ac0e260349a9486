"""The fused C++ kernels of csrc/ as torch custom operators: float32, float64 and bfloat16, forward and first
derivative.

The kernels are one shared library with a C interface, so they depend on no version of torch or Python. Which
instruction set runs is chosen when the library is loaded: the best this processor has, or the one named in the
environment variable STATEMIX_INSTRUCTION_SET.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_ORDER = 64  # kMaxOrder in csrc/interface.h
LIBRARY = "statemix_cpu.so"
INSTRUCTION_SET_VARIABLE = "STATEMIX_INSTRUCTION_SET"

_INTERFACE = 7  # kInterface in csrc/interface.h
_KINDS = {"block": 0, "companion": 1, "observer": 2}
_NORMALIZATIONS = {"softmax": 0, "sigmoid": 1, "relu": 2, "tanh": 3, "silu": 4, "linear": 5, "none": 6}
_STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Scan(ctypes.Structure):
    """`Scan` of csrc/interface.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "order", "blocks")]
        + [(f"{name}_{axis}_stride", ctypes.c_int64) for name in ("gate", "value") for axis in ("batch", "time")]
        + [(name, ctypes.c_int32) for name in ("kind", "normalization", "storage", "threads")]
        + _pointers("raw_gates", "values", "initial_state", "reset", "states", "final_state")
        + _pointers("grad_states", "grad_final_state", "grad_raw_gates", "grad_values", "grad_initial_state")
    )


class _Layer(ctypes.Structure):
    """`Layer` of csrc/interface.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "width", "order", "blocks")]
        + [(name, ctypes.c_int32) for name in ("kind", "normalization", "storage", "threads")]
        + _pointers("x", "gate_weight", "gate_bias", "value_weight", "output_weight", "initial_state", "reset")
        + _pointers("y", "final_state", "states", "kept", "grad_y", "grad_final_state", "grad_x", "grad_gate_weight")
        + _pointers("grad_gate_bias", "grad_value_weight", "grad_output_weight", "grad_initial_state")
    )


class _Pair(ctypes.Structure):
    """`Pair` of csrc/interface.h, field by field."""

    _fields_ = (
        [("mixer", _Layer), ("mlp_size", ctypes.c_int64)]
        + [(name, ctypes.c_double) for name in ("mixer_epsilon", "mlp_epsilon")]
        + _pointers("mixer_norm", "mlp_norm", "gate_and_input", "mlp_output")
    )


class _Readout(ctypes.Structure):
    """`Readout` of csrc/interface.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "width", "count")]
        + [(name, ctypes.c_int32) for name in ("storage", "threads")]
        + [("epsilon", ctypes.c_double)]
        + _pointers("x", "norm", "weight", "y")
    )


class _Model(ctypes.Structure):
    """`Model` of csrc/interface.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("vocabulary", "layers")]
        + _pointers("tokens", "embedding", "stream", "pairs")
        + [("readout", _Readout)]
    )


class _Gated(ctypes.Structure):
    """`Gated` of csrc/interface.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "size")]
        + [(name, ctypes.c_int32) for name in ("storage", "threads")]
        + _pointers("x", "grad_y", "y", "grad_x")
    )


class _Library:
    """The loaded shared library and the instruction set in use."""

    def __init__(self, path: Path | None = None) -> None:
        """Args: path: of the library; the one that was installed with the package if None."""
        if path is None:
            # an editable install keeps the library apart from the sources, so look in every folder of the package
            folders = [Path(folder) for folder in sys.modules[__package__].__path__]
            found = [folder / LIBRARY for folder in folders if (folder / LIBRARY).exists()]
            if not found:
                raise OSError(
                    f"{LIBRARY} is not in {folders[0]}: it was not built when statemix was installed. Install again "
                    "with a C++17 compiler (g++ or clang) and `pip install -v` to see why."
                )
            path = found[0]
        library = ctypes.CDLL(str(path))
        if getattr(library, "statemix_interface", int)() != _INTERFACE:
            raise OSError(f"{path} is from another version of statemix. Install again.")
        library.statemix_instruction_set.restype = ctypes.c_char_p
        library.statemix_model_step.restype = ctypes.c_int64
        names: list[str] = []
        while (name := library.statemix_instruction_set(len(names))) is not None:
            names.append(name.decode())
        self.supported = {name: i for i, name in enumerate(names) if library.statemix_supported(i)}
        self.vector_bytes = {name: library.statemix_vector_bytes(i) for name, i in self.supported.items()}
        self.instruction_set = os.environ.get(INSTRUCTION_SET_VARIABLE) or list(self.supported)[-1]
        if self.instruction_set not in self.supported:
            raise OSError(
                f"{INSTRUCTION_SET_VARIABLE} must be one of {list(self.supported)} on this processor, "
                f"got {self.instruction_set!r}."
            )
        self._library = library

    def run(self, function: str, problem: ctypes.Structure) -> Any:
        """Call a C entry point for the instruction set in use."""
        return getattr(self._library, function)(self.supported[self.instruction_set], ctypes.byref(problem))


def _load() -> _Library | str:
    """The library, or why it cannot be used."""
    try:
        return _Library()
    except OSError as error:
        return str(error)


_loaded = _load()  # now, not at the first call: torch.compile could not trace that


def load_problem() -> str | None:
    """Why the compiled kernels cannot be used here, in a sentence; None if they can."""
    return _loaded if isinstance(_loaded, str) else None


def serves(device: torch.device, order: int) -> bool:
    """Whether the kernels are there and serve tensors of this device with this block size or order."""
    return device.type == "cpu" and order <= MAX_ORDER and not isinstance(_loaded, str)


def transformed() -> bool:
    """Whether torch.compile, a trace, functorch or forward-mode differentiation looks at the operations now made."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of the library that this processor has, slowest first. Empty without the library."""
    return () if isinstance(_loaded, str) else tuple(_loaded.supported)


def instruction_set() -> str:
    """The instruction set in use."""
    return _library().instruction_set


def use_instruction_set(name: str) -> None:
    """Run the kernels of this instruction set from now on, in this process.

    Raises:
        ValueError: this processor or this build does not have it.
    """
    if name not in instruction_sets():
        raise ValueError(f"use_instruction_set: `name` must be one of {list(instruction_sets())}, got {name!r}.")
    _library().instruction_set = name


class _Operator:
    """A function of tensors, with its derivative, as torch needs it in two places.

    torch.compile, torch.export and subclasses of Tensor see a custom operator. That costs a few hundred microseconds a
    call in Python, as much as a small scan, and functorch refuses it: all other calls go through an autograd.Function,
    under functorch one with a `setup_context`, which again is slower.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        derivative: Callable[..., Any],
    ) -> None:
        self.operator = torch.library.custom_op(f"statemix::{name}", function, mutates_args=(), device_types="cpu")
        self.operator.register_fake(fake)
        self.operator.register_autograd(derivative, setup_context=save)

        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = function(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        eager = {"forward": forward, "backward": derivative}
        functorch = {"forward": function, "setup_context": save, "backward": derivative, "vmap": self._each}
        self.eager, self.functorch = (
            type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
            for methods in (eager, functorch)
        )

    def __call__(self, *inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
            return self.operator(*inputs)
        transformed = torch._C._are_functorch_transforms_active()
        return (self.functorch if transformed else self.eager).apply(*inputs)  # type: ignore[attr-defined]

    def _each(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Under vmap, one call for each."""
        each = [
            self(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(results) for results in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("scan: the 'cpu' backend has no second derivative. Use backend='associative'.")


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
    initial_state = initial_state.contiguous()
    reset = reset if reset is None else reset.contiguous()
    states, final_state = _states_like(values, initial_state, kind)
    problem = _scan_problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    problem.final_state = final_state.data_ptr()
    _library().run("statemix_scan_forward", problem)
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
    initial_state, grad_states = initial_state.contiguous(), grad_states.contiguous()
    grad_final_state = grad_final_state if grad_final_state is None else grad_final_state.contiguous()
    reset = reset if reset is None else reset.contiguous()
    grads = _grads_like(raw_gates, values, initial_state)
    problem = _scan_problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    problem.grad_states = grad_states.data_ptr()
    problem.grad_final_state = None if grad_final_state is None else grad_final_state.data_ptr()
    problem.grad_raw_gates, problem.grad_values, problem.grad_initial_state = (x.data_ptr() for x in grads)
    _library().run("statemix_scan_backward", problem)
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


_scan = _Operator("scan_forward", _scan_forward, _scan_forward_fake, _save_scan, _scan_derivative)
_differentiate_scan = _Operator(
    "scan_backward", _scan_backward, _scan_backward_fake, _save_nothing, _no_second_derivative
)


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
    _library().run("statemix_layer_step", problem)
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
    _library().run("statemix_pair_step", _pair_problem(x, inputs, y, final_state))
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
        self._pairs = (_Pair * len(pairs))(*(_pair_problem(stream, inputs, stream, inputs.state) for inputs in pairs))
        self._problem = _Model(
            *(embedding.shape[0], len(pairs), None, embedding.data_ptr(), stream.data_ptr()),
            ctypes.addressof(self._pairs),
            _Readout(
                *(batch, embedding.shape[1], head.shape[0], _STORAGES[head.dtype], torch.get_num_threads(), epsilon),
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
        if (row := _library().run("statemix_model_step", problem)) >= 0:
            raise IndexError(f"step: `tokens` must be in [0, {problem.vocabulary}), got {tokens[row]}.")
        return logits


def gated(x: Tensor) -> Tensor:
    """silu(gate) * inner for x (..., 2 H), contiguous, the gates first, to (..., H); without gradients."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _library().run("statemix_gated", _gated_problem(x, y=y.data_ptr()))
    return y


def gated_backward(grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient of x of `gated` from that of its result."""
    grad_y, grad_x = grad_y.contiguous(), torch.empty_like(x)
    _library().run("statemix_gated", _gated_problem(x, grad_y=grad_y.data_ptr(), grad_x=grad_x.data_ptr()))
    return grad_x


def _gated_problem(x: Tensor, **addresses: int) -> _Gated:
    size = x.shape[-1] // 2
    return _Gated(x.numel() // (2 * size), size, _STORAGES[x.dtype], torch.get_num_threads(), x.data_ptr(), **addresses)


def _pair_problem(x: Tensor, inputs: PairInputs, y: Tensor, final_state: Tensor) -> _Pair:
    weights, state, others, epsilons, normalization, kind = inputs
    return _Pair(
        _step_problem(x, weights, state, y, final_state, normalization, kind),
        *(others[3].shape[1], *epsilons, *(weight.data_ptr() for weight in others)),
    )


def _step_problem(
    x: Tensor, weights: Weights, state: Tensor, y: Tensor, final_state: Tensor, normalization: str, kind: str
) -> _Layer:
    (batch, width), (_, order, blocks) = x.shape, state.shape
    gates, bias, values, output = weights
    # one by one: unpacking generators would take longer than the rest of a short step's preparations
    return _Layer(
        batch,
        1,
        width,
        order,
        blocks,
        _KINDS[kind],
        _NORMALIZATIONS[normalization],
        _STORAGES[x.dtype],
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
    _library().run("statemix_layer_forward", problem)
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
    _library().run("statemix_layer_backward", problem)
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


_layer = _Operator("layer_forward", _layer_forward, _layer_forward_fake, _save_layer, _layer_derivative)
_differentiate_layer = _Operator(
    "layer_backward", _layer_backward, _layer_backward_fake, _save_nothing, _no_second_derivative
)


def _layer_shapes(x: Tensor, state: Tensor, kind: str) -> tuple[torch.Size, torch.Size]:
    """Shapes of the states and of the kept raw gates and values: `Shape` of csrc/layer.h.

    Blocks lie in vectors of the instruction set in use, the last axis; the third last is how many hold all of them.
    """
    batch, length, order, blocks = x.shape[0], x.shape[1], state.shape[1], state.shape[2]
    lanes = _library().vector_bytes[instruction_set()] // x.element_size()
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


def _layer_problem(inputs: list[Tensor | None], state: Tensor, normalization: str, kind: str) -> _Layer:
    x = inputs[0]
    assert x is not None
    return _Layer(
        *(*x.shape, state.shape[1], state.shape[2]),
        *(_KINDS[kind], _NORMALIZATIONS[normalization], _STORAGES[x.dtype], torch.get_num_threads()),
        *(_address(t) for t in inputs),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def _library() -> _Library:
    if isinstance(_loaded, str):
        raise RuntimeError(f"scan: backend 'cpu' cannot be used: {_loaded}")
    return _loaded


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
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _scan_problem(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
) -> _Scan:
    return _Scan(
        *(values.shape[0], values.shape[1], initial_state.shape[1], values.shape[-1]),
        *(*raw_gates.stride()[:2], *values.stride()[:2]),
        *(_KINDS[kind], _NORMALIZATIONS[normalization], _STORAGES[values.dtype], torch.get_num_threads()),
        *(raw_gates.data_ptr(), values.data_ptr(), initial_state.data_ptr()),
        *(None if reset is None else reset.data_ptr(), states.data_ptr()),
    )
