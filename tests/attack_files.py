"""Runs, fields and caches that somebody damaged: tries of attack.py."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from attack import WRONG, Attack, End, judge
from run_helpers import EDITS, TRAIN, Stopped, edited, fields_of, seal, small_config

from statemix import TrainConfig, cli, train
from statemix.files import digest_of
from statemix.report import html
from statemix.runs.sweep import run_name, sweep
from statemix.text.corpus import open_corpus
from statemix.training.loop import Training

TASK = {"name": "text", "tokenizer": "characters", "seq_len": 4, "valid": 0.2, "test": 0.2}
NOW = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"  # of a line of a report


def text_config(text: Path, **changes: object) -> TrainConfig:
    """A run of two layers on a text that carries its state, with two checkpoints that count at the end."""
    options = {"task": TASK | {"source": str(text)}, "steps": 4, "eval_every": 1, "test_lengths": (3,), "carry": True}
    return small_config(**options | changes)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Runs without pictures, which take longer than all the rest, and with one speed, which else is of the moment."""
    with (
        mock.patch.object(html, "figures", return_value={}),
        mock.patch.object(TRAIN, "plot_curves", lambda runs, path, **_: Path(path).write_bytes(b"a picture")),
        mock.patch.object(TRAIN.Stopwatch, "steps_per_second", return_value=1.0),
    ):
        yield


def command(*arguments: object) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
        plain(),
    ):
        status = cli.main([str(argument) for argument in arguments])
    return status, output.getvalue(), errors.getvalue()


def lasting(text: str, *places: Path) -> list[str]:
    """The lines of an output without what differs from one folder or moment to the next."""
    for place in places:
        text = text.replace(str(place), "PLACE")
    return [line for line in text.splitlines() if not re.search(NOW, line)]


# ---- what is damaged


class Home(NamedTuple):
    """A sweep of two finished runs, one that was stopped, their text, and what the commands say of them.

    run: name of the first of the finished ones in `sweep`, which is damaged; the one that was stopped is `begun`.
    said: what `said` gives for each of these two.
    """

    folder: Path
    config: TrainConfig
    run: str
    said: dict[str, dict[str, list[str]]]

    def copy(self, place: Path) -> Path:
        """All of it anew, in another folder, whose text and cache are those of this one."""
        shutil.copytree(self.folder / "sweep", place / "sweep", symlinks=True)
        return place / "sweep"


def make_home(place: Path) -> Home:
    (place / "text").write_text("".join(random.Random(0).choices("ab \n", weights=(4, 3, 2, 1), k=2000)))
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    config = text_config(place / "text")
    configs = {f"run, seed {seed}": text_config(place / "text", seed=seed) for seed in (0, 1)}
    save = Training.save

    def saving(run: Training) -> None:
        save(run)
        if run.step == 3:
            raise Stopped

    with plain():
        for one in configs.values():
            train(one, place / "sweep" / run_name(one), progress=False)
        done = sweep(configs, place / "sweep", progress=False)
        assert not done.failed
        with mock.patch.object(Training, "save", saving), contextlib.suppress(Stopped):
            train(config, place / "sweep" / "begun", progress=False)
    home = Home(place, config, run_name(config), {})
    for run in (home.run, "begun"):
        whole = home.copy(place / f"whole {run}")
        home.said[run] = said(home, whole, run)
        assert all(answer[0] == "0" for answer in home.said[run].values()), home.said
    return home


def said(home: Home, folder: Path, run: str) -> dict[str, list[str]]:
    """What each command says of a run, and what it leaves, as lines: the status first, and of an error what it says."""
    generating = ("generate", folder / run, "--prompt", "a", "--max-new-tokens", 12)
    reporting = ("report", folder, "--out", folder / "report")
    training = ("train", "--config", home.folder / "sweep" / run / "config.json", "--out", folder / run)
    found = {}
    for name, arguments in {"generate": generating, "report": reporting, "train": training}.items():
        status, output, errors = command(*arguments)
        lines = lasting(output, folder, home.folder)
        if status:
            lines = [errors.partition("error: ")[2] or errors]
        elif name == "report":
            lines += lasting((folder / "report" / "report.html").read_text(), folder, home.folder)
            lines += lasting((folder / "report" / "report.md").read_text(), folder, home.folder)
        elif name == "train":
            result = json.loads((folder / run / "result.json").read_text())
            best = folder / run / f"step-{result['best_step']}"
            lines += [json.dumps(result), digest_of(best / "model.safetensors")]
        found[name] = [str(status), *lines]
    return found


def compare(
    what: str, found: dict[str, list[str]], whole: dict[str, list[str]], names: set[str], lost: str | None = None
) -> End:
    """The worst of how the commands ended. lost: a run without its result, which a report must leave out aloud."""
    ends = []
    for name in whole:
        status, *lines = found[name]
        if status != "0":
            ends.append(judge(f"{what}, {name}", lines[0], names))
        elif lost and any("without a result, left out" in line and f"PLACE/{lost}" in line for line in lines):
            ends.append(End("refused", f"{what}, {name}: the run is told as one that has no result"))
        elif lines == whole[name][1:]:
            ends.append(End("as before", f"{what}, {name}"))
        else:
            differing = [pair for pair in zip(lines, whole[name][1:], strict=False) if pair[0] != pair[1]]
            ends.append(End("silently different", f"{what}, {name}: {differing[:1]}"))
    order = (*WRONG, "refused", "as before")
    return min(ends, key=lambda end: order.index(end.kind))


# ---- run folders


def flip(path: Path, rng: random.Random, other: Path) -> None:
    """One bit is the other one."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def blank(path: Path, rng: random.Random, other: Path) -> None:
    """Some of it is zeros."""
    content = path.read_bytes()
    begin = rng.randrange(len(content))
    end = rng.randint(begin + 1, len(content))
    path.write_bytes(content[:begin] + bytes(end - begin) + content[end:])


def grow(path: Path, rng: random.Random, other: Path) -> None:
    """There is something behind its end."""
    with path.open("ab") as file:
        file.write(rng.choice((b"\0", b"x", b"\n{}", b"  \n")))


def reorder(path: Path, rng: random.Random, other: Path) -> None:
    """Of its lines one is missing, there twice, or elsewhere."""
    lines = path.read_bytes().splitlines(keepends=True)
    line = lines.pop(rng.randrange(len(lines)))
    for _ in range(rng.randrange(3)):
        lines.insert(rng.randint(0, len(lines)), line)
    path.write_bytes(b"".join(lines))


def swap(path: Path, rng: random.Random, other: Path) -> None:
    """It is that of another run or checkpoint."""
    path.write_bytes(other.read_bytes())


def delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def folder_instead(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: random.Random, other: Path) -> None:
    """It is a link to another's, to itself, or to nothing."""
    path.unlink()
    path.symlink_to(rng.choice((other.resolve(), path, path.with_name("nothing"))))


DAMAGES = (flip, flip, cut, blank, grow, reorder, swap, delete, folder_instead, link)


def damage_folder(home: Home, rng: random.Random, place: Path) -> End:
    """Damage a file of a run, or exchange its checkpoints, and run the commands."""
    run = rng.choice((home.run, "begun"))
    sweep_folder = home.copy(place)
    out = sweep_folder / run
    (theirs,) = (path for path in sweep_folder.iterdir() if path.is_dir() and path.name not in (home.run, "begun"))
    steps = sorted(out.glob("step-*"))
    lost = None
    if rng.random() < 0.15:
        what, names = damage_checkpoints(rng, steps, theirs, home.folder / "sweep" / "begun")
    else:
        files = [file for file in out.rglob("*") if file.is_file()]
        if run == home.run:
            files += [sweep_folder / "sweep.json"]
        file = rng.choice(sorted(files))
        others = [f for f in sweep_folder.rglob(file.name) if f != file and f.read_bytes() != file.read_bytes()]
        # without its file a sweep is a folder of runs: that it had one cannot be known
        damage = rng.choice([damage for damage in DAMAGES if file.name != "sweep.json" or damage not in (delete, link)])
        other = rng.choice(sorted(others)) if others else steps[0] / "model.json"
        before = file.read_bytes()
        damage(file, rng, other)
        what, names = f"{damage.__name__} {run}/{file.relative_to(sweep_folder)}", {file.name}
        if file.is_file() and file.read_bytes() == before:
            what += " (the same)"
        lost = run if file.name == "result.json" and not file.is_file() else None
    return compare(what, said(home, sweep_folder, run), home.said[run], names, lost)


def damage_checkpoints(rng: random.Random, steps: list[Path], theirs: Path, begun: Path) -> tuple[str, set[str]]:
    """Exchange, rename or delete whole checkpoints. Returns what was done, and the names of which one must be told."""
    step = rng.choice(steps)
    names = {step.name, "checkpoints.json"}
    how = rng.choice(("delete", "rename", "exchange", "another run's", "another step's"))
    if how == "delete":
        shutil.rmtree(step)
    elif how == "rename":
        step.rename(step.with_name("step-7"))
    elif how == "exchange" and len(steps) > 1:
        for path, name in ((steps[0], "x"), (steps[1], steps[0].name), (steps[0].with_name("x"), steps[1].name)):
            path.rename(path.with_name(name))
        names |= {path.name for path in steps}
    else:
        found = sorted(theirs.glob("step-*") if how == "another run's" else begun.glob("step-*"))
        source = rng.choice([path for path in found if path.name != step.name or how == "another run's"])
        shutil.rmtree(step)
        shutil.copytree(source, step)
    return f"{how} {step.name}", names


FOLDERS = Attack("run folders", 500, make_home, damage_folder)


# ---- fields

PLAUSIBLE = "another value"


def another(value: object, rng: random.Random) -> object:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + rng.choice((1, -1, 1000)) if isinstance(value, int) else value * rng.choice((0.5, 2, -1)) + 0.1
    if isinstance(value, str):
        return rng.choice((value + "x", "", "step-1", "../begun", "softmax", "bytes"))
    if isinstance(value, list):
        return value[1:] if value else [1]
    return {} if value else {"x": 1}


def edit_field(home: Home, rng: random.Random, place: Path) -> End:
    """Edit a field of a JSON file and run the commands.

    Half of the edits are of someone who writes the manifests anew: the value is then none that the field may have. With
    the others it may be any.
    """
    run = rng.choice((home.run, "begun"))
    sweep_folder = home.copy(place)
    out = sweep_folder / run
    files = [file for file in sorted(out.rglob("*")) if file.suffix in (".json", ".jsonl")]
    if run == home.run:
        files.append(sweep_folder / "sweep.json")
    path = rng.choice(files)
    first, _, rest = path.read_bytes().partition(b"\n") if path.suffix == ".jsonl" else (path.read_bytes(), b"", b"")
    content = json.loads(first)
    field = rng.choice(list(fields_of(content)))
    value = content
    for key in field:
        value = value[key]
    resealed = rng.random() < 0.5 and path.name not in ("manifest.json", "sweep.json")
    size = path.stat().st_size
    leaf = next(key for key in reversed(field) if isinstance(key, str))
    edit = rng.choice([name for name in EDITS if not resealed or may_not(name, path, field, value)] + [PLAUSIBLE])
    if edit == PLAUSIBLE or (isinstance(field[-1], int) and edit in ("twice", "extra", "missing")):
        edit, resealed = PLAUSIBLE, False
        inner = content
        for key in field[:-1]:
            inner = inner[key]
        inner[field[-1]] = another(value, rng)
        text = json.dumps(content)
    else:
        text = edited(content, field, edit)
    path.write_bytes(text.encode() + b"\n" + rest)
    if resealed:
        reseal(out, path, path.stat().st_size - size)
    what = f"{run}/{path.name} {'.'.join(map(str, field))} {edit}{' resealed' if resealed else ''}"
    found = compare(what, said(home, sweep_folder, run), home.said[run], {path.name})
    named = path.name in found.what and (edit == "deep" or leaf in found.what)
    if resealed and found.kind == "refused" and not named:
        return End("unclear", f"{found.what} (names not `{leaf}`)")
    return found


def may_not(edit: str, path: Path, field: tuple, value: object) -> bool:
    """Whether an edit makes a value that the field may not have, wherever it is sealed."""
    nullable = path.name == "config.json" or "accuracy_by_position" in str(field) or "config" in field[:1]
    inner = path.name == "train.json" and field[0] == "config"  # compared as a whole
    if inner or edit in ("missing", "extra"):
        return False
    if edit == "huge":
        return isinstance(value, int) and not isinstance(value, bool) and path.name not in ("config.json",)
    return edit != "null" or not (nullable or value is None)


def reseal(out: Path, path: Path, longer: int) -> None:
    """Write the digests of a run anew, where one of its files was edited and is `longer` by so many bytes."""
    for step in out.glob("step-*"):
        if path.name == "metrics.jsonl":
            about = json.loads((step / "train.json").read_text())
            size = about["metrics"]["bytes"] + longer
            about["metrics"] = {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()[:size]).hexdigest()}
            (step / "train.json").write_text(json.dumps(about))
        seal(step)
    if (out / "manifest.json").exists():
        seal(out)


FIELDS = Attack("JSON fields", 600, make_home, edit_field)


# ---- caches


class Corpora(NamedTuple):
    """Two texts in a cache: what to open, the first one's folder, and what it holds."""

    folder: Path
    arguments: tuple
    key: str
    other: str
    holds: tuple


def make_corpora(place: Path) -> Corpora:
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    found = []
    for name, letters in (("a", "abcd \n"), ("b", "aefg \n")):
        (place / name).write_text("".join(random.Random(name).choices(letters, k=3000)))
        arguments = (str(place / name), "characters", 0, "text", (0.2, 0.2))
        found.append((arguments, open_corpus(*arguments)))
    (arguments, corpus), (_, other) = found
    return Corpora(place, arguments, corpus.fingerprint, other.fingerprint, content_of(corpus))


def content_of(corpus) -> tuple:
    tokens = corpus.tokens
    return str(tokens.dtype), tokens.tobytes(), corpus.documents.tobytes(), corpus.parts, corpus.tokenizer.to_json()


def damage_cache(corpora: Corpora, rng: random.Random, place: Path) -> End:
    """Damage a file of a cache, or all of it, and open the corpus."""
    shutil.copytree(corpora.folder / "cache", place / "cache")
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    own, other = (place / "cache" / "text" / key for key in (corpora.key, corpora.other))
    how = rng.random()
    if how < 0.1:
        what = "another text's"
        shutil.rmtree(own)
        shutil.copytree(other, own)
    elif how < 0.2:
        what = "open to others"
        rng.choice((own, own.parent, own.parent.parent)).chmod(0o777)
    elif how < 0.3:
        what = "a file"
        shutil.rmtree(own)
        own.write_text("x")
    else:
        file = rng.choice(sorted(own.iterdir()))
        damage = rng.choice(DAMAGES)
        damage(file, rng, other / file.name)
        what = f"{damage.__name__} {file.name}"
        if how < 0.6 and file.name != "manifest.json" and damage in (cut, grow):  # wrong whatever the manifest says
            what += " resealed"
            seal(own)
    try:
        corpus = open_corpus(*corpora.arguments)
    except Exception as error:
        return judge(what, error, {str(own), own.name, "cache"})
    same = content_of(corpus) == corpora.holds
    return End("as before" if same else "silently different", what)


CACHES = Attack("caches", 200, make_corpora, damage_cache)
