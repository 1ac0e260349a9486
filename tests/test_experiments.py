"""The experiments: their sweeps are made of valid configs, and what docs/claims/ shows is what the tables say."""

import csv
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from model_helpers import solved_model

from statemix import TrainConfig, train
from statemix.analysis.automata import NONE, Automaton
from statemix.runs.read import find_runs
from statemix.sizing import measure

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
TABLES = sorted(path.stem for path in (ROOT / "results").glob("*.csv"))
DRAWN_ELSEWHERE = ("inside-", "quickstart")  # by experiments/inside.py and quickstart.py, from runs
AGAINST_THE_CLOCK = {"generation", "shakespeare"}  # each wants the whole machine: one run of each


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def experiment(name: str) -> dict:
    """The names of a file of experiments/, which is not run."""
    return runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name=name)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        return experiment("results")


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_every_sweep_is_of_valid_configs_and_has_seeds(results, budget):
    for name in (*results["CLAIMS"], "random_automata"):
        configs = experiment(name)["configs"](budget)
        assert all(isinstance(config, TrainConfig) for config in configs.values())
        seeds = {config.seed for config in configs.values()}
        assert len(seeds) >= 3
        assert all(label.endswith(f", seed {config.seed}") for label, config in configs.items())
        assert len({config.to_json() for config in configs.values()}) == len(configs)


def test_the_rivals_of_the_suite_have_its_protocol_and_as_many_parameters(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    rivals = experiment("rivals")
    own = rivals["config"]("parity", rivals["OWN"], 3e-3, 1)
    assert own.mixer["name"] == "bd_lru"
    size, _ = measure(own.mixer, own.model.d_model)
    for name in rivals["RIVALS"]:
        rival = rivals["config"]("parity", name, 3e-3, 1)
        assert measure(rival.mixer, rival.model.d_model)[0] == pytest.approx(size, rel=0.1), name
        for field in ("task", "model", "optimizer", "steps", "batch_size", "seed", "test_lengths"):
            assert getattr(rival, field) == getattr(own, field), (name, field)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_whole_runs(name):
    with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if name not in AGAINST_THE_CLOCK:
        assert {int(row["seed"]) for row in rows} >= {0, 1, 2}
    if "task.name" in rows[0]:  # of a sweep
        assert all(row["status"] == "done" or row["error"] for row in rows)
        assert all(row["machine"] for row in rows)
        assert not any("'/" in row["error"] or " /" in row["error"] for row in rows)  # no folder of a machine


def test_the_page_shows_what_the_tables_say(results):
    for name, (draw, table) in results["CLAIMS"].items():
        if name not in TABLES:
            continue
        rows = results["read"](ROOT / "results" / f"{name}.csv")
        text = f"{results['align'](table(rows), markdown=True)}\n\n{results['provenance'](rows)}"
        page, content = results["fill"](name, text)
        assert content == page.read_text(), f"run `make results`: {name}"
        assert (draw is not None) == (ROOT / "results" / f"{name}.png").exists()
        assert draw is None or isinstance(draw(rows), Figure)
        changed = [row | {"test_16_token_accuracy": 0.123} for row in rows]
        if "test_16_token_accuracy" in rows[0]:
            assert table(changed) != table(rows)


def test_the_page_shows_the_plain_tables_too(results):
    shown_at_all = [name for name in results["PLAIN"] if name in TABLES]
    assert shown_at_all
    for name in shown_at_all:
        table = results["PLAIN"][name]
        lines = table(results["read"](ROOT / "results" / f"{name}.csv"))
        page, content = results["fill"](name, results["align"](lines, markdown=True))
        assert content == page.read_text(), f"run `make results`: {name}"


def test_the_page_shows_the_measured_speeds(results):
    page, content = results["fill"]("efficiency", results["align"](results["efficiency"](), markdown=True))
    assert content == page.read_text(), "run `make results`"


def test_results_draws_every_picture_again_and_leaves_the_pages_as_they_are(results, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs" / "claims", tmp_path / "docs" / "claims")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    pictures = {path for path in tmp_path.rglob("*.png") if not path.name.startswith(DRAWN_ELSEWHERE)}
    for path in pictures:
        path.write_bytes(b"")
    results["main"]()
    assert [path.name for path in pictures if not path.read_bytes().startswith(b"\x89PNG")] == []
    for page in (tmp_path / "docs" / "claims").iterdir():
        assert page.read_text() == (ROOT / "docs" / "claims" / page.name).read_text(), page.name


def test_an_automaton_is_verified_once(tmp_path):
    automata = experiment("random_automata")
    made = automata["configs"]("quick")
    assert sum(label.startswith("BD-LRU, 32 states") for label in made) >= 20
    assert len({config.to_json() for config in made.values()}) == len(made)
    own = {"name": "bd_lru", "num_blocks": 2, "block_size": 3}
    config = replace(automata["recipe"](4, 1, own, one_hot=True), steps=2, batch_size=4, eval_sequences=4)
    train(config, tmp_path, progress=False)
    (run,) = find_runs([tmp_path])
    row = automata["verified"](run)
    assert (row["outcome"], row["seed"]) == ("differs", 1)
    written = tmp_path / "verify.json"
    kept = written.read_text().replace('"differs"', '"equal"')
    written.write_text(kept)  # what is there already is not made again
    again = automata["verified"](run)
    assert again == row | {"outcome": "equal"}
    assert written.read_text() == kept
    right = f"{row['tokens right at 256']:.3f}"
    counts = ["2", "1", "0.50 (0.09-0.91)", "1", "0", "0", f"{right} ({right})"]
    assert automata["table"]([row, again])[1:] == [["bd_lru", "4", "10", *counts]]
    assert automata["wilson"](0, 20) == (0, pytest.approx(0.161, abs=1e-3))


def test_a_block_needs_a_component_for_each_function_of_the_state():
    """A shift register of 3 bits, of which the oldest is said: each of them is to be held."""
    components = experiment("random_automata")["components"]
    moves = np.array([[(2 * state + bit) % 8 for bit in (0, 1, 1)] for state in range(8)])
    moves[:, 2] = NONE  # the start token
    said = np.where(moves == NONE, NONE, moves >> 2)
    assert components(Automaton(moves, said).preceded_by(2)) == 3
    parity = np.array([[0, 1, NONE], [1, 0, NONE]])
    assert components(Automaton(parity, parity).preceded_by(2)) == 2  # even, and odd


@pytest.mark.parametrize(
    ("name", "first_work", "arguments"),
    [("agents", "runpy", []), ("generation", "load_text_model", ["a run"])],
)
def test_a_folder_for_the_table_is_there_before_any_work(tmp_path, monkeypatch, name, first_work, arguments):
    main, out = experiment(name)["main"], tmp_path / "new" / "folder"

    def begin(*_, **__):
        raise RuntimeError(f"folder: {out.is_dir()}")

    work = SimpleNamespace(run_path=begin) if first_work == "runpy" else begin
    monkeypatch.setitem(main.__globals__, first_work, work)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(out)])
    with pytest.raises(RuntimeError, match="folder: True"):
        main()


def test_the_suite_tries_until_a_model_is_verified(tmp_path, monkeypatch):
    """With models that are made and not trained: the first errs, the second is right at every length."""
    suite, made = experiment("suite"), []

    def write(config: TrainConfig, out: Path):
        made.append(config.seed)
        checkpoint = out / "step-1"
        checkpoint.mkdir(parents=True)
        (out / "config.json").write_text(replace(config, sharpen=2.0).to_json())
        solved_model(3, rows={(4, 2): 2} if len(made) == 1 else None).save(checkpoint)
        scores = {"40": {"token_accuracy": 0.5}}
        return SimpleNamespace(summary={"steps": 1, "queries": 3, "test": scores, "sharpened": scores})

    names = suite["solve"].__globals__
    monkeypatch.setitem(names, "train", write)
    monkeypatch.setitem(names, "find_checkpoint", lambda out, owner: out / "step-1")
    monkeypatch.setattr("statemix.verify.find_checkpoint", lambda out, owner: out / "step-1")
    wrong_prefixes = suite["wrong_prefixes"]
    monkeypatch.setitem(names, "wrong_prefixes", lambda out, length: (str(out)[-6:], length))
    monkeypatch.setitem(names, "LENGTHS", (40,))
    monkeypatch.setitem(names, "SUITE", {"s3": {"name": "permutation", "group": "S3", "start": True}})
    monkeypatch.setitem(names, "preset_config", lambda preset, task: TrainConfig(task=task))
    found = suite["solve"]("s3", 2, 5, tmp_path)
    assert made == [2, 1002]
    assert (found["try"], found["outcome"], found["states explored"], found["queries"]) == (1, "equal", 7, 3)
    assert found["wrong prefixes"] == ("s3-2-1", 10**6 + 1)
    assert wrong_prefixes(tmp_path / "s3-2-0", 1001) > wrong_prefixes(tmp_path / "s3-2-1", 1001) == 0
    assert suite["solve"]("s3", 2, 5, tmp_path) == found | {"wrong prefixes": list(found["wrong prefixes"])}
    assert made == [2, 1002]  # nothing was tried again
    kept = json.loads((tmp_path / "s3-2.json").read_text())
    spent = [one[f"core seconds of {what}"] for one in kept for what in ("training", "verification")]
    assert len(spent) == 4
    assert found["core seconds of all tries"] == pytest.approx(sum(spent))
    head, row = suite["table"]([found | {"wrong prefixes": 0}])
    assert dict(zip(head, row, strict=True))["verified for all lengths"] == "1 of 1"


def test_every_measured_picture_has_the_samples_it_is_drawn_from():
    pictures = sorted((ROOT / "results" / "bench").glob("*.png"))
    assert pictures
    samples = (".json", ".jsonl")  # the second of a card, a line for each result
    assert all(any(picture.with_suffix(suffix).exists() for suffix in samples) for picture in pictures)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a page", "another"),
        ("<!-- memory -->", "<!-- end of memory -->"),
        ("<!-- memory --><!-- end of memory -->", "<!-- memory --><!-- end of memory -->"),
        ("<!-- memory --><!-- memory --><!-- end of memory -->", ""),
    ],
    ids=["no page", "one mark each", "two pages", "a mark twice"],
)
def test_pages_without_the_marks_of_one_table_are_refused(results, tmp_path, monkeypatch, first, second):
    (tmp_path / "first.md").write_text(first)
    (tmp_path / "second.md").write_text(second)
    monkeypatch.setitem(results["fill"].__globals__, "PAGES", tmp_path)
    with pytest.raises(ValueError, match=r"must have '<!-- memory -->' and '<!-- end of memory -->' once each, got"):
        results["fill"]("memory", "text")
