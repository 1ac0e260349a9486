"""A run's folder: checkpoints, metrics and results, written so that a process killed at any moment loses nothing.

    out/config.json       the TrainConfig
    out/tokenizer.json    of a text: what its tokens stand for
    out/metrics.jsonl     one JSON object a line: training steps and validations
    out/checkpoints.json  {"last": "step-600", "best": "step-400"}: which checkpoints count
    out/step-600/         model.json, model.safetensors, optimizer.safetensors, train.json, and of a run that carries
                          its state, state.safetensors
    out/result.json       the test scores, once training has ended
    out/curves.png        loss and accuracy

A checkpoint is written under another name and renamed when it is complete; then checkpoints.json is replaced, in
one operation of the file system; then what no longer counts is deleted. Weights are safetensors, all else JSON.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from statemix.files import make_folder, sync, write_whole
from statemix.model import TokenModel, read_tensors
from statemix.text.tokenizer import TOKENIZER_FILE
from statemix.training.config import TrainConfig
from statemix.training.processes import part_like, whole

OPTIMIZER_FILE, STATE_FILE, TRAIN_FILE = "optimizer.safetensors", "state.safetensors", "train.json"  # of a checkpoint
POINTER_FILE, METRICS_FILE, CURVES_FILE = "checkpoints.json", "metrics.jsonl", "curves.png"
CONFIG_FILE, RESULT_FILE = "config.json", "result.json"
CLEARING_FILE = f".{POINTER_FILE}.partial"  # checkpoints.json while it is written, or while the run is deleted


class RunFolder:
    """The files of one training run. Raises as `make_folder`."""

    def __init__(self, path: str | Path) -> None:
        self.path = make_folder(path, "train")

    def write(self, name: str, content: bytes) -> None:
        """Replace a file whole."""
        write_whole(self.path / name, content)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None if there is none. Raises ValueError, naming it, if it is damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _damaged(self.path / name, error) from error

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file whole."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def clear(self) -> None:
        """Delete what an earlier run left here, and only that."""
        if (self.path / POINTER_FILE).exists():  # from here on there is nothing to resume, and CLEARING_FILE says why
            (self.path / POINTER_FILE).replace(self.path / CLEARING_FILE)
        self._delete_checkpoints_but(set())
        for name in (RESULT_FILE, CONFIG_FILE, CURVES_FILE, METRICS_FILE, TOKENIZER_FILE):
            (self.path / name).unlink(missing_ok=True)
            (self.path / f".{name}.partial").unlink(missing_ok=True)
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
        pointer = self.read_json(POINTER_FILE)
        if pointer is None:
            return None
        if not isinstance(pointer, dict) or not all(isinstance(pointer.get(key), str) for key in ("last", "best")):
            raise _damaged(self.path / POINTER_FILE, pointer)
        return self.path / str(pointer[which])

    def progress(self, checkpoint: Path) -> dict[str, Any]:
        """What `save_checkpoint` was given: "step", "best_loss", "config", "data"."""
        progress = self.read_json(f"{checkpoint.name}/{TRAIN_FILE}")
        kinds = {"step": int, "best_loss": float, "config": dict}
        if not isinstance(progress, dict) or not all(isinstance(progress.get(k), kind) for k, kind in kinds.items()):
            raise _damaged(checkpoint / TRAIN_FILE, progress)
        return progress

    def save_checkpoint(
        self,
        model: TokenModel,
        moments: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        best: bool,
        state: Sequence[Tensor] | None = None,
    ) -> None:
        """Write a checkpoint as the last, and maybe best; the "step" of its progress names the folder.

        Args:
            model: with its weights.
            moments: of the optimizer, as `optimizer_tensors` gives them.
            progress: JSON.
            best: whether it validates better than those before.
            state: carried by the training rows to the next step, a tensor (B, M, N) per layer. None: nothing is.
        """
        name = f"step-{progress['step']}"
        target, partial = self.path / name, self.path / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model.save(partial)
        (partial / OPTIMIZER_FILE).write_bytes(save(dict(moments)))
        if state is not None:
            (partial / STATE_FILE).write_bytes(save({str(i): part.contiguous() for i, part in enumerate(state)}))
        (partial / TRAIN_FILE).write_text(json.dumps(progress, indent=2) + "\n")
        for file in partial.iterdir():
            sync(file)
        if target.exists():  # complete, but killed before the pointer moved; the content is the same
            shutil.rmtree(target)
        partial.rename(target)
        pointer = self.read_json(POINTER_FILE) or {"best": name}
        pointer = {"last": name, "best": name if best else pointer["best"]}
        self.write_json(POINTER_FILE, pointer)
        self.delete_unused()

    def delete_unused(self) -> None:
        """Delete the checkpoints that no longer count, also parts that a kill left."""
        pointer = self.read_json(POINTER_FILE) or {}
        self._delete_checkpoints_but(set(pointer.values()))

    def _delete_checkpoints_but(self, names: set[str]) -> None:
        for folder in self.path.iterdir():
            if re.fullmatch(r"step-\d+|\.step-\d+\.partial", folder.name) and folder.name not in names:
                shutil.rmtree(folder)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill does not count."""
        path = self.path / METRICS_FILE
        if not path.exists() and self.checkpoint("last") is not None:
            raise _damaged(path, "missing")
        try:
            lines = path.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise _damaged(path, error) from error

    def forget_metrics_after(self, step: int) -> None:
        """Keep only the lines up to and including `step`: training goes on from there."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        self.write(METRICS_FILE, "".join(kept).encode())

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line."""
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Fill the optimizer with the moments of a checkpoint. Raises ValueError if they are cut short or do not fit."""
    path = checkpoint / OPTIMIZER_FILE
    tensors = read_tensors(path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number) if number.isdecimal() else -1, {})[key] = tensor
    current = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    muon = [group["orthogonal"] for group in optimizer.param_groups for _ in group["params"]]
    wanted = [{"momentum_buffer"} if of_muon else {"step", "exp_avg", "exp_avg_sq"} for of_muon in muon]
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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as "<parameter>.<name>", whole; every process must call it."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": whole(value).contiguous() for i, moments in state.items() for key, value in moments.items()}


def load_carried(checkpoint: Path, model: TokenModel, rows: int) -> list[Tensor]:
    """The state that the training rows of a checkpoint carry on. Raises ValueError if it is cut short or unfit."""
    path = checkpoint / STATE_FILE
    tensors = read_tensors(path)
    wanted = {str(i): (rows, *mixer.state_shape) for i, mixer in enumerate(model.mixers)}
    if {name: tuple(part.shape) for name, part in tensors.items()} != wanted:
        raise ValueError(f"train: '{path}' is of another model. Use --resume=never.")
    return [tensors[name] for name in wanted]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _damaged(path: Path, what: object) -> ValueError:
    return ValueError(f"train: '{path}' is damaged: {what!r}. Use --resume=never to start again.")
