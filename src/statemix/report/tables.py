"""Tables of runs: html.py makes the page of them, figures.py its pictures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from statemix.runs.read import Run, longest
from statemix.runs.statistics import interval

Groups = Mapping[str, Sequence[Run]]  # label -> runs that differ in their seed

_UNSEEN = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what moves a terminal's cursor or ends a row
_MARKS = re.compile(r"[|<\\]")  # what ends a cell of Markdown, begins HTML, or makes of either a plain character

ACCURACIES = {"token": "token_accuracy", "sequence": "sequence_accuracy", "macro": "macro_accuracy"}
BITS = {"bits per byte": "bits_per_byte"}  # of runs on a text


def results_table(results: Mapping[str, Sequence[Mapping[str, Any]]], *, markdown: bool = False) -> str:
    """A row per label: parameters, state size, token and sequence accuracy at every tested length, training speed.

    Args:
        results: label -> the contents of result.json of its runs, one a seed. Several are shown as mean (least-most).
        markdown: as a Markdown table, and else aligned for a terminal.
    """
    lengths = list(dict.fromkeys(length for runs in results.values() for run in runs for length in run["test"]))
    rows = [["token / sequence accuracy", "parameters", "state", *(f"length {n}" for n in lengths), "tokens/s"]]
    for label, runs in results.items():
        cells = [label, f"{runs[0]['parameters']:,}", f"{runs[0]['state_size']:,}"]
        for length in lengths:
            tests = [run["test"][length] for run in runs if length in run["test"]]
            accuracies = [_spread([t[key] for t in tests], ".3f") for key in ("token_accuracy", "sequence_accuracy")]
            cells.append(" / ".join(filter(None, accuracies)))
        rows.append([*cells, _spread([run["train_tokens_per_s"] for run in runs], ",.0f")])
    return align(rows, markdown=markdown)


def _spread(numbers: Sequence[float], form: str) -> str:
    """Write a mean as "mean (least-most)", one number as it is, and nothing where there is none."""
    if not numbers:
        return ""
    mean = format(sum(numbers) / len(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):{form}}-{max(numbers):{form}})"


def group_rows(groups: Groups) -> list[list[str]]:
    """A head and a row per group: sizes, the validation, the three accuracies at every tested length, the time.

    If a run is on a text there are bits per byte, too.

    Several seeds are shown as mean +- half of the 95 % interval of Student's t.
    """
    lengths = sorted(
        {length for runs in groups.values() for run in runs for length in run.summary["test"]}, key=longest
    )
    has_text = any("bits_per_byte" in run.summary["valid"] for runs in groups.values() for run in runs)
    valids = {"token": "token_accuracy"} | (BITS if has_text else {})
    scored = ACCURACIES | (BITS if has_text else {})
    tests = [(length, name) for length in lengths for name in scored]
    head = ["", "seeds", "parameters", "state", *(f"valid {name}" for name in valids)]
    rows = [[*head, *(f"test {length} {name}" for length, name in tests), "steps", "tokens/s"]]
    for label, runs in groups.items():
        summaries = [run.summary for run in runs]
        cells = [label, str(len(runs)), f"{summaries[0]['parameters']:,}", f"{summaries[0]['state_size']:,}"]
        for key in valids.values():
            cells.append(_estimate_of(key, [summary["valid"] for summary in summaries]))
        for length, name in tests:
            scores = [summary["test"][length] for summary in summaries if length in summary["test"]]
            cells.append(_estimate_of(scored[name], scores))
        cells.append(estimate([summary["steps"] for summary in summaries], ",.0f"))
        rows.append([*cells, estimate([summary["train_tokens_per_s"] for summary in summaries], ",.0f")])
    return rows


def _estimate_of(key: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """The estimate of a figure over those runs that have it."""
    return estimate([score[key] for score in scores if key in score], ".3f")


def estimate(numbers: Sequence[float], form: str) -> str:
    """Write a mean +- half of its 95 % interval, one number as it is, and nothing where there is none."""
    if not numbers:
        return ""
    mean, half_width, _ = interval(numbers)
    return format(mean, form) if half_width is None else f"{mean:{form}} ± {half_width:{form}}"


def align(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    rows = [[_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", cell) for cell in row] for row in rows]
    if markdown:
        rows = [[_MARKS.sub(r"\\\g<0>", cell) for cell in row] for row in rows]
        ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
