"""Who is told of each line of metrics while a run trains: a function of the caller, and a tracker of experiments.

A tracker is one of accelerate's. It is given each line of metrics.jsonl once: tracker.json counts them, so that a run
that was killed, and takes the same steps again, tells it only what it has not been told.
"""

import contextlib
import copy
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from statemix import records
from statemix.training.checkpoint import EVENTS_FOLDER, TRACKER_FILE, RunFolder
from statemix.training.config import TrainConfig

Line = dict[str, Any]
Listener = Callable[[Line], object]

PROJECT = "statemix"  # what runs are under, where a tracker has such

# the form of tracker.json, see records.py: by the name of a tracker its series, and the lines that it has been given
GIVEN = {str: {"series": str, "lines": int, "step": int}}


class Kind(NamedTuple):
    """How a tracker begins a series, and goes on with it.

    options: of accelerate's class, from the run's folder, the series (None: a new one) and the last step it was given.
    series: what the tracker itself calls the series, once it has started.
    """

    options: Callable[[Path, str | None, int], dict[str, Any]]
    series: Callable[[Any], str]


TRACKERS = {
    "mlflow": Kind(
        lambda out, series, step: {"experiment_name": PROJECT, "run_name": out.name, "run_id": series},
        lambda run: run.info.run_id,
    ),
    "tensorboard": Kind(  # which forgets what a killed process may have written after that step
        lambda out, series, step: {"run_name": EVENTS_FOLDER, "logging_dir": str(out), "purge_step": step + 1},
        lambda writer: EVENTS_FOLDER,
    ),
    "wandb": Kind(
        lambda out, series, step: {"run_name": PROJECT, "name": out.name, "id": series, "resume": "allow"},
        lambda run: run.id,
    ),
}


def check_listeners(on_log: object, tracker: object) -> None:
    """Raise TypeError or ValueError unless `on_log` can be called and the tracker is known and installed."""
    if on_log is not None and not callable(on_log):
        raise TypeError(f"train: `on_log` must be a function of one line of metrics, got {on_log!r}.")
    if tracker is None:
        return
    if tracker not in TRACKERS:
        raise ValueError(f"train: `tracker` must be one of {sorted(TRACKERS)}, got {tracker!r}.")
    if importlib.util.find_spec(str(tracker)) is None:
        raise ValueError(f"train: `tracker` {tracker!r} needs its package: pip install {tracker}.")


class Tracker:
    """A tracker that is given, as lines of metrics come, those it has not been given.

    Args:
        name: in `TRACKERS`.
        folder: of the run, its metrics as they are to go on.
        config: stored with the series.
    """

    def __init__(self, name: str, folder: RunFolder, config: TrainConfig) -> None:
        self.name, self.folder, self.config = name, folder, config
        try:
            self._all: dict[str, Any] = records.read(folder.path / TRACKER_FILE, GIVEN, "train", "Delete that file.")
        except FileNotFoundError:
            self._all = {}
        begun = self._all.get(name)
        self._given: dict[str, Any] = {"lines": 0, "step": 0} if begun is None else begun
        self._earlier, self._lines = folder.metrics(), 0
        self._tracker: Any = None

    @property
    def has_all(self) -> bool:
        """Whether there is nothing that it lacks."""
        return self._given["lines"] >= len(self._earlier)

    def start(self) -> None:
        """Begin or take up the series, and give it what it lacks of the metrics so far."""
        kind, series = TRACKERS[self.name], self._given.get("series")
        self._tracker = LOGGER_TYPE_TO_CLASS[self.name](**kind.options(self.folder.path, series, self._given["step"]))
        self._tracker.start()
        self._given["series"] = kind.series(self._tracker.tracker)
        if series is None and self.name != "tensorboard":  # which would make another series of it
            self._tracker.store_init_configuration(json.loads(self.config.to_json()))
        for line in self._earlier:
            self(line)

    def __call__(self, line: Line) -> None:
        """The next line of metrics."""
        self._lines += 1
        if self._lines > self._given["lines"]:
            numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
            self._tracker.log(numbers, step=line["step"])
            self._given |= {"lines": self._lines, "step": line["step"]}
            self.folder.write_json(TRACKER_FILE, self._all | {self.name: self._given})

    def finish(self) -> None:
        """End it, and wait until it has all; nothing is done where it has not started."""
        if self._tracker is not None:
            self._tracker.finish()


@contextlib.contextmanager
def listening(
    folder: RunFolder, config: TrainConfig, show: Listener, on_log: Listener | None, tracker: str | None
) -> Iterator[Listener]:
    """While it lasts, a function that shows a line of metrics, and tells a tracker and `on_log` of it.

    Raises:
        RuntimeError: one of these two raised an exception; the message names it and the last checkpoint.
    """
    tracking = None if tracker is None else Tracker(tracker, folder, config)
    name = f"`tracker` {tracker!r}"

    def tell(line: Line) -> None:
        show(line)
        if tracking is not None:
            with _named(name, folder):
                tracking(line)
        if on_log is not None:
            with _named("`on_log`", folder):
                on_log(copy.deepcopy(line))

    try:
        if tracking is not None:
            with _named(name, folder):
                tracking.start()
        yield tell
    except BaseException:
        with contextlib.suppress(Exception):  # what has happened before is to be told
            if tracking is not None:
                tracking.finish()
        raise
    if tracking is not None:
        with _named(name, folder):
            tracking.finish()


def give_all(folder: RunFolder, config: TrainConfig, tracker: str) -> None:
    """Give a tracker what it lacks of a run that has ended. Raises as `listening`."""
    if not Tracker(tracker, folder, config).has_all:
        with listening(folder, config, lambda line: None, None, tracker):
            pass


@contextlib.contextmanager
def _named(name: str, folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"train: {name} raised {type(error).__name__}: {error}. {folder.kept()}") from error
