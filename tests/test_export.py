"""export.py: programs that are the model at every length, and C that is the automaton."""

import itertools
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim

from statemix import BDLRU, Backbone, SequenceModel, SequencePredictor, cli, export
from statemix.analysis import NONE, Automaton
from statemix.backbone import State
from statemix.export import automaton_in_c, export_onnx, export_program, program_names
from statemix.model import AutoEncoder
from statemix.search import Verdict, WrongWord
from statemix.verify import read_verdict, write_verdict

EXPORTS = runpy.run_path(str(Path(__file__).parent.parent / "experiments" / "exports.py"), run_name="exports")
SPECS = EXPORTS["SPECS"]
V, D = EXPORTS["VOCABULARY"], EXPORTS["WIDTH"]
OURS = ["bd_lru", "h_lru", "h_lru, observer"]
CLOSE = 1e-5
pytestmark = [  # torch's own, within torch
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]


def small_model(mixer: str, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(V, D, 1, SPECS[mixer]).eval()


# ---- torch.export


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("mixer", OURS)
def test_a_saved_program_is_the_model_at_every_length(mixer, step):
    model = small_model(mixer)
    run = EXPORTS["loaded_program"](model, step)
    assert EXPORTS["largest_error"](model, run, step) <= CLOSE
    assert EXPORTS["largest_error"](small_model(mixer, seed=1), run, step) > CLOSE


def test_a_program_keeps_the_operators_of_the_kernels_and_leaves_the_model_alone():
    model = small_model("bd_lru").train()
    program = export_program(model)
    assert "statemix.layer_forward" in program.graph_module.code
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    before = [w.clone() for w in program.state_dict.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, before, program.state_dict.values()))


def options_of(state: torch.Tensor | State, rows: Dim, length: Dim):
    return {0: rows, 1: length}, {0: rows} if isinstance(state, torch.Tensor) else tuple({0: rows} for _ in state)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("mixer", OURS)
def test_torch_export_leaves_rows_and_length_of_a_mixer_open(mixer, fixed):
    """Also as a user calls it, with gradients, with resets and of a mixer without selection."""
    torch.manual_seed(0)
    layer = Backbone(D, 1, SPECS[mixer] | {"selective": not fixed}).mixers[0]
    rows, length = Dim("B", min=1), Dim("T", min=1)
    x, state, reset = torch.randn(2, 5, D), layer.initial_state(2), torch.zeros(2, 5, dtype=torch.bool)
    shapes = (*options_of(state, rows, length), {0: rows, 1: length})
    program = torch.export.export(layer, (x, state, reset), dynamic_shapes=shapes).module()
    for rows, length in itertools.product((1, 3), (1, 7, 1000)):
        x, reset = torch.randn(rows, length, D), torch.rand(rows, length) < 0.1
        state = torch.randn(rows, *layer.state_shape)
        for actual, expected in zip(program(x, state, reset), layer(x, state, reset), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_backbone_and_a_predictor_are_exported(bidirectional):
    torch.manual_seed(0)
    backbone = Backbone(D, 1, SPECS["bd_lru"], bidirectional=bidirectional).eval()
    predictor = SequencePredictor(3, 2, backbone, pooling="last").eval()
    rows, length = Dim("B", min=1), Dim("T", min=1)
    program = export_program(backbone).module()
    with torch.no_grad():
        predicts = torch.export.export(predictor, (torch.randn(2, 5, 3),), dynamic_shapes=({0: rows, 1: length},))
        predicts = predicts.module()
        for rows, length in itertools.product((1, 3), (1, 7, 1000)):
            x, state = torch.randn(rows, length, D), backbone.initial_state(rows)
            (y, after), (wanted, wanted_after) = program(x, state), backbone(x, state)
            for actual, expected in zip((y, *after), (wanted, *wanted_after), strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE)
            x = torch.randn(rows, length, 3)
            torch.testing.assert_close(predicts(x), predictor(x), rtol=0, atol=CLOSE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_aotinductor_compiles_a_program(tmp_path):
    model = small_model("bd_lru")
    # what is compiled once and run a few times need not be compiled well
    quickly = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(
        export_program(model), package_path=str(tmp_path / "model.pt2"), inductor_configs=quickly
    )
    compiled = torch._inductor.aoti_load_package(path)

    def run(tokens, state):
        logits, after = compiled(tokens.contiguous(), state)  # it does not look how they lie
        return [logits, *after]

    assert EXPORTS["largest_error"](model, run, False) <= CLOSE


# ---- ONNX


# a step of the last two would need operators that ONNX does not have, were it no case of its own
@pytest.mark.parametrize("mixer", [*OURS, "lstm", "mlstm", "delta_product"])
def test_onnx_is_the_model_at_every_length(mixer):
    run = EXPORTS["loaded_onnx"](small_model(mixer), False)
    assert EXPORTS["largest_error"](small_model(mixer), run, False) <= CLOSE
    assert EXPORTS["largest_error"](small_model(mixer, seed=1), run, False) > CLOSE


def test_onnx_of_a_mixer_has_no_operations_of_ours_and_the_names_it_is_said_to_have():
    import onnx

    torch.manual_seed(0)
    mixer = BDLRU(D, 5, 3, backend="cpu")
    made = export_onnx(mixer)
    onnx.checker.check_model(made)
    assert [node.op_type for node in made.graph.node] == ["Scan"]
    assert {entry.domain for entry in made.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    names = program_names(mixer)
    for described, known in ((made.graph.input, names.inputs), (made.graph.output, names.outputs)):
        shapes = [tuple(d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim) for one in described]
        assert dict(zip([one.name for one in described], shapes, strict=True)) == known
    assert names.inputs == {"x": ("B", "T", D), "state": ("B", 3, 5)}


# ---- C


PARITY = Automaton(np.array([[-1, -1, 1], [1, 2, -1], [2, 1, -1]]), np.array([[-1, -1, -1], [0, 1, -1], [1, 0, -1]]))
MAIN = """
#include <stdio.h>
#include "automaton.c"
int main(void)
{
    int32_t state = AUTOMATON_START;
    int token;
    while (scanf("%d", &token) == 1)
        printf("%d\\n", (int)automaton_step(&state, token));
    return 0;
}
"""


def run_in_c(folder: Path, tokens: list[int]) -> list[int]:
    """What the function in the folder's automaton.c says of the tokens, by the C compiler."""
    (folder / "main.c").write_text(MAIN)
    program = str(folder / "main")
    subprocess.run(["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-o", program, str(folder / "main.c")], check=True)
    said = subprocess.run([program], input=" ".join(map(str, tokens)), capture_output=True, text=True, check=True)
    return [int(line) for line in said.stdout.split()]


@pytest.mark.skipif(shutil.which("cc") is None, reason="it needs a C compiler")
def test_the_c_of_a_verified_automaton_says_what_it_says(tmp_path, capsys):
    write_verdict(Verdict(3, None, PARITY), tmp_path)
    assert cli.main(["export", str(tmp_path), "--format", "c"]) == 0
    assert "3 states and 3 tokens" in capsys.readouterr().out
    code = (tmp_path / "automaton.c").read_text()
    assert "float" not in code
    assert "double" not in code
    word = [2, *np.random.default_rng(0).integers(0, 2, 1000).tolist()]
    assert run_in_c(tmp_path, word) == PARITY.run(np.array([word]))[0].tolist()
    # what cannot come is said so and changes nothing
    assert run_in_c(tmp_path, [0, 2, 1, 2, 3, -1, 0]) == [-2, NONE, 1, -2, -2, -2, 1]


def test_an_automaton_with_another_start_begins_there():
    assert "AUTOMATON_START = 2 }" in automaton_in_c(Automaton(PARITY.transitions, PARITY.outputs, 2))


def test_a_verdict_is_read_as_it_was_written(tmp_path):
    differs = Verdict(7, WrongWord((2, 1), 1, 0), None)
    for verdict in (Verdict(3, None, PARITY, 100.0), differs, Verdict(9, None, None)):
        write_verdict(verdict, tmp_path)
        read = read_verdict(tmp_path)
        assert (read.states, read.wrong, read.sharpened) == (verdict.states, verdict.wrong, verdict.sharpened)
        assert read.outcome == verdict.outcome
        if verdict.automaton is not None:
            assert np.array_equal(read.automaton.transitions, PARITY.transitions)
            assert np.array_equal(read.automaton.outputs, PARITY.outputs)


# ---- the command


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_the_command_writes_a_step_and_says_what_goes_in(tmp_path, capsys, form):
    small_model("h_lru").save(tmp_path)
    assert cli.main(["export", str(tmp_path), "--format", form, "--step"]) == 0
    out, file = capsys.readouterr().out, tmp_path / f"step.{form}"
    assert f"{file}: {file.stat().st_size:,} bytes, of a step." in out
    assert "inputs: tokens (B); state_0 (B, 3, 5)\noutputs: logits (B, 11); next_state_0 (B, 3, 5)\n" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors", f"step.{form}"]


NO_AUTOMATON = '{"states": 1, "sharpened": null, "wrong": null, "automaton": {}}'
WRONG_CALLS = {  # what there is, the arguments, the exit status, and what is said
    "no run": (lambda folder: None, "onnx", 2, "export: "),
    "no verdict": (small_model("bd_lru").save, "c", 2, "verify.json' is missing. Run `statemix ver"),
    "not equal": (
        lambda folder: write_verdict(Verdict(7, WrongWord((2, 1), 1, 0), PARITY), folder),
        "c",
        2,
        "must say that the model is equal to its task, but says 'differs'",
    ),
    "damaged": (
        lambda folder: (folder / "verify.json").write_text(NO_AUTOMATON),
        "c",
        2,
        "verify.json' is damaged: `automaton.start` is missing",
    ),
    "a step of c": (lambda folder: None, "c --step", 2, "`step` must not be given with --format c"),
    "autoencoder": (
        AutoEncoder(V, D, 1, SPECS["bd_lru"], seq_len=4).save,
        "pt2",
        2,
        "RUN must be of a SequenceModel, got AutoEncoder",
    ),
    "length": (small_model("pd_ssm").save, "pt2", 1, "cannot trace PDSSM at any length"),
    "operations": (small_model("pd_ssm").save, "onnx", 1, "cannot translate PDSSM"),
    "sharpen": (small_model("lstm").save, "pt2 --sharpen 9", 2, "`sharpen` must be None"),
    "out": (small_model("lstm").save, "pt2 --out no/where", 2, "`out` must be a file"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_what_cannot_be_exported_is_refused(case, tmp_path, capsys):
    prepare, arguments, status, message = WRONG_CALLS[case]
    prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", str(tmp_path), "--format", *arguments.split()]) == status
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("statemix.export.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs onnx and onnxscript\. pip install 'statemix\[export\]'"):
        export_onnx(BDLRU(D, 2, 2))


@pytest.mark.parametrize(
    ("model", "step", "error", "message"),
    [
        (torch.nn.Linear(2, 2), False, TypeError, "`model` must be a SequenceModel, a Backbone or a mixer, got Linear"),
        (Backbone(D, 1, SPECS["lstm"], bidirectional=True), True, ValueError, "`model` must be of one direction"),
    ],
)
def test_other_models_are_refused(model, step, error, message):
    for make in (export_program, export_onnx):
        with pytest.raises(error, match=message):
            make(model, step=step)


def test_importing_the_module_asks_for_no_extra(monkeypatch):
    for extra in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, extra, None)
    runpy.run_path(export.__file__)
