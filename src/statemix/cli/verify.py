"""statemix verify: whether a run's model is right at every length."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from statemix.files import make_folder, write_whole
from statemix.report.automata import draw_automaton
from statemix.search import MAX_STATES, Verdict
from statemix.style import render
from statemix.verify import verify, write_verdict

PICTURE_FILE = "verify.png"
STATUSES = {"equal": 0, "differs": 1, "undecided": 2}


@dataclasses.dataclass(frozen=True)
class Verify:
    """Visit every state that the model of a run can reach, and compare it with the automaton of its task.

    The answer is: equal for all lengths (status 0); the shortest word on which they differ (status 1); or more states
    than were to be visited (status 2), and then nothing is claimed. Parts of a model that its answers do not need
    multiply its states: a pruned model has few.

    Args:
        run: folder of a run, then its best checkpoint, or a folder in it with a model.
        sharpen: factor of the raw gates of the model that is verified; 100 makes rows one-hot that nearly are, 1
            leaves it as it is. None: the run's own, as in its test.
        max_states: pairs of a model's and its task's states.
        out: folder of verify.json, with the answer and the automaton, and of its picture. None: that of the run.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    sharpen: float | None = None
    max_states: int = MAX_STATES
    out: Path | None = None


def run(arguments: list[str]) -> int:
    """Print the answer, and write it."""
    given = tyro.cli(Verify, args=arguments, prog="statemix verify")
    verdict = verify(given.run, sharpen=given.sharpen, max_states=given.max_states)
    out = make_folder(given.run if given.out is None else given.out, "verify")
    files, picture = [write_verdict(verdict, out)], out / PICTURE_FILE
    if verdict.automaton is None:
        picture.unlink(missing_ok=True)  # it would be of an earlier answer
    else:
        write_whole(picture, render(draw_automaton(verdict.automaton), "png"))
        files.append(picture)
    print(_answer(verdict))
    print(f"It is in {' and '.join(map(str, files))}.")
    return STATUSES[verdict.outcome]


def _answer(verdict: Verdict) -> str:
    how = "" if verdict.sharpened is None else f", of the model sharpened by {verdict.sharpened:g}"
    return f"{_outcome(verdict)}{how}."


def _outcome(verdict: Verdict) -> str:
    states = f"{verdict.states:,} states explored"
    if verdict.automaton is not None:
        states += f", {len(verdict.automaton.transitions):,} in the least automaton with the same answers"
    if verdict.wrong is not None:
        word, target, said = verdict.wrong
        shown = " ".join(map(str, word))
        return f"differs: at the end of {shown}, a shortest wrong word, it says {said} and not {target}; {states}"
    if verdict.automaton is None:
        return f"undecided: more than {verdict.states:,} states, and nothing is claimed"
    return f"equal for all lengths: {states}"
