"""The shared library of csrc/: its structs field by field, and which instruction set runs.

It has a C interface, so it depends on no version of torch or Python. The instruction set is chosen when the library is
loaded: the best this processor has, or the one named in the environment variable STATEMIX_INSTRUCTION_SET.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

from statemix import gates

MAX_ORDER = 64  # kMaxOrder in csrc/interface.h
LIBRARY = "statemix_cpu.so"
INSTRUCTION_SET_VARIABLE = "STATEMIX_INSTRUCTION_SET"

INTERFACE = 11  # kInterface in csrc/interface.h
KINDS = {"block": 0, "companion": 1, "observer": 2}
NORMALIZATIONS = {name: record.code for name, record in gates.NORMALIZATIONS.items()}
FUNCTIONS = (
    "statemix_scan_forward",
    "statemix_scan_backward",
    "statemix_layer_forward",
    "statemix_layer_backward",
    "statemix_layer_step",
    "statemix_pair_step",
    "statemix_model_step",
    "statemix_gated",
)
STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class ScanCall(ctypes.Structure):
    """What a scan is called with. The fields are those of `ScanCall` in csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "order", "blocks")]
        + [(f"{name}_{axis}_stride", ctypes.c_int64) for name in ("gate", "value") for axis in ("batch", "time")]
        + [(name, ctypes.c_int32) for name in ("kind", "normalization", "storage", "threads")]
        + _pointers("raw_gates", "values", "initial_state", "reset", "states", "final_state")
        + _pointers("grad_states", "grad_final_state", "grad_raw_gates", "grad_values", "grad_initial_state")
    )


class LayerCall(ctypes.Structure):
    """What a layer is called with. The fields are those of `LayerCall` in csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "width", "order", "blocks", "table_rows")]
        + [(name, ctypes.c_int32) for name in ("kind", "normalization", "storage", "threads")]
        + _pointers(
            "x", "gate_weight", "gate_bias", "value_weight", "output_weight", "initial_state", "reset", "places"
        )
        + _pointers("visibility", "y", "final_state", "states", "kept", "grad_y", "grad_final_state")
        + _pointers("grad_x", "grad_gate_weight", "grad_gate_bias", "grad_value_weight", "grad_output_weight")
        + _pointers("grad_initial_state")
    )


class PairCall(ctypes.Structure):
    """What a step of a residual pair is called with. The fields are those of `PairCall` in csrc/interface.h."""

    _fields_ = (
        [("mixer", LayerCall), ("mlp_size", ctypes.c_int64)]
        + [(name, ctypes.c_double) for name in ("mixer_epsilon", "mlp_epsilon")]
        + _pointers("mixer_norm", "mlp_norm", "gate_and_input", "mlp_output")
    )


class ReadoutCall(ctypes.Structure):
    """What the logits of a model are made from. The fields are those of `ReadoutCall` in csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "width", "count")]
        + [(name, ctypes.c_int32) for name in ("storage", "threads")]
        + [("epsilon", ctypes.c_double)]
        + _pointers("x", "norm", "weight", "y")
    )


class ModelCall(ctypes.Structure):
    """What a step of a model is called with. The fields are those of `ModelCall` in csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("vocabulary", "layers")]
        + _pointers("tokens", "embedding", "stream", "pairs")
        + [("readout", ReadoutCall)]
    )


class GatedCall(ctypes.Structure):
    """What the product of a SwiGLU is called with. The fields are those of `GatedCall` in csrc/interface.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "size")]
        + [(name, ctypes.c_int32) for name in ("storage", "threads")]
        + _pointers("x", "grad_y", "y", "grad_x")
    )


class Place(ctypes.Structure):
    """Where a tensor lies and how. The fields are those of `Place` in csrc/interface.h, and of DLPack's DLTensor."""

    _fields_ = (
        _pointers("data")
        + [(name, ctypes.c_int32) for name in ("device_type", "device", "ndim")]
        + [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]
        + _pointers("sizes", "strides")
        + [("offset", ctypes.c_uint64)]
    )


class Look(ctypes.Structure):
    """One object and what it was. The fields are those of `Look` in csrc/interface.h."""

    _fields_ = [("sight", ctypes.c_int64), *_pointers("object", "name", "wanted")]


class SnapshotCall(ctypes.Structure):
    """What looks are made with. The fields are those of `SnapshotCall` in csrc/interface.h."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *_pointers(
            "looks", "size", "next", "item", "class_of", "result", "attribute", "release", "forget_error", "place"
        ),
    ]


class Library:
    """The loaded shared library and the instruction set in use."""

    def __init__(self, path: Path | None = None) -> None:
        """Load the library at `path`, or the one that was installed with the package if None.

        Raises:
            OSError: there is no such library, it is of another version, or it lacks the instruction set that is named.
        """
        if path is None:
            # an editable install keeps the library apart from the sources, so look in every folder of the package
            folders = [Path(folder) for folder in sys.modules["statemix.kernels"].__path__]
            found = [folder / LIBRARY for folder in folders if (folder / LIBRARY).exists()]
            if not found:
                raise OSError(
                    f"{LIBRARY} is not in {folders[0]}: it was not built when statemix was installed. Install again "
                    "with a C++17 compiler (g++ or clang) and `pip install -v` to see why."
                )
            path = found[0]
        library = ctypes.CDLL(str(path))
        if getattr(library, "statemix_interface", int)() != INTERFACE:
            raise OSError(f"{path} is from another version of statemix. Install again.")
        library.statemix_instruction_set.restype = ctypes.c_char_p
        for function in FUNCTIONS:
            getattr(library, function).restype = ctypes.c_int64
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
        self.as_it_was = ctypes.PyDLL(str(path)).statemix_as_it_was  # with Python's lock: it looks at objects of Python

    def run(self, function: str, problem: ctypes.Structure, instruction_set: str | None = None) -> int:
        """Call a C entry point.

        Args:
            function: one of `FUNCTIONS`.
            problem: the struct that it takes.
            instruction_set: whose kernel runs. None: the one in use, which another thread may change at any moment. So
                a call that also makes room by it reads it once and names it here.

        Returns:
            0, or what the entry point says was wrong with the problem: csrc/dispatch.cpp.

        Raises:
            MemoryError: there is too little memory for what the kernel needs besides its results. Nothing was done.
        """
        index = self.supported[self.instruction_set if instruction_set is None else instruction_set]
        status: int = getattr(self._library, function)(index, ctypes.byref(problem))
        if status < 0:
            raise MemoryError(
                f"{function}: the kernel needs {-status:,} bytes besides its results, and found no memory."
            )
        return status

    def instruction_set_of(self, vector_bytes: int) -> str:
        """The instruction set whose vectors are of this size, in which what a layer keeps is laid out."""
        return next(name for name, size in self.vector_bytes.items() if size == vector_bytes)


def _load() -> Library | str:
    """The library, or why it cannot be used."""
    try:
        return Library()
    except OSError as error:
        return str(error)


_loaded = _load()  # now, not at the first call: torch.compile could not trace that


def load_problem() -> str | None:
    """Why the compiled kernels cannot be used here, in a sentence; None if they can."""
    return _loaded if isinstance(_loaded, str) else None


def serves(device: torch.device, order: int) -> bool:
    """Whether the kernels are there and serve tensors of this device with this block size or order."""
    return device.type == "cpu" and order <= MAX_ORDER and not isinstance(_loaded, str)


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of the library that this processor has, slowest first. Empty without the library."""
    return () if isinstance(_loaded, str) else tuple(_loaded.supported)


def instruction_set() -> str:
    """The instruction set in use."""
    return library().instruction_set


def use_instruction_set(name: str) -> None:
    """Run the kernels of this instruction set from now on, in this process.

    Raises:
        ValueError: this processor or this build does not have it.
    """
    if name not in instruction_sets():
        raise ValueError(f"use_instruction_set: `name` must be one of {list(instruction_sets())}, got {name!r}.")
    library().instruction_set = name


def library() -> Library:
    """The loaded library. Raises RuntimeError where there is none."""
    if isinstance(_loaded, str):
        raise RuntimeError(f"scan: backend 'cpu' cannot be used: {_loaded}")
    return _loaded
