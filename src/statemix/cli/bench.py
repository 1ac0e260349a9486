"""statemix bench: time and memory."""

import sys

import tyro
from rich.console import Console

from statemix import benchmark


def run(arguments: list[str]) -> None:
    """Measure, and print the tables."""
    chosen = tyro.extras.subcommand_cli_from_dict(benchmark.BENCHMARKS, args=arguments, prog="statemix bench")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    out = benchmark.run(chosen, console.print)
    print(f"The results are in {out}.json, with all samples, and {out}.png.")
