"""What is shown of a run while it trains, and how fast it is."""

import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A rich progress bar on a terminal; a line per validation elsewhere.

    Args:
        steps: of the whole run.
        done: steps that an earlier part of the run has taken.
        enabled: False: nothing is shown.
    """

    def __init__(self, steps: int, done: int, *, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.text, self.valid = "", ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not sys.stderr.isatty(),
        )
        self.id = self.progress.add_task("training", total=steps, completed=done)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Show a line of text."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if "loss" in line:
            self.text = f"loss {line['loss']:.3f}  acc {line['token_accuracy']:.3f}  {line['tokens_per_s']:,.0f} tok/s"
        else:
            self.valid = f"  valid {line['valid_loss']:.3f} acc {line['valid_token_accuracy']:.3f}"
            if self.progress.disable:
                self.console.print(f"step {line['step']:>6}  {self.text}{self.valid}", highlight=False)
        self.progress.update(self.id, completed=line["step"], description=self.text + self.valid)


class Stopwatch:
    """The time that steps take. Who validates starts it again afterwards, so that it times training alone."""

    def __init__(self, step: int) -> None:
        self.start(step)

    def start(self, step: int) -> None:
        """From now on it counts the steps after this one."""
        self.began, self.step = time.perf_counter(), step

    def steps_per_second(self, step: int) -> float:
        """Of the steps since it was started, which it then is again."""
        began, before = self.began, self.step
        self.start(step)
        return (step - before) / (self.began - began)
