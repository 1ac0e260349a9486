"""Which kernels run a scan, and with which numbers: a few rules, from measurements on an H200 (docs/gpu.md).

Every family has four programs: Forward; Backward; and for scans in chunks of time Map, what a chunk makes of any state that
enters it, and Adjoint, what its own steps hand back to that state. `Relay` takes the state from chunk to chunk.
"""

import functools
from typing import NamedTuple

import torch

from statemix.scan.gpu import compile
from statemix.scan.gpu.compile import Kernel

MAX_ORDER = 16
FULL = 2  # warps for each scheduler, below which time is cut into chunks
SCHEDULERS = 4  # of a processor of a card


class Signature(NamedTuple):
    """What decides how a scan runs."""

    kind: str
    dtype: torch.dtype
    order: int
    normalization: str
    has_reset: bool
    batch: int
    length: int
    blocks: int


def filled_order(order: int) -> int:
    """The order filled up to a power of two, as the kernels want it."""
    return 1 << (order - 1).bit_length()


def numbers(kind: str, program: str, dtype: torch.dtype, order: int, normalization: str) -> tuple[str, tuple[int | str, ...]]:
    """The family of the kernels that serve a scan, and the numbers of one of its programs.

    Returns:
        "slabs" with blocks of a lane, warps of a program, steps of a warp, slabs on their way; "rows" with steps of a
        group, groups on their way, warps; "lags" with the kind, lanes of a row, tiles on their way.
    """
    half = dtype != torch.float32
    if kind != "block":
        return "lags", (kind.title(), 2 if order <= 8 else 4, 3)
    if order > 4:
        return "rows", (4, 4, 1)
    if order == 1:
        return "slabs", (2 if half else 1, 4, 8, 2)
    return "slabs", (1, 4, 4, 2)


def kernel(signature: Signature, program: str) -> Kernel:
    """A program for a signature, "Forward" for example, with its numbers."""
    family, chosen = numbers(signature.kind, program, signature.dtype, signature.order, signature.normalization)
    return Kernel(
        family=family,
        program=family.title() + program,
        dtype=signature.dtype,
        order=signature.order,
        normalization=signature.normalization,
        has_reset=signature.has_reset,
        numbers=chosen,
    )


def relay(signature: Signature, backward: bool) -> Kernel:
    """The relay for a problem: the same for all kinds, dtypes and normalisations."""
    return Kernel(
        family="relay",
        program="Relay",
        dtype=torch.float32,
        order=signature.order,
        normalization="none",
        has_reset=signature.has_reset,
        numbers=(int(backward),),
    )


@functools.cache
def schedulers(device: torch.device) -> int:
    """How many warps of a card can issue at once. An emulated one is as small as can be."""
    if compile.EMULATED:
        return 1
    return SCHEDULERS * torch.cuda.get_device_properties(device).multi_processor_count


def chunk_size(signature: Signature, warps: int, device: torch.device) -> int:
    """Steps of a chunk, or all of them where chunks would not help. warps: of the scan without chunks.

    A map costs about as much as `columns` scans, so the chunks must be more than that to be faster.
    """
    columns = 1 + (signature.order + 1) / (1 if signature.order <= 4 and signature.kind == "block" else 4)
    chunks = min(FULL * schedulers(device) // warps, signature.length // 256)
    if chunks < 2 * columns:
        return signature.length
    return -(-signature.length // (16 * chunks)) * 16
