"""A run's folder: checkpoints, metrics and results, written so that a process killed at any moment loses nothing.

    out/config.json       the TrainConfig
    out/tokenizer.json    of a text: what its tokens stand for
    out/metrics.jsonl     one JSON object a line: training steps and validations
    out/checkpoints.json  {"last": "step-600", "best": "step-400"}: which checkpoints count
    out/step-600/         model.json, model.safetensors, optimizer.safetensors, train.json; of a run that carries its
                          state, state.safetensors; while a part of it is away on trial, trial.safetensors, what
                          it was before that
    out/step-600/manifest.json  the sha256 of each of these
    out/result.json       the test scores, once training has ended
    out/manifest.json     then, of config.json, tokenizer.json, metrics.jsonl and result.json
    out/curves.png        loss and accuracy
    out/tracker.json      what a tracker of experiments has been told of the run, see listeners.py
    out/tensorboard/      where that is TensorBoard, its events

A checkpoint is written under another name and renamed when it is complete; then checkpoints.json is replaced, in
one operation of the file system; then what no longer counts is deleted. Weights are safetensors, all else JSON.

A checkpoint is one thing: train.json holds its step, the config, the fingerprint of the data, the best checkpoint at
that time, and size and sha256 of the metrics so far. It counts only while all of that still fits together.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from statemix import records
from statemix.files import (
    MANIFEST_FILE,
    check_manifest,
    delete_partials,
    digest_of,
    make_folder,
    manifest_of,
    partial_of,
    sync,
    write_whole,
)
from statemix.model import CONFIG_FILE as MODEL_FILE
from statemix.model import WEIGHTS_FILE, TokenModel, read_tensors
from statemix.text.tokenizer import TOKENIZER_FILE
from statemix.training.config import TrainConfig, first_difference
from statemix.training.curriculum import STATE as CURRICULUM
from statemix.training.processes import part_like, whole
from statemix.training.pruning import snapshot

OPTIMIZER_FILE, STATE_FILE, TRAIN_FILE = "optimizer.safetensors", "state.safetensors", "train.json"  # of a checkpoint
POINTER_FILE, METRICS_FILE, CURVES_FILE = "checkpoints.json", "metrics.jsonl", "curves.png"
CONFIG_FILE, RESULT_FILE = "config.json", "result.json"
CLEARING_FILE = f".{POINTER_FILE}.partial"  # checkpoints.json while the run is deleted
TRIAL_FILE = "trial.safetensors"  # of a checkpoint
CHECKPOINT_FILES = (TRAIN_FILE, MODEL_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)  # that every checkpoint has
TRACKER_FILE, EVENTS_FOLDER = "tracker.json", "tensorboard"
RUN_FILES = (
    POINTER_FILE,
    METRICS_FILE,
    CURVES_FILE,
    CONFIG_FILE,
    RESULT_FILE,
    TOKENIZER_FILE,
    MANIFEST_FILE,
    TRACKER_FILE,
)
OWN = "|".join([*map(re.escape, RUN_FILES), r"step-\d+"])  # the names of what is in a run's folder

# forms of the JSON files, see records.py
POINTER = {"last": str, "best": str}
INIT = {"folder": str, "sha256": str}  # whose first weights a run has
# each time that a run was lengthened: up to which step it was one of `steps` steps, and the learning rates of that step
# and the next one
LENGTHENED = [{"step": int, "steps": int, "lr_before": float, "lr_after": float}]
PROGRESS = {
    "step": int,
    "best_loss": float,
    "best": str,
    "metrics": {"bytes": int, "sha256": str},
    "config": dict,
    "data?": str,
    "tokenizer?": str,
    "curriculum?": CURRICULUM,
    "init_from?": INIT,
    "lengthened?": LENGTHENED,
}
LINE = {"step": int, "valid_accuracy_by_position?": [float | None], str: float}
SCORES = {
    "loss": float,
    "token_accuracy": float,
    "sequence_accuracy": float,
    "macro_accuracy": float,
    "mad_accuracy": float,
    "accuracy_by_position": [float | None],
    str: float,
}
RESULT = {
    "version": str,
    "parameters": int,
    "mixer_parameters": int,
    "state_size": int,
    "steps": int,
    "best_step": int,
    "train_tokens_per_s": float,
    "threads": int,
    "processes": int,
    "valid": SCORES,
    "test": {str: SCORES},
    "kernels?": {str: str},
    "sharpened?": {str: SCORES},
    "blocks?": [int],
    "components?": [int],
    "data?": str,
    "init_from?": INIT,
    "lengthened?": LENGTHENED,
}
AGAIN = "Use --resume=never to start again."


class RunFolder:
    """The files of one training run. Raises as `make_folder`."""

    def __init__(self, path: str | Path) -> None:
        self.path = make_folder(path, "train")
        self._metrics_size = 0  # bytes of metrics.jsonl as this run has written it

    def write(self, name: str, content: bytes) -> None:
        """Replace a file whole."""
        write_whole(self.path / name, content)

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file whole."""
        self.write(name, _json(value))

    def clear(self) -> None:
        """Delete what an earlier run left here, and only that."""
        if (self.path / POINTER_FILE).exists():  # from here on there is nothing to resume, and CLEARING_FILE says why
            (self.path / POINTER_FILE).replace(self.path / CLEARING_FILE)
        self._delete_checkpoints_but(set())
        if (self.path / TRACKER_FILE).exists():
            for file in (self.path / EVENTS_FOLDER).glob("events.out.tfevents.*"):
                file.unlink()
            with contextlib.suppress(OSError):  # there is none, or it has files of others
                (self.path / EVENTS_FOLDER).rmdir()
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        delete_partials(self.path, OWN)
        (self.path / CLEARING_FILE).unlink(missing_ok=True)

    def check_remains(self) -> None:
        """Raise ValueError unless a folder without checkpoints.json holds only what a killed run may have left."""
        steps = [folder for folder in self.path.iterdir() if re.fullmatch(r"step-\d+", folder.name)]
        suspects = []
        if not (self.path / CLEARING_FILE).exists():
            suspects += [folder for folder in steps if not (folder / TRAIN_FILE).exists()]
            suspects += steps if len(steps) > 1 else []  # the second is only made once checkpoints.json names the first
            suspects += [self.path / RESULT_FILE] if (self.path / RESULT_FILE).exists() else []
        try:
            if (self.path / CONFIG_FILE).exists():
                TrainConfig.load(self.path / CONFIG_FILE)
        except ValueError:
            suspects.append(self.path / CONFIG_FILE)
        if suspects:
            raise ValueError(
                f"train: `out` must be a folder of one run, but '{self.path}' has '{suspects[0].name}' and no "
                f"{POINTER_FILE}. Use another folder, or --resume=never to delete what has the names of a run's files."
            )

    def checkpoint(self, which: str) -> Path | None:
        """The folder of the "last" or "best" checkpoint; None if there is none yet."""
        pointer = self._pointer()
        return None if pointer is None else self.path / pointer[which]

    def kept(self) -> str:
        """What an error has to say of the run so far."""
        last = self.checkpoint("last")
        return (
            f"The last checkpoint is '{last}'; the run resumes from there." if last else "There is no checkpoint yet."
        )

    def _pointer(self) -> dict[str, str] | None:
        """The content of checkpoints.json, if there is one."""
        try:
            return read_pointer(self.path, "train", AGAIN)
        except FileNotFoundError:
            return None

    def check(self, checkpoint: Path) -> dict[str, Any]:
        """See that a checkpoint is still as it was written, and the metrics up to it.

        Returns:
            What it says of itself: PROGRESS.

        Raises:
            ValueError: a file is not; the message names it, and an older checkpoint that still is.
        """
        try:
            return self._progress(checkpoint)
        except ValueError as error:
            older, remedy = self.checkpoint("best"), AGAIN
            if older is not None and older != checkpoint:
                with contextlib.suppress(ValueError):
                    self._progress(older)
                    remedy = f"'{older}' is whole: --resume=best goes on from there, --resume=never starts again."
            raise ValueError(f"{error} {remedy}") from error

    def _progress(self, checkpoint: Path) -> dict[str, Any]:
        """What a checkpoint says of itself. Raises ValueError if it is not true."""
        if not checkpoint.is_dir():
            raise ValueError(f"train: '{checkpoint}', which {POINTER_FILE} names, is missing.")
        check_manifest(checkpoint, CHECKPOINT_FILES, "train", every=True)
        path, metrics = checkpoint / TRAIN_FILE, self.path / METRICS_FILE
        progress: dict[str, Any] = records.read(path, PROGRESS, "train")
        if progress["step"] != step_of(checkpoint):  # a folder that was renamed
            raise records.damaged("train", path, f"`step` must be that of its folder, got {progress['step']}")
        try:
            begin = metrics.read_bytes()[: progress["metrics"]["bytes"]]
        except FileNotFoundError as error:
            raise ValueError(f"train: '{metrics}' is missing.") from error
        if hashlib.sha256(begin).hexdigest() != progress["metrics"]["sha256"]:
            raise records.damaged("train", metrics, f"it does not begin with the lines up to {checkpoint.name}")
        return progress

    def best_of(self, last: Mapping[str, Any]) -> Path:
        """The best checkpoint, which must be the one that the last one knows; `last`: its PROGRESS."""
        best = self.checkpoint("best")
        if best is None or best.name != last["best"]:
            what = f"`best` must be '{last['best']}', as {TRAIN_FILE} of step-{last['step']} says"
            raise records.damaged("train", self.path / POINTER_FILE, what, AGAIN)
        return best

    def go_on_from(self, checkpoint: Path) -> None:
        """Let the best checkpoint be the last one, unless the last one is meant: what came after it is not."""
        if checkpoint != self.checkpoint("last"):
            (self.path / RESULT_FILE).unlink(missing_ok=True)
            self.write_json(POINTER_FILE, {"last": checkpoint.name, "best": checkpoint.name})

    def reopen(self) -> None:
        """Let a run that has ended be one that has not."""
        (self.path / RESULT_FILE).unlink(missing_ok=True)

    def save_checkpoint(
        self,
        model: TokenModel,
        moments: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        best: bool,
        others: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Write a checkpoint as the last, and maybe best; the "step" of its progress names the folder.

        Args:
            model: with its weights.
            moments: of the optimizer, as `optimizer_tensors` gives them.
            progress: PROGRESS, without what this adds: "best" and "metrics".
            best: whether it validates better than those before.
            others: what else the next step depends on, by the file that holds it.
        """
        name = f"step-{progress['step']}"
        pointer = self._pointer() or {"best": name}
        pointer = {"last": name, "best": name if best else pointer["best"]}
        target, partial = self.path / name, partial_of(self.path / name)
        partial.mkdir()
        model.save(partial)
        (partial / OPTIMIZER_FILE).write_bytes(save(dict(moments)))
        for file_name, tensors in others.items():
            (partial / file_name).write_bytes(save({key: part.contiguous() for key, part in tensors.items()}))
        metrics = self.path / METRICS_FILE
        sync(metrics)
        so_far = {"bytes": metrics.stat().st_size, "sha256": digest_of(metrics)}
        (partial / TRAIN_FILE).write_bytes(_json({**progress, "best": pointer["best"], "metrics": so_far}))
        digests = {file.name: digest_of(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST_FILE).write_bytes(manifest_of(digests))
        for file in partial.iterdir():
            sync(file)
        if target.exists():  # complete, but killed before the pointer moved; the content is the same
            shutil.rmtree(target)
        partial.rename(target)
        self.write_json(POINTER_FILE, pointer)
        self.delete_unused()

    def delete_unused(self) -> None:
        """Delete the checkpoints that no longer count, also parts that a kill left."""
        self._delete_checkpoints_but(set((self._pointer() or {}).values()))
        delete_partials(self.path, OWN)

    def _delete_checkpoints_but(self, names: set[str]) -> None:
        for folder in self.path.iterdir():
            if re.fullmatch(r"step-\d+", folder.name) and folder.name not in names:
                shutil.rmtree(folder)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill does not count."""
        try:
            return records.read_lines(self.path / METRICS_FILE, LINE, "train", AGAIN)
        except FileNotFoundError:
            return []

    def keep_metrics(self, size: int) -> None:
        """Keep only so many bytes of metrics.jsonl: training goes on from there."""
        path = self.path / METRICS_FILE
        self.write(METRICS_FILE, path.read_bytes()[:size] if size else b"")
        self._metrics_size = size

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line. Raises OSError if the file is no longer as this run wrote it, as when its folder is gone."""
        content = (json.dumps(line) + "\n").encode()
        with (self.path / METRICS_FILE).open("ab") as file:
            if file.tell() != self._metrics_size:
                raise OSError(f"another program changed or deleted '{METRICS_FILE}' during the run")
            file.write(content)
        self._metrics_size += len(content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest of a run that has ended, and then result.json, the end."""
        result = _json(summary)
        names = [CONFIG_FILE, METRICS_FILE, *([TOKENIZER_FILE] if (self.path / TOKENIZER_FILE).exists() else [])]
        digests = {name: digest_of(self.path / name) for name in names}
        self.write(MANIFEST_FILE, manifest_of(digests | {RESULT_FILE: hashlib.sha256(result).hexdigest()}))
        self.write(RESULT_FILE, result)


def read_result(folder: Path, owner: str) -> dict[str, Any]:
    """The result.json of a run.

    Raises:
        FileNotFoundError: there is none: the run has not ended.
        ValueError: it, the config or the metrics are not as the run wrote them; the message names the file.
    """
    result: dict[str, Any] = records.read(folder / RESULT_FILE, RESULT, owner)
    for tests in ("test", "sharpened"):
        lengths = result.get(tests, {})
        if wrong := [length for length in lengths if not re.fullmatch(r"\d{1,18}(-\d{1,18})?", length, re.ASCII)]:
            raise records.damaged(owner, folder / RESULT_FILE, f"`{tests}` must be by lengths, got {wrong[0]!r}")
    check_manifest(folder, (CONFIG_FILE, METRICS_FILE, RESULT_FILE), owner, every=True)
    return result


def read_pointer(folder: Path, owner: str, remedy: str = "") -> dict[str, str]:
    """The checkpoints.json of a run: names of folders in it. Raises as `records.read`."""
    path = folder / POINTER_FILE
    pointer: dict[str, str] = records.read(path, POINTER, owner, remedy)
    for key in POINTER:
        if not re.fullmatch(r"step-\d{1,18}", pointer[key], re.ASCII):
            raise records.damaged(owner, path, f"`{key}` must be of the form step-N, got {pointer[key]!r}", remedy)
    return pointer


def find_checkpoint(folder: str | Path, owner: str = "generate") -> Path:
    """The folder itself if a model is in it, the best checkpoint if it is a run's; errors are in the name of `owner`.

    Raises:
        ValueError: it is neither; or what is read of a checkpoint is not as it was written, where there is a manifest
            to tell: a model that was saved on its own has none.
    """
    folder = Path(folder)
    if (folder / MODEL_FILE).exists():
        _check_model(folder, owner)
        return folder
    checkpoint, lengthened = _best_checkpoint(folder, owner)
    if _check_model(checkpoint, owner):
        _check_of_run(checkpoint, folder, lengthened, owner)
    return checkpoint


def _check_model(checkpoint: Path, owner: str) -> bool:
    """Whether a checkpoint has a manifest. Raises ValueError if what is read of it is not as that says."""
    if there := (checkpoint / MANIFEST_FILE).exists():
        check_manifest(checkpoint, (MODEL_FILE, WEIGHTS_FILE, TRAIN_FILE), owner)
    return there


def _check_of_run(checkpoint: Path, run: Path, lengthened: list[dict[str, Any]], owner: str) -> None:
    """Raise ValueError unless a checkpoint that is whole is the one that the run made at the step in its name."""
    path, config = checkpoint / TRAIN_FILE, run / CONFIG_FILE
    about = records.read(path, {"step": int, "config": dict}, owner)
    if about["step"] != step_of(checkpoint):
        raise records.damaged(owner, path, f"`step` must be that of its folder, got {about['step']}")
    try:
        wanted = records.read(config, dict, owner)
    except FileNotFoundError:  # of the weights nothing is missing
        return
    if lengthened and "steps" in wanted:
        wanted["steps"] = steps_at(lengthened, about["step"], wanted["steps"])
    difference = first_difference(wanted, about["config"])
    if difference is not None:
        raise ValueError(f"{owner}: checkpoint '{checkpoint}' is of another run than '{config}': it {difference}.")


def _best_checkpoint(run: Path, owner: str) -> tuple[Path, list[dict[str, Any]]]:
    """The best checkpoint of a run, which is the one that its last checkpoint knows, and how the run was lengthened.

    Raises:
        ValueError: it is another one, or missing.
    """
    try:
        pointer = read_pointer(run, owner)
    except FileNotFoundError as error:
        raise ValueError(
            f"{owner}: '{run}' must be the folder of a run or of a checkpoint, but has neither {POINTER_FILE} nor "
            f"{MODEL_FILE}."
        ) from error
    last: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        last = records.read(run / pointer["last"] / TRAIN_FILE, {"best?": str, "lengthened?": LENGTHENED}, owner)
        if (best := last.get("best")) not in (None, pointer["best"]):
            what = f"`best` must be '{best}', as {TRAIN_FILE} of {pointer['last']} says"
            raise records.damaged(owner, run / POINTER_FILE, what)
    if not (run / pointer["best"]).is_dir():
        raise ValueError(f"{owner}: '{run / pointer['best']}', which {POINTER_FILE} names, is missing.")
    return run / pointer["best"], last.get("lengthened", [])


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Fill the optimizer with the moments of a checkpoint. Raises ValueError if they are cut short or do not fit."""
    path = checkpoint / OPTIMIZER_FILE
    tensors = read_tensors(path, "train")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        # copied: the file is mapped into memory, and Windows deletes no such file
        state.setdefault(int(number) if number.isdecimal() else -1, {})[key] = tensor.clone()
    current = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [_moments_of(group) for group in optimizer.param_groups for _ in group["params"]]
    fits = set(state) == set(range(len(parameters))) and all(
        set(state[i]) == wanted[i] and all(m.shape == p.shape for key, m in state[i].items() if key != "step")
        for i, p in enumerate(parameters)
    )
    if not fits:
        raise ValueError(f"train: '{path}' is of another model. Use --resume=never.")
    state = {
        i: {key: value if key == "step" else part_like(value, parameters[i]) for key, value in moments.items()}
        for i, moments in state.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _moments_of(group: Mapping[str, Any]) -> set[str]:
    """What the optimizer keeps of a parameter of a group."""
    if group["orthogonal"]:
        return {"momentum_buffer"}
    return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as "<parameter>.<name>", whole; every process must call it."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": whole(value).contiguous() for i, moments in state.items() for key, value in moments.items()}


def load_carried(checkpoint: Path, model: TokenModel, rows: int) -> list[Tensor]:
    """The state that the training rows of a checkpoint carry on. Raises ValueError if it is cut short or unfit."""
    wanted = {str(i): (rows, *mixer.state_shape) for i, mixer in enumerate(model.mixers)}
    return list(_load(checkpoint / STATE_FILE, wanted).values())


def load_before(checkpoint: Path, model: TokenModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The snapshot before the trial of a checkpoint. Raises ValueError if it is cut short or unfit."""
    wanted = {name: tuple(part.shape) for name, part in snapshot(model, optimizer).items()}
    return _load(checkpoint / TRIAL_FILE, wanted)


def _load(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these names and shapes, in their order."""
    tensors = read_tensors(path, "train")
    if {name: tuple(part.shape) for name, part in tensors.items()} != wanted:
        raise ValueError(f"train: '{path}' is of another model. Use --resume=never.")
    return {name: tensors[name].clone() for name in wanted}  # no mapped file, see `load_optimizer`


def steps_at(lengthened: Sequence[Mapping[str, Any]], step: int, steps: int) -> int:
    """How many steps a run was to have when it took a step; `steps`: it is to have now, after it was lengthened."""
    return next((int(part["steps"]) for part in lengthened if step <= part["step"]), steps)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
