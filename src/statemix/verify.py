"""Is the model of a run right at every length? The search for its states (search.py), from a folder and into one."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import statemix
from statemix import records
from statemix.analysis import Automaton
from statemix.files import write_whole
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel, load_model
from statemix.search import MAX_STATES, Verdict, WrongWord, explore
from statemix.tasks import Task, build_task
from statemix.training.checkpoint import CONFIG_FILE, find_checkpoint
from statemix.training.config import TrainConfig
from statemix.training.regularization import row_entropies

VERDICT_FILE = "verify.json"
VERDICT = {
    "states": int,
    "sharpened": float | None,
    "wrong": dict | None,
    "automaton": dict | None,
}
WRONG = {"word": [int], "target": int, "said": int}
AUTOMATON = {"start": int, "transitions": list, "outputs": list}


class TrainedModel(NamedTuple):
    """The model of a run and its task; the factor of its raw gates, None if they are as saved; and whence it is."""

    model: SequenceModel
    task: Task
    sharpened: float | None
    checkpoint: Path


def load_run(run: str | Path, owner: str, sharpen: float | None = None) -> TrainedModel:
    """The model of a run, sharpened as asked for. Arguments as of `verify`; errors are in the name of `owner`.

    Raises:
        ValueError: the folder has no run or no model, or a mixer cannot be sharpened.
    """
    folder = Path(run)
    checkpoint = find_checkpoint(folder, owner)
    of_run = next((path for path in (folder, folder.parent) if (path / CONFIG_FILE).exists()), None)
    if of_run is None:
        raise ValueError(f"{owner}: '{folder}' must be the folder of a run or within one, but has no {CONFIG_FILE}.")
    config = TrainConfig.load(of_run / CONFIG_FILE)
    task, factor = build_task(config.task), config.sharpen if sharpen is None else sharpen
    model = load_model(checkpoint)
    if not isinstance(model, SequenceModel):
        raise ValueError(f"{owner}: '{checkpoint}' must have a SequenceModel, got {type(model).__name__}.")
    if factor is not None:
        for mixer in model.mixers:
            if not isinstance(mixer, LinearRecurrence):
                raise ValueError(f"{owner}: `sharpen` must be None: {type(mixer).__name__} has no rows of gates.")
            mixer.sharpen(factor)
    return TrainedModel(model, task, factor, checkpoint)


def verify(run: str | Path, *, sharpen: float | None = None, max_states: int = MAX_STATES) -> Verdict:
    """Whether the model of a run is right at every word of its task, of any length: see `explore`.

    Args:
        run: folder of a run, then its best checkpoint, or a folder in it with a model.
        sharpen: factor of the raw gates (`LinearRecurrence.sharpen`) of the model that is verified; the one in the
            folder stays as it is, and 1 verifies that. None: the run's own `sharpen`, as in its test.
        max_states: see `explore`.

    Raises:
        ValueError: the folder has no run or no model, the task has no finite automaton, or a mixer cannot be sharpened;
            or nothing can be said because rows of gates are not one-hot.
        TypeError, RuntimeError: as of `explore`.
    """
    model, task, factor, _ = load_run(run, "verify", sharpen)
    automaton = task.automaton()
    verdict = dataclasses.replace(explore(model, automaton, max_states=max_states), sharpened=factor)
    if verdict.outcome == "undecided" and (blur := _blur(model, task.sample("valid", 32).tokens)) > 0:
        raise ValueError(
            f"verify: the model must have one-hot rows of gates to have few states, but their mean entropy is "
            f"{blur:.3g} nats, and there are more than {max_states:,} states. "
            f"Sharpen it{', as with --sharpen 100' if factor is None else f' by more than {factor:g}'}."
        )
    return verdict


@torch.no_grad()
def _blur(model: SequenceModel, tokens: Tensor) -> float:
    """The largest of the layers' mean entropies of rows of gates; 0 where all are one-hot, or there are none."""
    with row_entropies(model, enabled=True) as entropies:
        model(tokens)
    return max((entropy.item() for entropy in entropies), default=0.0)


def write_verdict(verdict: Verdict, out: str | Path) -> Path:
    """Write what was found as verify.json in a folder, with the automaton. Returns the file."""
    content: dict[str, Any] = {
        "version": statemix.__version__,
        "outcome": verdict.outcome,
        "states": verdict.states,
        "sharpened": verdict.sharpened,
        "wrong": None if verdict.wrong is None else verdict.wrong._asdict(),
        "automaton": None,
    }
    if (automaton := verdict.automaton) is not None:
        tables = {name: getattr(automaton, name).tolist() for name in ("transitions", "outputs")}
        content["automaton"] = {"start": automaton.start} | tables
    path = Path(out) / VERDICT_FILE
    write_whole(path, (json.dumps(content) + "\n").encode())
    return path


def read_verdict(folder: str | Path) -> Verdict:
    """What `write_verdict` wrote into a folder.

    Raises:
        ValueError: there is no verify.json, or it is damaged.
    """
    path = Path(folder) / VERDICT_FILE
    try:
        content = records.read(path, VERDICT, "read_verdict", "Run `statemix verify` again.")
        wrong, automaton = content["wrong"], content["automaton"]
        if wrong is not None:
            records.check(wrong, WRONG, "wrong")
            wrong = WrongWord(tuple(wrong["word"]), wrong["target"], wrong["said"])
        if automaton is not None:
            records.check(automaton, AUTOMATON, "automaton")
            transitions, outputs = (np.array(automaton[name]) for name in ("transitions", "outputs"))
            automaton = Automaton(transitions, outputs, automaton["start"])
    except FileNotFoundError as error:
        raise ValueError(f"read_verdict: '{path}' is missing. Run `statemix verify` first.") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise records.damaged("read_verdict", path, error, "Run `statemix verify` again.") from error
    return Verdict(content["states"], wrong, automaton, content["sharpened"])
