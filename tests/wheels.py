"""A wheel as its users get it: installed where no compiler is, used, and timed beside a build from source.

`make wheels` runs this: python tests/wheels.py WHEEL. Without a wheel it uses the statemix that is installed here.
`--turns` compares two builds of csrc/, each a path, on whatever statemix is installed.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import statemix
from statemix import BDLRU, HLRU, kernels
from statemix.benchmark import commands
from statemix.kernels import library

COMPILERS = ("c++", "cc", "clang", "clang++", "cl", "cmake", "g++", "gcc")


def benchmarks(sizes: str, dtype: str) -> list[tuple[commands.Benchmark, tuple[str, ...]]]:
    """Of `statemix bench`: those of this dtype, and what runs in the kernels of a CPU there."""
    scans = commands.ScanBenchmark(sizes=sizes, dtype=dtype), ("cpu",)
    if dtype == "float64":
        return [scans]
    layers = commands.LayerBenchmark(sizes=sizes), ("bdlru", "hlru")
    return [layers, scans, (commands.DecodeBenchmark(sizes=sizes), ("bdlru", "hlru", "Decoder of 4 layers"))]


def use() -> None:
    """A layer of each kind forward and backward with the kernels, held to the loop."""
    if (problem := kernels.load_problem()) is not None:
        raise SystemExit(problem)
    generator = torch.Generator().manual_seed(0)
    makers = (BDLRU, HLRU, functools.partial(HLRU, form="observer"))
    for instruction_set in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        for make in makers:
            x = torch.randn(2, 65, 24, generator=generator)
            ours, loop = make(24, 17, 3, backend="cpu"), make(24, 17, 3, backend="reference")
            loop.load_state_dict(ours.state_dict())
            results = []
            for layer in (ours, loop):
                y, state = layer(x)
                results.append([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), layer.parameters())])
            for mine, wanted in zip(*results, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    where = Path(statemix.__file__).parent
    missing = "no compiler" if not any(map(shutil.which, COMPILERS)) else "a compiler"
    runtimes = {line.split()[-1] for line in _maps() if re.search(r"gomp|libomp|iomp", line)}
    print(f"{where}: the layers equal the loop with {', '.join(kernels.instruction_sets())}; {missing} on PATH;")
    print(f"OpenMP: {', '.join(sorted(runtimes)) or 'not known'}")


def _maps() -> list[str]:
    """What is mapped into this process, where the system says so."""
    path = Path("/proc/self/maps")
    return path.read_text().splitlines() if path.exists() else []


def turns(old: Path, new: Path, options: argparse.Namespace) -> None:
    """Print the time of the second library over that of the first, called in turns on one thread.

    The time is that of the thread on a processor, which a busy machine changes least. Median and quartiles of the ratio
    of each round.
    """
    torch.set_num_threads(1)
    libraries = library.Library(old), library.Library(new)
    for each in libraries:
        each.instruction_set = options.instruction_set or each.instruction_set
    print(f"{new} over {old}, {libraries[0].instruction_set}, torch {torch.__version__}, {options.rounds} rounds")
    ratios_of_all = []
    for benchmark, names in benchmarks(options.sizes, options.dtype):
        for group in benchmark.groups():
            for contender in group.contenders:
                if contender.name not in names:
                    continue
                library._loaded = libraries[0]
                work = contender.make(group.shape)
                ratios = []
                for turn in range(options.rounds + 2):
                    seconds = []
                    for each in libraries[:: 1 if turn % 2 else -1]:
                        library._loaded = each
                        if work.before is not None:
                            work.before()
                        begin = time.thread_time()
                        work.call()
                        seconds.append(time.thread_time() - begin)
                    first, second = seconds[:: 1 if turn % 2 else -1]
                    ratios.append(second / first)
                low, median, high = np.quantile(ratios[2:], (0.25, 0.5, 0.75))  # two to warm up
                ratios_of_all.append(median)
                row = f"{group.panel:32} {contender.name:20} {group.shape.size:>6}"
                print(f"{row}  {median:.2f} ({low:.2f} to {high:.2f})", flush=True)
    print(f"all: median {np.median(ratios_of_all):.3f}, {min(ratios_of_all):.2f} to {max(ratios_of_all):.2f}")


def install(wheel: Path, requirement: str, rounds: int) -> None:
    """Install the wheel into an environment of its own, without a compiler, and use and time it there."""
    where = (folder for folder in map(Path, kernels.__path__) if (folder / library.LIBRARY).exists())
    source = next(where) / library.LIBRARY
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        binaries = folder / "venv" / "bin"
        python = str(binaries / "python")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CC", "CXX")}
        environment["PATH"] = str(binaries)
        run = functools.partial(subprocess.run, check=True, cwd=folder, env=environment)
        # nothing is built: not the wheel, and not what it needs
        run([python, "-m", "pip", "install", "-q", "--only-binary=:all:", requirement, str(wheel.resolve())])
        script = shutil.copy(__file__, folder)
        run([python, str(script)])
        packages = next(binaries.parent.glob("lib/python*/site-packages"))
        installed = packages / "statemix" / "kernels" / library.LIBRARY
        run([python, str(script), "--turns", str(source), str(installed), "--rounds", str(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("--torch", default="torch", help="the requirement that torch is installed by")
    parser.add_argument("--turns", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--instruction-set")
    parser.add_argument("--sizes", default=commands.ScanBenchmark().sizes, help="of --turns, M x N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="of --turns; float64: scans")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.turns:
        turns(*options.turns, options)
    elif options.wheel:
        install(options.wheel, options.torch, options.rounds)
    else:
        use()


if __name__ == "__main__":
    main()
