"""statemix report: a page of runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from statemix.cli.tables import print_tables
from statemix.report.html import write_report
from statemix.runs.read import find_runs, unfinished_runs


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables and pictures of runs, and report.html with all of them.

    Args:
        runs: folders of runs or of sweeps. Runs that differ only in their seed are one row.
        out: folder of the report.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS...")]
    out: Path = Path("report")


def run(arguments: list[str]) -> None:
    """Write the page, and print its tables."""
    given = tyro.cli(Report, args=arguments, prog="statemix report")
    runs, left = find_runs(given.runs), unfinished_runs(given.runs)
    notes = [f"Runs without a result, left out: {', '.join(map(str, left))}."] if left else []
    page, *_ = write_report(runs, given.out, notes)
    print_tables(runs)
    print("\n".join([*notes, f"The page is {page}."]))
