"""`statemix bench gpu --check`: every kernel that a rule may choose, compiled for cards that need not be here."""

import functools
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich.table import Table

from statemix.benchmark.gpu.records import Records
from statemix.scan.gpu import plan
from statemix.scan.gpu.compile import (
    OLDEST_ARCHITECTURE,
    Kernel,
    Size,
    compile_for_gpu,
    compiler_version,
    headers,
    resources,
)

# what the threads of a program may share: compute capability -> bytes, from the CUDA C++ Programming Guide
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SLOWEST = 2.0  # seconds of a CPU that compiling a kernel may take


class Target(NamedTuple):
    """A kernel, and the compute capability that it is compiled for, 90 for 9.0."""

    kernel: Kernel
    architecture: int

    @property
    def key(self) -> str:
        """What decides the code: a record of older sources has another one."""
        digest = hashlib.sha256(_texts(self.kernel.family).encode()).hexdigest()[:12]
        return f"{self.kernel.source.splitlines()[-1]} sm_{self.architecture} {digest} NVRTC {compiler_version()}"


@functools.cache
def _texts(family: str) -> str:
    """The file of a family, and after it whatever it includes."""
    names, texts = [f"{family}.cuh"], headers()
    for name in names:
        names += [other for other in re.findall(r'#include "(\w+\.cuh)"', texts[name]) if other not in names]
    return "".join(texts[name] for name in names)


def targets(
    kinds: Sequence[str],
    orders: Sequence[int],
    normalizations: Sequence[str],
    dtypes: Sequence[str],
    architectures: Sequence[int],
) -> list[Target]:
    """Every kernel that some scan of these may run, for each architecture. A relay, common to all, is always there."""
    found: dict[Kernel, None] = {}
    for order, kind in itertools.product(orders, kinds):
        for kernel in plan.kernels(kind, order):
            of_these = kernel.normalization in normalizations and str(kernel.dtype).removeprefix("torch.") in dtypes
            if kernel.family == "relay" or of_these:
                found[kernel] = None
    return [Target(kernel, architecture) for architecture in architectures for kernel in found]


def compiled(target: Target) -> dict[str, Any]:
    """What a target compiles to, as it is kept, or the error; `program` and `order` are for the table."""

    def size_of(kernel: Kernel) -> Size:
        return compile_for_gpu(kernel, target.architecture)[1]

    names = [number for number in target.kernel.numbers if isinstance(number, str)]
    record: dict[str, Any] = {
        "key": target.key,
        "program": " ".join([target.kernel.program, *names]),
        "order": target.kernel.order,
        "architecture": target.architecture,
    }
    began = time.process_time()
    try:
        kernel = plan.shortened(target.kernel, size_of, SHARED_LIMITS[target.architecture])
        code, size = compile_for_gpu(kernel, target.architecture)
        seconds = time.process_time() - began  # of all that the first call on such a card waits for
        used = resources(code)
    except RuntimeError as error:
        return {**record, "error": str(error)}
    compile_for_gpu.cache_clear()
    return {
        **record,
        "kernel": kernel.source.splitlines()[-1],
        "registers": used.registers,
        "spilled": used.spilled,
        "shared_bytes": size.shared_bytes,
        "seconds": round(seconds, 3),
    }


def fault(record: dict[str, Any]) -> str | None:
    """What is wrong with a compiled kernel."""
    if "error" in record:
        return record["error"].strip().splitlines()[0]
    if record["spilled"]:
        return f"spills {record['spilled']} bytes"
    if record["shared_bytes"] > SHARED_LIMITS[record["architecture"]]:
        return f"shares {record['shared_bytes']} bytes, the card has {SHARED_LIMITS[record['architecture']]}"
    return f"takes {record['seconds']:.1f} s to compile" if record["seconds"] >= SLOWEST else None


def check_kernels(
    wanted: Sequence[Target],
    records: Records,
    jobs: int,
    seconds: float,
    show: Callable[[Any], object],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Compile what the records lack, in processes, and show the table. seconds: no kernel is begun after them.

    Returns:
        The records of all that was wanted, as far as time has gone.

    Raises:
        RuntimeError: something is wrong with a kernel.
    """
    missing = [target for target in wanted if target.key not in records]
    show(f"{len(wanted):,} kernels, {len(wanted) - len(missing):,} of them compiled before; NVRTC {compiler_version()}")
    began = told = clock()
    for done, record in enumerate(_in_processes(missing, jobs, lambda: clock() - began < seconds), start=1):
        records.add(record)
        if (wrong := fault(record)) is not None:
            show(f"WRONG: {record['key']} {wrong}")
        if clock() - told >= 10:
            told = clock()
            show(f"{done:,} of {len(missing):,} in {told - began:.0f} s")
    found = [records[target.key] for target in wanted if target.key in records]
    show(table(found))
    if len(found) < len(wanted):
        show(f"CUT OFF after {seconds:.0f} s: {len(wanted) - len(found):,} kernels; the same command goes on.")
    wrong_ones = [f"{record['key']} {fault(record)}" for record in found if fault(record) is not None]
    if wrong_ones:
        raise RuntimeError(f"bench: {len(wrong_ones)} of {len(found)} kernels are wrong:\n" + "\n".join(wrong_ones))
    return found


def _in_processes(missing: Sequence[Target], jobs: int, time_is_left: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The records as they come, of at most `jobs` targets at a time."""
    if not missing:
        return
    # "spawn": a compiler's threads do not outlive a fork
    with ProcessPoolExecutor(jobs, get_context("spawn"), _warm_up) as pool:
        waiting, running = iter(missing), set[Future[dict[str, Any]]]()
        while True:
            free = 2 * jobs - len(running) if time_is_left() else 0
            running |= {pool.submit(compiled, target) for target in itertools.islice(waiting, free)}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _warm_up() -> None:
    """Load the compiler, which is no part of the time of a kernel."""
    problem = plan.Signature("block", torch.float32, 1, "softmax", False, 1, 1, 1)
    compile_for_gpu(plan.relay(problem, backward=False), OLDEST_ARCHITECTURE)
    compile_for_gpu.cache_clear()


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each program and filled order: the most of everything."""
    drawn = Table(title="the most of any kernel of a program", title_justify="left")
    for header in ("program", "M"):
        drawn.add_column(header, no_wrap=True)
    for header in ("kernels", "registers", "shared KB", "spilled B", "seconds"):
        drawn.add_column(header, justify="right", no_wrap=True)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in found:
        if "error" not in record:
            groups.setdefault((record["program"], plan.filled_order(record["order"])), []).append(record)
    for (program, order), records in sorted(groups.items()):
        most = {
            name: max(record[name] for record in records)
            for name in ("registers", "shared_bytes", "spilled", "seconds")
        }
        drawn.add_row(
            program,
            str(order),
            f"{len(records):,}",
            str(most["registers"]),
            f"{most['shared_bytes'] / 1024:.1f}",
            str(most["spilled"]),
            f"{most['seconds']:.2f}",
        )
    return drawn
