"""`statemix bench gpu`: the kernels of csrc/gpu, on a card; and what can be said of them without one."""

import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statemix.benchmark.gpu import card, results
from statemix.benchmark.gpu.check import SHARED_LIMITS, Target, check_kernels, targets
from statemix.benchmark.gpu.host import lines
from statemix.benchmark.gpu.peers import Peers
from statemix.benchmark.gpu.records import Records
from statemix.benchmark.scans import SCANS
from statemix.files import write_whole
from statemix.gates import NORMALIZATIONS
from statemix.mixers.base import check_choice, check_sizes
from statemix.scan.gpu.compile import STORAGES, load_problem
from statemix.scan.gpu.plan import MAX_ORDER

DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in STORAGES)


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """The GPU kernels on a card: values, then speeds of scans, layers and training steps beside others'.

    Every result is kept at once, and the same command goes on with what is missing.

    Args:
        check: compile, instead, every kernel for cards that need not be here, and fail if one spills or takes 2 s.
        host: print, instead, what a scan costs in Python, the launch of its kernels left out. No card is needed.
        budget: seconds after which nothing more is begun. None: 300 on a card, no limit for `check`.
        architectures: of `check`: compute capabilities, 90 for 9.0.
        kinds: of `check`: of block, companion and observer.
        orders: of `check`: M, from-to or M,M.
        normalizations: of `check`: NAME,NAME. Empty: all.
        dtypes: of `check`: of float32, bfloat16 and float16.
        jobs: of `check`: processes. None: as many as there are processors.
        out: path of the results, to which .jsonl and .png are added. None: results/bench/gpu, with `check` gpu-check.
    """

    check: bool = False
    host: bool = False
    budget: float | None = None
    architectures: str = "80,90,100,120"
    kinds: str = ",".join(SCANS)
    orders: str = f"1-{MAX_ORDER}"
    normalizations: str = ""
    dtypes: str = ",".join(DTYPES)
    jobs: int | None = None
    out: str | None = None

    def run(self, show: Callable[[Any], object]) -> list[Path]:
        """Measure, and return the files of the results; none for `host`. show: is given lines and tables.

        Raises:
            TypeError, ValueError: an option is wrong; nothing was measured.
            RuntimeError: there is no card, or a kernel is wrong.
        """
        wanted = self._targets()
        if self.check and self.host:
            raise ValueError("bench: `check` and `host` are two commands: use one of them.")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ValueError(f"bench: `budget` must be above 0 and finite, got {self.budget}.")
        if self.host:
            for line in lines():
                show(line)
            show(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, the launch left out")
            return []
        name = re.sub(r"\.(jsonl|png)$", "", self.out or f"results/bench/{'gpu-check' if self.check else 'gpu'}")
        if self.check:
            records = Records(Path(f"{name}.jsonl"))
            check_kernels(wanted, records, self.jobs or os.cpu_count() or 1, self.budget or math.inf, show)
            return [records.path]
        if (problem := load_problem()) is not None:
            raise RuntimeError(f"bench: gpu cannot measure here: {problem} `--check` and `--host` need no GPU.")
        with Peers() as peers:
            return self._measure(card.Card(), Records(Path(f"{name}.jsonl")), peers, Path(f"{name}.png"), show)

    def _measure(
        self, on: card.Card, records: Records, peers: Peers, picture: Path, show: Callable[[Any], object]
    ) -> list[Path]:
        conditions = f"{on.name()}, torch {torch.__version__}, kernels {card.sources()}"
        show(conditions)
        wanted, seconds = card.measurements(on, peers), 300 if self.budget is None else self.budget
        if any(one.name.startswith("fla ") and one.key(conditions) not in records for one in wanted):
            waited = peers.prepare([(card.TOKENS // length, length) for length in card.LENGTHS])
            show(f"{waited:4.0f} s  the layers of flash-linear-attention have been compiled, as far as they can be")
            seconds -= waited
        found = card.measure_all(wanted, records, conditions, seconds, show)
        for drawn in results.tables(found, conditions):
            show(drawn)
        files = [records.path]
        if any("forward" in record for record in found if record["part"] == "scan"):
            write_whole(picture, results.roofline(found, conditions))
            files.append(picture)
        wrong = [f"{record['name']}: {record['wrong']}" for record in found if "wrong" in record]
        if wrong:
            raise RuntimeError(f"bench: {len(wrong)} scans have wrong values: {'; '.join(wrong)}.")
        return files

    def _targets(self) -> list[Target]:
        """What `check` compiles."""
        if self.jobs is not None:
            check_sizes("bench", jobs=self.jobs)
        chosen = {
            "kinds": (self.kinds, tuple(SCANS)),
            "normalizations": (self.normalizations or ",".join(NORMALIZATIONS), tuple(NORMALIZATIONS)),
            "dtypes": (self.dtypes, DTYPES),
            "architectures": (self.architectures, tuple(map(str, SHARED_LIMITS))),
        }
        lists = {}
        for option, (given, known) in chosen.items():
            lists[option] = given.split(",")
            for name in lists[option]:
                check_choice("bench", option, name, known)
        orders: list[int] = []
        for part in self.orders.split(","):
            numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
            if not 1 <= first <= last <= MAX_ORDER:
                raise ValueError(f"bench: `orders` must be M or M-M of 1 to {MAX_ORDER}, got {self.orders!r}.")
            orders += range(first, last + 1)
        architectures = [int(architecture) for architecture in lists.pop("architectures")]
        return targets(orders=orders, architectures=architectures, **lists)
