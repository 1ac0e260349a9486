"""What the tests of runs share: small configs, runs without a picture, what they leave, and disks that fail."""

import builtins
import contextlib
import copy
import errno
import importlib
import io
import json
import os
import re
from pathlib import Path
from unittest import mock

import torch
from helpers import PROCESSES

from statemix import TrainConfig, train
from statemix.files import digest_of, manifest_of
from statemix.tasks import PermutationComposition
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
    sample = PermutationComposition.sample

    def stopping_sample(self, split, batch_size, *, seed=0, index=0):
        if split == "train" and index == stop_before:
            raise Stopped
        return sample(self, split, batch_size, seed=seed, index=index)

    threads = torch.get_num_threads()
    with (
        mock.patch.object(TRAIN, "plot_curves", lambda runs, path, **_: Path(path).write_bytes(b"a picture")),
        mock.patch.object(PermutationComposition, "sample", stopping_sample),
    ):
        torch.set_num_threads(1)
        try:
            return train(config, out, resume=resume, **{"progress": False} | options)
        finally:
            torch.set_num_threads(threads)


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


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint anew: it was made as it is now."""
    names = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
    digests = {name: digest_of(checkpoint / name) for name in names}
    (checkpoint / "manifest.json").write_bytes(manifest_of(digests))


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(function, *arguments):
    """function(*arguments) in a new process."""
    process = PROCESSES.Process(target=function, args=arguments, daemon=True)  # ended with the tests
    process.start()
    return process


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def ten_steps(**changes) -> TrainConfig:
    """The learning rate grows to an absurd one, so that each validation is far worse than the one before."""
    small = {"steps": 10, "eval_every": 4, "log_every": 3, "test_lengths": (5, 12)}
    return small_config(**small | {"optimizer": OptimizerConfig(lr=30.0, warmup=1.0)} | changes)


LSTM = {"name": "lstm", "hidden_size": 3}


def tiny(seed: int, **changes) -> TrainConfig:
    return small_config(seed=seed, mixer=LSTM, **changes)


LONG = tiny(99, steps=200, eval_every=10, log_every=10)
ENDLESS = tiny(99, steps=1_000_000, eval_every=10, log_every=10)  # stopped, however fast the machine
NO_TEST = tiny(
    50, task={"name": "permutation", "group": "Z3", "seq_len": 5}, test_lengths=(2,)
)  # has no such sequences


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
    target = content
    for key in path[:-1]:
        target = target[key]
    value, key = target[path[-1]], path[-1]
    if isinstance(key, int):
        target[key] = "HERE"
        return json.dumps(content).replace('"HERE"', EDITS[edit]("", value))
    target[key] = "HERE"
    text, new = json.dumps(content), EDITS[edit](f"{json.dumps(key)}: ", value)
    here = f'{json.dumps(key)}: "HERE"'
    return text.replace(f"{here}, ", new and f"{new}, ").replace(f", {here}", new and f", {new}").replace(here, new)
