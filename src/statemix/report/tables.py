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


def group_tables(groups: Groups) -> list[list[list[str]]]:
    """Tables with a row per group: of sizes and time, of the validation, and of the test at each length.

    Each begins with its head, whose first cell says what the table is of. So none is wider for more lengths. If a run
    is on a text there are bits per byte, too. How several seeds are shown: `estimate`.
    """
    sizes = [["", "seeds", "parameters", "state", "steps", "tokens/s"]]
    for label, runs in groups.items():
        summaries = [run.summary for run in runs]
        cells = [label, str(len(runs)), f"{summaries[0]['parameters']:,}", f"{summaries[0]['state_size']:,}"]
        sizes.append(
            [*cells, *(estimate([s[key] for s in summaries], ",.0f") for key in ("steps", "train_tokens_per_s"))]
        )
    has_text = any("bits_per_byte" in run.summary["valid"] for runs in groups.values() for run in runs)
    scored = ACCURACIES | (BITS if has_text else {})
    tables = [sizes]
    for where in ["validation", *_tested(groups)]:
        head = where if where == "validation" else f"test, length {where}"
        rows = [[head, *scored]]
        for label, runs in groups.items():
            scores = [score for run in runs if (score := _scores(run, where)) is not None]
            if scores:
                rows.append(
                    [label, *(estimate([s[key] for s in scores if key in s], ".3f") for key in scored.values())]
                )
        tables.append(rows)
    return tables


def run_rows(groups: Groups) -> list[list[str]]:
    """A head and a row per run: its seed, steps, token accuracy on the validation and the first test, and time."""
    first = _tested(groups)[:1]
    rows = [["runs", "seed", "steps", "validation token", *(f"test {length} token" for length in first), "tokens/s"]]
    for label, runs in groups.items():
        for run in runs:
            scores = [_scores(run, where) for where in ("validation", *first)]
            accuracies = ["" if score is None else f"{score['token_accuracy']:.3f}" for score in scores]
            cells = [label, str(run.config.seed), f"{run.summary['steps']:,}", *accuracies]
            rows.append([*cells, f"{run.summary['train_tokens_per_s']:,.0f}"])
    return rows


def _tested(groups: Groups) -> list[str]:
    """The lengths of the tests, ascending."""
    return sorted({length for runs in groups.values() for run in runs for length in run.summary["test"]}, key=longest)


def _scores(run: Run, where: str) -> Mapping[str, Any] | None:
    """The scores of a run on the validation or on the test of a length; None if it has no such test."""
    return run.summary["valid"] if where == "validation" else run.summary["test"].get(where)


def estimate(numbers: Sequence[float], form: str) -> str:
    """Write a mean +- half of its 95 % interval.

    Of two numbers: mean (least-most). Of one, or where all are the same: the number. Of none: nothing.
    """
    if len(numbers) < 3 or len(set(numbers)) == 1:
        return _spread(numbers[:1] if len(set(numbers)) == 1 else numbers, form)
    mean, half_width, _ = interval(numbers)
    return f"{mean:{form}} ± {half_width:{form}}"


def align(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    rows = [[_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", cell) for cell in row] for row in rows]
    if markdown:
        rows = [[_MARKS.sub(r"\\\g<0>", cell) for cell in row] for row in rows]
        ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
