"""What the tests of runs share: small configs, runs without a picture, what they leave, and disks that fail."""

import builtins
import contextlib
import copy
import csv
import errno
import functools
import importlib
import io
import json
import operator
import os
import random
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import PROCESSES

from statemix import TrainConfig, train
from statemix.files import digest_of, manifest_of
from statemix.training.config import ModelConfig, OptimizerConfig

TRAIN = importlib.import_module("statemix.training.loop")  # as an attribute, statemix.training.loop is the function

CHANGES = {"open", "write", "mkdir", "rename", "replace", "unlink", "rmdir"}
RANDOM = r"\.[0-9a-f]{16}\."  # in the name of a file that is not whole
NEEDING_SPACE = {"open", "write", "mkdir", "rename", "replace", "fsync"}


def small_config(**changes) -> TrainConfig:
    """1,200 parameters, and a checkpoint at each of three steps."""
    small = {
        "task": {"name": "permutation", "group": "S3", "seq_len": 5},
        "mixer": {"name": "bd_lru", "num_blocks": 2, "block_size": 3},
        "model": ModelConfig(d_model=8),
        "optimizer": OptimizerConfig(lr=0.1, final_lr=0.1, warmup=0.0),
        "steps": 3,
        "batch_size": 8,
        "eval_every": 1,
        "eval_sequences": 16,
        "log_every": 1,
    }
    return TrainConfig(**(small | changes))


class Stopped(Exception):
    """Ends a run before it has begun the step asked for."""


def run(out: Path, config: TrainConfig, resume: str = "auto", stop_before: int | None = None, **options):
    """train() on one thread, with a stand-in for the picture, which takes longer than all the rest."""
    train_step = TRAIN.Training.train_step

    def stopping_step(training):
        if training.step == stop_before:
            raise Stopped
        return train_step(training)

    threads = torch.get_num_threads()
    with (
        mock.patch.object(TRAIN, "plot_curves", lambda runs, path, **_: Path(path).write_bytes(b"a picture")),
        mock.patch.object(TRAIN.Training, "train_step", stopping_step),
    ):
        torch.set_num_threads(1)
        try:
            return train(config, out, resume=resume, **{"progress": False} | options)
        finally:
            torch.set_num_threads(threads)


def stopped(out: Path, config: TrainConfig, before: int, **options) -> Path:
    """The folder of a run that was stopped before a step."""
    with pytest.raises(Stopped):
        run(out, config, stop_before=before, **options)
    return out


def run_in_parts(out: Path, config: TrainConfig, *stops: int, **options):
    """run(), stopped before each of these steps and resumed after it."""
    for before in stops:
        stopped(out, config, before, **options)
    return run(out, config, **options)


def snapshot(out: Path) -> dict[str, bytes | None]:
    """Every path below `out`, and its content if it is a file."""
    return {str(p.relative_to(out)): p.read_bytes() if p.is_file() else None for p in sorted(out.rglob("*"))}


def without_measured(content: dict) -> dict:
    """A train.json or manifest.json without what it says of the metrics, and a manifest of such files."""
    digests = {
        name: None if name in ("train.json", "metrics.jsonl", "result.json") else digest
        for name, digest in content.get("sha256", {}).items()
    }
    return content | {"metrics": None, "sha256": digests}


def differing(out: Path, reference: Path) -> list[str]:
    """The files of `reference` that are not the same in `out`. Measured speeds do not count, nor sums over them."""

    def content(folder):
        files = snapshot(folder)
        for name in files:
            if name.endswith(("train.json", "manifest.json")):
                files[name] = without_measured(json.loads(files[name]))
        lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        files["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]
        files["result.json"] = json.loads(files["result.json"]) | {"train_tokens_per_s": None}
        return files

    ours, theirs = content(out), content(reference)
    return [name for name in theirs if name not in ours or ours[name] != theirs[name]]


def extra(out: Path, reference: Path) -> list[str]:
    return sorted(snapshot(out).keys() - snapshot(reference).keys())


def assert_same_files(out: Path, reference: Path) -> None:
    """Hold a run to another one: it has the same files, and no more."""
    assert differing(out, reference) == []
    assert extra(out, reference) == []


def refused(message: str):
    """Expects a ValueError whose message this regular expression finds."""
    return pytest.raises(ValueError, match=message)


@contextlib.contextmanager
def disk(out: Path, kinds: set[str], at: int = 0, failure=None):
    """Instead of change number `at` to the files below `out`, and of every later one, `failure` is called.

    Of a write, half of the data are on the disk by then. Only changes of these `kinds` count. Yields the list of them.
    """
    changes: list[str] = []

    def change(kind, path):
        if kind in kinds:
            changes.append(f"{kind} {re.sub(RANDOM, '.', Path(path).name)}")
            if 0 < at <= len(changes):
                failure()

    def changing(kind, real):
        def call(path, *args, **options):
            target = args[0] if kind in ("rename", "replace") else path
            # shutil.rmtree gives names relative to an open folder
            if options.get("dir_fd") is not None or str(target).startswith(str(out)):
                change(kind, target)
            return real(path, *args, **options)

        return call

    def opening(real):
        def call(path, mode="r", *args, **options):
            if mode[0] == "r" or not str(path).startswith(str(out)):
                return real(path, mode, *args, **options)
            change("open", path)
            file = real(path, mode, *args, **options)
            whole = file.write

            def write(data):
                whole(data[: len(data) // 2])
                file.flush()
                change("write", path)
                return whole(data[len(data) // 2 :])

            file.write = write
            return file

        return call

    def syncing(real):
        def call(descriptor):
            change("fsync", "a file")
            real(descriptor)

        return call

    with contextlib.ExitStack() as patches:
        for module in (io, builtins):
            patches.enter_context(mock.patch.object(module, "open", opening(module.open)))
        for kind in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patches.enter_context(mock.patch.object(os, kind, changing(kind, getattr(os, kind))))
        patches.enter_context(mock.patch.object(os, "fsync", syncing(os.fsync)))
        yield changes


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint or run anew: it was made as it is now."""
    names = json.loads((folder / "manifest.json").read_text())["sha256"]
    digests = {name: digest_of(folder / name) for name in names}
    (folder / "manifest.json").write_bytes(manifest_of(digests))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(function, *arguments):
    """function(*arguments) in a new process."""
    process = PROCESSES.Process(target=function, args=arguments, daemon=True)  # ended with the tests
    process.start()
    return process


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def of_another_model(path: Path) -> None:
    shutil.copy(path.with_name("optimizer.safetensors"), path)
    seal(path.parent)


DAMAGED_TENSORS = [  # what befalls a file of a checkpoint, and what is told of it
    (cut(0.5), "is damaged: its sha256 is not the one in manifest.json"),
    (Path.unlink, "is missing, which manifest.json has."),
    (of_another_model, "is of another model"),
]


def ten_steps(**changes) -> TrainConfig:
    """The learning rate grows to an absurd one, so that each validation is far worse than the one before."""
    small = {"steps": 10, "eval_every": 4, "log_every": 3, "test_lengths": (5, 12)}
    return small_config(**small | {"optimizer": OptimizerConfig(lr=30.0, warmup=1.0)} | changes)


def write_documents(folder: Path, seed: int = 0, letters: str = "abcdé \n", shortest: int = 20) -> str:
    """Ten documents, each ten characters longer than the one before; some characters have two bytes."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for number in range(10):
        content = "".join(rng.choice(letters) for _ in range(shortest + 10 * number))
        (folder / f"{number}.txt").write_text(content, encoding="utf-8")
    return str(folder)


def text_config(source: str, **changes) -> TrainConfig:
    """1,600 parameters, windows of 12 tokens, 6 steps, checkpoints at 3 and 6."""
    task = {"name": "text", "source": source, "tokenizer": "characters", "seq_len": 12, "valid": 0.2, "test": 0.1}
    small = {
        "task": task | changes.pop("task", {}),
        "model": ModelConfig(d_model=8, num_layers=2),
        "optimizer": OptimizerConfig(lr=0.02, warmup=0.0),
        "steps": 6,
        "eval_every": 3,
        "eval_sequences": 100,
    }
    return small_config(**small | changes)


LSTM = {"name": "lstm", "hidden_size": 3}


def tiny(seed: int, **changes) -> TrainConfig:
    return small_config(seed=seed, mixer=LSTM, **changes)


WIDE = {"name": "bd_lru", "num_blocks": 6, "block_size": 3}
ROWS_OF_GATES = [
    WIDE,
    WIDE | {"selective": False},
    {"name": "h_lru", "num_channels": 6, "order": 3},
    {"name": "h_lru", "num_channels": 6, "order": 3, "form": "observer"},
]
each_kind_of_rows = pytest.mark.parametrize("mixer", ROWS_OF_GATES, ids=str)

LONG = tiny(99, steps=200, eval_every=10, log_every=10)
ENDLESS = tiny(99, steps=1_000_000, eval_every=10, log_every=10)  # stopped, however fast the machine
Z3 = {"name": "permutation", "group": "Z3", "seq_len": 5}
NO_TEST = tiny(50, task=Z3, test_lengths=(2,))  # has no such sequences


def fields_of(value, path=()):
    """The paths of all fields of a value, of a list those of its first part."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from fields_of(part, (*path, key))


def wrong_type(value: object) -> str:
    return "3" if isinstance(value, str) else "[]" if isinstance(value, dict) else '{"x": 1}'


EDITS = {  # what becomes of a field, as JSON text: `"key": ` and the old value to the new text
    "missing": lambda key, value: "",
    "null": lambda key, value: f"{key}null",
    "wrong": lambda key, value: key + wrong_type(value),
    "a text": lambda key, value: key + ('["x"]' if isinstance(value, str) else '"x"'),
    "huge": lambda key, value: f"{key}{'9' * 5000}",
    "deep": lambda key, value: f"{key}{'[' * 100_000}{']' * 100_000}",
    "not a number": lambda key, value: f"{key}NaN",
    "twice": lambda key, value: f"{key}{json.dumps(value)}, {key}{json.dumps(value)}",
    "extra": lambda key, value: f'{key}{json.dumps(value)}, "extra": "x"',
}


def edited(content: dict, path: tuple, edit: str) -> str:
    """The JSON text of a content in which a field is edited."""
    content = copy.deepcopy(content)
    *outer, key = path
    target = functools.reduce(operator.getitem, outer, content)
    value, target[key] = target[key], "HERE"
    if isinstance(key, int):
        return json.dumps(content).replace('"HERE"', EDITS[edit]("", value))
    text, new = json.dumps(content), EDITS[edit](f"{json.dumps(key)}: ", value)
    here = f'{json.dumps(key)}: "HERE"'
    return text.replace(f"{here}, ", new and f"{new}, ").replace(f", {here}", new and f", {new}").replace(here, new)
