"""statemix bench: time and memory."""

import sys

import tyro
from rich.console import Console

from statemix import benchmark


def run(arguments: list[str]) -> None:
    """Measure, and print the tables."""
    chosen = tyro.extras.subcommand_cli_from_dict(benchmark.BENCHMARKS, args=arguments, prog="statemix bench")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    samples, *pictures = benchmark.run(chosen, console.print)
    print(f"The results are in {samples}, with all samples{''.join(f', and {picture}' for picture in pictures)}.")
