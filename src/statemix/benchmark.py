"""Time and memory of scans, layers and training steps against baselines, all contenders of a table in one run.

Every contender of ours is first held to the float64 loop on a small version of the shape. Then each round times every
contender once, and the next round starts with the next one, so that a machine that slows down slows all of them. Ratios
are of medians; their range is the interquartile range of the ratios within a round.
"""

import bisect
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from statemix.files import write_whole
from statemix.gates import normalize
from statemix.mixers import BDLRU, HLRU, build_mixer
from statemix.mixers.base import check_choice, check_sizes
from statemix.model import SequenceModel
from statemix.scan import block_scan, companion_scan, cpu, observer_scan
from statemix.specs import Spec

ROUNDS, SLOW_ROUNDS = 5, 3  # at least; and of a contender whose one call takes more than a fifth of the time
SMALL_BATCH, SMALL_LENGTH = 2, 67  # at most, where a contender is held to the reference
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 5e-2}  # relative to the largest entry of a result
SCANS = {"block": block_scan, "companion": companion_scan, "observer": observer_scan}
FORWARD, BACKWARD, BOTH = PARTS = ("forward", "backward", "forward + backward")
VOCABULARY, DECODED, SCALING_LENGTH = 64, 200, 1024
NOT_INSTALLED = "not installed (pip install statemix[bench])"
EXTRAPOLATED = (1024, 2048, 4096)  # lengths at which the memory of a contender that does not fit is measured

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
        """MxN."""
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


@dataclass(frozen=True)
class Group:
    """A table: contenders on one shape, and those that ratios are to.

    panel: its part of the plot. checked: held to their reference first; None: the contenders.
    """

    panel: str
    shape: Shape
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...]
    checked: tuple[Contender, ...] | None = None

    def only(self, names: Sequence[str]) -> "Group":
        """The table with these contenders and the baselines."""
        return replace(self, contenders=tuple(c for c in self.contenders if c.name in (*names, *self.baselines)))


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
    over_contenders: ClassVar[bool] = False  # what the plot is over; sizes otherwise
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def groups(self) -> list[Group]:
        """The tables, in order."""
        raise NotImplementedError

    def samples(self, works: Mapping[str, Work]) -> dict[str, list[float]]:
        """The raw numbers of every contender, in `unit`."""
        return interleave(works, self.seconds)

    def shapes(self) -> list[Shape]:
        """A shape per size."""
        pairs = self.sizes.split(",")
        if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", pair) for pair in pairs):
            raise ValueError(
                f"bench: `sizes` must be MxN pairs of at least 1, such as '1x128,4x32', got {self.sizes!r}."
            )
        given = {name: getattr(self, name) for name in ("batch", "length", "d_model", "dtype") if hasattr(self, name)}
        sizes = (map(int, pair.split("x")) for pair in pairs)
        return [Shape(order, blocks, **given) for order, blocks in sizes]

    def check(self) -> list[Group]:
        """The tables, of the chosen contenders; raises ValueError or TypeError if an option is wrong."""
        counts = ("threads", "batch", "length", "d_model")
        check_sizes("bench", **{name: getattr(self, name) for name in counts if hasattr(self, name)})
        processors = os.cpu_count() or 1
        if self.threads > processors:
            raise ValueError(f"bench: `threads` must be at most {processors}, the processors here, got {self.threads}.")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"bench: `seconds` must be above 0 and finite, got {self.seconds}.")
        if self.instruction_set is not None:
            check_choice("bench", "instruction_set", self.instruction_set, cpu.instruction_sets())
        if hasattr(self, "dtype"):
            check_choice("bench", "dtype", self.dtype, self.dtypes)
        groups, only = self.groups(), [name for name in self.only.split(",") if name]
        for name in only:
            check_choice("bench", "only", name, tuple({c.name for group in groups for c in group.contenders}))
        return [group.only(only) for group in groups] if only else groups


def run(benchmark: Benchmark, show: Callable[[Any], object]) -> Path:
    """Check, measure, and write the results.

    Args:
        benchmark: one of `BENCHMARKS`, with its options.
        show: is given every table when it is there, and a line on the machine at the end.

    Returns:
        The path of the results, without its endings .json (with all samples) and .png.

    Raises:
        TypeError, ValueError: an option is wrong; nothing was measured.
        RuntimeError: a contender disagrees with the reference, or the results cannot be written.
    """
    groups = benchmark.check()
    with settings(benchmark.threads, benchmark.instruction_set):
        facts = machine(benchmark.threads)
        default = f"results/bench/{benchmark.what}-{facts['instruction_set']}-{benchmark.threads}t"
        out = Path(re.sub(r"\.(json|png)$", "", benchmark.out or default))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"bench: `out` must be a path in a folder that can be made, got '{out}': {error}."
            ) from None
        results = []
        for group in groups:
            for contender in group.contenders if group.checked is None else group.checked:
                check_agreement(contender, group.shape)
            results.append(_measured(benchmark, group))
            show(_table(benchmark, results[-1]))
    show(
        f"{facts['processor']}, {facts['processors']} processors; instruction set {facts['instruction_set']}, "
        f"threads {facts['threads']}, torch {facts['torch']}, {facts['date']}"
    )
    kept = {"what": benchmark.what, "machine": facts, "options": dataclasses.asdict(benchmark), "groups": results}
    try:
        write_whole(out.with_name(f"{out.name}.json"), (json.dumps(kept, indent=1) + "\n").encode())
        write_whole(out.with_name(f"{out.name}.png"), _plot(benchmark, results))
    except OSError as error:
        raise RuntimeError(f"bench: cannot write to '{out}': {error}.") from error
    return out


@contextmanager
def settings(threads: int, instruction_set: str | None) -> Iterator[None]:
    """Threads and instruction set of this process inside the block, and those from before after it."""
    before = torch.get_num_threads(), None if cpu.load_problem() else cpu.instruction_set()
    try:
        if instruction_set is not None:
            cpu.use_instruction_set(instruction_set)
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before[0])
        if before[1] is not None:
            cpu.use_instruction_set(before[1])


def machine(threads: int) -> dict[str, Any]:
    """What the numbers hold for."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "instruction_set": "torch" if cpu.load_problem() else cpu.instruction_set(),
        "threads": threads,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def check_agreement(contender: Contender, shape: Shape) -> None:
    """Raise RuntimeError unless the results are those of the reference on the small version of the shape."""
    if contender.reference is None:
        return
    small = shape.small()
    try:
        results = contender.make(small).call()
    except UnavailableError:
        return
    expected = contender.reference(replace(small, dtype="float64")).call()
    error = max(relative_error(*pair) for pair in zip(results, expected, strict=True))
    if error > TOLERANCE[shape.dtype]:
        raise RuntimeError(
            f"bench: {contender.name!r} disagrees with the float64 loop on {small}: its largest relative error is "
            f"{error:.3g}, above {TOLERANCE[shape.dtype]:g}."
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of `expected`; infinite if there is a NaN or a shape is wrong."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.detach().double() - expected.detach()).abs().max().item()
    error = difference / (expected.detach().abs().max().item() or 1.0)
    return math.inf if math.isnan(error) else error


def interleave(works: Mapping[str, Work], seconds: float) -> dict[str, list[float]]:
    """Seconds per unit of every work, a sample a round. Two untimed rounds first; a slow one has a single one.

    The time of slow works, those whose one call takes more than a fifth of `seconds`, does not count.
    """
    slow = {name for name, work in works.items() if _seconds(work) > seconds / 5}
    for name, work in works.items():
        if name not in slow:
            _seconds(work)
    samples: dict[str, list[float]] = {name: [] for name in works}
    spent = 0.0
    for number in itertools.count():
        due = [name for name in rotated(list(works), number) if name not in slow or number < SLOW_ROUNDS]
        if not due or (number >= ROUNDS and spent >= seconds):
            break
        for name in due:
            elapsed = _seconds(works[name])
            samples[name].append(elapsed / works[name].per)
            spent += 0 if name in slow else elapsed
    return samples


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round: the names from the number-th on, then those before it."""
    start = number % len(names) if names else 0
    return names[start:] + names[:start]


def _seconds(work: Work) -> float:
    if work.before is not None:
        work.before()
    begin = perf_counter()
    work.call()
    return perf_counter() - begin


def summarize(
    samples: Mapping[str, Sequence[float]], baselines: Sequence[str], of: str = "time"
) -> dict[str, dict[str, Any]]:
    """Median, spread and ratios of every contender.

    Args:
        samples: name -> a number a round, from round 0 on.
        baselines: names; those without samples are left out.
        of: "speed": baseline / contender. Anything else: contender / baseline.

    Returns:
        name -> median; spread, the interquartile range over the median; ratios: baseline -> ratio of medians and
        quartiles of the ratios, over the rounds that both have.
    """
    summary = {}
    for name, own in samples.items():
        ratios = {}
        for baseline in baselines:
            if theirs := samples.get(baseline):
                shared = list(zip(own, theirs, strict=False))  # a slow one has fewer rounds
                above, below = zip(*([pair[::-1] for pair in shared] if of == "speed" else shared), strict=True)
                rounds = [a / b for a, b in zip(above, below, strict=True)]
                ratios[baseline] = [statistics.median(above) / statistics.median(below), *_quartiles(rounds)]
        low, high = _quartiles(own)
        summary[name] = {"median": (m := statistics.median(own)), "spread": (high - low) / m, "ratios": ratios}
    return summary


def _quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(numbers, (25, 75))
    return float(low), float(high)


def _measured(benchmark: Benchmark, group: Group) -> dict[str, Any]:
    """A table as it is kept in the JSON file."""
    works, reasons = {}, {}
    for contender in group.contenders:
        try:
            works[contender.name] = contender.make(group.shape)
        except UnavailableError as error:
            reasons[contender.name] = str(error)
    samples = benchmark.samples(works)
    summary = summarize(samples, group.baselines, benchmark.of)
    rows: list[dict[str, Any]] = []
    for name in (c.name for c in group.contenders):
        if name in reasons:
            rows.append({"name": name, "unavailable": reasons[name]})
        else:
            slow = ["slow: fewer rounds"] if benchmark.unit == "s" and len(samples[name]) < ROUNDS else []
            note = "; ".join([*filter(None, [works[name].note]), *slow])
            rows.append({"name": name, **summary[name], "note": note, "samples": samples[name]})
    return {
        **{"panel": group.panel, "size": group.shape.size, "shape": dataclasses.asdict(group.shape)},
        **{"unit": benchmark.unit, "ratio": benchmark.of, "baselines": group.baselines, "contenders": rows},
    }


def _table(benchmark: Benchmark, result: Mapping[str, Any]) -> Table:
    shape, used = result["shape"], benchmark.__dataclass_fields__
    facts = [f"M {shape['order']}, N {shape['blocks']}"]
    facts += [f"{k} {shape[name]}" for k, name in (("B", "batch"), ("T", "length"), ("D", "d_model")) if name in used]
    facts += [shape["dtype"]] if "dtype" in used else []
    table = Table(title=f"{benchmark.what}, {result['panel']}: {', '.join(facts)}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for header in ("median", "spread", "rounds", *(f"{benchmark.of} / {name}" for name in result["baselines"])):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("note")
    for row in result["contenders"]:
        cells = [row["name"], *[""] * (3 + len(result["baselines"])), row.get("unavailable", "")]
        if "samples" in row:
            cells[1:4] = _amount(row["median"], benchmark.unit), f"{row['spread']:.1%}", str(len(row["samples"]))
            for i, name in enumerate(result["baselines"]):
                if name in row["ratios"] and name != row["name"]:
                    cells[4 + i] = "{:.3g} ({:.3g}-{:.3g})".format(*row["ratios"][name])
            cells[-1] = row["note"]
        table.add_row(*map(escape, cells))
    return table


def _amount(number: float, unit: str) -> str:
    """Three digits and a unit: 12.3 ms, 1.23 GB."""
    steps = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if unit == "B" else (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    name, size = next((step for step in steps if number >= step[1]), ("B", 1.0) if unit == "B" else ("ns", 1e-9))
    return f"{number / size:.3g} {name}" if number < 999 * size else f"{number / size:,.0f} {name}"


def _plot(benchmark: Benchmark, results: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the ratios to the first baseline, with their interquartile range; a panel for each part."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(result["panel"] for result in results))
    figure = Figure(figsize=(10, 3.5 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        groups = [result for result in results if result["panel"] == panel]
        sizes, baseline = [group["size"] for group in groups], groups[0]["baselines"][0]
        series: dict[str, dict[int, list[float]]] = {}  # label -> x -> ratio and its quartiles
        for i, group in enumerate(groups):
            for row in group["contenders"]:
                if baseline in row.get("ratios", {}):
                    number = int(re.sub(r"\D", "", row["name"]) or 0)
                    label, x = (group["size"], number) if benchmark.over_contenders else (row["name"], i)
                    series.setdefault(label, {})[x] = row["ratios"][baseline]
        for label, points in series.items():
            ratio, low, high = np.array(list(points.values())).T
            whiskers = np.maximum([ratio - low, high - ratio], 0)  # a median of ratios is not a ratio of medians
            axes.errorbar(list(points), ratio, whiskers, marker="o", capsize=3, label=label)
        if benchmark.over_contenders:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(points), list(points), rotation=30)
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.set_xticks(range(len(sizes)), sizes)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(title=panel, ylabel=f"{benchmark.of} / {baseline}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _inputs(shape: Shape, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Leaves of standard normal numbers, the same for every contender: drawn in float32 whatever the dtype."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if shape.dtype == "float64" else torch.float32
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def _imported(module: str, name: str) -> Any:
    """A name from a module of an optional peer. Raises UnavailableError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(import_module(module), name)
    except ImportError:
        raise UnavailableError(NOT_INSTALLED) from None


def _scan_sizes(shape: Shape) -> list[tuple[int, ...]]:
    """Of raw gates, values, initial state and states."""
    time, rows = (shape.batch, shape.length), (shape.order,) if shape.kind == "block" else ()
    kept = () if shape.kind == "companion" else (shape.order,)
    return [
        (*time, *rows, shape.order + 1, shape.blocks),
        (*time, *rows, shape.blocks),
        (shape.batch, shape.order, shape.blocks),
        (*time, *kept, shape.blocks),
    ]


def scan_work(shape: Shape, scan: Callable[..., Tensor]) -> Work:
    """A scan from raw gates, values and initial state to states; the backward gives the gradients of all three."""
    *leaves, cotangent = _inputs(shape, *_scan_sizes(shape))
    cotangent.detach_()

    def forward() -> Results:
        with torch.no_grad():
            return (scan(*leaves),)

    def both() -> Results:
        states = scan(*leaves)
        return states, *torch.autograd.grad(states, leaves, cotangent)

    if shape.part != BACKWARD:
        return Work(forward if shape.part == FORWARD else both)
    states = scan(*leaves)
    return Work(lambda: torch.autograd.grad(states, leaves, cotangent, retain_graph=True))


def _own_scan(name: str, backend: str) -> Contender:
    def make(shape: Shape, backend: str = backend) -> Work:
        problem = cpu.load_problem() or (f"M up to {cpu.MAX_ORDER} only" if shape.order > cpu.MAX_ORDER else None)
        if backend == "cpu" and problem:
            raise UnavailableError(problem)
        return scan_work(shape, partial(SCANS[shape.kind], backend=backend))

    return Contender(name, make, partial(make, backend="reference"))


def _copy(shape: Shape) -> Work:
    """A plain copy that reads and writes as many bytes as the scan must, in buffers that are already there.

    Forward: raw gates and values are read, states written. Backward: raw gates, values, states and their gradient are
    read, the gradients of raw gates and values written.
    """
    gates, values, _, states = (math.prod(size) for size in _scan_sizes(shape))
    forward, backward = gates + values + states, 2 * (gates + values + states)
    moved = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[shape.part]
    # half of the bytes are read and half written
    source = torch.ones(moved * (2 if shape.dtype == "float64" else 1) // 2)
    target = torch.ones_like(source)
    return Work(lambda: target.copy_(source), note=f"{8 * len(source) / 1e6:.3g} MB")


def _diagonal(scan: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Shape], Work]:
    """A peer's h_t = a_t h_{t-1} + b_t as the block scan of M = 1: with normalised gates, the first state in b_1."""

    def make(shape: Shape) -> Work:
        if shape.order != 1 or shape.kind != "block":
            raise UnavailableError("block scan of M = 1 only")
        peer = scan()

        def states(raw_gates: Tensor, values: Tensor, initial_state: Tensor) -> Tensor:
            decay, input_gate = normalize(raw_gates[:, :, 0], "softmax", 2).unbind(2)
            entering = input_gate * values[:, :, 0]
            first = entering[:, :1] + decay[:, :1] * initial_state
            return peer(decay, torch.cat([first, entering[:, 1:]], dim=1))[:, :, None]

        return scan_work(shape, states)

    return make


def _mambapy() -> Callable[[Tensor, Tensor], Tensor]:
    pscan = _imported("mambapy.pscan", "pscan")
    return lambda decay, entering: pscan(decay[:, :, None], entering[:, :, None])[:, :, 0]


def _assoc_scan() -> Callable[[Tensor, Tensor], Tensor]:
    scan: Callable[[Tensor, Tensor], Tensor] = _imported("assoc_scan", "AssocScan")(use_accelerated=False)
    return scan


SCAN_CONTENDERS = (
    _own_scan("cpu", "cpu"),
    _own_scan("associative", "associative"),
    _own_scan("loop", "reference"),
    Contender("copy", _copy),
    Contender("mambapy", _diagonal(_mambapy), _own_scan("", "reference").reference),
    Contender("assoc-scan", _diagonal(_assoc_scan), _own_scan("", "reference").reference),
)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _built(shape: Shape, build: Callable[[], nn.Module]) -> Any:
    """The module with the same first weights every time, whatever the dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    return module.double() if shape.dtype == "float64" else module


def nearest_width(target: int, build: Callable[[int], nn.Module]) -> int:
    """The width at which the number of parameters is nearest to `target`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return _parameters(build(width))

    widths = range(1, 1 << 14)
    above = bisect.bisect_left(widths, target, key=count)
    return min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(count(width) - target))


def _autocast(shape: Shape) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=shape.dtype == "bfloat16")


def layer_work(shape: Shape, build: Callable[[], nn.Module]) -> Work:
    """Forward and backward of a layer: the outputs, the gradients of x and of every parameter."""
    module = _built(shape, build)

    def output(x: Tensor) -> Tensor:
        with _autocast(shape):
            y = module(x)
        return y[0] if isinstance(y, tuple) else y

    (x,) = _inputs(shape, (shape.batch, shape.length, shape.d_model))
    leaves = (x, *module.parameters())
    few = output(x[:, :1])  # its width and dtype are the layer's own
    _, cotangent = _inputs(shape, x.shape, (*x.shape[:2], few.shape[2]))
    cotangent = cotangent.detach().to(few.dtype)

    def call() -> Results:
        y = output(x)
        return y, *torch.autograd.grad(y, leaves, cotangent)

    return Work(call, note=f"{_parameters(module):,} parameters")


def _bd_lru(shape: Shape, **options: Any) -> BDLRU:
    return BDLRU(shape.d_model, shape.blocks, shape.order, **options)


def _h_lru(shape: Shape, **options: Any) -> HLRU:
    return HLRU(shape.d_model, shape.blocks, shape.order, **options)


def _own_layer(name: str, build: Callable[..., nn.Module], dtype: str | None = None, **options: Any) -> Contender:
    def make(shape: Shape, options: dict[str, Any] = options) -> Work:
        if "recompute" in options and "recompute" not in inspect.signature(BDLRU).parameters:
            raise UnavailableError("not in this version")
        return layer_work(replace(shape, dtype=dtype or shape.dtype), partial(build, shape, **options))

    def reference(shape: Shape) -> Work:
        return layer_work(shape, partial(build, shape, backend="reference"))

    return Contender(name, make, reference)


def _products(shape: Shape) -> Work:
    """The products that a BD-LRU layer cannot avoid, at full length, and nothing else.

    Forward: raw gates with bias, values, and outputs from states that are there. Backward: two for each of them, from
    gradients that are there; not even the sum of the bias's gradient or of the two gradients of x.
    """
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32
    width, inner = shape.d_model, shape.order * shape.blocks
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    leaves, cotangents = [], []
    for columns, rows in ((width, inner * (shape.order + 1)), (width, inner), (inner, width)):
        time = (shape.batch, shape.length)
        drawn = [
            x.detach().to(dtype) for x in _inputs(shape, (*time, columns), (rows, columns), (*time, rows), (rows,))
        ]
        leaves += [drawn[0].requires_grad_(), drawn[1].requires_grad_()]
        cotangents.append(drawn[2])
        calls.append((drawn[0], drawn[1], drawn[3] if len(calls) == 0 else None))

    def call() -> Results:
        outputs = [nn.functional.linear(*arguments) for arguments in calls]
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return Work(call)


def _torch_rnn(kind: type[nn.LSTM] | type[nn.GRU]) -> Callable[[Shape], Work]:
    """torch.nn.LSTM or GRU, the bare module, with as many parameters as the BD-LRU layer."""

    def make(shape: Shape) -> Work:
        if kind is nn.GRU and shape.dtype == "bfloat16":
            raise UnavailableError("stays in float32 under autocast")
        with torch.device("meta"):
            target = _parameters(_bd_lru(shape))
        build = partial(kind, shape.d_model, batch_first=True)
        width = nearest_width(target, lambda width: build(hidden_size=width))
        return layer_work(shape, partial(build, hidden_size=width))

    return make


def _mamba2(shape: Shape) -> Work:
    if shape.d_model % 16:
        raise UnavailableError("D a multiple of 16 only")
    name = "transformers.models.mamba2"
    config = _imported(name, "Mamba2Config")(
        **{"hidden_size": shape.d_model, "expand": 2, "head_dim": 32, "num_heads": shape.d_model // 16},
        **{"state_size": 64, "n_groups": 1, "conv_kernel": 4, "chunk_size": 64},
    )
    return layer_work(shape, partial(_imported(f"{name}.modeling_mamba2", "Mamba2Mixer"), config, layer_idx=0))


LAYER_CONTENDERS = (
    _own_layer("bdlru", _bd_lru),
    _own_layer("bdlru keep", _bd_lru, recompute=False),
    _own_layer("bdlru recompute", _bd_lru, recompute=True),
    _own_layer("associative", _bd_lru, backend="associative"),
    _own_layer("hlru", _h_lru),
    Contender("products", _products),
    Contender("lstm", _torch_rnn(nn.LSTM)),
    Contender("gru", _torch_rnn(nn.GRU)),
    Contender("mamba2", _mamba2),
)


def train_work(shape: Shape, mixer: Spec) -> Work:
    """A training step of a model of one layer: cross entropy, its backward, clipping, AdamW."""
    model = _built(shape, partial(SequenceModel, VOCABULARY, shape.d_model, 1, mixer))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    size = (shape.batch, shape.length + 1)
    tokens = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(0))

    def call() -> Results:
        with _autocast(shape):
            logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss, *(p.grad for p in parameters if p.grad is not None)

    return Work(call, note=f"{_parameters(model):,} parameters")


def _train_contender(label: str, name: str, option: str | None) -> Contender:
    """The mixer with as many parameters as the BD-LRU's, by its `option`; None: the BD-LRU itself."""

    def make(shape: Shape, backend: str = "auto") -> Work:
        spec: dict[str, Any] = {"name": "bd_lru", "num_blocks": shape.blocks, "block_size": shape.order}
        if option is not None:
            with torch.device("meta"):
                target = _parameters(build_mixer(spec, shape.d_model))
            spec = {"name": name} | ({"order": shape.order} if name == "h_lru" else {})
            width = nearest_width(target, lambda width: build_mixer(spec | {option: width}, shape.d_model))
            spec |= {option: width}
        return train_work(shape, spec if name == "lstm" else spec | {"backend": backend})

    return Contender(label, make, None if name == "lstm" else partial(make, backend="reference"))


TRAIN_CONTENDERS = (
    _train_contender("bdlru", "bd_lru", None),
    _train_contender("hlru", "h_lru", "num_channels"),
    _train_contender("lstm", "lstm", "hidden_size"),
)


def decode_work(shape: Shape, build: Callable[[], nn.Module]) -> Work:
    """Steps of one sequence, each with the state of the last: a mixer, a SequenceModel or an LSTMCell."""
    module = _built(shape, build)
    (x,) = _inputs(shape, (1, shape.d_model))
    x = torch.zeros(1, dtype=torch.int64) if isinstance(module, SequenceModel) else x.detach()

    def call() -> Results:
        y, state = x, None
        with torch.inference_mode():
            for _ in range(DECODED):
                if isinstance(module, nn.LSTMCell):
                    state = module(x, state)
                else:
                    y, state = module.step(x, state)
        return y, *(state if isinstance(state, tuple) else (state,))

    return Work(call, per=DECODED)


def _decode_contender(name: str, build: Callable[..., nn.Module]) -> Contender:
    return Contender(
        name,
        lambda shape: decode_work(shape, partial(build, shape)),
        lambda shape: decode_work(shape, partial(build, shape, backend="reference")),
    )


def _model(shape: Shape, backend: str = "auto") -> SequenceModel:
    spec = {"name": "bd_lru", "num_blocks": shape.blocks, "block_size": shape.order, "backend": backend}
    return SequenceModel(VOCABULARY, shape.d_model, 4, spec)


DECODE_CONTENDERS = (
    _decode_contender("bdlru", _bd_lru),
    _decode_contender("hlru", _h_lru),
    Contender("lstm cell", lambda s: decode_work(s, lambda: nn.LSTMCell(s.d_model, s.order * s.blocks))),
    _decode_contender("model of 4 layers", _model),
)


def _memory_contender(layer: Contender) -> Contender:
    """The peak of a layer's training step in a process of its own; where it does not fit, from shorter ones."""

    def make(shape: Shape) -> Work:
        if layer.name != "associative" or shape.length <= max(EXTRAPOLATED):
            peak = peak_bytes(layer.name, shape)
            return Work(lambda: peak)
        peaks = [peak_bytes(layer.name, replace(shape, length=length)) for length in EXTRAPOLATED]
        slope, start = np.polyfit(EXTRAPOLATED, peaks, 1)
        return Work(
            lambda: start + slope * shape.length, note=f"EXTRAPOLATED from T {', '.join(map(str, EXTRAPOLATED))}"
        )

    return Contender(layer.name, make)


def peak_bytes(name: str, shape: Shape) -> int:
    """Peak resident memory of forward and backward of a layer beyond its parameters and inputs, in a fresh process.

    Raises:
        UnavailableError: the process failed; the message is its last line, or its signal.
    """
    code = "from statemix import benchmark; benchmark._report_peak()"
    request = {"name": name, "shape": dataclasses.asdict(shape), "threads": torch.get_num_threads()}
    environment = dict(os.environ)
    if not cpu.load_problem():
        environment[cpu.INSTRUCTION_SET_VARIABLE] = cpu.instruction_set()
    command = [sys.executable, "-c", code, json.dumps(request)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode < 0:
        raise UnavailableError(f"killed by signal {-child.returncode}, as when memory is short")
    if child.returncode > 0:
        raise UnavailableError(child.stderr.strip().splitlines()[-1].partition("Error: ")[2])
    return int(child.stdout)


def _report_peak() -> None:
    """The process of `peak_bytes`."""
    request = json.loads(sys.argv[1])
    shape = Shape(**request["shape"])
    torch.set_num_threads(request["threads"])
    (contender,) = (c for c in LAYER_CONTENDERS if c.name == request["name"])
    contender.make(replace(shape, length=8)).call()  # what is loaded and built at the first call
    work = contender.make(shape)
    before = _resident("VmRSS")
    kept = work.call()
    sys.stdout.write(f"{max(4096, _resident('VmHWM') - before)}")  # a page at least
    del kept


def _resident(field: str) -> int:
    """VmRSS now or VmHWM at the peak, in bytes; the ru_maxrss of getrusage would be inherited from the parent."""
    (kilobytes,) = re.findall(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


@dataclass(frozen=True, kw_only=True)
class Scan(Benchmark):
    """The bare scan against a plain copy of its bytes, the published log-depth scan, the loop, and peers for M = 1.

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

    def groups(self) -> list[Group]:
        """A table per kind, size and part."""
        kinds = self.kinds.split(",")
        for kind in kinds:
            check_choice("bench", "kinds", kind, tuple(SCANS))
        return [
            Group(
                f"{kind} scan, {part}", replace(shape, kind=kind, part=part), SCAN_CONTENDERS, ("copy", "associative")
            )
            for kind, shape, part in itertools.product(kinds, self.shapes(), PARTS)
        ]


@dataclass(frozen=True, kw_only=True)
class Layer(Benchmark):
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

    def groups(self) -> list[Group]:
        """A table per size."""
        contenders: tuple[Contender, ...] = LAYER_CONTENDERS
        if self.dtype == "bfloat16":
            contenders = (*contenders, _own_layer("bdlru float32", _bd_lru, dtype="float32"))
        return [Group(BOTH, shape, contenders, ("products",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class TrainStep(Layer):
    """A training step of a one-layer model, with mixers of equally many parameters: against the LSTM."""

    what = "train-step"

    def groups(self) -> list[Group]:
        """A table per size."""
        return [Group("training step", shape, TRAIN_CONTENDERS, ("lstm",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class Decode(Benchmark):
    """One token at batch 1, by `step`: against an LSTMCell with as large a state.

    Args:
        d_model: D.
    """

    d_model: int = 128

    what = "decode"

    def groups(self) -> list[Group]:
        """A table per size."""
        return [Group("one step", shape, DECODE_CONTENDERS, ("lstm cell",)) for shape in self.shapes()]


@dataclass(frozen=True, kw_only=True)
class Memory(Layer):
    """Peak memory of a layer's training step beyond parameters and inputs: against the published log-depth scan."""

    sizes: str = "16x16"
    batch: int = 1
    length: int = 131072

    what, of, unit = "memory", "memory", "B"

    def groups(self) -> list[Group]:
        """A table per size."""
        if not Path("/proc/self/status").exists():
            raise RuntimeError("bench: memory is read from /proc/self/status, which this system does not have.")
        layers = LAYER_CONTENDERS[:4]
        peaks = tuple(map(_memory_contender, layers))
        return [Group("peak of a training step", shape, peaks, ("associative",), layers) for shape in self.shapes()]

    def samples(self, works: Mapping[str, Work]) -> dict[str, list[float]]:
        """One number each: it was measured when the work was made."""
        return {name: [work.call()] for name, work in works.items()}


@dataclass(frozen=True, kw_only=True)
class Scaling(Benchmark):
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

    what, of, over_contenders = "scaling", "speed", True

    def groups(self) -> list[Group]:
        """Per size a table over lengths, and one over threads for the scan and the layer at B and at B 1."""
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.lengths):
            raise ValueError(
                f"bench: `lengths` must be numbers of at least 1, such as '256,1024', got {self.lengths!r}."
            )
        lengths = sorted({SCALING_LENGTH, *map(int, self.lengths.split(","))})
        scan, layer = _own_scan("scan", "auto"), LAYER_CONTENDERS[0]
        groups = []
        for shape in self.shapes():
            one = replace(shape, batch=1)
            over_lengths = tuple(_at_length(scan, length) for length in lengths)
            groups.append(Group("scan over T, B 1", one, over_lengths, (f"T {SCALING_LENGTH}",), (scan,)))
            for own, at in itertools.product((scan, layer), dict.fromkeys((shape, one))):
                over_threads = tuple(_on_threads(own, threads) for threads in range(1, self.threads + 1))
                name = "scan" if own is scan else "layer"
                groups.append(Group(f"{name} over threads, B {at.batch}", at, over_threads, ("1 thread",), (own,)))
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


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {b.what: b for b in (Scan, Layer, TrainStep, Decode, Memory, Scaling)}
