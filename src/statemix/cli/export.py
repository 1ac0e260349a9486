"""statemix export: the model of a run, or the automaton that it was proved equal to, as a program."""

import dataclasses
import io
import logging
import warnings
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from statemix.export import automaton_in_c, export_onnx, export_program, program_names
from statemix.files import write_whole
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel, load_model
from statemix.training.checkpoint import find_checkpoint
from statemix.verify import VERDICT_FILE, read_verdict

LARGEST_ONNX = 2**31 - 1  # bytes: no message of protobuf is larger


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of a run as a program: of whole sequences of any length, or of a step.

    Args:
        run: folder of a run, then its best checkpoint, or a folder in it with a model; for c, the one with verify.json.
        format: onnx; pt2 (torch.export, for torch.export.load); or c, the automaton that `statemix verify` found equal
            to the model, as a table of integers.
        step: a program of one token and a state, in place of one of a sequence and a state.
        sharpen: factor of the raw gates of the model that is exported; None: as it is.
        out: the file. None: model or step with the ending of the format, or automaton.c, in the folder of the run.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    format: Literal["c", "onnx", "pt2"]
    step: bool = False
    sharpen: float | None = None
    out: Path | None = None


def run(arguments: list[str]) -> None:
    """Write the program, and print what goes into it and comes out."""
    given = tyro.cli(Export, args=arguments, prog="statemix export")
    name = "automaton" if given.format == "c" else "step" if given.step else "model"
    out = given.run / f"{name}.{given.format}" if given.out is None else given.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"export: `out` must be a file in a folder that exists, got '{out}'.")
    if given.format == "c":
        _write_automaton(given, out)
    else:
        _write_model(given, out)


def _write_automaton(given: Export, out: Path) -> None:
    for name, value, unset in (("step", given.step, False), ("sharpen", given.sharpen, None)):
        if value != unset:
            raise ValueError(f"export: `{name}` must not be given with --format c, whose table is of the automaton.")
    verdict, path = read_verdict(given.run), given.run / VERDICT_FILE
    if verdict.outcome != "equal" or verdict.automaton is None:
        raise ValueError(
            f"export: '{path}' must say that the model is equal to its task, but says {verdict.outcome!r}. "
            "Only what `statemix verify` has found equal is written as C."
        )
    write_whole(out, automaton_in_c(verdict.automaton).encode())
    states, tokens = verdict.automaton.transitions.shape
    print(f"{out}: int32_t automaton_step(int32_t *state, int32_t token), of {states} states and {tokens} tokens.")


def _write_model(given: Export, out: Path) -> None:
    model = load_model(find_checkpoint(given.run, "export"))
    if not isinstance(model, SequenceModel):
        raise ValueError(f"export: RUN must be of a SequenceModel, got {type(model).__name__}, which has no state.")
    if given.sharpen is not None:
        for mixer in model.mixers:
            if not isinstance(mixer, LinearRecurrence):
                raise ValueError(f"export: `sharpen` must be None: {type(mixer).__name__} has no rows of gates.")
            mixer.sharpen(given.sharpen)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists what else could be installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of itself
        content = _onnx(model, given.step) if given.format == "onnx" else _program(model, given.step)
    write_whole(out, content)
    print(f"{out}: {len(content):,} bytes, of {'a step' if given.step else 'sequences'}.")
    names = program_names(model, step=given.step)
    for title, shapes in (("inputs", names.inputs), ("outputs", names.outputs)):
        shown = (f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())
        print(f"{title}: {'; '.join(shown)}")
    nested = "" if given.format == "onnx" else " The states are one argument, a tuple."
    print(f"States are zeros at first. B is any number of rows{'' if given.step else ', T any length'}.{nested}")


def _onnx(model: SequenceModel, step: bool) -> bytes:
    made = export_onnx(model, step=step)
    if (size := made.ByteSize()) > LARGEST_ONNX:
        raise ValueError(f"export: the model must be of at most {LARGEST_ONNX:,} bytes for onnx, got {size:,}.")
    return made.SerializeToString()


def _program(model: SequenceModel, step: bool) -> bytes:
    file = io.BytesIO()
    torch.export.save(export_program(model, step=step), file)
    return file.getvalue()
