"""Tasks by name."""

from typing import Any

from statemix.specs import Registry, Spec, complete
from statemix.tasks.base import IGNORE_INDEX, SPLITS, Batch, Score, Task, finite_batch, scaled_accuracy
from statemix.tasks.compression import Compression
from statemix.tasks.fuzzy_recall import FuzzyInContextRecall
from statemix.tasks.in_context_recall import InContextRecall, NoisyInContextRecall
from statemix.tasks.memorization import Memorization
from statemix.tasks.modular_arithmetic import ModularArithmetic, ModularArithmeticSimple
from statemix.tasks.permutation import PermutationComposition
from statemix.tasks.presets import PRESETS, Setting, settings
from statemix.tasks.random_automaton import RandomAutomaton
from statemix.tasks.regular import CycleNavigation, EvenPairs, ModularCounting, Parity
from statemix.tasks.selective_copying import SelectiveCopying
from statemix.tasks.text import Text
from statemix.tasks.word_problem import WordProblem

REGISTERED: dict[str, type[Task]] = {
    task.name: task
    for task in (
        PermutationComposition,
        InContextRecall,
        NoisyInContextRecall,
        FuzzyInContextRecall,
        Memorization,
        SelectiveCopying,
        Compression,
        Parity,
        ModularCounting,
        CycleNavigation,
        ModularArithmetic,
        EvenPairs,
        ModularArithmeticSimple,
        RandomAutomaton,
        Text,
        WordProblem,
    )
}
TASKS = Registry("task", Task, REGISTERED)


def complete_task(spec: Spec) -> dict[str, Any]:
    """The spec of a task with every default filled in. Raises ValueError if a name is unknown."""
    return complete(TASKS, spec)


def build_task(spec: Spec) -> Task:
    """The task of a spec, such as {"name": "permutation", "group": "S3", "seq_len": 16}.

    Raises:
        TypeError, ValueError: the name or an option is unknown, or the task rejects a value.
    """
    options = complete_task(spec)
    return TASKS[options.pop("name")](**options)


__all__ = [
    "IGNORE_INDEX",
    "PRESETS",
    "SPLITS",
    "TASKS",
    "Batch",
    "Compression",
    "CycleNavigation",
    "EvenPairs",
    "FuzzyInContextRecall",
    "InContextRecall",
    "Memorization",
    "ModularArithmetic",
    "ModularArithmeticSimple",
    "ModularCounting",
    "NoisyInContextRecall",
    "Parity",
    "PermutationComposition",
    "RandomAutomaton",
    "Score",
    "SelectiveCopying",
    "Setting",
    "Task",
    "Text",
    "WordProblem",
    "build_task",
    "complete_task",
    "finite_batch",
    "scaled_accuracy",
    "settings",
]
