"""One page of runs that opens from disk: tables and pictures in a single HTML file, for a screen of any width."""

import html
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import statemix
from statemix.files import write_whole
from statemix.report.figures import figures
from statemix.report.tables import Groups, align, group_tables, run_rows
from statemix.runs.read import RUN_FILES, Run, row_of, write_table
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
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin-top: 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
tr:last-child td { border-bottom: 0; } th { color: var(--dim); font-weight: 600; }
th:first-child { color: var(--ink); } td span { white-space: nowrap; }
a { color: inherit; } td a { margin-left: 0.5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem;
  margin-top: 1rem; align-items: start; }
figure { margin: 0; padding: 0.5rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
figure svg { width: 100%; height: auto; display: block; }
@media (max-width: 40rem) { /* a card for each row, in which every cell has its column's name above it */
  figure { padding: 0.2rem; }
  table, tbody { display: block; } th:not(:first-child) { display: none; } th:first-child:empty { padding: 0; }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; } th, td { border-bottom: 0; text-align: left; }
  th:first-child, td:first-child { grid-column: 1 / -1; font-weight: 600; padding-bottom: 0.1rem; }
  td { white-space: normal; padding-top: 0.1rem; }
  td:not(:first-child)::before { content: attr(data-column); display: block; color: var(--dim); font-size: 0.75rem; }
  td:last-child:has(a) { grid-column: 1 / -1; } td a:first-of-type { margin-left: 0; }
}
"""

_SPREAD = re.compile(r"(± \S+|\(\S+\))$")  # of an estimate: a narrow cell has it in a line of its own


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
    at = out.resolve()
    sections, text = [], []
    for task, groups in sections_of(runs).items():
        tables, single = group_tables(groups), run_rows(groups)
        folders = [run.folder for runs_of_label in groups.values() for run in runs_of_label]
        with_folders = [[*row, str(folder)] for row, folder in zip(single, ["folder", *folders], strict=True)]
        text += [f"## {task}\n", *(f"{align(rows, markdown=True)}\n" for rows in [*tables, with_folders])]
        pictures = []
        for name, figure in figures(groups).items():
            png, svg = (out / f"{file_name(task)}-{name}.{kind}" for kind in ("png", "svg"))
            drawing = render(figure, "svg")
            write_whole(png, render(figure, "png"))
            write_whole(svg, drawing)
            pictures.append(f"<figure>{inline(drawing, f'{task}-{name}')}</figure>")
            files += [png, svg]
        shown = "\n".join(map(table, tables))
        shown += f"\n<div class=figures>{''.join(pictures)}</div>\n"
        shown += table(single, "files", [links(folder, at) for folder in folders])
        sections.append(f"<h2>{html.escape(task)}</h2>\n{shown}")
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
targets of their accuracy. Of three seeds and more: mean ± half of the 95 % interval (Student's t); of two: mean
(least-most). Bands in the curves are the range of the seeds. Dotted lines: guessing. The checkpoint was chosen on the
validation split; the test split was used once.</p>
{remarks}
{"".join(sections)}
<footer>{made}</footer>
</body>
</html>
"""


def table(rows: Sequence[Sequence[str]], column: str = "", cells: Sequence[str] = ()) -> str:
    """Rows of cells, a head first, as an HTML table; `cells` are HTML for one more column of that name."""
    head, *body = rows
    names = [html.escape(name) for name in [*head, *([column] if cells else [])]]
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for number, row in enumerate(body):
        label, *figures = map(html.escape, row)
        filled = [label, *(_SPREAD.sub(r"<span>\1</span>", figure) for figure in figures), *cells[number : number + 1]]
        pairs = zip(names, filled, strict=True)
        lines.append("".join(f'<td data-column="{name}">{cell}</td>' for name, cell in pairs))
    return f"<div class=scroll><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def links(folder: Path, out: Path) -> str:
    """Links to a run's folder and files, of those there are, as seen from the page in `out`, an absolute path."""
    made = []
    for name, file in {"folder": "", **RUN_FILES}.items():
        path = folder.resolve() / file
        if path.exists():
            try:
                target = quote(Path(os.path.relpath(path, out)).as_posix())
            except ValueError:  # on another drive of Windows
                target = path.as_uri()
            made.append(f'<a href="{html.escape(target)}">{name}</a>')
    return " ".join(made)


def inline(svg: bytes, name: str) -> str:
    """An SVG for a page: of the width it is given, in the page's text colour, with ids that no other one has."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{html.escape(name)}"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
