"""config.py and specs.py: a config equals its JSON, and a wrong one is told by field, rule and value."""

import dataclasses
import functools
import json
import operator
import re
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from statemix.mixers import MIXERS
from statemix.tasks import TASKS
from statemix.training.config import CurriculumConfig, ModelConfig, OptimizerConfig, TrainConfig, first_difference

NOT_DEFAULT = [
    TrainConfig(),
    TrainConfig(task={"name": "permutation", "group": "A4xZ5", "seq_len": 9}, seed=7, steps=1),
    TrainConfig(task={"name": "permutation", "group": "S4", "generators": "transpositions"}, test_lengths=(8, 64)),
    TrainConfig(mixer={"name": "h_lru", "num_channels": 5, "order": 3, "form": "observer", "selective": False}),
    TrainConfig(mixer={"name": "lstm", "hidden_size": 4}, batch_size=3, eval_every=5, eval_sequences=9, log_every=2),
    TrainConfig(model=ModelConfig(d_model=3, num_layers=4, mlp_size=17, tied_embedding=True), mixed_precision="bf16"),
    TrainConfig(model=ModelConfig(init_std=0.02), train_sequences=100, patience=3, stop_accuracy=0.999),
    TrainConfig(optimizer=OptimizerConfig(0.1, 1e-9, 1.0, (0.0, 0.5), 0.0, 1e300)),
    TrainConfig(optimizer=OptimizerConfig(clip=None)),
    TrainConfig(optimizer=OptimizerConfig(schedule="linear", muon_lr=0.02)),
    TrainConfig(task={"name": "text", "test": 0.0, "tokenizer": "characters"}, accumulate=4, carry=True),
    TrainConfig(train_lengths=(4, 16), row_entropy=0.1, block_dropout=0.5, gate_noise=0.25),
    TrainConfig(
        task={"name": "parity", "start": True},
        curriculum=CurriculumConfig(2, 1.5, 0.9, 64, 0.2, 8, 3, 9, 4),
        sharpen=10.0,
        test_lengths=(8, "40-256"),
    ),
]


@pytest.mark.parametrize("config", NOT_DEFAULT, ids=range(len(NOT_DEFAULT)))
def test_json_round_trip(config, tmp_path):
    assert TrainConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.load(path) == TrainConfig.load(str(path)) == config


def test_the_round_trip_covers_every_field():
    """The configs above are of use only if each field is changed in one of them."""
    default = dataclasses.asdict(TrainConfig())
    changed = {
        key for config in NOT_DEFAULT for key, value in dataclasses.asdict(config).items() if value != default[key]
    }
    assert changed == set(default)
    assert all(a != b for i, a in enumerate(NOT_DEFAULT) for b in NOT_DEFAULT[:i])


# what is left out where it has its default, of a task, too
LATER = ["accumulate", "amsgrad", "block_dropout", "carry", "curriculum", "dropout", "min_len", "muon", "sharpen"]


def test_a_config_without_later_fields_is_written_as_before():
    """The name of a run in a sweep is a hash of its JSON: a sweep that is started again must find its runs."""
    text = TrainConfig().to_json()
    assert [name for name in LATER if name in text] == []
    assert TrainConfig.from_json(text) == TrainConfig(accumulate=1, carry=False)
    assert '"start"' in TrainConfig(task={"name": "parity", "start": True}).to_json()
    assert '"start"' not in TrainConfig(task={"name": "parity"}).to_json()


def test_a_missing_key_has_its_default_and_whole_numbers_serve_as_floats():
    assert TrainConfig.from_json("{}") == TrainConfig()
    config = TrainConfig.from_json('{"optimizer": {"lr": 1, "clip": 2, "betas": [0, 0.5]}, "test_lengths": [8]}')
    assert config == TrainConfig(optimizer=OptimizerConfig(lr=1.0, clip=2.0, betas=(0.0, 0.5)), test_lengths=(8,))
    assert {type(config.optimizer.lr), type(config.optimizer.clip), type(config.test_lengths[0])} == {float, int}


def test_specs_are_stored_with_their_defaults():
    mixer = {"name": "h_lru", "num_channels": 4, "order": 2}
    config = TrainConfig(task={"name": "permutation"}, mixer=mixer)
    assert config.task == {
        "name": "permutation",
        "group": "S3",
        "seq_len": 16,
        "generators": "all",
        "start": False,
        "min_len": None,
        "scored": "every",
        "generators_seed": 0,
    }
    assert config.mixer == mixer | {
        "normalization": "softmax",
        "selective": True,
        "form": "companion",
        "backend": "auto",
        "recompute": None,
        "gate_half_life": None,
    }
    assert TrainConfig(task={"name": "permutation", "group": "S3"}, mixer=mixer | {"form": "companion"}) == config


def test_a_config_keeps_no_hold_of_the_callers_specs():
    spec = {"name": "lstm", "hidden_size": 4}
    config = TrainConfig(mixer=spec)
    spec["hidden_size"] = 5
    assert config.mixer["hidden_size"] == 4
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'steps'"):
        config.steps = 3


def test_a_config_leaves_the_callers_random_state_as_it_was():
    """It builds a mixer to check the options, and a mixer draws its first weights."""
    before = torch.get_rng_state()
    TrainConfig()
    assert torch.equal(torch.get_rng_state(), before)


# what is set to 1 in the JSON of the default config, at every level -> the message
UNKNOWN_KEYS = {
    "step": r"unknown key `step`; there are \['accumulate', .*'test_lengths', 'train_lengths', 'train_sequences'\]",
    "model.width": r"unknown key `model\.width`; there are \['d_model', .*'tied_embedding'\]",
    "optimizer.beta": r"unknown key `optimizer\.beta`; there are \['amsgrad', .*'weight_decay'\]",
    "mixer.blocks": r"mixer: `blocks` is not an option of 'bd_lru', which has \['backend', .*\]",
    "mixer.d_model": r"mixer: `d_model` is not an option of 'bd_lru'",
    "task.length": r"task: `length` is not an option of 'permutation', which has \['generators', .*\]",
}
WRONG_JSON = {key: (1, ValueError, message) for key, message in UNKNOWN_KEYS.items()} | {
    "steps": ("10", TypeError, r"`steps` must be of type int, got '10'"),
    "seed": (1.5, TypeError, r"`seed` must be of type int, got 1\.5"),
    "batch_size": (True, TypeError, r"`batch_size` must be of type int, got True"),
    "eval_every": (None, TypeError, r"`eval_every` must be of type int, got None"),
    "mixed_precision": (16, TypeError, r"`mixed_precision` must be of type str, got 16"),
    "model": ([64], TypeError, r"`model` must be an object, got \[64\]"),
    "model.d_model": ("64", TypeError, r"`model\.d_model` must be of type int, got '64'"),
    "model.mlp_size": (0.5, TypeError, r"`model\.mlp_size` must be of type int \| None, got 0\.5"),
    "model.tied_embedding": (1, TypeError, r"`model\.tied_embedding` must be of type bool, got 1"),
    "optimizer": (None, TypeError, r"`optimizer` must be an object, got None"),
    "optimizer.lr": ("3e-3", TypeError, r"`optimizer\.lr` must be of type float, got '3e-3'"),
    "optimizer.clip": (False, TypeError, r"`optimizer\.clip` must be of type float \| None, got False"),
    "model.init_std": ("0.02", TypeError, r"`model\.init_std` must be of type float \| None, got '0\.02'"),
    "train_sequences": (1.5, TypeError, r"`train_sequences` must be of type int \| None, got 1\.5"),
    "patience": (True, TypeError, r"`patience` must be of type int \| None, got True"),
    "optimizer.betas": (0.9, TypeError, r"`optimizer\.betas` must be of type tuple\[float, float\], got 0\.9"),
    "optimizer.betas ": (
        [0.9, "x"],
        TypeError,
        r"`optimizer\.betas` must be of type tuple\[float, float\], got \(0\.9, 'x'\)",
    ),
    "test_lengths": (8, TypeError, r"`test_lengths` must be of type tuple\[int \| str, ...\], got 8"),
    "test_lengths ": ([8, 8.5], TypeError, r"`test_lengths` must be of type tuple\[int \| str, ...\], got \(8, 8\.5\)"),
    "mixer": ("bd_lru", TypeError, r"`mixer` must be of type dict.*, got 'bd_lru'"),
    "task": (["permutation"], TypeError, r"`task` must be of type dict.*, got \['permutation'\]"),
    "mixer.block_size": ("3", TypeError, r"BDLRU: `block_size` must be an int, got '3'"),
    "mixer.selective": ("no", TypeError, r"BDLRU: `selective` must be (a bool|True or False), got 'no'"),
    "task.seq_len": (4.0, TypeError, r"permutation: `seq_len` must be an int, got 4\.0"),
}


@pytest.mark.parametrize("key", WRONG_JSON, ids=str.strip)
def test_a_wrong_json_value_is_named(key, tmp_path):
    value, error, message = WRONG_JSON[key]
    data = json.loads(TrainConfig().to_json())
    *outer, last = key.strip().split(".")
    functools.reduce(operator.getitem, outer, data)[last] = value
    with pytest.raises(error, match=message):
        TrainConfig.from_json(json.dumps(data))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"^TrainConfig: cannot read '{re.escape(str(path))}': .*{message}"):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, r"^TrainConfig: cannot be read: it is not JSON at line 1, column 1\.$"),
        ('{"steps": 3', ValueError, r"^TrainConfig: cannot be read: it is not JSON at line 1, column 12\.$"),
        ("[1, 2]", TypeError, r"^TrainConfig: `the config` must be an object, got \[1, 2\]"),
        ("null", TypeError, r"^TrainConfig: `the config` must be an object, got None"),
    ],
)
def test_text_that_is_no_config(text, error, message):
    with pytest.raises(error, match=message):
        TrainConfig.from_json(text)


def test_load_names_a_file_that_is_missing_or_no_text(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=rf"cannot read '{re.escape(str(path))}': .*No such file"):
        TrainConfig.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"cannot read '{re.escape(str(path))}': .*it is not UTF-8 at byte 0"):
        TrainConfig.load(path)
    with pytest.raises(ValueError, match=rf"cannot read '{re.escape(str(tmp_path))}': .*directory"):
        TrainConfig.load(tmp_path)


LSTM = {"name": "lstm", "hidden_size": 4}


class Wrong(NamedTuple):
    """A value of a field, dotted, that breaks a rule, perhaps only beside others."""

    name: str
    value: object
    rule: str
    others: dict | None = None


AT_LEAST_ONE = ("steps", "batch_size", "eval_every", "eval_sequences", "log_every", "train_sequences", "patience")
WRONG_VALUES = [
    *(Wrong(name, 0, "at least 1") for name in AT_LEAST_ONE),
    Wrong("stop_accuracy", 0.0, "above 0 and at most 1"),
    Wrong("stop_accuracy", 1.5, "above 0 and at most 1"),
    Wrong("seed", -1, "at least 0"),
    Wrong("test_lengths", (8, 0), "all at least 1"),
    Wrong("mixed_precision", "fp17", "one of ['bf16', 'fp16', 'no']"),
    Wrong("accumulate", 0, "at least 1"),
    Wrong("accumulate", 3, "a divisor of `batch_size` = 8", {"batch_size": 8}),
    Wrong("carry", True, "False for the task 'permutation'"),
    Wrong("carry", True, "False with `train_sequences`", {"task": {"name": "text"}, "train_sequences": 10}),
    Wrong("train_lengths", (4, 0), "all at least 1"),
    Wrong("train_lengths", (4,), "empty with `train_sequences`, `carry` or an autoencoder", {"train_sequences": 9}),
    Wrong("row_entropy", -0.1, "at least 0 and finite"),
    Wrong("row_entropy", float("inf"), "at least 0 and finite"),
    Wrong("row_entropy", 0.1, "0 for a mixer without rows of gates", {"mixer": LSTM}),
    Wrong("gate_noise", -0.1, "at least 0 and finite"),
    Wrong("gate_noise", float("inf"), "at least 0 and finite"),
    Wrong("gate_noise", 0.1, "0 for a mixer without rows of gates", {"mixer": LSTM}),
    Wrong("block_dropout", 1.0, "in [0, 1)"),
    Wrong("block_dropout", -0.1, "in [0, 1)"),
    Wrong("block_dropout", 0.1, "0 for a mixer without blocks", {"mixer": LSTM}),
    Wrong("sharpen", 0.0, "above 0 and finite"),
    Wrong("sharpen", 100.0, "None for a mixer without rows of softmax", {"mixer": LSTM}),
    Wrong("model.d_model", 0, "at least 1"),
    Wrong("model.num_layers", 0, "at least 1"),
    Wrong("model.mlp_size", -1, "at least 1"),
    *(Wrong("model.init_std", std, "above 0 and finite") for std in (0.0, -1.0, float("inf"), float("nan"))),
    *(Wrong("optimizer.lr", rate, "above 0 and finite") for rate in (0.0, float("nan"), float("inf"))),
    Wrong("optimizer.final_lr", -1.0, "in [0, lr] = [0, 0.003]"),
    Wrong("optimizer.final_lr", 0.004, "in [0, lr] = [0, 0.003]"),
    Wrong("optimizer.warmup", 1.1, "in [0, 1]"),
    Wrong("optimizer.warmup", -0.1, "in [0, 1]"),
    Wrong("optimizer.betas", (0.9,), "two numbers"),
    Wrong("optimizer.betas", (0.9, 1.0), "in [0, 1)"),
    Wrong("optimizer.betas", (-0.1, 0.9), "in [0, 1)"),
    Wrong("optimizer.weight_decay", -0.1, "at least 0"),
    Wrong("optimizer.clip", 0.0, "above 0"),
    Wrong("optimizer.schedule", "step", "one of ['cosine', 'linear']"),
    Wrong("curriculum.first", 0, "at least 1"),
    Wrong("curriculum.growth", 1.0, "above 1 and finite", {"first": 1}),
    Wrong("curriculum.accuracy", 1.0, "in (0, 1)", {"first": 1}),
    Wrong("curriculum.again", 1.0, "in [0, 1)", {"first": 1}),
    Wrong("curriculum.kept", 0, "at least 1", {"first": 1}),
    Wrong("curriculum.queries", 1, "at least 0, and 0 without `curriculum.prune`", {"first": 1}),
    Wrong("curriculum.quiet", 0, "at least 1", {"first": 1}),
    Wrong("curriculum.prune", 0, "at least 1", {"first": 1, "quiet": 3}),
    Wrong("curriculum.prune", 3, "None without `curriculum.quiet`", {"first": 1}),
    Wrong("curriculum.quiet", 4, "None without `curriculum.first`"),
    Wrong("curriculum.row", 99, "256 without `curriculum.first`"),
]
WRONG_TYPES = [
    Wrong("steps", "10", "of type int"),
    Wrong("steps", 2.5, "of type int"),
    Wrong("batch_size", None, "of type int"),
    Wrong("seed", "a", "of type int"),
    Wrong("test_lengths", 8, "of type tuple[int | str, ...]"),
    Wrong("test_lengths", (8.5,), "of type tuple[int | str, ...]"),
    Wrong("train_lengths", (4.0,), "of type tuple[int, ...]"),
    Wrong("mixer", "x", "of type dict[str, typing.Any]"),
    Wrong("task", "x", "of type dict[str, typing.Any]"),
    Wrong("model", "x", "of type ModelConfig"),
    Wrong("optimizer", "x", "of type OptimizerConfig"),
    Wrong("curriculum.first", 1.5, "of type int | None"),
]
WRONG = [(case, ValueError) for case in WRONG_VALUES] + [(case, TypeError) for case in WRONG_TYPES]
PARTS = {"": TrainConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "curriculum": CurriculumConfig}


@pytest.mark.parametrize(("case", "error"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_named(case, error):
    part, _, key = case.name.rpartition(".")
    message = f"TrainConfig: `{case.name}` must be {case.rule}, got {case.value!r}."
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PARTS[part](**{key: case.value} | (case.others or {}))


BD_LRU = {"name": "bd_lru", "num_blocks": 2, "block_size": 3}
ONE_OF_THE_MIXERS = rf"mixer: `name` must be one of {re.escape(str(sorted(MIXERS)))}"
ONE_OF_THE_TASKS = rf"task: `name` must be one of {re.escape(str(sorted(TASKS)))}"
WRONG_SPECS = [
    ("mixer", {}, rf"{ONE_OF_THE_MIXERS}, got None"),
    ("mixer", {"name": "gpu"}, rf"{ONE_OF_THE_MIXERS}, got 'gpu'"),
    ("mixer", {"name": ["lstm"]}, r"mixer: `name` must be one of .*, got \['lstm'\]"),
    ("mixer", {"name": "bd_lru", "num_blocks": 2}, r"mixer: 'bd_lru' needs the option `block_size`"),
    ("mixer", {"name": "lstm"}, r"mixer: 'lstm' needs the option `hidden_size`"),
    ("mixer", BD_LRU | {"block_size": 0}, r"BDLRU: `block_size` must be at least 1, got 0"),
    ("mixer", BD_LRU | {"normalization": "max"}, r"BDLRU: `normalization` must be one of \['linear', .*\], got 'max'"),
    ("mixer", BD_LRU | {"backend": "tpu"}, r"BDLRU: `backend` must be one of \[.*'auto', 'cpu', .*\], got 'tpu'"),
    ("task", {}, rf"{ONE_OF_THE_TASKS}, got None"),
    ("task", {"name": "party"}, rf"{ONE_OF_THE_TASKS}, got 'party'"),
    ("task", {"name": "permutation", "group": "Q8"}, r"permutation: `group` must be S<n>, .*, got 'Q8'"),
    ("task", {"name": "permutation", "group": "S8"}, r"permutation: `group` must have at most 5040 elements, got 'S8'"),
    ("task", {"name": "permutation", "seq_len": 0}, r"permutation: `seq_len` must be at least 1, got 0"),
    (
        "task",
        {"name": "permutation", "generators": "some"},
        r"permutation: `generators` must be one of \[.*\] or a number of elements, got 'some'",
    ),
]


@pytest.mark.parametrize(("name", "spec", "message"), WRONG_SPECS, ids=lambda value: str(value)[:40])
def test_a_wrong_spec_is_named(name, spec, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: spec})


def test_a_mixer_is_checked_at_the_width_it_will_have():
    with mock.patch("statemix.training.config.build_mixer") as build:
        TrainConfig(mixer=BD_LRU, model=ModelConfig(d_model=24))
    assert build.call_args.args[1] == 24


def test_first_difference():
    mine = {"steps": 3, "mixer": {"name": "bd_lru", "block_size": 3}, "seed": 0}
    assert first_difference(mine, json.loads(json.dumps(mine))) is None
    theirs = mine | {"mixer": {"name": "bd_lru", "block_size": 4}, "seed": 1}
    assert first_difference(mine, theirs) == "was made with mixer.block_size=4, the config asks for 3"
    theirs["steps"] = 5
    assert first_difference(mine, theirs) == "was made with steps=5, the config asks for 3"
    assert first_difference({"mixer": {"name": "lstm"}}, {"mixer": {"name": "gru"}}) == (
        "was made with mixer.name='gru', the config asks for 'lstm'"
    )
    # a key that only one of them has, on either side
    assert first_difference({"a": 1}, {}) == "was made with a=None, the config asks for 1"
    assert first_difference({}, {"b": {"c": 2}}) == "was made with b={'c': 2}, the config asks for None"


def test_first_difference_of_configs_is_none_only_for_equal_ones():
    for i, a in enumerate(NOT_DEFAULT):
        for j, b in enumerate(NOT_DEFAULT):
            difference = first_difference(json.loads(a.to_json()), json.loads(b.to_json()))
            assert (difference is None) == (i == j), (i, j)
