"""The tables that several commands print."""

from collections.abc import Sequence

from statemix.report.html import sections_of
from statemix.report.tables import align, group_tables
from statemix.runs.read import Run


def print_tables(runs: Sequence[Run]) -> None:
    """Print tables per task of what came of the runs; runs that differ in their seed are one row."""
    for task, groups in sections_of(runs).items():
        print(task)
        for rows in group_tables(groups):
            print(f"{align(rows, markdown=False)}\n")
