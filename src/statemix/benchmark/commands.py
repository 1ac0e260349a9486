"""`statemix bench WHAT`: the options of every WHAT, its tables, and the run that measures them."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table

from statemix import kernels
from statemix.benchmark.contender import BOTH, PARTS, Contender, Shape, Work
from statemix.benchmark.layers import DECODE_CONTENDERS, LAYER_CONTENDERS, TRAIN_CONTENDERS
from statemix.benchmark.measure import Comparison, Samples, interleave, machine, measured, settings
from statemix.benchmark.memory import LAYERS, MEMORY_CONTENDERS
from statemix.benchmark.results import plot, table
from statemix.benchmark.scans import SCAN_CONTENDERS, SCANS, own_scan
from statemix.files import write_whole
from statemix.mixers.base import check_choice, check_sizes

SCALING_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What `statemix bench WHAT` does; a subclass per WHAT.

    Args:
        sizes: M x N, block sizes (orders) and numbers of blocks (channels), such as 1x128,4x32.
        threads: of torch and of the kernels.
        instruction_set: of the compiled kernels, see `statemix info`. None: the one in use.
        seconds: to go on timing a table, at least 5 rounds; a contender slower than a fifth of it is timed 3 times.
        only: contenders to time besides the baselines, NAME,NAME. Empty: all.
        out: path of the results, to which .json and .png are added. None: results/bench/WHAT-<instruction set>-<n>t.
    """

    sizes: str = "1x128,2x64,4x32,8x16,16x16"
    threads: int = 1
    instruction_set: str | None = None
    seconds: float = 10.0
    only: str = ""
    out: str | None = None

    what: ClassVar[str]
    of: ClassVar[str] = "time"  # ratios are number / baseline's; of "speed", the inverse
    unit: ClassVar[str] = "s"
    pictured: ClassVar[bool] = True  # whether there is a picture of the ratios over the sizes
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def groups(self) -> list[Comparison]:
        """The tables, in order."""
        raise NotImplementedError

    def samples(self, works: Mapping[str, Work]) -> Samples:
        """The raw numbers of every contender, in `unit`."""
        return interleave(works, self.seconds)

    def result(self, group: Comparison) -> dict[str, Any]:
        """A table as it is kept in the JSON file."""
        return measured(group, self.samples, self.unit, self.of)

    def table(self, group: Comparison, result: Mapping[str, Any]) -> Table:
        """The table as it is shown."""
        return table(self.title(group), result)

    def name(self, facts: Mapping[str, Any]) -> str:
        """Of the results, where `out` is None."""
        return f"{self.what}-{facts['instruction_set']}-{self.threads}t"

    def conditions(self, facts: Mapping[str, Any]) -> str:
        """What all numbers hold for."""
        return (
            f"{facts['processor']}, {facts['processors']} processors; instruction set {facts['instruction_set']}, "
            f"threads {facts['threads']}, torch {facts['torch']}, {facts['date']}"
        )

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named options that this WHAT has."""
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def shapes(self) -> list[Shape]:
        """A shape per size."""
        pairs = self.sizes.split(",")
        if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", pair) for pair in pairs):
            raise ValueError(
                f"bench: `sizes` must be MxN pairs of at least 1, such as '1x128,4x32', got {self.sizes!r}."
            )
        sizes = (map(int, pair.split("x")) for pair in pairs)
        return [Shape(order, blocks, **self.given("batch", "length", "d_model", "dtype")) for order, blocks in sizes]

    def title(self, group: Comparison) -> str:
        """Of a table: what its numbers hold for."""
        facts = [f"M {group.shape.order}, N {group.shape.blocks}"]
        letters = {"batch": "B ", "length": "T ", "d_model": "D ", "dtype": ""}
        facts += [f"{letters[name]}{getattr(group.shape, name)}" for name in self.given(*letters)]
        return f"{self.what}, {group.panel}: {', '.join(facts)}"

    def check(self) -> list[Comparison]:
        """The tables, of the chosen contenders; raises ValueError or TypeError if an option is wrong."""
        check_sizes("bench", **self.given("threads", "batch", "length", "d_model"))
        processors = os.cpu_count() or 1
        if self.threads > processors:
            raise ValueError(f"bench: `threads` must be at most {processors}, the processors here, got {self.threads}.")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"bench: `seconds` must be above 0 and finite, got {self.seconds}.")
        if self.instruction_set is not None:
            check_choice("bench", "instruction_set", self.instruction_set, kernels.instruction_sets())
        for dtype in self.given("dtype").values():
            check_choice("bench", "dtype", dtype, self.dtypes)
        groups, only = self.groups(), [name for name in self.only.split(",") if name]
        for name in only:
            check_choice("bench", "only", name, tuple({c.name for group in groups for c in group.contenders}))
        return [group.only(only) for group in groups] if only else groups


def run(benchmark: Benchmark, show: Callable[[Any], object]) -> list[Path]:
    """Check, measure, and write the results.

    Args:
        benchmark: one of `BENCHMARKS`, with its options.
        show: is given every table when it is there, and a line on the machine at the end.

    Returns:
        The files of the results: .json with all samples, and the .png of their picture if there is one.

    Raises:
        TypeError, ValueError: an option is wrong; nothing was measured.
        RuntimeError: a contender disagrees with the reference, or the results cannot be written.
    """
    groups = benchmark.check()
    with settings(benchmark.threads, benchmark.instruction_set):
        facts = machine(benchmark.threads)
        out = Path(re.sub(r"\.(json|png)$", "", benchmark.out or f"results/bench/{benchmark.name(facts)}"))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"bench: `out` must be a path in a folder that can be made, got '{out}': {error}."
            ) from None
        results = []
        for group in groups:
            results.append(benchmark.result(group))
            show(benchmark.table(group, results[-1]))
    show(benchmark.conditions(facts))
    kept = {"what": benchmark.what, "machine": facts, "options": dataclasses.asdict(benchmark), "groups": results}
    files = {out.with_name(f"{out.name}.json"): (json.dumps(kept, indent=1) + "\n").encode()}
    if benchmark.pictured:
        files[out.with_name(f"{out.name}.png")] = plot(kept)
    try:
        for file, content in files.items():
            write_whole(file, content)
    except OSError as error:
        raise RuntimeError(f"bench: cannot write to '{out}': {error}.") from error
    return list(files)


@dataclass(frozen=True, kw_only=True)
class ScanBenchmark(Benchmark):
    """The bare scan against a copy of its bytes, the softmax of its gates, the published scan, the loop, and peers.

    Args:
        batch: B.
        length: T.
        dtype: float32 or float64.
        kinds: of block, companion and observer.
    """

    batch: int = 4
    length: int = 1024
    dtype: str = "float32"
    kinds: str = "block"

    what, of = "scan", "speed"
    dtypes = ("float32", "float64")

    def groups(self) -> list[Comparison]:
        """A table per kind, size and part."""
        kinds = self.kinds.split(",")
        for kind in kinds:
            check_choice("bench", "kinds", kind, tuple(SCANS))
        return [
            Comparison(
                f"{kind} scan, {part}", replace(shape, kind=kind, part=part), SCAN_CONTENDERS, ("copy", "associative")
            )
            for kind, shape, part in itertools.product(kinds, self.shapes(), PARTS)
        ]


@dataclass(frozen=True, kw_only=True)
class LayerBenchmark(Benchmark):
    """Forward and backward of a layer against the matrix products that it cannot avoid, and other layers.

    Args:
        batch: B.
        length: T.
        d_model: D.
        dtype: float32, or bfloat16 for autocast.
    """

    batch: int = 4
    length: int = 1024
    d_model: int = 128
    dtype: str = "float32"

    what = "layer"

    def groups(self) -> list[Comparison]:
        """A table per size."""
        contenders: tuple[Contender, ...] = LAYER_CONTENDERS
        if self.dtype == "bfloat16":
            own = LAYER_CONTENDERS[0]
            full = Contender("bdlru float32", lambda shape: own.make(replace(shape, dtype="float32")), own.reference)
            contenders = (*contenders, full)
        return [Comparison(BOTH, shape, contenders, ("products",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class TrainStepBenchmark(LayerBenchmark):
    """A training step of a one-layer model, with mixers of equally many parameters: against LSTM and Mamba-2."""

    what = "train-step"

    def groups(self) -> list[Comparison]:
        """A table per size."""
        return [Comparison("training step", shape, TRAIN_CONTENDERS, ("lstm",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark(Benchmark):
    """One token at batch 1, by `step` and by a Decoder: against an LSTMCell with as large a state.

    Args:
        d_model: D.
    """

    d_model: int = 128

    what = "decode"

    def groups(self) -> list[Comparison]:
        """A table per size."""
        return [Comparison("one step", shape, DECODE_CONTENDERS, ("lstm cell",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark(LayerBenchmark):
    """Peak memory of a layer's training step beyond parameters and inputs: against the published log-depth scan."""

    sizes: str = "16x16"
    batch: int = 1
    length: int = 131072

    what, of, unit = "memory", "memory", "B"

    def groups(self) -> list[Comparison]:
        """A table per size."""
        if not Path("/proc/self/status").exists():
            raise RuntimeError("bench: memory is read from /proc/self/status, which this system does not have.")
        return [
            Comparison("peak of a training step", shape, MEMORY_CONTENDERS, ("associative",), LAYERS)
            for shape in self.shapes()
        ]

    def samples(self, works: Mapping[str, Work]) -> dict[str, list[float]]:
        """One number each: it was measured when the work was made."""
        return {name: [work.call()] for name, work in works.items()}


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark(Benchmark):
    """Speed per token over lengths, on one thread at B 1; speed over threads, at B and at B 1.

    Args:
        threads: the most.
        batch: B, of the measurements over threads.
        length: T, of the measurements over threads.
        d_model: D.
        lengths: T, T, ... of the measurements over lengths; 1024, the baseline, is always among them.
    """

    sizes: str = "4x32"
    threads: int = os.cpu_count() or 1
    batch: int = 4
    length: int = 1024
    d_model: int = 128
    lengths: str = ",".join(str(2**n) for n in range(8, 18))

    what, of, pictured = "scaling", "speed", False

    def groups(self) -> list[Comparison]:
        """Per size a table over lengths, and one over threads for the scan and the layer at B and at B 1."""
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.lengths):
            raise ValueError(
                f"bench: `lengths` must be numbers of at least 1, such as '256,1024', got {self.lengths!r}."
            )
        lengths = sorted({SCALING_LENGTH, *map(int, self.lengths.split(","))})
        scan, layer = own_scan("scan", "auto"), LAYER_CONTENDERS[0]
        groups = []
        for shape in self.shapes():
            one = replace(shape, batch=1)
            over_lengths = tuple(_at_length(scan, length) for length in lengths)
            groups.append(Comparison("scan over T, B 1", one, over_lengths, (f"T {SCALING_LENGTH}",), (scan,)))
            for own, at in itertools.product((scan, layer), dict.fromkeys((shape, one))):
                over_threads = tuple(_on_threads(own, threads) for threads in range(1, self.threads + 1))
                name = "scan" if own is scan else "layer"
                groups.append(Comparison(f"{name} over threads, B {at.batch}", at, over_threads, ("1 thread",), (own,)))
        return groups


def _at_length(contender: Contender, length: int) -> Contender:
    """On one thread, per token."""

    def make(shape: Shape) -> Work:
        work = contender.make(replace(shape, length=length))
        return replace(work, per=shape.batch * length, before=partial(torch.set_num_threads, 1))

    return Contender(f"T {length}", make)


def _on_threads(contender: Contender, threads: int) -> Contender:
    """With an untimed call after the change of threads: it starts or stops them."""

    def make(shape: Shape) -> Work:
        work = contender.make(shape)

        def before() -> None:
            torch.set_num_threads(threads)
            work.call()

        return replace(work, before=before)

    return Contender(f"{threads} thread{'s' if threads > 1 else ''}", make)


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    benchmark.what: benchmark
    for benchmark in (
        ScanBenchmark,
        LayerBenchmark,
        TrainStepBenchmark,
        DecodeBenchmark,
        MemoryBenchmark,
        ScalingBenchmark,
    )
}
