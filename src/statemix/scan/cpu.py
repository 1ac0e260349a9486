"""The fused C++ kernels of csrc/ as torch custom operators: float32 and float64, forward and first derivative.

The kernels are one shared library with a C interface, so they depend on no version of torch or Python. Which
instruction set runs is chosen when the library is loaded: the best this processor has, or the one named in the
environment variable STATEMIX_INSTRUCTION_SET.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_ORDER = 64  # kMaxOrder in csrc/scan.h
LIBRARY = "statemix_cpu.so"
INSTRUCTION_SET_VARIABLE = "STATEMIX_INSTRUCTION_SET"

_KINDS = {"block": 0, "companion": 1, "observer": 2}
_NORMALIZATIONS = {"softmax": 0, "sigmoid": 1, "relu": 2, "tanh": 3, "silu": 4, "linear": 5, "none": 6}


class _Problem(ctypes.Structure):
    """`Problem` of csrc/scan.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "order", "blocks")]
        + [(f"{name}_{axis}_stride", ctypes.c_int64) for name in ("gate", "value") for axis in ("batch", "time")]
        + [(name, ctypes.c_int32) for name in ("kind", "normalization", "is_double", "threads")]
        + [(name, ctypes.c_void_p) for name in ("raw_gates", "values", "initial_state", "reset", "states")]
        + [(f"grad_{name}", ctypes.c_void_p) for name in ("states", "raw_gates", "values", "initial_state")]
    )


class _Library:
    """The loaded shared library and the instruction set in use."""

    def __init__(self) -> None:
        # an editable install keeps the library apart from the sources, so look in every folder of the package
        folders = [Path(folder) for folder in sys.modules[__package__].__path__]
        found = [folder / LIBRARY for folder in folders if (folder / LIBRARY).exists()]
        if not found:
            raise OSError(
                f"{LIBRARY} is not in {folders[0]}: it was not built when statemix was installed. Install again with a "
                "C++17 compiler (g++ or clang) and `pip install -v` to see why."
            )
        library = ctypes.CDLL(str(found[0]))
        if getattr(library, "statemix_max_order", int)() != MAX_ORDER:
            raise OSError(f"{found[0]} is from another version of statemix. Install again.")
        library.statemix_instruction_set.restype = ctypes.c_char_p
        names: list[str] = []
        while (name := library.statemix_instruction_set(len(names))) is not None:
            names.append(name.decode())
        self.supported = {name: i for i, name in enumerate(names) if library.statemix_supported(i)}
        self.instruction_set = os.environ.get(INSTRUCTION_SET_VARIABLE) or list(self.supported)[-1]
        if self.instruction_set not in self.supported:
            raise OSError(
                f"{INSTRUCTION_SET_VARIABLE} must be one of {list(self.supported)} on this processor, "
                f"got {self.instruction_set!r}."
            )
        self.forward, self.backward = library.statemix_forward, library.statemix_backward

    def run(self, function: Callable[..., None], problem: _Problem) -> None:
        function(self.supported[self.instruction_set], ctypes.byref(problem))


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


def block_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h_t = A_t h_{t-1} + a0_t * v_t. Shapes: `statemix.scan.block_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "block")


def companion_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t. Shapes: `statemix.scan.companion_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "companion")


def observer_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h'[0] = a_1 h[0] + h[1] + a_0 v, h'[i] = a_{i+1} h[0] + h[i+1]. Shapes: `statemix.scan.observer_scan`."""
    return _scan(raw_gates, values, initial_state, reset, normalization, "observer")


@torch.library.custom_op("statemix::scan_forward", mutates_args=(), device_types="cpu")
def _scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str, kind: str
) -> Tensor:
    raw_gates, values = _strided(raw_gates), _strided(values)
    initial_state = initial_state.contiguous()
    reset = reset if reset is None else reset.contiguous()
    states = _empty_states(values, initial_state, kind)
    problem = _problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    _library().run(_library().forward, problem)
    return states


@_scan.register_fake
def _(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str, kind: str
) -> Tensor:
    return _empty_states(values, initial_state, kind)


@torch.library.custom_op("statemix::scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    grad_states: Tensor,
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
    reset = reset if reset is None else reset.contiguous()
    grads = _grads_like(raw_gates, values, initial_state)
    problem = _problem(raw_gates, values, initial_state, reset, states, normalization, kind)
    problem.grad_states = grad_states.data_ptr()
    problem.grad_raw_gates, problem.grad_values, problem.grad_initial_state = (x.data_ptr() for x in grads)
    _library().run(_library().backward, problem)
    return grads


@_scan_backward.register_fake
def _(
    grad_states: Tensor, raw_gates: Tensor, values: Tensor, initial_state: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads_like(raw_gates, values, initial_state)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    raw_gates, values, initial_state, reset, ctx.normalization, ctx.kind = inputs
    ctx.save_for_backward(raw_gates, values, initial_state, reset, output)


def _first_derivative(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    raw_gates, values, initial_state, reset, states = ctx.saved_tensors
    grads = _scan_backward(grad_states, raw_gates, values, initial_state, reset, states, ctx.normalization, ctx.kind)
    return *grads, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("scan: the 'cpu' backend has no second derivative. Use backend='associative'.")


_scan.register_autograd(_first_derivative, setup_context=_save_for_backward)
_scan_backward.register_autograd(_no_second_derivative)


def _library() -> _Library:
    if isinstance(_loaded, str):
        raise RuntimeError(f"scan: backend 'cpu' cannot be used: {_loaded}")
    return _loaded


def _empty_states(values: Tensor, initial_state: Tensor, kind: str) -> Tensor:
    """What the scan returns, contiguous: the kept state of every step."""
    batch, length, blocks = values.shape[0], values.shape[1], values.shape[-1]
    order = initial_state.shape[1]
    shape = (batch, length, blocks) if kind == "companion" else (batch, length, order, blocks)
    return values.new_empty(shape)


def _grads_like(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the three gradients, contiguous also where an input was expanded."""
    return tuple(x.new_empty(x.shape) for x in (raw_gates, values, initial_state))  # type: ignore[return-value]


def _strided(x: Tensor) -> Tensor:
    """`x` itself if everything below a time step is contiguous (the kernel takes batch and time strides), or a copy."""
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _problem(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    states: Tensor,
    normalization: str,
    kind: str,
) -> _Problem:
    return _Problem(
        *(values.shape[0], values.shape[1], initial_state.shape[1], values.shape[-1]),
        *(*raw_gates.stride()[:2], *values.stride()[:2]),
        *(_KINDS[kind], _NORMALIZATIONS[normalization], values.dtype == torch.float64, torch.get_num_threads()),
        *(raw_gates.data_ptr(), values.data_ptr(), initial_state.data_ptr()),
        *(None if reset is None else reset.data_ptr(), states.data_ptr()),
    )
