"""report/: what tables say, what pictures show, and a page that needs nothing else."""

import dataclasses
import html
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import browse, needs_chromium
from PIL import Image
from run_helpers import NEEDING_SPACE, disk, disk_is_full, snapshot

from statemix import TrainConfig
from statemix.report.figures import WIDTH, figures
from statemix.report.html import inline, sections_of, write_report
from statemix.report.tables import align, estimate, group_tables, results_table, run_rows
from statemix.runs.read import Run
from statemix.runs.statistics import bounds
from statemix.training.curves import plot_curves


def result(parameters, state, speed, **test):
    """A result.json with token and sequence accuracy by length: l8=(0.5, 0.25)."""
    scores = {n[1:]: {"token_accuracy": token, "sequence_accuracy": whole} for n, (token, whole) in test.items()}
    return {"parameters": parameters, "state_size": state, "train_tokens_per_s": speed, "test": scores}


RESULTS = {
    "bd_lru": [
        result(12345, 48, 100000.4, l8=(1.0, 0.9996), l64=(0.5, 0.0)),
        result(12345, 48, 300000.4, l8=(0.5, 0.9994)),
    ],
    "lstm, one run": [result(1000, 1024, 99.6, l8=(0.98765, 0.125), l128=(0.25, 0.0))],
}
CELLS = [
    ["parameters", "state", "length 8", "length 64", "length 128", "tokens/s"],
    ["12,345", "48", "0.750 (0.500-1.000) / 1.000 (0.999-1.000)", "0.500 / 0.000", "", "200,000 (100,000-300,000)"],
    ["1,000", "1,024", "0.988 / 0.125", "", "0.250 / 0.000", "100"],
]


def test_a_markdown_table_has_a_row_per_label_and_a_column_per_length():
    lines = results_table(RESULTS, markdown=True).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert rows[1] == ["---", *["---:"] * 6]
    assert [row[0] for row in rows[2:]] == list(RESULTS)
    assert [row[1:] for row in (rows[0], *rows[2:])] == CELLS


def test_no_label_breaks_a_table():
    rows = [["", "a"], ["x|y\\|z", "<b>"], ["new\nline\u2028\x1b[2J\x9b\ud800", "1"]]
    text = align(rows, markdown=True)
    assert text.encode().decode().splitlines() == [
        "|  | a |",
        "| --- | ---: |",
        r"| x\|y\\\|z | \<b> |",
        "| new\N{REPLACEMENT CHARACTER}line\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J"
        "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} | 1 |",
    ]
    lines = align(rows, markdown=False).splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 3
    assert lines[1].split() == ["x|y\\|z", "<b>"]


def test_a_table_for_the_terminal_has_the_same_cells_aligned():
    lines = results_table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    # cells have no two blanks in a row, and an empty one is seen by the place of its neighbours
    assert [re.split(r" {2,}", line)[1:] for line in lines] == [[cell for cell in row if cell] for row in CELLS]
    assert [line.split("  ")[0] for line in lines[1:]] == list(RESULTS)
    for text in ("48", "1,024"):
        assert any(line.find(text) + len(text) == lines[0].find("state") + len("state") for line in lines[1:]), text
    assert lines[2].find("0.250 / 0.000") + 13 == lines[0].find("length 128") + 10


@pytest.mark.parametrize("markdown", [False, True])
def test_a_table_of_one_run(markdown):
    one = {"h_lru": [result(7, 3, 5.0, l16=(0.5, 0.125))]}
    lines = results_table(one, markdown=markdown).splitlines()
    assert len(lines) == 2 + markdown
    assert re.search(r"h_lru[ |]+7[ |]+3[ |]+0\.500 / 0\.125[ |]+5\b", lines[-1])


def metrics(steps=5, start=2.0):
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": start / step, "token_accuracy": 1 - 1 / (step + 1), "tokens_per_s": 10.0})
        lines.append({"step": step, "valid_loss": start / step + 0.1, "valid_token_accuracy": 1 - 1 / (step + 1)})
    return lines


def colored(path, rgb) -> int:
    """Number of pixels of this color, exactly."""
    return int((np.asarray(Image.open(path).convert("RGB")) == rgb).all(-1).sum())


FIRST, SECOND = ((0, 114, 178), (213, 94, 0))  # the first two colours of a picture


def test_a_png_shows_every_run_in_its_color(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_curves({"bd_lru": metrics()}, one)
    plot_curves({"bd_lru": metrics(), "lstm": metrics(start=1.0)}, two, title="S3", chance=1 / 6)
    for path in (one, two):
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("PNG", (1500, 675))
    assert colored(one, FIRST) > 500
    assert colored(one, SECOND) == 0
    assert colored(two, SECOND) > 500


def test_an_svg_and_a_pdf_are_of_their_kind(tmp_path):
    plot_curves({"bd_lru": metrics()}, tmp_path / "curves.svg")
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "720pt"
    plot_curves({"bd_lru": metrics()}, str(tmp_path / "curves.pdf"))
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF-")


# warnings are errors here, so that these also show that matplotlib has none
POOR = {
    "one step": {"run": metrics(steps=1)},
    "no validation": {"run": [line for line in metrics() if "loss" in line]},
    "only validation": {"run": [line for line in metrics() if "loss" not in line]},
    "no lines": {"run": []},
    "no runs": {},
    "one run of two without lines": {"empty": [], "run": metrics()},
    "loss 0 on a log scale": {"run": [{"step": s, "loss": 0.0, "token_accuracy": 1.0} for s in (1, 2)]},
    "loss nan": {"run": [{"step": s, "loss": math.nan, "token_accuracy": 0.0} for s in (1, 2)]},
}


@pytest.mark.parametrize("case", POOR)
def test_a_picture_of_few_points(tmp_path, case):
    path = tmp_path / "curves.png"
    plot_curves(POOR[case], path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (1500, 675)
    if case in ("one step", "only validation"):
        assert colored(path, FIRST) > 50


@pytest.mark.parametrize("name", ["curves.xyz", "curves"])
def test_an_unknown_ending_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"(?s)(ending|[Ff]ormat|suffix).*png"):
        plot_curves({"bd_lru": metrics()}, tmp_path / name)
    assert snapshot(tmp_path) == {}


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"the picture of yesterday")
    old = snapshot(tmp_path)
    with disk(tmp_path, NEEDING_SPACE) as changes:
        plot_curves({"bd_lru": metrics(steps=1)}, tmp_path / "dry.png")
    (tmp_path / "dry.png").unlink()
    assert any(change.startswith("write") for change in changes)
    for at in range(1, len(changes) + 1):
        with disk(tmp_path, NEEDING_SPACE, at, disk_is_full), pytest.raises(OSError, match="No space left on device"):
            plot_curves({"bd_lru": metrics(steps=1)}, path)
        assert snapshot(tmp_path) == old, changes[at - 1]


# ---- groups of runs


MIXERS = {
    0.9: {"name": "bd_lru", "num_blocks": 16, "block_size": 3},
    0.5: {"name": "bd_lru", "num_blocks": 48, "block_size": 1},
    0.8: {"name": "lstm", "hidden_size": 39},
}


def scores(accuracy: float) -> dict:
    names = ("token_accuracy", "sequence_accuracy", "macro_accuracy", "mad_accuracy")
    return {"loss": 2 - accuracy} | {name: accuracy / (i + 1) for i, name in enumerate(names)}


def made_runs(tasks=("permutation",), lengths=(16, 64), seeds=(0, 1, 2)) -> list[Run]:
    """Runs that never were: the accuracy of a mixer is its key, plus a hundredth a seed; the LSTM has one seed."""
    runs = []
    for task in tasks:
        for accuracy, mixer in MIXERS.items():
            for seed in seeds if mixer["name"] == "bd_lru" else seeds[:1]:
                config = TrainConfig(task={"name": task, "seq_len": 16}, mixer=mixer, seed=seed, test_lengths=lengths)
                own = accuracy + seed / 100
                summary = {"parameters": 12345, "mixer_parameters": 99, "state_size": 48, "steps": 600, "threads": 1}
                summary |= {"best_step": 500, "train_tokens_per_s": 5e4 + seed, "version": "0.1.0"}
                summary |= {"valid": scores(own), "test": {str(n): scores(own * 16 / n) for n in lengths}}
                runs.append(Run(Path(f"runs/{task}-{accuracy}-{seed}"), config, summary, metrics(start=3 - own)))
    return runs


def test_an_estimate_is_a_mean_and_its_interval():
    assert estimate([0.9, 0.91, 0.92], ".3f") == "0.910 ± 0.025"  # t 4.303, deviation 0.01, root of 3
    assert bounds([0.9, 0.91, 0.92]) == pytest.approx((0.91 - 0.02484, 0.91 + 0.02484), abs=1e-5)
    assert estimate([0.5], ".3f") == "0.500"
    assert estimate([], ".3f") == ""
    assert estimate([1.0, 1.0, 1.0], ".3f") == "1.000"


def test_two_seeds_have_a_range_and_no_interval():
    """Student's t of one degree of freedom is 12.7: 7,329 of 6,508 and 8,150 would be 7,329 ± 10,433."""
    assert estimate([8150.0, 6508.0], ",.0f") == "7,329 (6,508-8,150)"
    assert bounds([0.5, 0.25]) == (0.25, 0.5)
    assert bounds([0.5]) == (0.5, 0.5)
    [groups] = sections_of(made_runs(seeds=(0, 1))).values()
    drawn = figures(groups)
    [bars] = drawn["accuracy"].axes
    [whisker] = bars.collections[0].get_segments()
    assert whisker[:, 0] == pytest.approx([0.9, 0.91])
    [lengths] = drawn["lengths"].axes
    assert lengths.collections[0].get_segments()[1][:, 1] == pytest.approx([0.9 / 4, 0.91 / 4])


def test_tables_of_groups():
    [groups] = sections_of(made_runs()).values()
    sizes, validation, short, long = group_tables(groups)
    labels = ["bd_lru, num_blocks=16, block_size=3", "bd_lru, num_blocks=48, block_size=1", "lstm"]
    assert sizes[0] == ["", "seeds", "parameters", "state", "steps", "tokens/s"]
    assert sizes[1] == [labels[0], "3", "12,345", "48", "600", "50,001 ± 2"]
    assert sizes[3] == ["lstm", "1", "12,345", "48", "600", "50,000"]
    for rows, head in ((validation, "validation"), (short, "test, length 16"), (long, "test, length 64")):
        assert rows[0] == [head, "token", "sequence", "macro"]
        assert [row[0] for row in rows[1:]] == labels
    assert validation[1][1:] == short[1][1:] == ["0.910 ± 0.025", "0.455 ± 0.012", "0.303 ± 0.008"]
    assert long[1][1] == "0.228 ± 0.006"
    assert long[3][1:] == ["0.200", "0.100", "0.067"]
    assert len(align(sizes, markdown=True).splitlines()) == 5


def test_a_row_for_each_run():
    [groups] = sections_of(made_runs()).values()
    rows = run_rows(groups)
    assert rows[0] == ["runs", "seed", "steps", "validation token", "test 16 token", "tokens/s"]
    assert rows[2] == ["bd_lru, num_blocks=16, block_size=3", "1", "600", "0.910", "0.910", "50,001"]
    assert len(rows) == 1 + 3 + 3 + 1


def test_a_length_that_only_some_runs_were_tested_at_has_their_rows():
    runs = [*made_runs(lengths=(16, 64), seeds=(0,)), *made_runs(lengths=(16, 32), seeds=(0,))[:1]]
    tables = group_tables(sections_of(runs)["permutation"])
    assert [rows[0][0] for rows in tables[2:]] == ["test, length 16", "test, length 32", "test, length 64"]
    assert [row[1] for row in tables[3][1:]] == ["0.450"]


def test_runs_on_a_text_show_bits_per_byte_and_others_beside_them_none():
    groups = sections_of(made_runs(lengths=(16,), seeds=(0, 1)))["permutation"]
    text, *_ = groups
    for bits, run in zip((2.0, 2.5), groups[text], strict=True):
        run.summary["valid"]["bits_per_byte"] = bits
        run.summary["test"]["16"]["bits_per_byte"] = bits + 1
    _, validation, test = group_tables(groups)
    assert validation[0][-1] == test[0][-1] == "bits per byte"
    assert (validation[1][-1], test[1][-1]) == (estimate([2.0, 2.5], ".3f"), estimate([3.0, 3.5], ".3f"))
    assert (validation[2][-1], test[2][-1]) == ("", "")


class Page(HTMLParser):
    """Tags that are open at the end or close another, what would be loaded from elsewhere, links, ids, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.wrong, self.loaded, self.links, self.ids, self.text = [], [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if tag == "a":
                self.links.append(value)
            elif name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.loaded.append((tag, name, value))
            if name == "id":
                self.ids.append(value)
        if tag in ("script", "link", "iframe", "object"):
            self.loaded.append((tag, "", ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two tasks, with a note; its folder."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    files = write_report(made_runs(("permutation", "cycle-navigation")), out, ["Left out: <runs/a>."])
    assert files[0] == out / "report.html"
    assert sorted(files) == sorted(out.iterdir())
    return out


def test_the_page_is_whole_and_loads_nothing(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert (page.open, page.wrong, page.loaded) == ([], [], [])
    assert len(page.ids) == len(set(page.ids)) > 50  # of eight drawings in one document
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    assert {a or b for a, b in used} <= set(page.ids)
    assert '<meta name=viewport content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # the names of SVG's own vocabularies
    assert "Left out: <runs/a>." in page.text
    groups = sections_of(made_runs(("permutation",)))["permutation"]
    for rows in [*group_tables(groups), run_rows(groups)]:
        assert all(cell in page.text for row in rows for cell in row)
    assert page.links == []  # of these runs there are no folders
    assert text.count("<svg") == 8  # bars, loss, accuracy and lengths of each task
    assert "#3a3b3c" not in text  # drawn in the colour of the text, in the dark too


def test_each_run_has_links_to_its_files(tmp_path):
    run = made_runs(seeds=(0,), lengths=(16,))[0]._replace(folder=tmp_path / "of 100 %" / "run#1")
    run.folder.mkdir(parents=True)
    names = ("config.json", "result.json", "metrics.jsonl")  # and no log: it was no run of a sweep
    for name in names:
        (run.folder / name).touch()
    page, *_ = write_report([run], tmp_path / "reports" / "one")
    links = Page(page.read_text()).links
    assert links[1:] == [f"../../of%20100%20%25/run%231/{name}" for name in names]
    assert all((page.parent / unquote(link)).exists() for link in links)
    assert f"| 0 | 600 | 0.900 | 0.900 | 50,000 | {run.folder} |" in (page.parent / "report.md").read_text()


def test_the_report_has_its_tables_and_pictures_as_files(report):
    markdown = (report / "report.md").read_text()
    assert markdown.startswith("Left out: <runs/a>.\n## permutation\n\n|  | seeds |")
    assert markdown.count("| lstm | 1 | 12,345 |") == 2
    assert len((report / "runs.csv").read_text().splitlines()) == 1 + 14
    names = {f"{task}-{name}" for task in ("permutation", "cycle-navigation") for name in FIGURES}
    assert {path.stem for path in report.glob("*.png")} == {path.stem for path in report.glob("*.svg")} == names
    for path in report.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for path in report.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.size[0] == WIDTH * 160
    assert colored(report / "permutation-accuracy.png", FIRST) > 1000


FIGURES = ("accuracy", "loss", "learning", "lengths")


def test_the_same_runs_give_the_same_pictures(report, tmp_path):
    write_report(made_runs(), tmp_path)
    for path in report.glob("permutation-*"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_figures_show_means_intervals_and_guessing():
    [groups] = sections_of(made_runs()).values()
    drawn = figures(groups)
    assert tuple(drawn) == FIGURES
    [bars] = drawn["accuracy"].axes
    assert bars.get_title(loc="left") == "test token accuracy at length 16"
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.91, 0.51, 0.8])
    [learning] = drawn["learning"].axes
    assert list(learning.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert learning.lines[-1].get_ydata()[0] == pytest.approx(1 / 6)
    [loss] = drawn["loss"].axes
    mean_of_seeds = [2.09 / step + 0.1 for step in range(1, 6)]
    assert list(loss.lines[0].get_ydata()) == pytest.approx(mean_of_seeds)
    assert sorted(text.get_text().replace("\n", " ") for text in loss.texts) == sorted(groups)
    [lengths] = drawn["lengths"].axes
    mean_line = lengths.lines[0]
    assert list(mean_line.get_xdata()) == [16, 64]
    assert list(mean_line.get_ydata()) == pytest.approx([0.91, 0.91 / 4])


def test_the_lengths_of_a_picture_do_not_run_into_each_other():
    [groups] = sections_of(made_runs(lengths=tuple(2**n for n in range(4, 13)))).values()
    figure = figures(groups)["lengths"]
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "4,096"
    assert len(boxes) >= 4
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_runs_of_one_length_have_no_picture_of_lengths_and_many_groups_fit():
    runs = made_runs(lengths=(16,), seeds=(0,))
    many = [
        run._replace(config=dataclasses.replace(run.config, batch_size=size)) for run in runs for size in range(1, 9)
    ]
    drawn = figures(sections_of(many)["permutation"])
    assert "lengths" not in drawn
    for figure in drawn.values():  # a warning, which is an error here, says that the axes have no room left
        figure.draw_without_rendering()
        assert figure.axes[0].get_position().height * figure.get_figheight() > 1.5


def test_a_report_of_nothing_and_of_several_versions(tmp_path):
    with pytest.raises(ValueError, match=r"^report: `runs` must hold at least one finished run, got none\.$"):
        write_report([], tmp_path)
    one, two = made_runs(seeds=(0,), lengths=(16,))[:2]
    two = two._replace(summary=two.summary | {"version": "0.2.0"})
    write_report([one, two], tmp_path)
    assert "of several versions of statemix: 0.1.0, 0.2.0." in (tmp_path / "report.md").read_text()


def test_labels_cannot_break_the_page():
    svg = b'<?xml version="1.0"?>\n<svg width="360pt" height="9pt" id="a"><use href="#a"/><metadata>x</metadata></svg>'
    assert inline(svg, 'a"b<') == '<svg role="img" aria-label="a&quot;b&lt;" id="a-b--a"><use href="#a-b--a"/></svg>'


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path, width, dark):
    """Nor is a table cut: it is in a frame of that width, which tells how wide its parts are, and a picture is taken.

    A window of Chromium cannot be as narrow as a telephone.
    """
    lengths = (16, 32, 64, 128, 256, 512, 1024)
    report, *_ = write_report(made_runs(("permutation", "cycle-navigation"), lengths, (0, 1)), tmp_path)
    frame = f"""<body style="margin: 0"><iframe srcdoc="{html.escape(report.read_text())}"
        style="width: {width}px; height: 1400px; border: 0"></iframe><script>
        const measure = part => part.scrollWidth - part.clientWidth
        onload = () => {{ const inside = document.querySelector("iframe").contentDocument
        const cut = [...inside.querySelectorAll(".scroll"), inside.documentElement].map(measure)
        document.title = [inside.defaultView.innerWidth, cut.length, Math.max(...cut)] }}</script>"""
    page = tmp_path / "page.html"
    page.write_text(frame)
    options = [f"--window-size={max(width, 500)},1400", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    dumped = browse(page, *options, "--dump-dom")
    [measured] = re.findall(r"<title>(\d+,\d+,-?\d+)</title>", dumped)
    tables = 2 * (1 + 1 + len(lengths) + 1)  # sizes, validation, tests, runs
    assert measured == f"{width},{tables + 1},0"
    browse(page, *options, f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)[:, :width]
    paper, ink = ((13, 17, 23), (230, 237, 243)) if dark else ((255, 255, 255), (31, 35, 40))
    assert tuple(pixels[0, 0]) == paper
    assert (abs(pixels - ink).sum(-1) < 30).sum() > 200  # text
