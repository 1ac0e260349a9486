"""One page of runs that opens from disk: tables and pictures in a single HTML file, for a screen of any width."""

import html
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import statemix
from statemix.files import write_whole
from statemix.report.figures import figures
from statemix.report.tables import Groups, align, group_rows
from statemix.runs.read import Run, row_of, write_table
from statemix.runs.select import group_over_seeds
from statemix.specs import file_name
from statemix.style import INK, render

PAGE_FILE, TABLE_FILE, TABLE_NAME = "report.html", "report.md", "runs"

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #656d76; --line: #d0d7de; --paper: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --paper: #0d1117; --card: #151b23; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
p, footer { color: var(--dim); margin: 0.5rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 9rem; max-width: 20rem; }
tr:last-child td { border-bottom: 0; } th { color: var(--dim); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  margin-top: 1rem; align-items: start; }
figure { margin: 0; padding: 0.5rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
figure svg { width: 100%; height: auto; display: block; }
"""


def write_report(runs: Sequence[Run], out: str | Path, notes: Sequence[str] = ()) -> list[Path]:
    """Write report.html, its tables as report.md and runs.csv, and its pictures as PNG and SVG.

    A section per task; in it, runs that differ only in their seed are one row and one line.

    Args:
        runs: finished ones, at least one.
        out: folder; made if it is not there.
        notes: sentences for the top of the page, such as what was left out.

    Returns:
        The files, the page first.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("report: `runs` must hold at least one finished run, got none.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    versions = sorted({run.summary["version"] for run in runs})
    notes = list(notes)
    if len(versions) > 1:
        notes.append(f"The runs are of several versions of statemix: {', '.join(versions)}.")
    files = write_table([row_of(run) for run in runs], out, TABLE_NAME)
    sections, text = [], []
    for task, groups in sections_of(runs).items():
        rows = group_rows(groups)
        text.append(f"## {task}\n\n{align(rows, markdown=True)}\n")
        pictures = []
        for name, figure in figures(groups).items():
            png, svg = (out / f"{file_name(task)}-{name}.{kind}" for kind in ("png", "svg"))
            drawing = render(figure, "svg")
            write_whole(png, render(figure, "png"))
            write_whole(svg, drawing)
            pictures.append(f"<figure>{inline(drawing, f'{task}-{name}')}</figure>")
            files += [png, svg]
        sections.append(f"<h2>{html.escape(task)}</h2>\n{table(rows)}\n<div class=figures>{''.join(pictures)}</div>")
    write_whole(out / TABLE_FILE, "\n".join([*notes, *text]).encode())
    write_whole(out / PAGE_FILE, page(sections, notes, len(runs)).encode())
    return [out / PAGE_FILE, out / TABLE_FILE, *files]


def sections_of(runs: Sequence[Run]) -> dict[str, Groups]:
    """Task name -> its groups."""
    names = dict.fromkeys(run.config.task["name"] for run in runs)
    return {name: group_over_seeds([run for run in runs if run.config.task["name"] == name]) for name in names}


def page(sections: Sequence[str], notes: Sequence[str], runs: int) -> str:
    """The HTML document: nothing in it is loaded from elsewhere."""
    remarks = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, statemix {statemix.__version__}"
    return f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>statemix: {runs} runs</title>
<style>{CSS}</style>
</head>
<body>
<h1>{runs} runs</h1>
<p>Token accuracy: right tokens over scored tokens. Sequence: sequences without a wrong token. Macro: the mean over
targets of their accuracy. Of several seeds: mean ± half of the 95 % interval (Student's t); bands in the curves are the
range of the seeds. Dotted lines: guessing. The checkpoint was chosen on the validation split; the test split was used
once.</p>
{remarks}
{"".join(sections)}
<footer>{made}</footer>
</body>
</html>
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, a head first, as an HTML table that scrolls sideways where it is too wide."""
    head, *body = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for row, tag in _tagged(rows)]
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table></div>"


def _tagged(rows: Sequence[Sequence[str]]) -> list[tuple[Sequence[str], str]]:
    return [(row, "td" if number else "th") for number, row in enumerate(rows)]


def inline(svg: bytes, name: str) -> str:
    """An SVG for a page: of the width it is given, in the page's text colour, with ids that no other one has."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{html.escape(name)}"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
