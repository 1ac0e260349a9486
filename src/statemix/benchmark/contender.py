"""What is compared: contenders, each of which makes the work that is timed from a shape."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SMALL_BATCH, SMALL_LENGTH = 2, 67  # at most, where a contender is held to the reference
FORWARD, BACKWARD, BOTH = PARTS = ("forward", "backward", "forward + backward")
NOT_INSTALLED = "not installed (pip install statemix[bench])"

Results = Sequence[Tensor]


class UnavailableError(Exception):
    """A contender cannot be had here; the message is the reason that its row of the table shows."""


@dataclass(frozen=True)
class Shape:
    """What is measured: order M, blocks N, batch B, length T, d_model D; which scan, and which part of it."""

    order: int
    blocks: int
    batch: int = 1
    length: int = 1
    d_model: int = 1
    dtype: str = "float32"
    kind: str = "block"
    part: str = BOTH

    @property
    def size(self) -> str:
        """The size as it is written: MxN."""
        return f"{self.order}x{self.blocks}"

    def small(self) -> "Shape":
        """The version that the reference can run."""
        return replace(self, batch=min(self.batch, SMALL_BATCH), length=min(self.length, SMALL_LENGTH))


@dataclass(frozen=True)
class Work:
    """What is timed: `call` does the work once and returns its results, for as many units as `per`.

    before: called ahead of every call, not timed. note: for the table.
    """

    call: Callable[[], Any]
    per: int = 1
    before: Callable[[], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """A row of a table. `make(shape)` prepares the work or raises UnavailableError.

    reference: makes the float64 work that has the results which this one must agree with. None: no such thing.
    """

    name: str
    make: Callable[[Shape], Work]
    reference: Callable[[Shape], Work] | None = None


def inputs(shape: Shape, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Leaves of standard normal numbers, the same for every contender: drawn in float32 whatever the dtype."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if shape.dtype == "float64" else torch.float32
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def imported(module: str, name: str) -> Any:
    """A name from a module of an optional peer. Raises UnavailableError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(import_module(module), name)
    except ImportError:
        raise UnavailableError(NOT_INSTALLED) from None
