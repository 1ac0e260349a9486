"""What a GPU scan costs by a model of the card, and the configuration that the model finds fastest.

Every kernel of a configuration is as slow as the slowest of four things:

    memory    the bytes that it moves, over the bandwidth of the card
    issue     its instructions, and its exponentials and reciprocals, over what the schedulers take in a cycle
    latency   the steps of one program, one after the other, in the cycles that a warp needs which runs alone
    launch    the time that a kernel takes whatever it does

and a scan takes the sum over its kernels. What a kernel needs is read from its compiled code and kept in gpu_costs.csv
(`python tests/gpu_resources.py --write`); tests/test_gpu_compile.py holds the two together. Nothing in it was
measured on a GPU: `statemix bench gpu` prints measured beside predicted where there is one.
"""

import csv
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

MAX_ORDER = 16  # M that the kernels serve
BOUNDS = ("memory", "issue", "latency")  # what may bind a kernel besides its launch
LAUNCH = 3e-6  # seconds; an assumption: the order of what is usual for small kernels
SCHEDULERS = 4  # of a multiprocessor: each issues an instruction a cycle
SPECIAL = 8  # cycles of a scheduler for an exponential or reciprocal of a warp: 16 a cycle and multiprocessor
SECTOR = 32  # bytes: memory moves no less
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor of compute capability 8.0, 9.0 and 10.0
# Source of these: CUDA programming guide: throughput of arithmetic instructions, technical specifications, memory.


@dataclass(frozen=True)
class Configuration:
    """How the kernels of one scan are launched.

    Args:
        block_n: blocks (or channels) that one program carries side by side, a power of two.
        num_warps: warps of 32 threads that share them.
        num_stages: loads in flight: 1 issues those of a step when it begins, s > 1 issues them s - 1 steps before.
        chunk_size: steps per program; 0 gives one program the whole of time.
        tile: steps that the lanes of a program take side by side; 0: a lane takes one after the other.
    """

    block_n: int
    num_warps: int
    num_stages: int
    chunk_size: int = 0
    tile: int = 0


CHUNK_SIZES = (64, 256, 1024)  # one code serves all of them
CONFIGURATIONS = (
    *(Configuration(32, 1, num_stages) for num_stages in (2, 4, 7)),
    *(Configuration(16, 1, num_stages) for num_stages in (2, 3, 6)),
    *(Configuration(8, 1, num_stages) for num_stages in (2, 3, 5)),
    *(Configuration(16, 8, 3, tile=tile) for tile in (64, 128)),
    *(Configuration(32, 8, 3, tile=tile) for tile in (32, 128)),
    *(Configuration(32, 1, 7, chunk_size) for chunk_size in CHUNK_SIZES),
    *(Configuration(16, 1, num_stages, chunk_size) for num_stages in (2, 3, 6) for chunk_size in CHUNK_SIZES),
    *(Configuration(8, 1, num_stages, chunk_size) for num_stages in (3, 5) for chunk_size in CHUNK_SIZES),
)


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        name: of the card.
        target: what Triton compiles for.
        multiprocessors: how many.
        bandwidth: of its memory, bytes a second.
        clock: cycles a second.
        shared: bytes of shared memory of a multiprocessor.
        issue: cycles of a scheduler for one instruction of a warp.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    clock: float
    shared: int
    issue: int = 1


# Data sheets: NVIDIA A100 80GB SXM, NVIDIA H100 SXM, NVIDIA HGX B200, AMD Instinct MI300X. The clock is the one that
# their peak of float32 needs (19.5, 67, 75 and 163 TFLOP/s); a card under load may run below it. A wave of MI300X has
# 64 lanes on units of 16: CDNA 3 instruction set, section 1.
CARDS = {
    card.name: card
    for card in (
        Card("A100", "cuda:80", 108, 2.039e12, 1.41e9, 164 << 10),
        Card("H100", "cuda:90", 132, 3.35e12, 1.98e9, 228 << 10),
        Card("B200", "cuda:100", 148, 8.0e12, 1.97e9, 228 << 10),
        Card("MI300X", "hip:gfx942", 304, 5.3e12, 2.1e9, 64 << 10, issue=4),
    )
}


@dataclass(frozen=True)
class Scan:
    """What is computed: one direction, "forward" or "backward", of one kind of scan.

    Args:
        kind: "block", "companion" or "observer".
        direction: "forward" or "backward".
        order: M.
        dtype: "float32" or "bfloat16", of everything but the state that is carried.
        batch, length, blocks: B, T, N.
    """

    kind: str
    direction: str
    order: int
    dtype: str
    batch: int
    length: int
    blocks: int

    @property
    def least_bytes(self) -> int:
        """Bytes per step and block (channel) if everything is read once and written once.

        Forward: raw gates and values are read, states written. Backward: these three and the gradient of the states
        are read, the gradients of raw gates and values written.
        """
        rows = self.order if self.kind == "block" else 1
        gates, values, states = rows * (self.order + 1), rows, 1 if self.kind == "companion" else self.order
        numbers = gates + values + states
        return (numbers if self.direction == "forward" else 2 * numbers) * (4 if self.dtype == "float32" else 2)

    @property
    def least_chunk_size(self) -> int:
        """Steps of a chunk from which on a scan in chunks moves at most twice the least bytes: docs/gpu.md.

        The inputs that are read twice leave that much room: M numbers a step (companion: 1), in a backward more. It
        takes in what is written and read of a chunk, in float32: its map, M (M+1) numbers, and its carry, M.
        """
        room = (1 if self.kind == "companion" else self.order) * (4 if self.dtype == "float32" else 2)
        return math.ceil(4 * 2 * (self.order * (self.order + 1) + self.order) / room)

    def floor(self, card: Card) -> float:
        """Seconds for the least bytes."""
        return self.least_bytes * self.batch * self.length * self.blocks / card.bandwidth


@dataclass(frozen=True)
class Cost:
    """What a kernel of a configuration needs, read from its code for sm_90: a row of gpu_costs.csv.

    Args:
        kernel: its name.
        per: "step", or "chunk" for a kernel whose loop is over chunks.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        bytes: read from and written to memory, for one block in an iteration of the loop, which is one step or chunk.
        instructions, special: of a warp in an iteration; `special` of them are exponentials, reciprocals and the like.
        cycles: of an iteration in a warp that runs alone.
    """

    kernel: str
    per: str
    registers: int
    shared: int
    bytes: float
    instructions: float
    special: float
    cycles: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a scan, and of each of the things that may bind a kernel, summed over its kernels."""

    seconds: float
    memory: float
    issue: float
    latency: float
    occupancy: float  # of the kernel with the least: the part of a multiprocessor's warps that can be resident

    @property
    def bound(self) -> str:
        """What binds most."""
        return max(BOUNDS, key=lambda name: getattr(self, name))


Key = tuple[str, str, str, int]  # kind, direction, dtype and order


@functools.cache
def costs() -> Mapping[Key, Mapping[Configuration, tuple[Cost, ...]]]:
    """The kernels of every configuration whose code was read."""
    found: dict[Key, dict[Configuration, tuple[Cost, ...]]] = {}
    with Path(__file__).with_name("gpu_costs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = [int(row[field.name]) for field in fields(Configuration)]
            per_thread = int(row["registers"]), int(row["shared"])
            per_iteration = (float(row[name]) for name in ("bytes", "instructions", "special", "cycles"))
            cost = Cost(row["kernel"], row["per"], *per_thread, *per_iteration)
            configuration = Configuration(*numbers)
            of_scan = found.setdefault((row["kind"], row["direction"], row["dtype"], int(row["order"])), {})
            for chunk_size in CHUNK_SIZES if configuration.chunk_size else (0,):  # the table has the first of them
                known = replace(configuration, chunk_size=chunk_size)
                of_scan[known] = (*of_scan.get(known, ()), cost)
    return found


def known_costs(scan: Scan, configuration: Configuration) -> tuple[Cost, ...]:
    """Of the least order whose code was read and that is not below the scan's. Empty: not in this configuration."""
    known = costs()
    keys = ((scan.kind, scan.direction, scan.dtype, order) for order in range(scan.order, MAX_ORDER + 1))
    return next((known[key] for key in keys if key in known), {}).get(configuration, ())


def resident(card: Card, registers: int, shared: int, num_warps: int) -> int:
    """Programs that a multiprocessor runs at a time."""
    warp = math.ceil(registers / 8) * 8 * 32  # registers are given to a warp by 256, and to a quarter of the warps each
    by_registers = REGISTERS // SCHEDULERS // warp * SCHEDULERS // num_warps
    by_shared = card.shared // (shared + 1024)  # 1 KiB of every program is the system's
    return min(PROGRAMS, WARPS // num_warps, by_registers, by_shared)


def fits(scan: Scan, configuration: Configuration, card: Card) -> bool:
    """Whether the code of its kernels was read, and a multiprocessor of the card holds a program of each.

    And chunks, if there are any, are more than one, and none below `Scan.least_chunk_size`.
    """
    if configuration.chunk_size and not scan.least_chunk_size <= configuration.chunk_size < scan.length:
        return False
    kernels = known_costs(scan, configuration)
    return bool(kernels) and all(resident(card, it.registers, it.shared, configuration.num_warps) for it in kernels)


def predict(scan: Scan, configuration: Configuration, card: Card) -> Prediction:
    """Seconds of a scan on a card.

    Args:
        scan: what is computed.
        configuration: one that `fits`.
        card: one of `CARDS`, or from `card_of`.
    """
    chunks = math.ceil(scan.length / configuration.chunk_size) if configuration.chunk_size else 1
    tiles = scan.batch * math.ceil(scan.blocks / configuration.block_n)
    unused = max(1.0, SECTOR / (configuration.block_n * (4 if scan.dtype == "float32" else 2)))
    seconds = memory = issue = latency = 0.0
    occupancy = 1.0
    for cost in known_costs(scan, configuration):
        whole = chunks if cost.per == "chunk" else scan.length  # iterations over the whole of time
        programs, iterations = tiles, whole
        if configuration.chunk_size and cost.per == "step":
            programs, iterations = tiles * chunks, configuration.chunk_size
        at_once = resident(card, cost.registers, cost.shared, configuration.num_warps)
        occupancy = min(occupancy, at_once * configuration.num_warps / WARPS)
        waves = math.ceil(programs / (card.multiprocessors * at_once))
        warps = math.ceil(math.ceil(programs / card.multiprocessors) * configuration.num_warps / SCHEDULERS)
        busy = max(cost.instructions, cost.special * SPECIAL) * card.issue
        parts = (
            cost.bytes * scan.batch * scan.blocks * whole * unused / card.bandwidth,
            warps * iterations * busy / card.clock,
            waves * iterations * cost.cycles / card.clock,
        )
        memory, issue, latency = (total + part for total, part in zip((memory, issue, latency), parts, strict=True))
        seconds += max(*parts, LAUNCH)
    return Prediction(seconds, memory, issue, latency, occupancy)


@functools.lru_cache(maxsize=1024)
def choose(scan: Scan, card: Card) -> Configuration:
    """The configuration with the least predicted time; among equals, as where memory binds, the one with most to spare.

    So time is cut into chunks where B x N alone leaves the card waiting.

    Raises:
        ValueError: none fits.
    """

    def cost(configuration: Configuration) -> tuple[float, float]:
        prediction = predict(scan, configuration, card)
        return prediction.seconds, prediction.issue + prediction.latency

    known = [configuration for configuration in CONFIGURATIONS if fits(scan, configuration, card)]
    if not known:
        raise ValueError(f"choose: no configuration of the GPU kernels serves {scan}.")
    return min(known, key=cost)


def card_of(properties: Any) -> Card:
    """One of `CARDS` by its name, or one with the numbers of `torch.cuda.get_device_properties`."""
    for name, card in CARDS.items():
        if name in properties.name and card.multiprocessors == properties.multi_processor_count:
            return card
    bandwidth = 2.0 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8  # two transfers a cycle
    return Card(
        properties.name,
        f"cuda:{properties.major}{properties.minor}",
        properties.multi_processor_count,
        bandwidth,
        properties.clock_rate * 1e3,
        properties.shared_memory_per_multiprocessor,
    )
