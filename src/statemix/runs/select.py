"""Which runs belong together: those that differ in their seed alone, and the best of those that differ in options."""

import json
import math
import re
from collections.abc import Sequence

from statemix.runs.read import FIELDS, Row, Run, check_label, flatten, lineage_of, read_sweep


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
    """Runs that differ in their seed alone, and come from the same run, under a label that tells the groups apart.

    The label is the one a sweep's file gave all its runs, but for ", seed 0", "/seed=0" and so on at its end. Where
    there is none, or two groups have the same, it is the mixer and every option that is not the same in all groups that
    have it.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        whole = flatten(run.config) | lineage_of(run)
        key = json.dumps({name: value for name, value in whole.items() if name != "seed"})
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
    """What the file of a sweep called these runs, seeds apart; None if they are not of one name, or of none.

    Raises:
        ValueError: the file is not as the sweep wrote it.
    """
    names = set()
    for run in group:
        try:
            name = read_sweep(run.folder.parent, "runs")["labels"][run.folder.name]
        except (FileNotFoundError, KeyError):  # it is no run of a sweep
            return None
        check_label(name)
        names.add(re.sub(rf"[\s,;/_-]*(?<![^\W_])seed[\s=_-]?{run.config.seed}$", "", name) or name)
    name = names.pop()
    return None if names or name.isdecimal() else name  # a list of configs has numbers only
