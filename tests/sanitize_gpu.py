"""The kernels of csrc/gpu in their emulator, each access watched: races, copies not waited for, addresses, indices.

`make sanitize` runs this. Small scans of every family, forward and backward, whole and in chunks of time, are held to
the loop; then each fault that is planted must be told. Twice:

- of shared memory the emulator itself is told by the compiler, as its thread sanitizer would be (`races` in emulate.h).
  That sanitizer, with a thread for each lane, was too slow to end, and takes an exchange between lanes for a barrier;
- of all other memory, the tensors', by the address sanitizer, in a process of its own: its runtime has to come first.
"""

import functools
import os
import subprocess
import sys

import torch
from helpers import assert_problem, make_problem
from kernel_helpers import GPU_FAULTS, INDEX, RACE, GpuFault

from statemix.scan import gpu
from statemix.scan.gpu import compile, plan

# instead of the sanitizers' libraries, which the compiler would add, those of C++ alone
LIBRARIES = ("-nodefaultlibs", "-Wl,--no-as-needed", "-lstdc++", "-lm", "-lc", "-lgcc_s")
WATCHED = ("-DSTATEMIX_RACES", "-fsanitize=thread,bounds", *LIBRARIES)
ADDRESSES = ("-fsanitize=address", "--param=asan-stack=0")  # it knows no stacks of fibers
FOUND = 66  # exit status of a process in which the address sanitizer found something
CASES = (
    ("block", 1, torch.float32),
    ("block", 2, torch.bfloat16),
    ("block", 3, torch.float32),
    ("block", 8, torch.float32),
    ("block", 16, torch.bfloat16),
    ("companion", 4, torch.float32),
    ("companion", 16, torch.bfloat16),
    ("observer", 5, torch.float32),
)


HEADERS = compile.headers  # without a fault


FAULTS = (
    *GPU_FAULTS,
    # beside exchanges, which order nothing
    GpuFault("rows.cuh", "          __syncwarp();\n", "", "block", 16, RACE),
    GpuFault("slabs.cuh", "[u][i][lane] = h[u][i]", "[u][i][lane + 1] = h[u][i]", "block", 1, INDEX),
)


# the last step of the last block is written behind the states
OUTSIDE = GpuFault(
    "rows.cuh", "place.first) + (int64)lanes.n * M", "place.first) + (int64)(lanes.n + 1) * M", "block", 8, ""
)


def main() -> None:
    use(WATCHED)
    check_all()
    for fault in FAULTS:
        with_fault(fault)
        assert fault.told in told(fault), f"{fault} is not told"
    for planted, status in ((), 0), (("planted",), FOUND):
        process = run_with_addresses(*planted)
        assert process.returncode == status, f"the address sanitizer says of {planted or 'no fault'}:\n{process.stderr}"


def run_with_addresses(*planted: str) -> "subprocess.CompletedProcess[str]":
    """`check_addresses` in a process with the sanitizer's runtime, and libstdc++, whose exceptions it watches."""
    compiler = os.environ.get("CXX", "g++")
    questions = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    paths = [subprocess.check_output(question, text=True).strip() for question in questions]
    environment = os.environ | {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}"}
    command = [sys.executable, __file__, "addresses", *planted]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)


def check_addresses(*planted: str) -> None:
    del os.environ["LD_PRELOAD"]  # the compiler does without
    use(ADDRESSES)
    if planted:
        with_fault(OUTSIDE)
        check(OUTSIDE.kind, OUTSIDE.order)
    else:
        check_all()


def use(options: tuple[str, ...]) -> None:
    """Let kernels be emulated, and compiled with these options."""
    compile.EMULATED = True
    compile.build_emulated = functools.partial(compile.build_emulated, options=options)


def check_all() -> None:
    """Every case, whole and in chunks; there with teams of half a warp, which slabs may have."""
    rules = plan.chunk_size, plan.team
    for chunk_size, team in (rules, (lambda *_: 16, lambda *_: plan.HALF_WARP)):
        plan.chunk_size, plan.team = chunk_size, team
        forget()
        for case in CASES:
            check(*case)
    plan.chunk_size, plan.team = rules


def check(kind: str, order: int, dtype: torch.dtype = torch.float32) -> None:
    """Hold a small scan, with resets, to the loop."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"order": order, "length": 35, "batch": 1, "with_reset": True, "dtype": dtype}
    problem = make_problem(generator, kind, "softmax", **sizes)
    assert_problem(problem, "gpu", problem.to(torch.float64).results("reference"))


def with_fault(fault: GpuFault) -> None:
    """Let the kernels have this fault, and no other."""
    texts = fault.planted(HEADERS())
    compile.headers = lambda: texts
    forget()


def told(fault: GpuFault) -> str:
    """What the emulator says of a fault that is there."""
    try:
        check(fault.kind, fault.order)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def forget() -> None:
    gpu._plan.cache_clear()
    compile.load.cache_clear()


if __name__ == "__main__":
    check_addresses(*sys.argv[2:]) if sys.argv[1:2] == ["addresses"] else main()
