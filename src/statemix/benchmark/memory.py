"""Peak memory of a layer's training step, in a process of its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from statemix import kernels
from statemix.benchmark.contender import Contender, Shape, UnavailableError, Work
from statemix.benchmark.layers import LAYER_CONTENDERS

EXTRAPOLATED = (1024, 2048, 4096)  # lengths at which the memory of a contender that does not fit is measured
LAYERS = LAYER_CONTENDERS[:4]  # the BD-LRU, in all its ways


def peak_bytes(name: str, shape: Shape) -> int:
    """Peak resident memory of forward and backward of a layer beyond its parameters and inputs, in a fresh process.

    Raises:
        UnavailableError: the process failed; the message is its last line, or its signal.
    """
    code = "from statemix.benchmark import memory; memory.report_peak()"
    request = {"name": name, "shape": dataclasses.asdict(shape), "threads": torch.get_num_threads()}
    environment = dict(os.environ)
    if not kernels.load_problem():
        environment[kernels.INSTRUCTION_SET_VARIABLE] = kernels.instruction_set()
    command = [sys.executable, "-c", code, json.dumps(request)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode < 0:
        raise UnavailableError(f"killed by signal {-child.returncode}, as when memory is short")
    if child.returncode > 0:
        raise UnavailableError(child.stderr.strip().splitlines()[-1].partition("Error: ")[2])
    return int(child.stdout)


def report_peak() -> None:
    """What the process of `peak_bytes` runs: its argument is the request, and it writes the bytes."""
    request = json.loads(sys.argv[1])
    shape = Shape(**request["shape"])
    torch.set_num_threads(request["threads"])
    (contender,) = (c for c in LAYERS if c.name == request["name"])
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


def _peak(layer: Contender) -> Contender:
    """The peak of a layer, as the result of its work; of the associative scan from shorter ones, as it does not fit."""

    def make(shape: Shape) -> Work:
        if layer.name != "associative" or shape.length <= max(EXTRAPOLATED):
            peak = peak_bytes(layer.name, shape)
            return Work(lambda: peak)
        peaks = [peak_bytes(layer.name, replace(shape, length=length)) for length in EXTRAPOLATED]
        slope, start = np.polyfit(EXTRAPOLATED, peaks, 1)
        note = f"EXTRAPOLATED from T {', '.join(map(str, EXTRAPOLATED))}"
        return Work(lambda: start + slope * shape.length, note=note)

    return Contender(layer.name, make)


MEMORY_CONTENDERS = tuple(map(_peak, LAYERS))
