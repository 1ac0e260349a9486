"""The tables and figures of the claims: results/NAME.csv and .png, and the tables in docs/claims/.

The pictures of `statemix bench` in results/bench are drawn again from their samples, too.

    python experiments/results.py                     draw all again from the committed tables
    python experiments/results.py --collect NAME...   first take results/NAME.csv from the sweep in runs/NAME

A table is the sweep's own: a row per run, with its config, seed and figures, and the machine it ran on.
"""

import argparse
import csv
import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import choose_m
import endless
import figures
import generation
import random_automata
import relu
import rivals
import shakespeare
import suite
import torch
from matplotlib.figure import Figure

from statemix import kernels
from statemix.benchmark.gpu.records import Records
from statemix.benchmark.gpu.results import roofline
from statemix.benchmark.results import plot, read_kept
from statemix.files import write_whole
from statemix.report.tables import align
from statemix.runs.read import write_table
from statemix.runs.statistics import interval
from statemix.scan import backend_problem
from statemix.style import render

RESULTS, RUNS, PAGES = Path("results"), Path("runs"), Path("docs/claims")

Row = dict[str, Any]


def main() -> None:
    """Collect what was asked for, then draw and write every table there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="+", default=[], metavar="NAME", choices=sorted(CLAIMS))
    arguments = parser.parse_args()
    for name in arguments.collect:
        collect(name)
    for name, (draw, table) in CLAIMS.items():
        if not (file := RESULTS / f"{name}.csv").exists():
            continue
        rows = read(file)
        if draw is not None:
            save(draw(rows), name)
        show(name, f"{align(table(rows), markdown=True)}\n\n{provenance(rows)}")
        print(f"{name}: {len(rows)} runs")
    for name, plain in PLAIN.items():
        if (file := RESULTS / f"{name}.csv").exists():
            show(name, align(plain(read(file)), markdown=True))
    if (file := RESULTS / "shakespeare.csv").exists():
        save(figures.shakespeare(read(file)), "shakespeare")
    for picture in sorted((RESULTS / "bench").glob("*.png")):
        write_whole(picture, measured(picture))
    show("efficiency", align(efficiency(), markdown=True))


def measured(picture: Path) -> bytes:
    """A picture of `statemix bench` again; of a card's records those of the last conditions."""
    if (samples := picture.with_suffix(".json")).exists():
        return plot(read_kept(samples))
    records = Records(picture.with_suffix(".jsonl"))
    *_, last = records
    conditions = last.partition("; ")[2]
    return roofline([record for key, record in records.items() if key.endswith(conditions)], conditions)


def save(figure: Figure, name: str) -> None:
    """Write results/NAME.png."""
    write_whole(RESULTS / f"{name}.png", render(figure, "png", dpi=120))


def efficiency() -> list[list[str]]:
    """Claim 5: training throughput at equal parameters over that of BD-LRU with M = 1: `statemix bench train-step`."""
    names = ("bdlru", "bdlru first layer", "hlru", "lstm", "mamba2")
    table = [["M x N of BD-LRU", "threads", "BD-LRU", "the same, of a table", "H-LRU, order M", "LSTM", "Mamba-2"]]
    for threads in (1, 2):
        groups = read_kept(RESULTS / f"bench/train-step-avx512-{threads}t.json")["groups"]
        times = [{c["name"]: c["median"] for c in group["contenders"]} for group in groups]
        for group, own in zip(groups, times, strict=True):
            speeds = [times[0]["bdlru"] / own[name] for name in names]
            table.append([group["size"], str(threads), *(f"{speed:.2f}" for speed in speeds)])
    return table


def collect(name: str) -> None:
    """Write results/NAME.csv from runs/NAME/results.csv: without the folders, with gradient norms and the machine."""
    isa = kernels.instruction_set() if backend_problem("cpu") is None else "no kernels"
    machine = f"{platform.system()} {platform.machine()}, {isa}, torch {torch.__version__.partition('+')[0]}"
    rows = []
    with (RUNS / name / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "unfinished":
                continue
            made: Row = {key: value for key, value in row.items() if key != "folder"} | {"machine": machine}
            made["error"] = row["error"].replace(f"{(RUNS / name).resolve()}/", "")  # a folder of this machine
            if row["folder"]:
                lines = (Path(row["folder"]) / "metrics.jsonl").read_text().splitlines()
                norms = [line["grad_norm"] for line in map(json.loads, lines) if "grad_norm" in line]
                made |= {"median_grad_norm": median(norms), "largest_grad_norm": max(norms)}
            rows.append(made)
    write_table(rows, RESULTS, name)


def read(file: Path) -> list[Row]:
    """The rows of a table, numbers as numbers."""

    def value(text: str) -> str | float:
        try:
            return float(text)
        except ValueError:
            return text

    with file.open(newline="") as lines:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(lines)]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one label, seeds apart."""
    made: dict[str, list[Row]] = {}
    for row in rows:
        made.setdefault(re.sub(r", seed \d+$", "", row["label"]), []).append(row)
    return made


def estimate(rows: Sequence[Row], key: str) -> str:
    """Mean ± half of the 95 % interval over the seeds that ended; how many did not, if any."""
    numbers = [row[key] for row in rows if row["status"] == "done" and row.get(key) != ""]
    failed = sum(row["status"] != "done" for row in rows)
    note = f" ({failed} of {len(rows)} diverged)" if failed else ""
    if not numbers:
        return note.strip()
    mean, half_width, _ = interval(numbers)
    return (f"{mean:.3f}" if half_width is None else f"{mean:.3f} ± {half_width:.3f}") + note


def tabulate(rows: Sequence[Row], columns: dict[str, str]) -> list[list[str]]:
    """A line per group: its label, sizes, and the estimate of each column."""
    table = [["", "seeds", "parameters of a mixer", "state", *columns]]
    for label, runs in groups(rows).items():
        ended = next((row for row in runs if row["status"] == "done"), None)
        sizes = [f"{ended[key]:,.0f}" if ended else "" for key in ("mixer_parameters", "state_size")]
        table.append([label, str(len(runs)), *sizes, *(estimate(runs, key) for key in columns.values())])
    return table


def provenance(rows: Sequence[Row]) -> str:
    """Where the figures of a table come from."""
    ended = [row for row in rows if row["status"] == "done"]
    seeds = sorted({int(row["seed"]) for row in ended})
    hours = sum(row["train_seconds"] for row in ended) / 3600
    machines = "; ".join(sorted({str(row["machine"]) for row in rows}))
    return (
        f"Mean ± half of the 95 % interval (Student's t) over seeds {', '.join(map(str, seeds))}; {len(rows)} runs "
        f"of one thread each, {hours:.1f} core hours of training. {machines}."
    )


def show(name: str, text: str) -> None:
    """Write a table between its marks, into the page of PAGES that has them."""
    page, content = fill(name, text)
    write_whole(page, content.encode())


def fill(name: str, text: str) -> tuple[Path, str]:
    """The page that has the marks of a table, and its content with the text between them.

    Raises:
        ValueError: no page has them, or more than one, or one has a mark twice.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pages = {page: page.read_text() for page in sorted(PAGES.glob("*.md"))}
    found = [page for page, content in pages.items() if begin in content or end in content]
    if len(found) != 1 or pages[found[0]].count(begin) != 1 or pages[found[0]].count(end) != 1:
        where = ", ".join(map(str, found)) or "no page"
        raise ValueError(f"results: one page of {PAGES} must have {begin!r} and {end!r} once each, got {where}.")
    content = pages[found[0]]
    return found[0], content[: content.index(begin) + len(begin)] + f"\n{text}\n" + content[content.index(end) :]


def accuracies(*lengths: int, kinds: Sequence[str] = ("token", "sequence")) -> dict[str, str]:
    """Columns of the test at some lengths."""
    return {f"{kind}, {length}": f"test_{length}_{kind}_accuracy" for length in lengths for kind in kinds}


def first_length(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows with the test at the task's own length under names without it, for tables of tasks of different lengths."""
    for row in rows:
        own = f"test_{row['task.seq_len']:.0f}_" if row["status"] == "done" else "-"
        yield row | {f"test_{key.removeprefix(own)}": value for key, value in row.items() if key.startswith(own)}


OWN = {"token": "test_token_accuracy", "sequence": "test_sequence_accuracy"}
BITS = {"test, bits per byte": "test_128_bits_per_byte", "validation": "valid_bits_per_byte"}
NORMS = {"largest gradient norm": "largest_grad_norm", "median": "median_grad_norm"}
CLAIMS: dict[str, tuple[Any, Any]] = {  # picture, or None where the table says it all, and table
    "state_tracking": (figures.state_tracking, lambda rows: tabulate(rows, accuracies(16, 32, 64))),
    "memory": (figures.memory, lambda rows: tabulate(list(first_length(rows)), OWN)),
    "structure": (figures.structure, lambda rows: tabulate(rows, accuracies(16))),
    "normalization": (figures.normalization, lambda rows: tabulate(list(first_length(rows)), OWN | NORMS)),
    "exact": (None, lambda rows: tabulate(rows, accuracies(64, 256, 1024, 4096, kinds=("sequence",)))),
    "language": (figures.language, lambda rows: tabulate(rows, BITS)),
    "regular": (figures.regular, lambda rows: tabulate(rows, accuracies(40, 80, 160, kinds=("token",)))),
}
# tables of scripts of their own, without a picture
PLAIN: dict[str, Callable[[Sequence[Row]], list[list[str]]]] = {
    "relu": relu.table,
    "endless": endless.table,
    "choose_m": choose_m.table,
    "shakespeare": shakespeare.table,
    "generation": generation.table,
    "suite": suite.table,
    "rivals": rivals.table,
    "random_automata": random_automata.table,
}

if __name__ == "__main__":
    main()
