"""statemix sweep: every config of a file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from statemix.cli.tables import print_tables
from statemix.runs.read import read_run
from statemix.runs.sweep import load_configs, sweep


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train every config of a Python file. Started again, it does what is missing.

    Args:
        file: ends with `configs`: a list of TrainConfig, a dict {label: config}, or a function of the budget.
        out: folder of the sweep: a folder per run, results.csv, and results.parquet where pyarrow is installed. None:
            runs/ and the name of the file.
        jobs: runs at a time, a process of one thread each. None: as many as there are cores.
        executor: processes of this machine, or workers of a Ray cluster that see `out` under the same path.
        address: of the Ray cluster. None: a Ray of this machine's own.
        budget: what `configs` is called with if it is a function.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    out: Path | None = None
    jobs: int | None = None
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    budget: Literal["quick", "full"] | None = None


def run(arguments: list[str]) -> None:
    """Train what is missing, and print the tables; raises RuntimeError if a run failed."""
    given = tyro.cli(Sweep, args=arguments, prog="statemix sweep")
    entries = load_configs(given.file, given.budget)
    out = given.out or Path("runs") / given.file.stem
    done = sweep(entries, out, jobs=given.jobs, executor=given.executor, address=given.address)
    runs = [read_run(row["folder"]) for row in done.rows if row["status"] == "done"]
    print_tables(runs)
    print(
        f"{len(runs)} of {len(done.rows)} runs have ended; all are in {done.tables[0]}. statemix report {out}: a page."
    )
    if done.failed:
        errors = "".join(f"\n  {row['label']}: {row['error']}" for row in done.failed)
        raise RuntimeError(
            f"sweep: {len(done.failed)} of {len(done.rows)} runs failed; the same command tries them again:{errors}"
        )
