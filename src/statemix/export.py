"""Models as programs that run without their Python: torch.export and ONNX; and a verified automaton as a table in C.

A program has any number of rows and, if it is of sequences, any length: the state that goes in is what came out before,
at first `model.initial_state(rows)`, which is zeros. `export_program` keeps what computes fast: a whole layer is one
operator of the compiled kernels, which `import statemix` registers. `export_onnx` needs nothing of ours: a step is made
of plain operations, and a sequence is an ONNX Scan of that step, which every mixer has.
"""

import copy
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from statemix.analysis import NONE, Automaton
from statemix.backbone import Backbone
from statemix.mixers import Mixer
from statemix.model import SequenceModel

if TYPE_CHECKING:
    import onnx

MAX_LENGTH = 2**20  # of a sequence in one call; a longer one goes in pieces, from state to state
ROWS, LENGTH = 2, 5  # of the examples that are traced: sizes of 1 would stay 1
REFUSED = -2  # said by an automaton in C of a token that cannot come


Shape = tuple[int | str, ...]  # "B" rows, "T" steps, or a number


class Names(NamedTuple):
    """What goes into a program and comes out of it, in order; next to each, its axes and their sizes."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def program_names(model: nn.Module, *, step: bool = False) -> Names:
    """The names of the inputs and outputs of a program, and the shape of each: "B" rows, "T" steps, or a number.

    Raises:
        TypeError, ValueError: as of `export_onnx`.
    """
    _check_model("program_names", model, step)
    axes: Shape = ("B",) if step else ("B", "T")
    states: list[Shape] = [("B", *mixer.state_shape) for mixer in _mixers(model)]
    keys = ["state"] if isinstance(model, Mixer) else [f"state_{i}" for i in range(len(states))]
    before = dict(zip(keys, states, strict=True))
    after = {f"next_{key}": shape for key, shape in before.items()}
    if isinstance(model, SequenceModel):
        return Names({"tokens": axes} | before, {"logits": (*axes, model.config["vocab_size"])} | after)
    width = model.output_size if isinstance(model, Backbone) else _width(model)
    return Names({"x": (*axes, _width(model))} | before, {"y": (*axes, width)} | after)


def export_program(model: nn.Module, *, step: bool = False) -> ExportedProgram:
    """The program of model(x, state), or of model.step(x, state), for any number of rows and up to `MAX_LENGTH` steps.

    It is made without gradients, in eval mode, of a copy of the weights. On a CPU the layers of BD-LRU and H-LRU are
    operators of the compiled kernels, as in the model: who loads the program imports statemix first. A step with
    `backend="associative"` is made of torch's operations alone; of a sequence that backend is refused.

    Args:
        model: a SequenceModel of tokens, or a Backbone or one mixer, of x.
        step: True: of `step`, for one token or vector of each row.

    Returns:
        What `torch.export.save` writes, `.module()` runs, and `torch._inductor.aoti_compile_and_package` compiles. Its
        inputs are x or tokens, and the state as the model has it.

    Raises:
        TypeError: the model is of another class.
        ValueError: a step is asked for of a bidirectional backbone.
        RuntimeError: torch.export cannot trace a mixer, or not at any length.
    """
    _check_model("export_program", model, step)
    return _trace("export_program", _copy(model), step)


def export_onnx(model: nn.Module, *, step: bool = False) -> "onnx.ModelProto":
    """The model as ONNX, of a step, or of a sequence of any length: then as a Scan of the step's plain operations.

    Inputs and outputs are those of `program_names`. What the recurrence of a BD-LRU, H-LRU or LRU computes in a step is
    float64, as in the package's definition of it: a decay near one, rounded, is off at every step.

    Args:
        model, step: see `export_program`. A backbone must be of one direction: its step is what is repeated.

    Raises:
        TypeError: the model is of another class.
        ValueError: the backbone is bidirectional.
        RuntimeError: a package is missing, or a mixer has operations that torch.onnx does not know.
    """
    _check_model("export_onnx", model, step=True)
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"export_onnx: it needs {' and '.join(missing)}. pip install 'statemix[export]'")
    plain = _copy(model)
    for mixer in _mixers(plain):
        for name, value in mixer.plain_options.items():
            setattr(mixer, name, value)
    program = _trace("export_onnx", plain, step=True)
    names = program_names(model, step=True)
    inside = "" if step else "step_"  # a name within a Scan is another than those around it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own calls
            warnings.simplefilter("ignore", DeprecationWarning)
            made = torch.onnx.export(
                program,
                input_names=[inside + name for name in names.inputs],
                output_names=[inside + name for name in names.outputs],
                verbose=False,
            )
    except Exception as error:  # of any kind: what has no translation is said in many ways
        raise RuntimeError(
            f"export_onnx: torch.onnx cannot translate {_classes(model)}: {_first_line(error)}"
        ) from error
    assert made is not None
    return made.model_proto if step else _over_time(made.model_proto, program_names(model))


def automaton_in_c(automaton: Automaton) -> str:
    """C of one table of integers, and a function that reads it: the outputs of `Automaton.run`, token by token."""
    states, tokens = automaton.transitions.shape
    sizes = f"AUTOMATON_STATES = {states}, AUTOMATON_TOKENS = {tokens}, AUTOMATON_START = {automaton.start}"
    rows = [
        "    {" + ", ".join(f"{{{after}, {said}}}" for after, said in zip(*row, strict=True)) + "},"
        for row in zip(automaton.transitions.tolist(), automaton.outputs.tolist(), strict=True)
    ]
    return "\n".join(
        [
            f"/* An automaton of {states} states and {tokens} tokens, written by statemix. */",
            "#include <stdint.h>",
            "",
            f"enum {{ {sizes} }};",
            "",
            "/* Of each state and token: the state after it, and what is said; -1 for neither. */",
            "static const int32_t automaton_table[AUTOMATON_STATES][AUTOMATON_TOKENS][2] = {",
            *rows,
            "};",
            "",
            f"/* What is said at a token: {NONE} for nothing, {REFUSED} if it cannot come here. *state is",
            "   AUTOMATON_START before the first token, and becomes the state after each that can come. */",
            "int32_t automaton_step(int32_t *state, int32_t token)",
            "{",
            "    const int32_t *entry;",
            "    if (token < 0 || token >= AUTOMATON_TOKENS)",
            f"        return {REFUSED};",
            "    entry = automaton_table[*state][token];",
            "    if (entry[0] < 0)",
            f"        return {REFUSED};",
            "    *state = entry[0];",
            "    return entry[1];",
            "}",
            "",
        ]
    )


class _Call(nn.Module):
    """A model called with a state, on sequences or on a step of each row."""

    def __init__(self, model: nn.Module, step: bool) -> None:
        super().__init__()
        self.model, self.of_step = model, step

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As the model's, or as its step's."""
        if not self.of_step:
            return self.model(x, state)
        y, after = self.model(x[:, None], state)
        return y[:, 0], after


def _trace(owner: str, model: nn.Module, step: bool) -> ExportedProgram:
    """The program of a model in eval mode."""
    weight = next(model.parameters())
    sizes = (ROWS,) if step else (ROWS, LENGTH)
    if isinstance(model, SequenceModel):
        x = torch.zeros(sizes, dtype=torch.int64, device=weight.device)
    else:
        x = torch.zeros(*sizes, _width(model), dtype=weight.dtype, device=weight.device)
    rows, length = Dim("B", min=1), Dim("T", min=1, max=MAX_LENGTH)
    state = model.initial_state(ROWS)  # type: ignore[operator]
    open_rows = {0: rows}
    of_state = open_rows if isinstance(state, Tensor) else tuple(open_rows for _ in state)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's LSTM and GRU put their weights into a list once more, which changes nothing
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
            return torch.export.export(
                _Call(model, step),
                (x, state),
                dynamic_shapes=(open_rows if step else {0: rows, 1: length}, of_state),
            )
    except Exception as error:  # of any kind: what cannot be traced is said in many ways
        what = "at any number of rows" if step else "at any length (a step may be possible, and ONNX, which repeats it)"
        raise RuntimeError(
            f"{owner}: torch.export cannot trace {_classes(model)} {what}: {_first_line(error)}"
        ) from error


def _over_time(step: "onnx.ModelProto", names: Names) -> "onnx.ModelProto":
    """The ONNX of a step, whose names begin with "step_", repeated over the second axis of the first input."""
    from onnx import helper

    graph = step.graph
    (x, *states), (y, *after) = graph.input, graph.output
    body = helper.make_graph(graph.node, "step", [*states, x], [*after, y])
    (sequence, *before), (said, *final) = names.inputs, names.outputs
    scan = helper.make_node(
        "Scan",
        [*before, sequence],
        [*final, said],
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
    )

    def described(known: Any, shapes: dict[str, Shape]) -> list[Any]:
        pairs = zip(known, shapes.items(), strict=True)
        return [
            helper.make_tensor_value_info(key, one.type.tensor_type.elem_type, shape) for one, (key, shape) in pairs
        ]

    inputs, outputs = described(graph.input, names.inputs), described(graph.output, names.outputs)
    whole = helper.make_graph([scan], "sequence", inputs, outputs, initializer=graph.initializer)
    return helper.make_model(
        whole, opset_imports=step.opset_import, functions=step.functions, ir_version=step.ir_version
    )


def _check_model(owner: str, model: nn.Module, step: bool) -> None:
    if not isinstance(model, SequenceModel | Backbone | Mixer):
        raise TypeError(f"{owner}: `model` must be a SequenceModel, a Backbone or a mixer, got {type(model).__name__}.")
    if step and isinstance(model, Backbone) and model.config["bidirectional"]:
        raise ValueError(f"{owner}: `model` must be of one direction: a bidirectional Backbone has no step.")


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _mixers(model: nn.Module) -> list[Mixer]:
    return [model] if isinstance(model, Mixer) else model.mixers  # type: ignore[return-value]


def _width(model: nn.Module) -> int:
    return model.d_model if isinstance(model, Mixer) else model.config["d_model"]  # type: ignore[index,return-value]


def _classes(model: nn.Module) -> str:
    return " and ".join(dict.fromkeys(type(mixer).__name__ for mixer in _mixers(model)))


def _first_line(error: BaseException) -> str:
    """Of what was at the root of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__
