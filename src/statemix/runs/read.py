"""Runs that have ended, as data: read from their folders, and as rows of a table.

A row is flat: the config under its dotted names ("optimizer.lr"), then what came of it: "valid_loss" and the other
figures of the best validation, "test_16_token_accuracy" and so on for each tested length, and with sharpened gates
"sharpened_16_token_accuracy".
"""

import csv
import dataclasses
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import statemix
from statemix import records
from statemix.files import write_whole
from statemix.specs import NotImportedError
from statemix.tasks import build_task, scaled_accuracy
from statemix.training.checkpoint import CONFIG_FILE, LINE, METRICS_FILE, POINTER_FILE, RESULT, RESULT_FILE, read_result
from statemix.training.config import TrainConfig

LOG_FILE = "log.txt"  # in the folder of a run of a sweep: what it printed
RUN_FILES = {"config": CONFIG_FILE, "result": RESULT_FILE, "metrics": METRICS_FILE, "log": LOG_FILE}
SWEEP_FILE = "sweep.json"  # in the folder of a sweep, above those of its runs
SWEEP = {"version": str, "labels": {str: str}, "sha256": str}  # its form, see records.py; the digest is of the rest

Row = dict[str, Any]

UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # of Unicode: control characters, surrogates, ends of lines and paragraphs

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
        summary = records.read(path / RESULT_FILE, dict, "runs")
        metrics = records.read_lines(path / METRICS_FILE, LINE, "runs")
    except FileNotFoundError as error:
        raise ValueError(f"runs: '{path}' is not a finished run: it has no {Path(error.filename).name}.") from error
    problem = None
    try:
        records.check(summary, RESULT)
    except ValueError as error:
        problem = f"in {RESULT_FILE} {error}"
    try:
        config = TrainConfig.load(path / CONFIG_FILE)
    except NotImportedError:  # it says what to do
        raise
    except ValueError as error:
        problem = problem or str(error)
    if problem is not None:
        version = summary.get("version")
        if version == statemix.__version__:
            raise ValueError(f"runs: '{path}' cannot be read: {problem}")
        theirs = f"statemix {version}" if isinstance(version, str) else "another version of statemix"
        raise ValueError(
            f"runs: '{path}' was written by {theirs}, this is {statemix.__version__}: {problem}. "
            "Read it with that version, or train again."
        )
    return Run(path, config, read_result(path, "runs"), metrics)


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
    names = (CONFIG_FILE, POINTER_FILE)  # one of them may have been lost
    folders = dict.fromkeys(file.parent for path in paths for name in names for file in sorted(Path(path).rglob(name)))
    return [folder for folder in folders if not (folder / RESULT_FILE).exists()]


def longest(tested: str) -> int:
    """The longest length of a test, by its name in result.json: a length, or a range such as "40-256"."""
    return int(tested.rpartition("-")[2])


def sweep_json(labels: Mapping[str, str], version: str = statemix.__version__) -> bytes:
    """The content of a sweep.json: the version that made it, and the labels of its runs by their names."""
    made = {"version": version, "labels": dict(labels)}
    return (json.dumps(made | {"sha256": _digest_of(made)}, indent=2) + "\n").encode()


def read_sweep(folder: Path, owner: str, remedy: str = "") -> dict[str, Any]:
    """The sweep.json in a folder. Raises as `records.read`, also where it is not as it was written."""
    path = folder / SWEEP_FILE
    made: dict[str, Any] = records.read(path, SWEEP, owner, remedy)
    if made["sha256"] != _digest_of({key: made[key] for key in ("version", "labels")}):
        raise records.damaged(owner, path, "its `sha256` is not that of `version` and `labels`", remedy)
    return made


def _digest_of(made: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def row_of(run: Run) -> Row:
    """The row of a run; the scaled accuracy of a task is 0 for guessing and 1 for no error."""
    chance = build_task(run.config.task).chance
    row = (
        flatten(run.config)
        | lineage_of(run)
        | {"trained_steps": run.summary["steps"], "train_seconds": train_seconds(run)}
    )
    row |= {key: run.summary[key] for key in SUMMARY} | {"chance": chance}
    tests = {f"test_{length}": scores for length, scores in run.summary["test"].items()}
    tests |= {f"sharpened_{length}": scores for length, scores in run.summary.get("sharpened", {}).items()}
    for prefix, scores in ({"valid": run.summary["valid"]} | tests).items():
        row |= {f"{prefix}_{key}": value for key, value in scores.items() if key != "accuracy_by_position"}
        if chance < 1:
            row[f"{prefix}_scaled_accuracy"] = scaled_accuracy(scores["token_accuracy"], chance)
    return row | {"folder": str(run.folder)}


def lineage_of(run: Run) -> Row:
    """What a config does not say: whose weights came first, and after which steps the run was lengthened, or None."""
    steps = [str(part["step"]) for part in run.summary.get("lengthened", [])]
    return {"init_from": run.summary.get("init_from", {}).get("folder"), "lengthened": " ".join(steps) or None}


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
    tokens, seconds, before = run.config.step_tokens, 0.0, 0
    for line in run.metrics:
        if "tokens_per_s" in line:
            seconds += (line["step"] - before) * tokens / line["tokens_per_s"]
            before = line["step"]
    return seconds


def check_label(label: str) -> None:
    """Raise ValueError if a label has a character that is none to look at, or half of one."""
    if wrong := [character for character in label if unicodedata.category(character) in UNSEEN]:
        raise ValueError(f"sweep: `label` must have no control characters, got {label!a} with {wrong[0]!a}.")


def write_table(rows: Sequence[Row], out: str | Path, name: str) -> list[Path]:
    """Write rows as NAME.csv and, where pyarrow is installed, as NAME.parquet. Returns the files.

    The folder is made if it is not there. A text that a spreadsheet would take for a formula has an apostrophe before
    it in the CSV.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)
    Path(out).mkdir(parents=True, exist_ok=True)
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


def _cell(value: Any) -> Any:
    """A value of a CSV: numbers as they are, a text so that it stays one."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: numbers, or texts where an option is sometimes a number and sometimes not."""
    kinds = {
        bool if isinstance(v, bool) else float if isinstance(v, int | float) else str for v in values if v is not None
    }
    return [None if v is None else str(v) for v in values] if len(kinds) > 1 else values
