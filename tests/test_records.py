"""records.py, and every JSON file that statemix reads: each field wrong in each way is told by file and field."""

import json
import shutil
from pathlib import Path

import pytest
from run_helpers import EDITS, edit_json, edited, fields_of, refused, run, seal, small_config

from statemix import TrainConfig
from statemix.files import digest_of
from statemix.generate import load_text_model
from statemix.records import check, parse, read, read_lines
from statemix.runs.read import find_runs, row_of, sweep_json
from statemix.runs.select import group_over_seeds
from statemix.runs.sweep import sweep

# ---- what a form takes and refuses

GOOD = [
    (int, [0, 2**63 - 1]),
    (float, [0, -1.5, float("inf"), 10**400]),
    (str, ["", "é"]),
    (bool, [True]),
    (float | None, [None, 2.0]),
    (object, [None, [{}]]),
    ([int], [[], [1, 2]]),
    ({"a": int, "b?": str}, [{"a": 1}, {"a": 1, "b": "x", "c": None}]),
    ({"a": str, str: float}, [{"a": "x"}, {"a": "x", "y": 1, "z": 2.5}]),
    ({"a": [{"b": int}]}, [{"a": [{"b": 1}]}]),
]
WRONG = [
    (int, -1, r"^`the content` must be a whole number in \[0, 2\^63\), got -1$"),
    (int, 2**63, r"a whole number in \[0, 2\^63\), got 9223372036854775808$"),
    (int, 1.0, r"a whole number in \[0, 2\^63\), got 1\.0$"),
    (int, True, r"a whole number in \[0, 2\^63\), got True$"),
    (float, float("nan"), "`the content` must be a number, got nan$"),
    (float, False, "must be a number, got False$"),
    (float, "1", "must be a number, got '1'$"),
    (float | None, [], r"must be a number or null, got \[\]$"),
    (str, None, "must be a text, got None$"),
    (bool, 1, "must be true or false, got 1$"),
    ([int], {}, r"must be a list, got \{\}$"),
    ([int], [0, "x"], r"^`\[1\]` must be a whole number"),
    ({"a": int}, [], r"must be an object, got \[\]$"),
    ({"a": int}, {}, "^`a` is missing$"),
    ({"a": {"b": int}}, {"a": {}}, r"^`a\.b` is missing$"),
    ({"a": [{"b": int}]}, {"a": [{"b": 1}, {"b": None}]}, r"^`a\[1\]\.b` must be a whole number"),
    ({"a?": int}, {"a": None}, "^`a` must be a whole number"),
    ({str: float}, {"x": 1, "y": "z"}, "^`y` must be a number, got 'z'$"),
]


@pytest.mark.parametrize(("form", "values"), GOOD, ids=str)
def test_what_is_of_a_form(form, values):
    for value in values:
        check(value, form)


@pytest.mark.parametrize(("form", "value", "message"), WRONG, ids=str)
def test_what_is_not_of_a_form(form, value, message):
    with refused(message):
        check(value, form)


NO_JSON = [
    ("", "^it is not JSON at line 1, column 1$"),
    ("{\n]", "^it is not JSON at line 2, column 1$"),
    (b"\xff", "^it is not UTF-8 at byte 0$"),
    ("[" * 100_000, "^it is nested too deep$"),
    ('{"a": ' * 100_000, "^it is nested too deep$"),
    ('{"a": 1, "b": {"c": 2, "c": 2}}', "^`c` is there twice$"),
    (r'["\ud800"]', "^a text in it is not valid Unicode"),
    (r'{"\uDFFF": 1}', "^a text in it is not valid Unicode"),
]


@pytest.mark.parametrize(("text", "message"), NO_JSON, ids=lambda value: str(value)[:20])
def test_what_is_no_json_of_ours(text, message):
    with refused(message):
        parse(text)


def test_numbers_and_pairs_of_surrogates():
    assert parse("[9223372036854775807, -9223372036854775808, 1.5]") == [2**63 - 1, -(2**63), 1.5]
    values = parse(f"[9223372036854775808, -9223372036854775809, {'9' * 400}, -{'9' * 5000}]")
    assert values == [2.0**63, -(2.0**63), float("inf"), -float("inf")]
    assert [type(value) for value in values] == [float] * 4
    assert parse(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


def test_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "lines"
    for reader in (read, read_lines):
        with pytest.raises(FileNotFoundError):
            reader(path, int, "owner")
    path.write_text("1\n2\n3")
    assert read_lines(path, int, "owner") == [1, 2]
    path.write_text("1\n-2\n3")
    with refused(rf"^owner: '{path}' is damaged: line 2: `the content` must be .*, got -2\. Do$"):
        read_lines(path, int, "owner", "Do")
    with refused(rf"^owner: '{path}' is damaged: it is not JSON at line 2, column 1\.$"):
        read(path, int, "owner")
    with refused(rf"^owner: '{tmp_path}' is damaged: .*[Dd]irectory"):
        read(tmp_path, int, "owner")


# ---- every file, every field

TASK = {"name": "text", "tokenizer": "characters", "seq_len": 4, "valid": 0.2, "test": 0.2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of text in the folder of a sweep."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "text").write_text("abcab\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATEMIX_CACHE", str(folder / "cache"))
        config = small_config(task=TASK | {"source": str(folder / "text")}, steps=2, test_lengths=(3,))
        run(folder / "sweep" / "run", config)
        (folder / "sweep" / "sweep.json").write_bytes(sweep_json({"run": "mine"}))
        yield folder


def as_report(out: Path) -> object:
    """All that a report is made of."""
    runs = find_runs([out])
    return [row_of(run) for run in runs], [run.metrics for run in runs], list(group_over_seeds(runs))


def as_training(out: Path) -> object:
    return run(out, TrainConfig.load(out / "config.json"))[1:]


def as_generation(out: Path) -> object:
    model, tokenizer = load_text_model(out)
    return model.config, tokenizer


READERS = {
    "result.json": (as_report, as_training),
    "metrics.jsonl": (as_report, as_training),
    "config.json": (as_report,),
    "checkpoints.json": (as_training, as_generation),
    "tokenizer.json": (as_generation,),
    "step-2/train.json": (as_training, as_generation),
    "step-2/manifest.json": (as_training, as_generation),
    "step-2/model.json": (as_generation,),
    "manifest.json": (as_report, as_training),
    "../sweep.json": (lambda out: sweep({}, out.parent, progress=False), as_report),
}


# what only a text has, a length of the test, what older runs have not, and a mixer
OPTIONAL = ("bits_per_byte", "perplexity", "data", "3", "kernels", "bd_lru")


@pytest.mark.parametrize("name", READERS)
def test_each_field_wrong_in_each_way_is_told_or_changes_nothing(finished, tmp_path, name):
    out = shutil.copytree(finished, tmp_path / "all") / "sweep" / "run"
    path = (out / name).resolve()
    whole = path.read_bytes()
    first, _, rest = whole.partition(b"\n") if name == "metrics.jsonl" else (whole, b"", b"")
    content, problems, told = json.loads(first), [], 0
    sealing = [out / "manifest.json", out / "step-2" / "manifest.json", out / "step-2" / "train.json"]
    seals = {file: file.read_bytes() for file in sealing if file != path}
    good = [reader(out) for reader in READERS[name]]
    for field in fields_of(content):
        if field[0] == "config" and len(field) > 1:  # of train.json: compared as a whole
            continue
        may = {"extra", "huge"}  # what is accepted, though it changes what is read: a larger number is one, too
        may |= {"missing", "null"} if name == "config.json" else set()  # there are defaults
        may |= {"null"} if "accuracy_by_position" in field[:-1] else set()  # of a position that is not scored
        may |= {"missing"} if name == "metrics.jsonl" or field[-1] in OPTIONAL else set()
        for edit in EDITS:
            if isinstance(field[-1], int) and edit in ("twice", "extra", "missing"):
                continue
            path.write_bytes(edited(content, field, edit).encode() + b"\n" + rest)
            if path.name != "manifest.json":
                if path.name == "metrics.jsonl":
                    metrics = {"bytes": path.stat().st_size, "sha256": digest_of(path)}
                    edit_json(out / "step-2" / "train.json", lambda train, new=metrics: train.update(metrics=new))
                seal(out / "step-2")
                seal(out)
            for reader, before in zip(READERS[name], good, strict=True):
                case = f"{reader.__name__} {'.'.join(map(str, field))} {edit}"
                try:
                    after = reader(out)
                except (TypeError, ValueError, RuntimeError) as error:
                    told += 1
                    leaf = "extra" if edit == "extra" else next(k for k in reversed(field) if isinstance(k, str))
                    if path.name == "sweep.json" and edit in ("missing", "extra"):  # its digest is of all labels
                        leaf = field[0]
                    if path.name not in str(error) or (edit != "deep" and leaf not in str(error)):
                        problems.append(f"{case}: {error}")
                except Exception as error:
                    problems.append(f"{case}: {error!r}")
                else:
                    if after != before and edit not in may:
                        problems.append(f"{case}: accepted, and what is read is another")
            path.write_bytes(whole)
            for file, before in seals.items():
                file.write_bytes(before)
    assert problems == []
    assert told > 10
