"""statemix bench: time and memory."""

import sys
from collections.abc import Callable

import tyro
from rich.console import Console

from statemix import benchmark
from statemix.benchmark.gpu import GpuBenchmark


def run(arguments: list[str]) -> None:
    """Measure, and print the tables."""
    known: dict[str, Callable[..., benchmark.Benchmark | GpuBenchmark]] = benchmark.BENCHMARKS | {"gpu": GpuBenchmark}
    chosen = tyro.extras.subcommand_cli_from_dict(known, args=arguments, prog="statemix bench")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if isinstance(chosen, GpuBenchmark):
        for file in chosen.run(lambda shown: console.print(shown, soft_wrap=isinstance(shown, str))):
            print(f"The results are in {file}.")
        return
    samples, *pictures = benchmark.run(chosen, console.print)
    print(f"The results are in {samples}, with all samples{''.join(f', and {picture}' for picture in pictures)}.")
