"""Runs that have ended, as data: read from their folders, as rows of a table, grouped over seeds, selected.

A row is flat: the config under its dotted names ("optimizer.lr"), then what came of it: "valid_loss" and the other
figures of the best validation, "test_16_token_accuracy" and so on for each tested length.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import statemix
from statemix.files import write_whole
from statemix.tasks import build_task, scaled_accuracy
from statemix.training.checkpoint import CONFIG_FILE, METRICS_FILE, RESULT_FILE
from statemix.training.config import TrainConfig

SWEEP_FILE = "sweep.json"  # in the folder of a sweep, above those of its runs

Row = dict[str, Any]

FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
SUMMARY = ("parameters", "mixer_parameters", "state_size", "best_step", "train_tokens_per_s", "threads", "version")


class Run(NamedTuple):
    """A finished run: its folder, config, result.json and the lines of metrics.jsonl."""

    folder: Path
    config: TrainConfig
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


def read_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: a file is missing or damaged, or the run was written by a version of statemix whose files say
            something else; the message names folder and version.
    """
    path = Path(folder)
    try:
        summary = json.loads((path / RESULT_FILE).read_text())
        lines = (path / METRICS_FILE).read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        keys = set(summary)
    except FileNotFoundError as error:
        raise ValueError(f"runs: '{path}' is not a finished run: it has no {Path(error.filename).name}.") from error
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"runs: a file of '{path}' is damaged: {error}") from error
    missing = [key for key in (*SUMMARY, "steps", "valid", "test") if key not in keys]
    problem = f"{RESULT_FILE} has no `{missing[0]}`" if missing else None
    try:
        config = TrainConfig.load(path / CONFIG_FILE)
    except ValueError as error:
        problem = problem or str(error)
    if problem is not None:
        theirs = f"statemix {summary['version']}" if "version" in summary else "another version of statemix"
        raise ValueError(
            f"runs: '{path}' was written by {theirs}, this is {statemix.__version__}: {problem}. "
            "Read it with that version, or train again."
        )
    return Run(path, config, summary, metrics)


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The finished runs at or below each path, each once, in the order of their names.

    Raises:
        ValueError: a path does not exist or has no finished run, or a run cannot be read.
    """
    folders: dict[Path, Path] = {}  # by their resolved names: a folder has many
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"runs: '{path}' is not a folder.")
        found = sorted(file.parent for file in path.rglob(RESULT_FILE))
        if not found:
            raise ValueError(f"runs: there is no finished run in '{path}': no {RESULT_FILE} at or below it.")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [read_run(folder) for folder in folders.values()]


def unfinished_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The folders at or below each path that hold a run without a result: at work, stopped or failed."""
    folders = dict.fromkeys(file.parent for path in paths for file in sorted(Path(path).rglob(CONFIG_FILE)))
    return [folder for folder in folders if not (folder / RESULT_FILE).exists()]


def row_of(run: Run) -> Row:
    """The row of a run; the scaled accuracy of a task is 0 for guessing and 1 for no error."""
    chance = build_task(run.config.task).chance
    row = flatten(run.config) | {"trained_steps": run.summary["steps"], "train_seconds": train_seconds(run)}
    row |= {key: run.summary[key] for key in SUMMARY} | {"chance": chance}
    tests = {f"test_{length}": scores for length, scores in run.summary["test"].items()}
    for prefix, scores in ({"valid": run.summary["valid"]} | tests).items():
        row |= {f"{prefix}_{key}": value for key, value in scores.items() if key != "accuracy_by_position"}
        if chance < 1:
            row[f"{prefix}_scaled_accuracy"] = scaled_accuracy(scores["token_accuracy"], chance)
    return row | {"folder": str(run.folder)}


def flatten(config: TrainConfig) -> Row:
    """A config under its dotted names; what is no number, text, bool or None is written as JSON."""

    def walk(prefix: str, value: Any) -> Row:
        if isinstance(value, Mapping):
            parts = [walk(f"{prefix}.{key}", part) for key, part in value.items()]
            return {name: leaf for part in parts for name, leaf in part.items()}
        return {prefix: value if isinstance(value, int | float | str | None) else json.dumps(value)}

    return {name: leaf for key in FIELDS for name, leaf in walk(key, _plain(getattr(config, key))).items()}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def train_seconds(run: Run) -> float:
    """Time of the training steps alone, without start, validations and test, over all parts of an interrupted run."""
    tokens, seconds, before = run.config.batch_size * build_task(run.config.task).length, 0.0, 0
    for line in run.metrics:
        if "tokens_per_s" in line:
            seconds += (line["step"] - before) * tokens / line["tokens_per_s"]
            before = line["step"]
    return seconds


def write_table(rows: Sequence[Row], out: str | Path, name: str) -> list[Path]:
    """Write rows as NAME.csv and, where pyarrow is installed, as NAME.parquet. Returns the files."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    files = [Path(out) / f"{name}.csv"]
    write_whole(files[0], text.getvalue().encode())
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return files
    content = io.BytesIO()
    parquet.write_table(
        pyarrow.table({column: _column([row.get(column) for row in rows]) for column in columns}), content
    )
    files.append(Path(out) / f"{name}.parquet")
    write_whole(files[1], content.getvalue())
    return files


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: numbers, or texts where an option is sometimes a number and sometimes not."""
    kinds = {
        bool if isinstance(v, bool) else float if isinstance(v, int | float) else str for v in values if v is not None
    }
    return [None if v is None else str(v) for v in values] if len(kinds) > 1 else values


def select(rows: Sequence[Row], over: Sequence[str], by: str = "valid_loss") -> list[Row]:
    """Of runs that differ only in the options `over` and in the seed, those with the best mean validation.

    Choosing on the test split would make its figures too good. So the choice sees configs and validation figures only;
    what comes back are the whole rows.

    Args:
        rows: of finished runs, as `row_of` gives them; others are left out.
        over: dotted names of the options to choose, such as "optimizer.lr".
        by: the figure, a column that begins with "valid_"; of a loss the lowest is the best, else the highest.

    Returns:
        The rows of the chosen, all their seeds, in the order they came. A choice lost runs to errors if it has fewer
        seeds than another: then it is only chosen where all have as few.

    Raises:
        ValueError: `by` is not of the validation, or a name in `over` is no option of these runs.
    """
    if not by.startswith("valid_"):
        raise ValueError(f"select: `by` must be a figure of the validation split ('valid_...'), got {by!r}.")
    figures = sorted({column for row in rows for column in row if column.startswith("valid_")})
    if figures and by not in figures:
        raise ValueError(f"select: `by` must be one of {figures}, got {by!r}.")
    rows = [row for row in rows if by in row]
    known = {column for row in rows for column in row if column.split(".")[0] in FIELDS and column != "seed"}
    for name in over:
        if rows and name not in known:
            raise ValueError(f"select: `over` must hold names of {sorted(known)}, got {name!r}.")
    sign = 1 if by.endswith("loss") else -1
    candidates: dict[str, dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        setting = json.dumps({key: row.get(key) for key in sorted(known - set(over))})
        choice = json.dumps([row.get(key) for key in over])
        candidates.setdefault(setting, {}).setdefault(choice, []).append(number)

    def rank(numbers: list[int]) -> tuple[int, float]:
        figures = [sign * rows[number][by] for number in numbers]
        mean = sum(figures) / len(figures)
        return -len(figures), math.inf if math.isnan(mean) else mean

    chosen = [min(choices.values(), key=rank) for choices in candidates.values()]
    return [rows[number] for number in sorted(number for numbers in chosen for number in numbers)]


def group_over_seeds(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under a label that tells the groups apart.

    The label is the one a sweep's file gave all its runs, but for ", seed 0" and so on at its end. Where there is none,
    or two groups have the same, it is the mixer and every option that is not the same in all groups that have it.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps({name: value for name, value in flatten(run.config).items() if name != "seed"})
        groups.setdefault(key, []).append(run)
    options = [json.loads(key) for key in groups]
    values: dict[str, set[str]] = {}
    for option in options:
        for column, value in option.items():
            values.setdefault(column, set()).add(json.dumps(value))
    labels = {}
    given = [given_label(group) for group in groups.values()]
    for option, group, name in zip(options, groups.values(), given, strict=True):
        if name is not None and given.count(name) == 1:
            labels[name] = sorted(group, key=lambda run: run.config.seed)
            continue
        differing = [column for column in option if len(values[column]) > 1 and column != "mixer.name"]
        parts = [f"{column.rpartition('.')[2]}={option[column]}" for column in differing]
        labels[", ".join([option["mixer.name"], *parts])] = sorted(group, key=lambda run: run.config.seed)
    return labels


def given_label(group: Sequence[Run]) -> str | None:
    """What the file of a sweep called these runs, seeds apart; None if they are not of one name, or of none."""
    names = set()
    for run in group:
        try:
            labels = json.loads((run.folder.parent / SWEEP_FILE).read_text())["labels"]
            name = str(labels[run.folder.name])
        except (OSError, TypeError, ValueError, KeyError):  # it is no run of a sweep
            return None
        names.add(name.removesuffix(f", seed {run.config.seed}"))
    name = names.pop()
    return None if names or name.isdecimal() else name  # a list of configs has numbers only


class Interval(NamedTuple):
    """Mean of n numbers, and the half width of its 95 % interval: None of a single number."""

    mean: float
    half_width: float | None
    n: int


def interval(numbers: Sequence[float]) -> Interval:
    """Mean and Student's t interval at 95 %: mean +- t(0.975, n - 1) s / sqrt(n)."""
    n = len(numbers)
    mean = sum(numbers) / n
    if n == 1:
        return Interval(mean, None, n)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (n - 1))
    return Interval(mean, t_quantile(n - 1) * deviation / math.sqrt(n), n)


def t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = 0.95 for Student's distribution with so many degrees of freedom, by bisection."""
    low, high = 0.0, 13.0  # 12.706 at 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_probability(t: float, freedom: int) -> float:
    """P(|T| <= t). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
