"""Which kernels run a scan, and with which numbers: a few rules, from what an H100 and an H200 showed (docs/gpu.md).

Every family has four programs: Forward; Backward; and for scans in chunks of time Map, what a chunk makes of any state
that enters it, and Adjoint, what its own steps hand back to that state. `Relay` takes the state from chunk to chunk.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from statemix.gates import NORMALIZATIONS
from statemix.scan.gpu import compile
from statemix.scan.gpu.compile import Kernel, Size

MAX_ORDER = 16
FULL = 2  # warps for each scheduler, below which time is cut into chunks
MANY = 4  # warps for each scheduler, from which on no single one has to be fast
PROGRAMS = ("Forward", "Backward", "Map", "Adjoint")
SCHEDULERS = 4  # of a multiprocessor
WARP, HALF_WARP = 32, 16  # lanes


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


class Load(NamedTuple):
    """How the blocks of a scan fill a card. many: no single warp has to be fast; team: lanes of a team of `slabs`."""

    many: bool = False
    team: int = WARP


LOADS = tuple(Load(many, team) for many in (False, True) for team in (WARP, HALF_WARP))


def filled_order(order: int) -> int:
    """The order filled up to a power of two, as the kernels want it."""
    return 1 << (order - 1).bit_length()


def kernel(signature: Signature, program: str, load: Load) -> Kernel:
    """A program for a signature, "Forward" for example, and the numbers that suit it."""
    numbers: tuple[int | str, ...]
    if signature.kind != "block":
        family, numbers = "lags", lags_numbers(signature, program)
    elif signature.order <= 4:
        family, numbers = "slabs", slabs_numbers(signature, program, load.team)
    else:
        family, numbers = "rows", rows_numbers(signature, program, load.many)
    return Kernel(
        family=family,
        program=family.title() + program,
        dtype=signature.dtype,
        order=signature.order,
        normalization=signature.normalization,
        has_reset=signature.has_reset,
        numbers=numbers,
    )


def slabs_numbers(signature: Signature, program: str, team: int) -> tuple[int, ...]:
    """Lanes of a team, blocks of a lane, warps, steps of a team in a slab, slabs on their way, and blocks left over."""
    half, back = signature.dtype != torch.float32, program in ("Backward", "Adjoint")
    lane_blocks, warps, steps = 1, 4, 4
    if signature.order == 1:
        lane_blocks, warps, steps = 2, 8, 8 if half else 4
    elif signature.order == 2:
        warps, steps = (16, 4) if half and back else (8, 8)
    elif half and team == WARP:
        warps, steps = 8, 2
    elif half:
        warps, steps = (8, 4) if back else (4, 2)
    if program == "Backward" and signature.normalization != "softmax":
        steps //= 2  # its rows are weighed twice
    return team, lane_blocks, warps, steps, 2, signature.blocks % lane_blocks


def rows_numbers(signature: Signature, program: str, many: bool) -> tuple[int, ...]:
    """Steps of a group, groups on their way, and warps: as many steps as a lane has registers for."""
    if program != "Backward":
        return 4, 4, 1
    half = signature.dtype != torch.float32
    warps = 2 if many and half else 1
    if signature.normalization in ("sigmoid", "tanh", "silu"):  # these keep slopes beside the weights
        return 2, 8, warps
    if half and not many and signature.normalization == "softmax" and not signature.has_reset:
        return 8, 2, 1
    return 4, 4, warps


def lags_numbers(signature: Signature, program: str) -> tuple[int | str, ...]:
    """The kind, steps of a group, and groups on their way: those of 16 KB of gates, which few warps need to keep up."""
    observer, back = signature.kind == "observer", program in ("Backward", "Adjoint")
    of_step = filled_order(signature.order) * signature.dtype.itemsize * (2 if observer and back else 1)
    steps = 8 if observer or back else 4  # twice the warps, where these wait for each other's steps anyway
    return signature.kind.title(), steps, max(4, min(16, 512 // of_step))


def fitting(kernel: Kernel, device: torch.device) -> Kernel:
    """The kernel, or one with shorter slabs for a card that has less shared memory."""
    return shortened(kernel, lambda kernel: compile.size_of(kernel, device), compile.shared_limit(device))


def shortened(kernel: Kernel, size_of: Callable[[Kernel], Size], limit: int) -> Kernel:
    """The kernel with slabs so short that its programs share at most `limit` bytes."""
    while kernel.family == "slabs" and size_of(kernel).shared_bytes > limit:
        team, lane_blocks, warps, steps, *others = kernel.numbers
        kernel = kernel._replace(numbers=(team, lane_blocks, warps, int(steps) // 2, *others))
    return kernel


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


def team(programs: Callable[[int], int], device: torch.device) -> int:
    """Lanes of a team: half a warp where multiprocessors would be idle for long. programs: how many, of so many lanes.

    A multiprocessor takes as long for one program of whole warps as for two of half ones, which hand on more maps.
    """
    multiprocessors = max(1, schedulers(device) // SCHEDULERS)
    turns = {lanes: lanes * -(-programs(lanes) // multiprocessors) for lanes in (WARP, HALF_WARP)}
    return HALF_WARP if turns[HALF_WARP] <= 0.8 * turns[WARP] else WARP


@functools.cache
def schedulers(device: torch.device) -> int:
    """How many warps of a card can issue at once. An emulated one is as small as can be."""
    if compile.EMULATED:
        return 1
    return SCHEDULERS * torch.cuda.get_device_properties(device).multi_processor_count


def chunk_size(signature: Signature, warps: int, device: torch.device) -> int:
    """Steps of a chunk, or all of them where chunks would not help. warps: of the scan without chunks.

    With a map that costs as much as `maps` scans, it takes more chunks than 1 + maps to be faster.
    """
    maps = 1 if signature.kind == "block" and signature.order <= 4 else (signature.order + 1) / 4
    chunks = min(FULL * schedulers(device) // warps, signature.length // 256)
    if chunks < 1.5 * (1 + maps):
        return signature.length
    return -(-signature.length // (16 * chunks)) * 16


def kernels(kind: str, order: int) -> list[Kernel]:
    """Every kernel that some scan of a kind and order may run."""
    found: dict[Kernel, None] = {}
    for dtype, normalization, has_reset in itertools.product(compile.STORAGES, NORMALIZATIONS, (False, True)):
        for blocks, load, program in itertools.product((1, 2), LOADS, PROGRAMS):
            signature = Signature(kind, dtype, order, normalization, has_reset, 1, 1, blocks)
            found[kernel(signature, program, load)] = None
        found.update(dict.fromkeys(relay(signature, backward) for backward in (False, True)))
    return list(found)
