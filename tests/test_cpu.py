"""scan/cpu and csrc/: every instruction set against the float64 loop, the torch operator, loading the library."""

import _ctypes
import ctypes
import functools
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    SCANS,
    Problem,
    assert_close,
    assert_compiled_agrees,
    assert_problem,
    each_instruction_set,
    each_kind,
    make_problem,
    needs_kernels,
    relative_error,
)

import statemix
from statemix import kernels
from statemix.gates import NORMALIZATIONS
from statemix.kernels import library, snapshot
from statemix.scan.problem import KINDS

SOURCES = Path(__file__).parents[1] / "csrc"
BOUNDED = [name for name in NORMALIZATIONS if name != "none"]
pytestmark = needs_kernels


def test_memory_that_no_kernel_wrote_is_nan(generator, monkeypatch):
    problem = make_problem(generator, "block", "softmax", order=3, length=4)
    monkeypatch.setattr(library.Library, "run", lambda *arguments: None)
    for what, result in problem.results("cpu").items():
        assert result.isnan().all(), what


ORDERS = (*range(1, 17), 17, 64)  # 17 and 64 share one for any order, and so do some below
BLOCKS = (1, 3, 15, 16, 17, 33)  # a vector is 4 to 16 floats or 2 to 8 doubles


# What goes with a normalisation; the number of blocks turns beside it, from order to order.
OPTIONS = {
    "softmax": {"batch": 1, "with_state": True, "with_reset": True},
    "sigmoid": {"batch": 2, "with_state": False, "with_reset": False},
    "relu": {"batch": 3, "with_state": True, "with_reset": False},
    "tanh": {"batch": 1, "with_state": False, "with_reset": True},
    "silu": {"batch": 2, "with_state": True, "with_reset": False},
    "linear": {"batch": 3, "with_state": False, "with_reset": False},
    "none": {"batch": 1, "with_state": True, "with_reset": True},
}


@functools.cache
def solved(kind: str, order: int, dtype: torch.dtype) -> list[tuple[Problem, dict[str, torch.Tensor]]]:
    """One problem for every normalisation, and what the float64 loop says about it."""
    generator, problems = torch.Generator().manual_seed(order), []
    turned = itertools.islice(itertools.cycle(BLOCKS), order, None)
    for normalization, blocks in zip(NORMALIZATIONS, turned, strict=False):
        sizes = {"order": order, "length": 3 if order > 8 else 9, "blocks": blocks}
        problem = make_problem(generator, kind, normalization, dtype=dtype, **sizes, **OPTIONS[normalization])
        problems.append((problem, problem.to(torch.float64).results("reference")))
    return problems


@each_instruction_set
@each_kind
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_instruction_set_equals_the_loop(instruction_set, kind, order, dtype):
    for problem, expected in solved(kind, order, dtype):
        assert_problem(problem, "cpu", expected)


@each_instruction_set
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_bit(generator, threads, instruction_set, kind, dtype):
    sizes = {"order": 3, "length": 65, "blocks": 33, "batch": 3}
    problem = make_problem(generator, kind, "softmax", **sizes, with_reset=True, dtype=dtype)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(problem.results("cpu"))
    for other, what in itertools.product(results[1:], results[0]):
        assert torch.equal(other[what], results[0][what]), what


@each_instruction_set
@each_kind
def test_the_length_of_a_chunk_changes_no_bit(generator, instruction_set, kind):
    """The more blocks, the fewer steps in a chunk; the next goes on with the carry and with what rounding lost."""
    options = {"order": 2, "length": 129, "blocks": 2048, "batch": 1, "with_reset": True, "dtype": torch.float32}
    problem = make_problem(generator, kind, "softmax", **options)
    few = problem.map(lambda x: x if x.dtype == torch.bool else x[..., :16].contiguous()).results("cpu")
    for what, result in problem.results("cpu").items():
        assert torch.equal(result[..., :16], few[what]), what


def near_one(generator: torch.Generator, normalization: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Raw gates whose first weight is about 1 - 1e-4, with the rest random."""
    small, normal = 1e-4 / (shape[-2] - 1), torch.randn(shape, generator=generator, dtype=torch.float64)
    peak, rest = {
        "softmax": (0.0, math.log(small) + normal / 2),
        "sigmoid": (5.0, math.log(small) + normal / 2),
        "tanh": (3.0, small * normal),
        "silu": (5.0, 10 * small * normal),
        "linear": (3.0, 3 * small * normal),
        "none": (1 - 1e-4, small * normal),
    }[normalization]
    return torch.where(torch.arange(shape[-2])[:, None] == 0, peak, rest).float()


@functools.lru_cache(maxsize=1)
def long_memory(kind: str, normalization: str) -> tuple[Problem, torch.Tensor]:
    """65,536 float32 steps of slow decay, and the float64 states, the first 2,000 of which are those of the loop."""
    generator, length = torch.Generator().manual_seed(0), 65536
    sizes = {"order": 2, "length": length, "blocks": 4, "batch": 1, "dtype": torch.float32}
    problem = make_problem(generator, kind, normalization, **sizes)
    problem.raw_gates.copy_(near_one(generator, normalization, problem.raw_gates.shape))
    wide = problem.to(torch.float64)
    states = wide.states("cpu")
    start = wide.map(lambda x: x[:, :2000] if x.shape[1] == length else x)
    assert_close(states[:, :2000], start.states("reference"))
    return problem, states


@each_instruction_set
@each_kind
# relu comes this close to 1 only with gates above 20, and there the floor is lost in the rounding of the sum
@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name != "relu"])
def test_a_memory_of_ten_thousand_steps_is_accurate(instruction_set, kind, normalization):
    problem, expected = long_memory(kind, normalization)
    states = problem.states("cpu")
    assert_close(states, expected)
    if normalization in ("softmax", "sigmoid"):  # their rounding is carried along: csrc/recurrence.h
        assert relative_error(states, expected) <= 2e-6


@each_instruction_set
def test_exp_is_accurate_over_its_whole_range(instruction_set):
    raw = torch.linspace(-87.3, 0, 200_003)
    gates = torch.stack([torch.zeros_like(raw), raw])[None, None]  # weights 1 / (1 + e^z) and e^z / (1 + e^z)
    weights = statemix.companion_scan(gates, torch.ones(1, 1, len(raw)), backend="cpu")[0, 0].double()
    exact = raw.double().exp()
    error = (weights / (exact / (1 + exact)) - 1).abs()
    assert error[raw < -17].max() <= 2e-7  # there the sum is 1, and the weight e^z itself
    assert error.max() <= 3e-7  # and the rounding of the sum and of the product


@each_instruction_set
@each_kind
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", [1, 3])
def test_a_closed_gate_forgets_a_large_state(generator, instruction_set, kind, normalization, order):
    problem = make_problem(generator, kind, normalization, order=order, length=2, dtype=torch.float32)
    transitions = (..., slice(order), slice(None))
    problem.raw_gates.zero_()[transitions] = -30  # weights of 1e-13
    if kind == "observer":  # the older components move up whole, so only one is large
        problem.initial_state[:, 1:] = 0
    problem.initial_state[:, :1] *= 1e6
    assert_close(problem.states("cpu"), problem.to(torch.float64).states("reference"))


# Where exp leaves the normal numbers of float32 or float64, so that a sum is 0 or has no finite inverse; and either
# side of 40, beyond which a row of softmax is shifted; and gates that are below the normal numbers themselves.
EXTREMES = (-1e4, -740.0, -100.0, -95.0, -88.0, -40.5, -39.5, 0.0, 39.5, 40.5, 88.0, 100.0, 1e4, 1e-40, 1e-310)


@functools.cache
def extreme(raw: float, kind: str, normalization: str, dtype: torch.dtype) -> tuple[Problem, dict[str, torch.Tensor]]:
    """A step whose raw gates are all `raw`, and one with one of them; and what the loop of this dtype says about it."""
    problem = make_problem(torch.Generator().manual_seed(0), kind, normalization, order=2, length=3, dtype=dtype)
    problem.raw_gates[:, 1] = raw
    problem.raw_gates[1, 2, ..., 0, :] = raw
    return problem, {what: result.double() for what, result in problem.results("reference").items()}


@each_instruction_set
@each_kind
@pytest.mark.parametrize("normalization", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_equal_the_loop_and_stay_finite(instruction_set, kind, normalization, dtype):
    for raw in EXTREMES:
        problem, expected = extreme(raw, kind, normalization, dtype)
        assert_problem(problem, "cpu", expected)  # refuses NaN and infinities


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.14's own opcheck
def test_the_operator_passes_opcheck(generator):
    for kind, with_reset in (("block", False), ("block", True), ("companion", True), ("observer", True)):
        problem = make_problem(generator, kind, "softmax", order=3, length=5, with_reset=with_reset)
        inputs = [x.detach().requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
        arguments = (kind, *inputs, problem.reset, "softmax")
        checks = torch.library.opcheck(torch.ops.statemix.scan_forward, arguments)
        assert set(checks.values()) == {"SUCCESS"}
        assert len(checks) == 4


@each_kind
def test_a_second_derivative_is_refused(generator, kind):
    problem = make_problem(generator, kind, "softmax", order=2, length=3)
    values = problem.values.requires_grad_()
    states = problem.states("cpu")
    (gradient,) = torch.autograd.grad(states.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'cpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()


@each_kind
def test_a_tensor_that_outlived_a_transform_is_the_one_within(generator, kind):
    problem = make_problem(generator, kind, "softmax", order=3, length=4, dtype=torch.float32)
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(problem.raw_gates)
    values = problem.values.requires_grad_()
    assert not problem.states("cpu", raw_gates=kept[0], values=values.detach()).requires_grad  # its wrapper does
    states = problem.states("cpu", raw_gates=kept[0])
    assert torch.equal(states, problem.states("cpu"))
    states.sum().backward()
    assert values.grad.any()


@each_kind
def test_compiled_and_eager_calls_agree(generator, kind):
    problem = make_problem(generator, kind, "softmax", order=3, length=9, with_reset=True)
    assert_compiled_agrees(problem, "cpu")


def test_an_instruction_set_that_is_not_here_is_refused():
    names = re.escape(str(list(kernels.instruction_sets())))
    with pytest.raises(ValueError, match=rf"^use_instruction_set: `name` must be one of {names}, got 'mmx'\.$"):
        kernels.use_instruction_set("mmx")
    assert kernels.instruction_sets()[0] == "baseline"
    assert kernels.instruction_set() in kernels.instruction_sets()


STARVED = """
import resource, sys, threading
import torch
from statemix import BDLRU, SequenceModel, companion_scan
from statemix.decoder import Decoder

torch.set_num_threads(2)
layer, wide = BDLRU(128, 32, 4), BDLRU(64, 64, 16)
model = SequenceModel(11, 64, 2, {"name": "bd_lru", "num_blocks": 64, "block_size": 16})
x = torch.randn(4, 300, 128, requires_grad=True)
# 64 rows: what the kernel needs is more than the step between two limits, and than holes that malloc has left
gates, values = torch.randn(64, 100, 65, 1, requires_grad=True), torch.randn(64, 100, 1, requires_grad=True)

def scan():
    states = companion_scan(gates, values, backend="cpu")
    return states, *torch.autograd.grad(states.sum(), (gates, values))

def sequence():
    y, state = layer(x)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), (x, *layer.parameters()))

@torch.no_grad()
def step():
    return wide.step(x[0, :8, :64].contiguous())

def decode():
    return (Decoder(model, batch=8).step(torch.arange(8)),)

call, expected = globals()[sys.argv[1]], []
first = threading.Thread(target=lambda: expected.extend(call()))
first.start()
first.join()  # what the kernels keep between calls, they keep for the thread that called
with open("/proc/self/statm") as sizes:
    used = int(sizes.read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
outcome, limits = "", [quarter / 4 for quarter in range(-256, 64)]  # the kernel alone finds none in a short range
for megabytes in (*limits, 16, 32, 256):
    if outcome == "right" and megabytes < 16:
        continue
    resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes * 2**20), most))
    try:
        results, outcome = call(), "right"
    except MemoryError as error:
        results, outcome = expected, str(error)
    except RuntimeError as error:  # a tensor's memory is torch's affair
        assert "can't allocate memory" in str(error)
        results, outcome = expected, "no tensor"
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for result, wanted in zip(results, expected, strict=True):
        assert (result - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    print(outcome)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
@pytest.mark.parametrize("call", ["scan", "sequence", "step", "decode"])
def test_without_memory_a_call_raises_or_is_right(call):
    """The process lives on: also where a thread finds none for its stack, which makes the threads fewer."""
    # memory that was freed goes back to the system at once, so that the limits mean something
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", STARVED, call]
    process = subprocess.run(command, env=os.environ | memory, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    outcomes = process.stdout.splitlines()
    assert outcomes[-1] == "right"
    refused = re.compile(r"statemix_\w+: the kernel needs [\d,]+ bytes besides its results, and found no memory\.")
    assert any(map(refused.fullmatch, outcomes)), outcomes
    assert all(outcome in ("right", "no tensor") or refused.fullmatch(outcome) for outcome in outcomes), outcomes


@pytest.fixture
def spoiled(request, monkeypatch, tmp_path):
    """A process in which the library, not loaded yet, cannot be used, and the pattern of why."""
    monkeypatch.setattr(statemix.scan, "_warned", [])
    path = tmp_path / library.LIBRARY
    if request.param == "variable":
        monkeypatch.setenv("STATEMIX_INSTRUCTION_SET", "mmx")
        names = re.escape(str(list(kernels.instruction_sets())))
        problem = rf"STATEMIX_INSTRUCTION_SET must be one of {names} on this processor, got 'mmx'\."
    else:
        monkeypatch.setattr(statemix.kernels, "__path__", [str(tmp_path)])
        problem = re.escape(str(path))
    if request.param == "missing":
        problem = re.escape(f"{library.LIBRARY} is not in {tmp_path}: it was not built when statemix was installed.")
    if request.param == "corrupted":
        path.write_bytes(b"not a library")
    if request.param == "another library":  # such as one built from older sources
        path.symlink_to(_ctypes.__file__)
    monkeypatch.setattr(library, "_loaded", library._load())
    return problem


@pytest.mark.parametrize("spoiled", ["variable", "missing", "corrupted", "another library"], indirect=True)
def test_without_kernels_auto_warns_once_and_a_named_backend_raises(generator, spoiled):
    problem = make_problem(generator, "block", "softmax", order=3, length=5)
    expected = problem.results("reference")
    start = "statemix: the slow torch scan runs in place of the compiled one: "
    with pytest.warns(UserWarning, match=start + ".*" + spoiled) as caught:
        states = statemix.block_scan(problem.raw_gates, problem.values, problem.initial_state)
    assert [warning.filename for warning in caught] == [__file__]  # it points at the caller
    assert_close(states, expected["states"])
    assert_problem(problem, "auto", expected)  # a second warning would be an error
    assert statemix.available_backends("cpu") == ("associative", "reference")
    assert kernels.instruction_sets() == ()
    message = rf"backend 'cpu' cannot be used: .*{spoiled}"
    with pytest.raises(RuntimeError, match=rf"^block_scan: {message}.* Use backend='auto'\.$"):
        problem.states("cpu")
    with pytest.raises(RuntimeError, match=rf"^scan: {message}"):
        kernels.instruction_set()


@pytest.mark.parametrize(("name", "set_in_use"), [("baseline", "baseline"), ("mmx", None)])
def test_the_variable_is_read_by_a_new_process(name, set_in_use):
    code = f"""
from statemix import kernels
from statemix.scan import available_backends
assert (kernels.instruction_set() if "cpu" in available_backends() else None) == {set_in_use!r}
"""
    environment = os.environ | {"STATEMIX_INSTRUCTION_SET": name}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# struct -> how many fields it has
STRUCTS = {"ScanCall": 23, "LayerCall": 31, "PairCall": 8, "ReadoutCall": 10, "ModelCall": 7, "GatedCall": 8}
STRUCTS |= {"Place": 10, "Look": 4, "SnapshotCall": 11}


@pytest.mark.parametrize(("struct", "count"), STRUCTS.items())
def test_the_problem_of_python_is_the_struct_of_the_header(struct, count):
    header = re.sub(r"//[^\n]*", "", (SOURCES / "interface.h").read_text())
    (body,) = re.findall(rf"struct {struct} \{{(.*?)\}};", header, re.DOTALL)
    fields = []
    for declaration in body.split(";")[:-1]:
        ctype, names = re.fullmatch(r"\s*(?:const )?(\w+)\s*(.*)", declaration, re.DOTALL).groups()
        for name in names.split(","):
            fields.append((name.strip(" *\n"), "pointer" if "*" in name else ctype))
    ctypes_of = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "pointer": ctypes.c_void_p}
    ctypes_of |= {"uint8_t": ctypes.c_uint8, "uint16_t": ctypes.c_uint16, "uint64_t": ctypes.c_uint64}
    ctypes_of |= {"double": ctypes.c_double, "LayerCall": library.LayerCall, "ReadoutCall": library.ReadoutCall}
    assert [(name, ctypes_of[ctype]) for name, ctype in fields] == getattr(library, struct)._fields_
    assert len(fields) == count


@pytest.mark.parametrize(
    ("enum", "numbers"),
    [("Kind", library.KINDS), ("Normalization", library.NORMALIZATIONS), ("Sight", snapshot.SIGHTS)],
    ids=["kind", "normalization", "sight"],
)
def test_the_names_of_python_have_the_numbers_of_the_header(enum, numbers):
    (body,) = re.findall(rf"enum {enum} : int32_t {{(.*?)}};", (SOURCES / "interface.h").read_text())
    found, number = {}, 0
    for enumerator in body.split(","):
        name, _, given = enumerator.partition("=")
        number = int(given) if given else number
        found[name.strip().removeprefix("k").lower()] = number
        number += 1
    assert found == numbers


def test_the_constants_of_python_are_those_of_the_sources():
    recurrence = (SOURCES / "recurrence.h").read_text()
    (order,) = re.findall(r"constexpr int kMaxOrder = (\d+);", (SOURCES / "interface.h").read_text())
    (floor,) = re.findall(r"constexpr double kReluFloor = ([\d.e-]+);", recurrence)
    assert int(order) == kernels.MAX_ORDER
    floors = {name: record.floor for name, record in NORMALIZATIONS.items() if record.floor}
    assert floors == {"relu": float(floor)}
    assert library.KINDS.keys() == set(KINDS) == SCANS.keys()
