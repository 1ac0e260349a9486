"""checkpoint.py: a run that is killed or meets a full disk at any moment ends as one that was never stopped."""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from helpers import exit_code
from run_helpers import (
    CHANGES,
    NEEDING_SPACE,
    Stopped,
    assert_same_files,
    cut,
    differing,
    disk,
    disk_is_full,
    edit_json,
    extra,
    refused,
    run,
    small_config,
    snapshot,
    start,
    stopped,
)

from statemix import SequenceModel, TrainConfig, train
from statemix.runs.read import read_run
from statemix.tasks import PermutationComposition
from statemix.training.checkpoint import find_checkpoint
from statemix.training.config import OptimizerConfig

DELETIONS = {"unlink", "rmdir"}


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_broken():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def run_killed_at(at: int, out: Path, config: TrainConfig) -> None:
    with disk(out, CHANGES, at, kill_myself):
        run(out, config)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The second checkpoint validates worse than the first, the third best: they are kept and deleted in every way."""
    for seed in range(100):
        metrics = run(tmp_path_factory.mktemp("seed"), small_config(seed=seed)).metrics
        first, second, third = (line["valid_loss"] for line in metrics if "valid_loss" in line)
        if second > first + 0.01 > third + 0.02:
            return small_config(seed=seed)
    pytest.fail("there is no such seed")


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run(out, config)
    files = {"config.json", "metrics.jsonl", "checkpoints.json", "result.json", "manifest.json", "curves.png"}
    assert {path.name for path in out.iterdir()} == files | {"step-3"}
    return out


@pytest.fixture(scope="module")
def half_way(config, tmp_path_factory):
    """A run stopped after step 2 of 3: the last checkpoint is step-2, the best is step-1."""
    out = stopped(tmp_path_factory.mktemp("half_way") / "run", config, 2)
    assert json.loads((out / "checkpoints.json").read_text()) == {"last": "step-2", "best": "step-1"}
    return out


@pytest.fixture
def out(half_way, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(half_way, tmp_path / "run")


@pytest.fixture(scope="module")
def killed(config, reference, tmp_path_factory):
    """For every change a run makes to its files: what differs or is left over when it was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    with disk(folder / "run", CHANGES) as changes:
        run(folder / "run", config)
    outs = [folder / f"{at}: {what}" for at, what in enumerate(changes, start=1)]
    for at in range(0, len(outs), 2):  # two processes at a time
        processes = [start(run_killed_at, 1 + outs.index(out), out, config) for out in outs[at : at + 2]]
        assert {exit_code(process) for process in processes} == {-signal.SIGKILL}
    outcomes = {}
    for out in outs:
        try:
            run(out, config)
            outcomes[out.name] = differing(out, reference) + extra(out, reference)
        except Exception as error:  # told by the test, with the moment
            outcomes[out.name] = [repr(error)]
    return outcomes


def test_the_kills_hit_every_kind_of_moment(killed):
    moments = [moment.partition(": ")[2] for moment in killed]
    assert {
        "write model.safetensors",  # half of it, in the partial folder
        "rename step-2",
        "replace checkpoints.json",  # the checkpoint is there, but does not count yet
        "rmdir step-1",
        "rmdir step-2",  # checkpoints.json is new, the old checkpoints are there
        "write metrics.jsonl",
        "write curves.png",
        "replace result.json",
    } <= set(moments)
    assert any(re.fullmatch(r"write \.checkpoints\.json.+", moment) for moment in moments)


def test_a_run_killed_at_any_change_ends_as_one_never_stopped_and_leaves_no_other_file(killed):
    assert {moment: names for moment, names in killed.items() if names} == {}


def test_a_run_killed_many_times_ends_as_one_never_stopped(config, reference, tmp_path):
    out, moments = tmp_path / "run", random.Random(0)
    codes = [exit_code(start(run_killed_at, moments.randrange(15, 40), out, config)) for _ in range(8)]
    assert codes[:3] == [-signal.SIGKILL] * 3
    assert set(codes) <= {-signal.SIGKILL, 0}
    run(out, config)
    assert differing(out, reference) == []


LONG = {"steps": 24, "eval_every": 4, "optimizer": OptimizerConfig(lr=0.03)}


def run_slowly(out: Path) -> None:
    """A run that takes a while, and never reaches its end."""
    sample = PermutationComposition.sample

    def slow_sample(self, split, *args, **options):
        time.sleep(3600 if split == "test" else 0.01)
        return sample(self, split, *args, **options)

    with mock.patch.object(PermutationComposition, "sample", slow_sample):
        run(out, small_config(**LONG))


def lines_of(path: Path) -> int:
    """The whole lines of a file; 0 where there is none: a run that starts anew deletes its old one first."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_run_killed_from_outside_again_and_again_ends_as_one_never_stopped(tmp_path):
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    delay = random.Random(0)
    for lines in (1, 6, 6, 17, 30):  # there are 24 of training steps and 6 of validations
        process, deadline = start(run_slowly, out), time.monotonic() + 60
        while lines_of(metrics) < lines:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay.uniform(0, 0.03))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL
        assert not (out / "result.json").exists()
    run(out, small_config(**LONG))
    run(tmp_path / "reference", small_config(**LONG))
    assert differing(out, tmp_path / "reference") == []


def last_checkpoint(out: Path) -> Path | None:
    path = out / "checkpoints.json"
    return out / json.loads(path.read_text())["last"] if path.exists() else None


def test_a_full_disk_at_any_change_loses_nothing(config, reference, tmp_path):
    with disk(tmp_path / "run", NEEDING_SPACE) as changes:
        run(tmp_path / "run", config)
    assert {"write model.safetensors", "mkdir .step-2.partial", "write metrics.jsonl", "fsync a file"} <= set(changes)
    problems = {}
    for at, what in enumerate(changes, start=1):
        out = tmp_path / str(at)
        # before config.json is there, `out` itself is what cannot be used
        begun = at > next(i for i, change in enumerate(changes, start=1) if change == "replace config.json")
        with (
            disk(out, NEEDING_SPACE, at, disk_is_full),
            pytest.raises(RuntimeError if begun else (RuntimeError, ValueError), match="No space left on device") as e,
        ):
            run(out, config)
        message, last = str(e.value), last_checkpoint(out)
        if str(out) not in message:
            problems[f"{at}: {what}"] = f"does not name the folder: {message}"
        if begun and (f"The last checkpoint is '{last}'" if last else "There is no checkpoint yet") not in message:
            problems[f"{at}: {what}"] = f"does not name {last}: {message}"
        if last is not None:
            SequenceModel.load(last)
        run(out, config)
        if names := differing(out, reference) + extra(out, reference):
            problems[f"{at}: {what}"] = f"differ or are left over: {names}"
    assert problems == {}


def test_what_gets_its_name_is_on_the_disk_and_the_pointer_comes_last(tmp_path):
    """Or a machine that stops may find the name without the content."""
    synced, renamed, missing, fsync = set(), [], [], os.fsync

    def identity(status):
        return status.st_ino, status.st_mtime_ns

    def syncing(descriptor):
        fsync(descriptor)
        synced.add(identity(os.fstat(descriptor)))

    def renaming(real):
        def call(source, target):
            renamed.append(Path(target).name)
            files = [path for path in (Path(source), *Path(source).rglob("*")) if path.is_file()]
            missing.extend(path.name for path in files if identity(path.stat()) not in synced)
            real(source, target)

        return call

    with mock.patch.multiple(os, fsync=syncing, rename=renaming(os.rename), replace=renaming(os.replace)):
        run(tmp_path / "run", small_config())
    assert missing == []
    names = [name for name in renamed if name.startswith(("step-", "checkpoints"))]
    assert names == ["step-1", "checkpoints.json", "step-2", "checkpoints.json", "step-3", "checkpoints.json"]


def run_with_small_files(limit: int, answer: Path, out: Path, config: TrainConfig) -> None:
    """Write what the RuntimeError of a run says that may write no file above `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(out, config)
    except RuntimeError as error:
        answer.write_text(str(error))


def test_a_write_that_the_system_refuses_in_the_middle_loses_nothing(config, out, reference, tmp_path):
    answer = tmp_path / "answer"
    limit = (out / "step-2" / "model.safetensors").stat().st_size - 1
    assert limit > (out / "config.json").stat().st_size
    assert exit_code(start(run_with_small_files, limit, answer, out, config)) == 0
    assert re.fullmatch(
        rf"train: cannot write to '{re.escape(str(out))}': .*File too large.*\. "
        rf"The last checkpoint is '{re.escape(str(out))}/step-2'; the run resumes from there\.",
        answer.read_text(),
    )
    [partial] = out.glob(".step-3.*.partial")
    assert (partial / "model.safetensors").stat().st_size == limit  # it did stop in the middle
    run(out, config)
    assert_same_files(out, reference)


def holding(text):
    return lambda path: path.write_text(text)


def edited(change):
    return lambda path: edit_json(path, change)


def of_another_model(path):
    shutil.copy(path.parent / "model.safetensors", path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replacing(old, new):
    def change(path):
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))

    return change


def without_line(number):
    def change(path):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:number] + lines[number + 1 :]))

    return change


def doubled_loss(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["loss"] *= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def under_its_name(path):
    shutil.rmtree(path.parent)
    path.parent.with_name("step-1").rename(path.parent)


LAST, BAD_LINE = "step-2", "metrics.jsonl with a damaged line"
DAMAGES = {
    "weights cut": (f"{LAST}/model.safetensors", cut(0.5)),
    "weights cut by a byte": (f"{LAST}/model.safetensors", cut(0.9999)),
    "weights empty": (f"{LAST}/model.safetensors", cut(0)),
    "weights missing": (f"{LAST}/model.safetensors", Path.unlink),
    "optimizer cut": (f"{LAST}/optimizer.safetensors", cut(0.5)),
    "optimizer empty": (f"{LAST}/optimizer.safetensors", cut(0)),
    "optimizer missing": (f"{LAST}/optimizer.safetensors", Path.unlink),
    "optimizer of another kind": (f"{LAST}/optimizer.safetensors", of_another_model),
    "model.json missing": (f"{LAST}/model.json", Path.unlink),
    "train.json cut": (f"{LAST}/train.json", cut(0.5)),
    "train.json empty": (f"{LAST}/train.json", cut(0)),
    "train.json missing": (f"{LAST}/train.json", Path.unlink),
    "train.json a list": (f"{LAST}/train.json", holding("[]")),
    "train.json an object": (f"{LAST}/train.json", holding("{}")),
    "train.json without the step": (f"{LAST}/train.json", edited(lambda state: state.pop("step"))),
    "checkpoint missing": (LAST, shutil.rmtree),
    "checkpoints.json cut": ("checkpoints.json", cut(0.5)),
    "checkpoints.json empty": ("checkpoints.json", cut(0)),
    "checkpoints.json a list": ("checkpoints.json", holding("[]")),
    "checkpoints.json an object": ("checkpoints.json", holding("{}")),
    "checkpoints.json with a number": ("checkpoints.json", holding('{"last": 2, "best": 1}')),
    "checkpoints.json no text": ("checkpoints.json", lambda path: path.write_bytes(b"\xff\x00")),
    BAD_LINE: ("metrics.jsonl", lambda path: path.write_text("{\n" + path.read_text())),
    "metrics.jsonl missing": ("metrics.jsonl", Path.unlink),
    "result.json cut": ("result.json", holding('{"parameters": 12')),
    # each of the right form, but not as it was written
    "a bit of the weights": (f"{LAST}/model.safetensors", flip_a_bit),
    "a bit of the moments": (f"{LAST}/optimizer.safetensors", flip_a_bit),
    "a bit of the best weights": ("step-1/model.safetensors", flip_a_bit),
    "half of the best weights": ("step-1/model.safetensors", cut(0.5)),
    "another step": (f"{LAST}/train.json", replacing('"step": 2', '"step": 3')),
    "another best loss": (f"{LAST}/train.json", edited(lambda state: state.update(best_loss=9.0))),
    "an older checkpoint under the name of the last": (f"{LAST}/train.json", under_its_name),
    "an empty manifest": (f"{LAST}/manifest.json", holding('{"sha256": {}}')),
    "a manifest of a file elsewhere": (f"{LAST}/manifest.json", replacing('"train.json"', '"../train.json"')),
    "another best checkpoint": ("checkpoints.json", replacing("step-1", "step-2")),
    "a pointer to a folder elsewhere": ("checkpoints.json", replacing("step-2", "../run/step-2")),
    "another number in the metrics": ("metrics.jsonl", doubled_loss),
    "the metrics without their first line": ("metrics.jsonl", without_line(0)),
    "the metrics without their last line": ("metrics.jsonl", without_line(-1)),
    "the metrics cut": ("metrics.jsonl", cut(0.9)),
}


def assert_refused_and_kept(out: Path, config: TrainConfig, message: str) -> None:
    before = snapshot(out)
    with refused(message):
        run(out, config)
    assert snapshot(out) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_nothing_is_changed(config, out, damage):
    name, spoil = DAMAGES[damage]
    spoil(out / name)
    told = "' is damaged: " if (out / name).exists() else "'.* is missing"
    assert_refused_and_kept(out, config, rf"^train: '{re.escape(str(out / name))}{told}")


STARTED_AGAIN = ["weights cut", "checkpoints.json cut", "train.json a list", "checkpoint missing", BAD_LINE]


@pytest.mark.parametrize("damage", STARTED_AGAIN)
def test_a_damaged_run_starts_again_when_told_to(config, out, reference, damage):
    name, spoil = DAMAGES[damage]
    spoil(out / name)
    run(out, config, resume="never")
    assert_same_files(out, reference)


def test_a_half_deleted_run_is_not_taken_for_a_finished_one(config, reference, tmp_path):
    """resume="never" deletes the old run first; wherever that fails, the new run must be trained to its end."""
    other = small_config(seed=config.seed + 1)
    run(tmp_path / "other", other)
    shutil.copytree(reference, tmp_path / "run")
    with disk(tmp_path / "run", DELETIONS) as deletions:
        run(tmp_path / "run", other, resume="never")
    assert_same_files(tmp_path / "run", tmp_path / "other")
    wrong = {}
    for at, what in enumerate(deletions, start=1):
        out = tmp_path / str(at)
        shutil.copytree(reference, out)
        with disk(out, DELETIONS, at, disk_is_broken), pytest.raises(RuntimeError, match="Input/output error"):
            run(out, other, resume="never")
        expected = tmp_path / "other"
        try:
            with contextlib.suppress(Stopped):
                run(out, other, stop_before=2)
            run(out, other)
        except ValueError:  # the old run still counts, and says so; then it must be whole
            with refused("was made with seed="):
                run(out, other)
            run(out, config)
            expected = reference
        if names := differing(out, expected):
            wrong[f"{at}: {what}"] = names
    assert wrong == {}


def test_a_lost_pointer_deletes_nothing(config, out):
    (out / "checkpoints.json").unlink()
    assert_refused_and_kept(out, config, r"no checkpoints\.json")


@pytest.mark.parametrize("name", ["config.json", "result.json", "step-7/thesis.txt"])
def test_a_folder_that_never_held_a_run_keeps_files_with_our_names(config, tmp_path, name):
    out = tmp_path / "run"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    assert_refused_and_kept(out, config, rf"'{out}' has '{name.partition('/')[0]}' and no checkpoints\.json")


@pytest.fixture(scope="module")
def other_seed(config, tmp_path_factory):
    """A run of another seed, stopped after step 2, too."""
    return stopped(tmp_path_factory.mktemp("other_seed") / "run", small_config(seed=config.seed + 1), 2)


def test_text_is_not_generated_from_another_checkpoint_under_the_name_of_the_best(out, other_seed):
    """Each is whole, and true to its own manifest."""
    best = out / "step-1"
    path = re.escape(str(best))
    assert find_checkpoint(out) == best
    for source, told in (
        (out / "step-2", rf"'{path}/train\.json' is damaged: `step` must be that of its folder, got 2"),
        (other_seed / "step-1", rf"checkpoint '{path}' is of another run than '.*/config\.json': .* seed="),
    ):
        shutil.rmtree(best)
        shutil.copytree(source, best)
        with refused(f"^generate: {told}"):
            find_checkpoint(out)
    assert find_checkpoint(best) == best  # as it was asked for


FILES = ["model.json", "model.safetensors", "optimizer.safetensors", "train.json", "manifest.json"]


@pytest.mark.parametrize("name", [*FILES[1:], "metrics.jsonl", ""])
def test_a_file_of_another_run_is_refused(config, out, other_seed, name):
    """The file model.json is the same in both; "" is the whole checkpoint, which is true to itself."""
    assert sorted(path.name for path in (out / LAST).iterdir()) == sorted(FILES)
    path = out / name if name == "metrics.jsonl" else out / LAST / name
    theirs = other_seed / path.relative_to(out)
    if name:
        shutil.copy(theirs, path)
        message = re.escape(str(out / LAST / "train.json" if name == "manifest.json" else path)) + "' is damaged: "
    else:
        shutil.rmtree(path)
        shutil.copytree(theirs, path)
        message = r"metrics\.jsonl' is damaged: it does not begin with the lines up to step-2\."
    with refused(message):
        run(out, config)


@pytest.mark.parametrize("damage", ["weights cut", "train.json an object", "checkpoint missing", "model.json missing"])
def test_an_older_checkpoint_that_is_whole_is_offered_and_taken(config, out, reference, damage):
    name, spoil = DAMAGES[damage]
    spoil(out / name)
    older = re.escape(str(out / "step-1"))
    with refused(rf" '{older}' is whole: --resume=best goes on from there, --resume=never starts again\.$"):
        run(out, config)
    stopped(out, config, 2, resume="best")
    run(out, config)
    assert_same_files(out, reference)


def test_where_no_checkpoint_is_whole_none_is_offered(config, out):
    for name in (LAST, "step-1"):
        flip_a_bit(out / name / "model.safetensors")
    for resume in ("auto", "best"):
        with refused(r"model\.safetensors' is damaged: .*json\. Use --resume=never to start again"):
            run(out, config, resume=resume)


def test_a_finished_run_goes_back_to_its_best_checkpoint(tmp_path):
    """The best of these four is the first: the others are taken again."""
    config = small_config(steps=4, optimizer=OptimizerConfig(lr=30.0, warmup=1.0))
    first = run(tmp_path / "run", config)
    assert first.summary["best_step"] == 1
    flip_a_bit(tmp_path / "run" / "step-4" / "optimizer.safetensors")
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    with refused("--resume=best"):
        run(tmp_path / "run", config)
    again = run(tmp_path / "run", config, resume="best")
    assert again.summary | {"train_tokens_per_s": 0} == first.summary | {"train_tokens_per_s": 0}
    stopped(tmp_path / "stopped", config, 2, resume="best")
    assert not (tmp_path / "stopped" / "result.json").exists()  # it was of what is being trained again
    run(tmp_path / "stopped", config)
    assert differing(tmp_path / "stopped", tmp_path / "run") == []


def test_a_checkpoint_of_an_older_version_is_refused(config, out):
    for name in (LAST, "step-1"):
        (out / name / "manifest.json").unlink()
    last = re.escape(str(out / LAST))
    with refused(rf"^train: '{last}' has no manifest\.json: it is of an older version\. Use --resume="):
        run(out, config)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_a_result_that_is_not_as_it_was_written_is_refused(config, reference, tmp_path, name):
    out = shutil.copytree(reference, tmp_path / "run")
    path = out / name
    path.write_text(re.sub(r"(0\.\d*)\d", r"\g<1>3", path.read_text(), count=1))
    path.write_text(path.read_text() + (" " if snapshot(out)[name] == snapshot(reference)[name] else ""))
    with refused(rf"^train: '{re.escape(str(path))}' is damaged: "):
        run(out, config)
    with refused(rf"^runs: '{re.escape(str(path))}' is damaged: its sha256 is not the one in"):
        read_run(out)


@pytest.mark.parametrize("moment", [0, 1, 2, "test"])
def test_a_run_whose_folder_vanishes_ends_with_an_error(tmp_path, moment):
    """It is deleted, or moved away and another put in its place, before a step or in the test."""
    sample = PermutationComposition.sample
    for replace in (False, True):
        out = tmp_path / f"run {replace}"

        def vanishing(self, split, batch_size, *, seed=0, index=0, out=out, replace=replace):
            if (out / "config.json").exists() and (split == moment or (split == "train" and index == moment)):
                shutil.rmtree(out)
                if replace:
                    out.mkdir()
            return sample(self, split, batch_size, seed=seed, index=index)

        with (
            mock.patch.object(PermutationComposition, "sample", vanishing),
            pytest.raises(RuntimeError, match=rf"^train: cannot write to '{out}': "),
        ):
            train(small_config(), out, progress=False)


def test_links_with_the_names_of_partial_files_are_not_followed(config, reference, tmp_path):
    """As in a folder that others may write to."""
    out, mine = tmp_path / "run", tmp_path / "mine"
    out.mkdir()
    (mine / "folder").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints.json", "result.json", "manifest.json", "curves.png"):
        (mine / name).write_text("mine")
        (out / f".{name}.partial").symlink_to(mine / name)
    for step in (1, 2, 3):
        (out / f".step-{step}.partial").symlink_to(mine / "folder")
    before = snapshot(mine)
    run(out, config)
    assert snapshot(mine) == before
    assert differing(out, reference) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the files that are mapped are seen in /proc")
def test_a_run_keeps_the_rules_of_windows(config, out, reference):
    """Only what is open for writing is synced, and nothing is deleted or replaced while it is mapped into memory."""
    broken, fsync = [], os.fsync

    def syncing(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            broken.append("fsync of a file that is open for reading")
        fsync(descriptor)

    def changing(name, real):
        def call(path, *args, **options):
            for target in (path, *args):  # relative to an open folder in shutil.rmtree
                if f"/{Path(target).name}\n" in Path("/proc/self/maps").read_text():
                    broken.append(f"{name} {target}")
            return real(path, *args, **options)

        return call

    changed = {name: changing(name, getattr(os, name)) for name in ("unlink", "rmdir", "rename", "replace")}
    with mock.patch.multiple(os, fsync=syncing, **changed):
        run(out, config)
    assert broken == []
    assert differing(out, reference) == []
