"""Agents of four recurrent cores with as many parameters on popgym's games of memory: returns and speed.

    python experiments/agents.py --budget quick       writes results/agents_quick.csv; needs pip install 'statemix[rl]'

quick: 100,000 steps of each run. full: 1,000,000. smoke: two games, two updates, to see that everything runs. The runs
are made one after the other by examples/popgym_ppo.py; each has its line in the table as soon as it is done, and the
command, given again, makes those that are missing. It prints the table with intervals over the seeds.
"""

import argparse
import csv
import itertools
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from statemix.report.tables import align
from statemix.runs.read import Row, write_table
from statemix.runs.statistics import interval

EXAMPLE = Path(__file__).parents[1] / "examples" / "popgym_ppo.py"
GAMES = [
    "RepeatPreviousEasy",
    "RepeatFirstEasy",
    "AutoencodeEasy",
    "CountRecallEasy",
    "PositionOnlyCartPoleEasy",
    "VelocityOnlyCartPoleEasy",
    "HigherLowerEasy",
    "MultiarmedBanditEasy",
]
MIXERS = ["bd_lru", "h_lru", "gru", "lstm"]


class Budget(NamedTuple):
    """What is run: steps of each run, games, seeds."""

    steps: int
    games: Sequence[str]
    seeds: Sequence[int]


BUDGETS = {
    "smoke": Budget(4_096, GAMES[:2], [0]),
    "quick": Budget(100_000, GAMES, [0, 1, 2]),
    "full": Budget(1_000_000, GAMES, [0, 1, 2]),
}


def read(path: Path) -> list[Row]:
    """The runs that are done: game and mixer as they are, the others as numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("game", "mixer")
    return [{name: cell if name in texts else float(cell) for name, cell in row.items()} for row in rows]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return of each mixer by game, and environment steps per second of the processor, with 95 % intervals."""
    mixers = [mixer for mixer in MIXERS if any(row["mixer"] == mixer for row in rows)]
    lines = [["game", *(f"{mixer}, {what}" for what in ("return", "steps per CPU-s") for mixer in mixers)]]
    for game in dict.fromkeys(str(row["game"]) for row in rows):
        line = [game]
        for column, mixer in itertools.product(("mean_return", "steps_per_cpu_second"), mixers):
            numbers = [float(row[column] or 0) for row in rows if (row["game"], row["mixer"]) == (game, mixer)]
            line.append(cell(numbers, digits=3 if column == "mean_return" else 0))
        lines.append(line)
    return lines


def cell(numbers: Sequence[float], digits: int) -> str:
    """Mean and half width of the interval; of a single number itself; of none a dash."""
    if not numbers:
        return "-"
    mean, half_width, _ = interval(numbers)
    return f"{mean:,.{digits}f}" + ("" if half_width is None else f" ± {half_width:,.{digits}f}")


def main() -> None:
    """Make the runs that are missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="quick")
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ppo, budget = runpy.run_path(str(EXAMPLE), run_name="popgym_ppo"), BUDGETS[arguments.budget]
    name = f"agents_{arguments.budget}"
    rows = read(arguments.out / f"{name}.csv")
    done = {(row["game"], row["mixer"], row["seed"]) for row in rows}
    for seed, game, mixer in itertools.product(budget.seeds, budget.games, MIXERS):  # all of a seed before the next
        if (game, mixer, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = ppo["Config"](env=game, mixer=mixer, seed=seed, steps=budget.steps, out=Path(folder))
            *_, last = ppo["train"](config)
        rows.append({"game": game, "mixer": mixer, "seed": seed, **last._asdict()})
        write_table(rows, arguments.out, name)
        print(f"{game} {mixer} {seed}: return {last.mean_return:.3f}, {last.steps_per_second:,.0f} steps/s", flush=True)
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
