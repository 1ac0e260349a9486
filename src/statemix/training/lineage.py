"""Where a run comes from: the weights of another one, or a shorter run of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statemix import records
from statemix.files import digest_of
from statemix.model import WEIGHTS_FILE, TokenModel, load_model
from statemix.tasks.base import Task
from statemix.training.checkpoint import TRAIN_FILE, find_checkpoint, steps_at
from statemix.training.config import TrainConfig, first_difference
from statemix.training.optimizer import learning_rate

FREE = ("dropout", "init_std")  # options of a model that its trained weights do not depend on
FREE_OF_MIXER = ("backend", "recompute")  # and of a mixer: how it is computed

SCHEDULED = ("train_lengths", "row_entropy", "block_dropout", "gate_noise")  # what goes by the share of the steps taken


class Lineage:
    """Where a run comes from, as its checkpoints and its result say.

    Args:
        out: folder of the run.
        resume, init_from, lengthen: as of `train`.

    Attributes:
        origin: INIT of checkpoint.py. None: the first weights were drawn.
        lengthened: LENGTHENED of checkpoint.py.
        news: what has become of the run now, in words; "" if it is not lengthened now.

    Raises:
        TypeError, ValueError: what is asked for cannot be, whatever is in the folder.
    """

    def __init__(self, out: str | Path, resume: str, init_from: str | Path | None, lengthen: bool) -> None:
        if not isinstance(init_from, str | Path | None):
            raise TypeError(f"train: `init_from` must be the path of a folder, got {init_from!r}.")
        if not isinstance(lengthen, bool):
            raise TypeError(f"train: `lengthen` must be True or False, got {lengthen!r}.")
        if lengthen and resume != "auto":
            rule = "'auto' with `lengthen`, which goes on from the last step"
            raise ValueError(f"train: `resume` must be {rule}, got {resume!r}.")
        if lengthen and init_from is not None:
            raise ValueError(f"train: `init_from` must be None with `lengthen`, got '{init_from}'.")
        if init_from is not None:
            own, other = Path(out).resolve(), Path(init_from).resolve()
            if own in (other, *other.parents):
                raise ValueError(f"train: `init_from` must be another run than `out` = '{out}', got '{init_from}'.")
        self.init_from = None if init_from is None else Path(init_from)
        self.lengthen = lengthen
        self.origin: dict[str, str] | None = None
        self.lengthened: list[dict[str, Any]] = []
        self.news = ""

    def begin(self, model: TokenModel, task: Task, out: Path) -> None:
        """Give a new run its first weights. Raises ValueError if that cannot be; the message names why."""
        if self.lengthen:
            raise ValueError(f"train: `lengthen` needs a run in `out`, but '{out}' has no checkpoint.")
        if self.init_from is not None:
            self.origin = take_weights(model, task, self.init_from)

    def go_on(self, config: TrainConfig, last: Path, saved: Mapping[str, Any]) -> None:
        """Take up what the last checkpoint says of itself, and lengthen the run if that is asked for.

        Raises:
            ValueError: its first weights were others than those of `init_from`; or it is to be lengthened and has not
                taken all its steps, or as many as the config has.
        """
        self.origin, self.lengthened = saved.get("init_from"), list(saved.get("lengthened", []))
        began = None if self.origin is None else self.origin["folder"]
        if self.init_from is not None and str(self.init_from) != began:
            first = "drawn weights" if began is None else f"those of '{began}'"
            raise ValueError(
                f"train: checkpoint '{last}' is of a run that began with {first}, not with `init_from` = "
                f"'{self.init_from}'. Use --resume=never, or another folder."
            )
        step, before = saved["step"], saved["config"].get("steps")
        if not self.lengthen or (before == config.steps and self.lengthened):  # which was done before a kill
            return
        if step != before:
            raise ValueError(
                f"train: `lengthen` is of a run that has taken all its steps, but '{last}' is the last checkpoint of "
                f"{before} steps. Let it end first, unless it has come to its end early: more steps do not change that."
            )
        if config.steps <= before:
            raise ValueError(
                f"train: `steps` must be above {before}, those of '{last}', with `lengthen`, got {config.steps}."
            )
        rates = learning_rate(config.optimizer, step - 1, before), learning_rate(config.optimizer, step, config.steps)
        self.lengthened.append({"step": step, "steps": before, "lr_before": rates[0], "lr_after": rates[1]})
        self.news = _told(config, self.lengthened[-1])

    def config_at(self, config: TrainConfig, step: int) -> dict[str, Any]:
        """The config as a checkpoint at a step has it."""
        content: dict[str, Any] = json.loads(config.to_json())
        return content | {"steps": steps_at(self.lengthened, step, config.steps)}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and the result say of it."""
        origin = {} if self.origin is None else {"init_from": self.origin}
        return origin | ({"lengthened": self.lengthened} if self.lengthened else {})


def take_weights(model: TokenModel, task: Task, folder: Path) -> dict[str, str]:
    """Fill a model with the weights of a run's best checkpoint, or of a folder with a model.

    Returns:
        The folder, and the sha256 of the weights: INIT of checkpoint.py.

    Raises:
        ValueError: there is no model, or one of other options or tokens; the message names the first that differs.
    """
    checkpoint = find_checkpoint(folder, "train")
    other = load_model(checkpoint)
    if (difference := first_difference(_form(model), _form(other))) is not None:
        raise ValueError(f"train: `init_from` must have a model as the config has, but '{checkpoint}' {difference}.")
    if (checkpoint / TRAIN_FILE).exists() and task.vocabulary is not None:
        tokens = records.read(checkpoint / TRAIN_FILE, {"tokenizer?": str}, "train").get("tokenizer")
        if tokens not in (None, task.vocabulary.fingerprint):
            raise ValueError(
                f"train: `init_from` must have a model of the same tokens as `task`, but '{checkpoint}' was made with "
                "another tokenizer."
            )
    model.load_state_dict(other.state_dict())
    return {"folder": str(folder), "sha256": digest_of(checkpoint / WEIGHTS_FILE)}


def _form(model: TokenModel) -> dict[str, Any]:
    """What must be equal in two models so that one can have the weights of the other."""
    options = {key: value for key, value in model.config.items() if key not in FREE}
    mixer = {key: value for key, value in options["mixer"].items() if key not in FREE_OF_MIXER}
    return {"kind": type(model).__name__} | options | {"mixer": mixer}


def _told(config: TrainConfig, part: Mapping[str, Any]) -> str:
    """What a part of LENGTHENED means, in words."""
    schedule, before, after = config.optimizer, part["steps"], config.steps
    text = (
        f"Lengthened from {before:,} to {after:,} steps: the learning rate was {part['lr_before']:.3g} in step "
        f"{part['step']:,} and is {part['lr_after']:.3g} in the next, as in a run of {after:,} steps."
    )
    if part["lr_before"] < schedule.lr:
        text += f" It had already decayed from {schedule.lr:.3g}."
    same = all(learning_rate(schedule, t, before) == learning_rate(schedule, t, after) for t in range(part["step"]))
    changed = [name for name in SCHEDULED if getattr(config, name)]
    if changed:
        text += f" {', '.join(changed)}: as there, too."
    return text if same and not changed else f"{text} What it has learned so far is not what that run would have."
