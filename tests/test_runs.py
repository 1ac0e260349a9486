"""runs.py: runs as rows, groups over seeds with their intervals, and a selection that never sees the test."""

import dataclasses
import math
import re
import shutil
import statistics

import pytest
from run_helpers import edit_json, read_csv, refused, run, small_config

from statemix.runs.read import (
    find_runs,
    flatten,
    read_run,
    row_of,
    sweep_json,
    train_seconds,
    unfinished_runs,
    write_table,
)
from statemix.runs.select import group_over_seeds, select
from statemix.runs.statistics import interval, t_quantile
from statemix.training.config import OptimizerConfig, TrainConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 3 steps with a test at two lengths; not to be changed."""
    return run(tmp_path_factory.mktemp("runs") / "run", small_config(test_lengths=(5, 9)))


# ---- intervals


# two-sided 95 % points of Student's t, from a printed table
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_quantile_is_that_of_the_printed_table(freedom):
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=5e-4)


def test_an_interval_by_hand():
    """Of 1, 2, 3: mean 2, standard deviation 1, t 4.303: 2 +- 4.303 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3), 3), rel=1e-3)
    assert interval([0.25, 0.25]) == (0.25, 0.0, 2)
    assert interval([0.7]) == (0.7, None, 1)
    numbers = [0.1, 0.9, 0.4, 0.35, 0.7]
    mean, half_width, n = interval(numbers)
    assert (mean, n) == (pytest.approx(statistics.mean(numbers)), 5)
    assert half_width == pytest.approx(2.776 * statistics.stdev(numbers) / math.sqrt(5), rel=1e-3)


# ---- reading


def test_a_run_is_read_as_it_was_returned(finished):
    read = read_run(str(finished.out))
    assert (read.folder, read.summary, read.metrics) == (finished.out, finished.summary, finished.metrics)
    assert read.config == small_config(test_lengths=(5, 9))


def test_runs_are_found_below_a_folder_each_once_and_unfinished_ones_apart(finished, tmp_path, monkeypatch):
    for name in ("b", "a", "deep/c", "stopped"):
        shutil.copytree(finished.out, tmp_path / name)
    (tmp_path / "stopped" / "result.json").unlink()
    names = [found.folder.relative_to(tmp_path).as_posix() for found in find_runs([tmp_path, tmp_path / "a"])]
    assert names == ["a", "b", "deep/c"]
    monkeypatch.chdir(tmp_path)
    assert len(find_runs(["a", tmp_path / "a", "./a"])) == 1
    for lost in (None, "config.json"):
        if lost is not None:
            (tmp_path / "stopped" / lost).unlink()
        assert unfinished_runs([tmp_path, tmp_path / "a"]) == [tmp_path / "stopped"]
    with refused(rf"^runs: there is no finished run in '{tmp_path}/stopped': no result\.json"):
        find_runs([tmp_path / "a", tmp_path / "stopped"])
    with refused(rf"^runs: '{tmp_path}/none' is not a folder\.$"):
        find_runs([tmp_path / "none"])


OTHER_VERSIONS = {  # the file, what is changed in it, and what is told
    "without validation": ("result.json", lambda data: data.pop("valid"), r"in result\.json `valid` is missing"),
    "the first version": ("result.json", lambda data: data.pop("version"), r"in result\.json `version` is missing"),
    "config with another key": ("config.json", lambda data: data.update(epochs=3), r"unknown key `epochs`"),
}


@pytest.mark.parametrize("case", OTHER_VERSIONS)
def test_a_run_of_another_version_is_told_as_one(finished, tmp_path, case):
    name, change, problem = OTHER_VERSIONS[case]
    out = shutil.copytree(finished.out, tmp_path / "run")
    edit_json(out / "result.json", lambda data: data.update(version="9.8.7"))
    edit_json(out / name, change)
    theirs = "another version of statemix" if "first" in case else r"statemix 9\.8\.7"
    with refused(rf"^runs: '{out}' was written by {theirs}, this is .*{problem}"):
        read_run(out)


DAMAGED = [
    ("result.json", None, r"^runs: '.*' is not a finished run: it has no result\.json"),
    ("metrics.jsonl", None, r"^runs: '.*' is not a finished run: it has no metrics\.jsonl"),
    ("result.json", "{", r"^runs: '.*result\.json' is damaged: it is not JSON at line 1, column 2\.$"),
    ("metrics.jsonl", "{}\n", r"^runs: '.*metrics\.jsonl' is damaged: line 1: `step` is missing\.$"),
    ("result.json", "3", r"^runs: '.*result\.json' is damaged: `the content` must be an object, got 3\.$"),
]


@pytest.mark.parametrize(("name", "content", "problem"), DAMAGED)
def test_a_damaged_run_is_named(finished, tmp_path, name, content, problem):
    out = shutil.copytree(finished.out, tmp_path / "run")
    (out / name).unlink() if content is None else (out / name).write_text(content)
    with refused(problem):
        read_run(out)


# ---- rows


def test_a_row_is_flat(finished):
    row = row_of(read_run(finished.out))
    assert row["task.group"] == "S3"
    assert row["mixer.block_size"] == 3
    assert row["optimizer.betas"] == "[0.9, 0.95]"
    assert row["test_lengths"] == "[5, 9]"
    assert (row["steps"], row["trained_steps"]) == (3, 3)
    for name in ("loss", "token_accuracy", "sequence_accuracy", "macro_accuracy", "mad_accuracy"):
        assert row[f"valid_{name}"] == finished.summary["valid"][name]
        for length in ("5", "9"):
            assert row[f"test_{length}_{name}"] == finished.summary["test"][length][name]
    assert row["chance"] == pytest.approx(1 / 6)
    assert row["test_9_scaled_accuracy"] == pytest.approx((row["test_9_token_accuracy"] - 1 / 6) / (5 / 6))
    assert row["folder"] == str(finished.out)
    assert all(isinstance(value, int | float | str | None) for value in row.values())
    assert flatten(read_run(finished.out).config).items() <= row.items()


def test_the_seconds_are_those_of_the_steps(finished):
    """Batches of 10 tokens: 3 and 2 steps, a validation, 2 steps, another, 3 steps; at 10, 5 and 25 tokens a second."""
    config = small_config(batch_size=2, task={"name": "permutation", "group": "S3", "seq_len": 5})
    metrics = [{"step": 3, "tokens_per_s": 10.0}, {"step": 5, "tokens_per_s": 5.0}, {"step": 5, "valid_loss": 1.0}]
    metrics += [{"step": 7, "valid_loss": 1.0}, {"step": 10, "tokens_per_s": 25.0}]
    made = read_run(finished.out)._replace(config=config, metrics=metrics)
    assert train_seconds(made) == pytest.approx(3 + 4 + 5 * 10 / 25)  # steps 6 and 7 have no speed but the next


ROWS = [
    {"label": 'a, "b"', "seed": 0, "valid_loss": 0.5, "mixer.width": 3, "option": True},
    {"label": "c\nd", "seed": 1, "error": "failed", "mixer.width": 4.5, "option": "auto"},
]


@pytest.mark.parametrize("text", ["=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '="a,b"\n'])
def test_a_spreadsheet_takes_no_text_for_a_formula(tmp_path, text):
    rows = [{"label": text, "a": -1, "b": -0.5, "c": float("-inf"), "d": "1=1", "e": None}]
    path = write_table(rows, tmp_path, "table")[0]
    [cells] = read_csv(path)
    assert cells == {"label": f"'{text}", "a": "-1", "b": "-0.5", "c": "-inf", "d": "1=1", "e": ""}


def test_a_table_as_csv(tmp_path):
    path = write_table(ROWS, tmp_path / "new" / "folder", "table")[0]
    assert path == tmp_path / "new" / "folder" / "table.csv"
    read = read_csv(path)
    assert list(read[0]) == ["label", "seed", "valid_loss", "mixer.width", "option", "error"]
    assert [row["label"] for row in read] == ['a, "b"', "c\nd"]
    assert (read[1]["valid_loss"], read[0]["error"], read[0]["option"]) == ("", "", "True")


def test_a_table_as_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install statemix[table]")
    [_, path] = write_table(ROWS, tmp_path, "table")
    read = parquet.read_table(path).to_pylist()
    assert read[0] == ROWS[0] | {"option": "True", "error": None}
    assert [type(row["mixer.width"]) for row in read] == [float, float]
    assert (read[1]["valid_loss"], read[1]["option"]) == (None, "auto")


# ---- selection


def rows_of(figures) -> list[dict]:
    """(lr, decay, seed, valid loss, test accuracy) as rows."""
    base = flatten(TrainConfig())
    return [
        base
        | {"optimizer.lr": lr, "optimizer.weight_decay": decay, "seed": seed, "valid_loss": loss}
        | {"valid_token_accuracy": 1 - loss, "test_16_token_accuracy": test, "folder": f"{lr}-{decay}-{seed}"}
        for lr, decay, seed, loss, test in figures
    ]


def test_the_best_mean_validation_is_chosen_whatever_the_test_says():
    rows = rows_of(
        [(1e-3, 0.0, 0, 0.30, 0.99), (1e-3, 0.0, 1, 0.40, 0.99), (3e-3, 0.0, 0, 0.29, 0.1), (3e-3, 0.0, 1, 0.31, 0.1)]
    )
    assert select(rows, ("optimizer.lr",)) == rows[2:]
    assert select(rows, ("optimizer.lr",), by="valid_token_accuracy") == rows[2:]
    unseen = [{key: value for key, value in row.items() if not key.startswith("test")} for row in rows]
    assert select(unseen, ("optimizer.lr",)) == unseen[2:]


def test_each_setting_has_its_own_choice():
    """Of two weight decays each has its learning rate; over both there is one."""
    rows = rows_of([(1e-3, 0.0, 0, 0.3, 0), (3e-3, 0.0, 0, 0.4, 0), (1e-3, 0.1, 0, 0.6, 0), (3e-3, 0.1, 0, 0.5, 0)])
    assert select(rows, ("optimizer.lr",)) == [rows[0], rows[3]]
    assert select(rows, ("optimizer.lr", "optimizer.weight_decay")) == [rows[0]]
    assert select(rows, ()) == rows


def test_a_choice_that_lost_runs_is_not_chosen_over_one_that_did_not():
    rows = rows_of([(1e-3, 0.0, 0, 0.5, 0), (1e-3, 0.0, 1, 0.5, 0), (1.0, 0.0, 0, 0.1, 0), (1.0, 0.0, 1, 9, 0)])
    failed = {key: value for key, value in rows[3].items() if not key.startswith(("valid", "test"))}
    assert select([*rows[:3], failed], ("optimizer.lr",)) == rows[:2]
    assert select([rows[0], rows[2]], ("optimizer.lr",)) == [rows[2]]
    nan = rows[2] | {"valid_loss": math.nan}
    assert select([rows[0], nan], ("optimizer.lr",)) == [rows[0]]


def test_a_selection_on_the_test_or_what_is_unknown_is_refused():
    rows = rows_of([(1e-3, 0.0, 0, 0.5, 0)])
    with refused(r"^select: `by` must be a figure of the validation split .*'test_16_token_acc"):
        select(rows, ("optimizer.lr",), by="test_16_token_accuracy")
    with refused(r"^select: `by` must be one of \['valid_.*\], got 'valid_acc'\.$"):
        select(rows, ("optimizer.lr",), by="valid_acc")
    with refused(r"^select: `over` must hold names of \['accumulate', .*, got 'lr'\.$"):
        select(rows, ("lr",))
    assert select([], ("optimizer.lr",)) == []


# ---- groups


def test_groups_differ_in_more_than_the_seed_and_are_labelled_by_what_differs(finished):
    made = read_run(finished.out)
    slow = dataclasses.replace(made.config, optimizer=OptimizerConfig(lr=0.01, final_lr=0.01, warmup=0.0))
    lstm = dataclasses.replace(made.config, mixer={"name": "lstm", "hidden_size": 5})
    configs = [dataclasses.replace(c, seed=s) for s in (1, 0) for c in (made.config, slow, lstm)]
    groups = group_over_seeds([made._replace(config=config) for config in configs])
    assert {label: [run.config.seed for run in runs] for label, runs in groups.items()} == {
        "bd_lru, lr=0.1, final_lr=0.1": [0, 1],
        "bd_lru, lr=0.01, final_lr=0.01": [0, 1],
        "lstm, lr=0.1, final_lr=0.1": [0, 1],
    }
    assert list(group_over_seeds([made])) == ["bd_lru"]
    wide = dataclasses.replace(made.config, mixer={"name": "bd_lru", "num_blocks": 4, "block_size": 3})
    both = group_over_seeds([made, made._replace(config=wide), made._replace(config=lstm)])
    assert list(both) == ["bd_lru, num_blocks=2", "bd_lru, num_blocks=4", "lstm"]
    assert not re.search("hidden_size", "".join(both))


def test_groups_have_the_names_that_a_sweep_gave_them(finished, tmp_path):
    made = read_run(finished.out)
    lstm = dataclasses.replace(made.config, mixer={"name": "lstm", "hidden_size": 5})
    runs = [
        made._replace(folder=tmp_path / f"{number}", config=dataclasses.replace(config, seed=seed))
        for number, (config, seed) in enumerate([(made.config, 0), (made.config, 1), (lstm, 0), (lstm, 1)])
    ]

    def labels(*names: str) -> list[str]:
        given = {str(number): name for number, name in enumerate(names)}
        (tmp_path / "sweep.json").write_bytes(sweep_json(given))
        return list(group_over_seeds(runs))

    assert labels("mixing, seed 0", "mixing, seed 1", "gates", "gates") == ["mixing", "gates"]
    assert labels("mixing/seed=0", "mixing/seed=1", "gates_seed_0", "gates_seed_1") == ["mixing", "gates"]
    assert labels("mixing, seed 0", "other, seed 1", "gates", "gates") == ["bd_lru", "gates"]  # two names
    assert labels("one", "one", "one", "one") == ["bd_lru", "lstm"]  # whose it is cannot be told
    assert labels("0", "0", "2", "2") == ["bd_lru", "lstm"]  # numbers of a list
    with refused(r"`label` must have no control characters"):
        labels("\x1b[2J", "\x1b[2J", "gates", "gates")
    labels("mixing", "mixing", "gates", "gates")
    path = tmp_path / "sweep.json"
    path.write_text(path.read_text().replace("mixing", "magic"))
    with refused(rf"^runs: '{re.escape(str(path))}' is damaged: its `sha256` is not that of `version` and"):
        group_over_seeds(runs)
    path.unlink()
    assert list(group_over_seeds(runs)) == ["bd_lru", "lstm"]
