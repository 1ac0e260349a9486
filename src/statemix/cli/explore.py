"""statemix explore: a page on which one types a word and sees the blocks of a trained model move."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from statemix.explore import write_page
from statemix.files import make_folder


@dataclasses.dataclass(frozen=True)
class Explore:
    """Write a page that computes the model of a run in the browser: type a word, and watch its blocks move.

    It is one file that loads nothing from elsewhere. Each block's matrix and state are shown at every token, and the
    answer beside the task's own; after `statemix verify`, also the automaton that it found, walking beside the model.
    For small models of BD-LRU and H-LRU whose tokens are no text.

    Args:
        run: folder of a run, then its best checkpoint, or a folder in it with a model.
        sharpen: factor of the raw gates of the model that is shown; 1 leaves it as it is. None: that of verify.json;
            without one the run's own, as in its test.
        out: folder of explore.html. None: that of the run.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    sharpen: float | None = None
    out: Path | None = None


def run(arguments: list[str]) -> int:
    """Write the page."""
    given = tyro.cli(Explore, args=arguments, prog="statemix explore")
    out = make_folder(given.run if given.out is None else given.out, "explore")
    page = write_page(given.run, out, sharpen=given.sharpen)
    print(f"Open {page} in a browser: {page.stat().st_size / 1000:,.0f} kB, and it loads nothing else.")
    return 0
