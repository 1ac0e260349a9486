"""Tasks by name."""

from typing import Any

from statemix.specs import Spec, complete
from statemix.tasks.base import IGNORE_INDEX, SPLITS, Batch, Score
from statemix.tasks.permutation import PermutationComposition

Task = PermutationComposition

TASKS: dict[str, type[Task]] = {"permutation": PermutationComposition}


def complete_task(spec: Spec) -> dict[str, Any]:
    """The spec of a task with every default filled in. Raises ValueError if a name is unknown."""
    return complete("task", TASKS, spec)


def build_task(spec: Spec) -> Task:
    """The task of a spec, such as {"name": "permutation", "group": "S3", "seq_len": 16}.

    Raises:
        TypeError, ValueError: the name or an option is unknown, or the task rejects a value.
    """
    options = complete_task(spec)
    return TASKS[options.pop("name")](**options)


__all__ = [
    "IGNORE_INDEX",
    "SPLITS",
    "TASKS",
    "Batch",
    "PermutationComposition",
    "Score",
    "Task",
    "build_task",
    "complete_task",
]
