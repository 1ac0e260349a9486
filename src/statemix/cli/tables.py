"""The tables that several commands print."""

from collections.abc import Sequence

from statemix.report.html import sections_of
from statemix.report.tables import align, group_rows
from statemix.runs.read import Run


def print_tables(runs: Sequence[Run]) -> None:
    """A table per task of what came of the runs, seeds together."""
    for task, groups in sections_of(runs).items():
        print(f"{task}\n{align(group_rows(groups), markdown=False)}\n")
