"""scan/gpu: the Triton kernels against the float64 loop, on a GPU or in triton's interpreter; the operator, the door.

What the interpreter cannot show, whether the compiler takes the kernels and what they cost: test_gpu_compile.py.
"""

import dataclasses
import itertools
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, SCANS, assert_close, assert_problem, make_problem

import statemix
from statemix.gates import NORMALIZATIONS
from statemix.generate import zero_state
from statemix.scan import gpu
from statemix.scan.gpu_model import CARDS, Configuration, Scan

pytest.importorskip("triton", reason="triton is not installed: pip install statemix[gpu]")
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
each_kind = pytest.mark.parametrize("kind", SCANS)
KERNELS = {"block": "block", "companion": "lagged", "observer": "lagged"}
# infinities are meant: a GPU says nothing about them
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning")
MODULES = ("weights", "block", "lagged", "tiles", "chunks")


def as_gpus_convert(convert):
    """The interpreter's conversions, but to bfloat16 to nearest, as GPUs do it: its own cuts the bits off."""
    from triton import language

    def convert_float(x, source, target, rounding):
        if (source, target) == (language.float32, language.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (language.bfloat16, language.float32):  # as its own does, but faster
            return x.view(np.uint16).astype(np.uint32) << 16
        return convert(x, source, target, rounding)

    return convert_float


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton's interpreter where there is no GPU, for these tests alone: chosen when a kernel's module is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            for name in MODULES:
                patch.delitem(sys.modules, f"{gpu.__name__}.{name}", raising=False)
                patch.delattr(gpu, name, raising=False)
            from triton.runtime import interpreter

            patch.setattr(interpreter, "_convert_float", as_gpus_convert(interpreter._convert_float))
        yield


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that run in a test, in their order."""
    names, run = [], gpu._run

    def note(launch, *arguments):
        names.append(launch.kernel.__name__)
        run(launch, *arguments)

    monkeypatch.setattr(gpu, "_run", note)
    return names


def problem_here(kind, normalization, layout="contiguous", *, seed=0, **sizes):
    """A problem on the device of these tests, and what the float64 loop says about it."""
    problem = make_problem(torch.Generator().manual_seed(seed), kind, normalization, **sizes)
    here = problem.map(lambda x: LAYOUTS[layout](x).to(DEVICE))
    return here, {k: x.to(DEVICE) for k, x in problem.to(torch.float64).results("reference").items()}


def table() -> list[tuple]:
    """(scan, normalisation, M, T, N, B, initial state?, reset?, layout, dtype): few steps, the interpreter is slow."""
    orders, lengths, blocks = (16, 1, 8, 2, 5, 3, 4), (2, 5, 1), (5, 3, 8)
    rest = list(itertools.product((True, False), (True, False), LAYOUTS, (torch.float32, torch.bfloat16)))
    cases = []
    for (k, kind), (j, normalization) in itertools.product(enumerate(SCANS), enumerate(NORMALIZATIONS)):
        for order in {orders[(j + k) % 7], orders[(j + k + 3) % 7]}:
            count = len(cases)
            length = 2 if order == 16 else lengths[count % 3]
            cases.append((kind, normalization, order, length, blocks[count % 3], 1 + count % 2, *rest[7 * count % 24]))
    long = ((2, 65, 5), (1, 64, 33), (3, 31, 5))
    for i, kind in enumerate(SCANS):
        for order, length, blocks in ((1, 257, 5), long[i]) if kind == "block" else (long[i],):
            layout = list(LAYOUTS)[(i + order) % 3]
            # float32, because the conversions of bfloat16 take the interpreter long
            cases.append((kind, "softmax", order, length, blocks, 1, True, order > 1, layout, torch.float32))
    return cases


def test_the_table_holds_what_it_should():
    cases = table()
    assert {(case[0], case[1]) for case in cases} == set(itertools.product(SCANS, NORMALIZATIONS))
    assert {(case[0], case[2]) for case in cases} == set(itertools.product(SCANS, (1, 2, 3, 4, 5, 8, 16)))
    assert {case[3] for case in cases} >= {1, 2, 31, 64, 65, 257}
    for axes in itertools.combinations((0, 6, 7, 8, 9), 2):
        met = {tuple(case[axis] for axis in axes) for case in cases}
        assert len(met) == len({m[0] for m in met}) * len({m[1] for m in met}), axes


@pytest.mark.parametrize("case", table(), ids=lambda case: "-".join(map(str, case)))
def test_the_kernels_equal_the_loop(case, ran):
    kind, normalization, order, length, blocks, batch, with_state, with_reset, layout, dtype = case
    sizes = {"order": order, "length": length, "blocks": blocks, "batch": batch, "dtype": dtype}
    problem, expected = problem_here(kind, normalization, layout, **sizes, with_state=with_state, with_reset=with_reset)
    assert_problem(problem, "gpu", expected)
    assert ran == [f"{KERNELS[kind]}_forward", f"{KERNELS[kind]}_backward"]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_n", "ahead"), [(16, 0), (8, 2), (4, 3)])
def test_every_configuration_computes_the_same(kind, dtype, block_n, ahead, monkeypatch):
    """Tiles that do not fill up, rows shared out over 2 and 4 lanes, and loads ahead of more steps than are left."""
    monkeypatch.setattr(gpu, "configure", lambda *problem: Configuration(block_n, 1, 1 + ahead))
    sizes = {"order": 3, "length": 5, "blocks": 5, "batch": 1, "with_reset": True, "dtype": dtype}
    problem, expected = problem_here(kind, "tanh", **sizes)
    assert_problem(problem, "gpu", expected)


@pytest.mark.parametrize(
    ("order", "normalization", "length", "blocks", "tile", "layout", "dtype"),
    [
        (1, "softmax", 65, 5, 16, "contiguous", torch.float32),
        (1, "tanh", 31, 8, 8, "time first", torch.bfloat16),
        (2, "softmax", 31, 5, 8, "blocks first", torch.float32),
        (2, "relu", 8, 8, 8, "contiguous", torch.float32),  # tiles that come out even
        (2, "sigmoid", 5, 3, 16, "time first", torch.bfloat16),  # none that is full
    ],
)
def test_tiles_of_time_compute_the_same(order, normalization, length, blocks, tile, layout, dtype, ran, monkeypatch):
    monkeypatch.setattr(gpu, "configure", lambda *problem: Configuration(8, 1, 2, tile=tile))
    sizes = {"order": order, "length": length, "blocks": blocks, "with_reset": order == 2, "dtype": dtype}
    problem, expected = problem_here("block", normalization, layout, **sizes)
    assert_problem(problem, "gpu", expected)
    assert ran == ["tile_forward", "tile_backward"]


# In chunks: kind, normalisation, M, T, N, B, initial state?, reset?, dtype, chunk_size, and block_n, num_stages, tile.
IN_CHUNKS = [
    ("block", "softmax", 1, 97, 5, 1, True, False, torch.float32, 40, (8, 2, 32)),
    ("block", "softmax", 2, 8, 33, 2, True, True, torch.float32, 2, (64, 2, 0)),  # chunks that come out even
    ("block", "tanh", 3, 7, 5, 2, True, True, torch.bfloat16, 2, (8, 2, 0)),  # a last chunk of one step
    ("block", "sigmoid", 4, 7, 5, 1, False, False, torch.float32, 3, (16, 3, 0)),  # no whole number of loads ahead
    ("block", "softmax", 8, 3, 3, 1, True, False, torch.float32, 1, (8, 2, 0)),
    ("companion", "softmax", 1, 6, 5, 2, True, True, torch.float32, 2, (8, 2, 0)),
    ("companion", "linear", 3, 7, 33, 1, True, False, torch.float32, 3, (64, 3, 0)),
    ("companion", "softmax", 4, 6, 5, 2, True, True, torch.bfloat16, 2, (16, 2, 0)),  # chunks shorter than the lags
    ("observer", "softmax", 1, 5, 5, 2, False, False, torch.bfloat16, 2, (8, 1, 0)),
    ("observer", "silu", 3, 7, 33, 1, True, True, torch.float32, 3, (64, 3, 0)),
    ("observer", "softmax", 8, 5, 5, 1, True, False, torch.float32, 2, (8, 2, 0)),
]


def in_chunks(monkeypatch, chunk_size, block_n=8, num_stages=2, tile=0):
    configuration = Configuration(block_n, 1, num_stages, chunk_size, tile)
    monkeypatch.setattr(gpu, "configure", lambda *problem: configuration)


def problem_in_chunks(kind, normalization, order, length, blocks, batch, with_state, with_reset, dtype, chunk_size):
    """With resets at the first step of a chunk, at the last step of one and inside one."""
    generator, sizes = torch.Generator().manual_seed(1), {"order": order, "length": length, "blocks": blocks}
    problem = make_problem(generator, kind, normalization, **sizes, batch=batch, with_state=with_state, dtype=dtype)
    if with_reset:
        reset = torch.zeros(batch, length, dtype=torch.bool)
        reset[0, chunk_size] = reset[-1, 2 * chunk_size - 1] = reset[-1, chunk_size // 2] = True
        problem = dataclasses.replace(problem, reset=reset)
    return problem.map(lambda x: x.to(DEVICE))


@pytest.mark.parametrize("case", IN_CHUNKS, ids=lambda case: "-".join(map(str, case)))
def test_chunks_equal_the_loop(case, ran, monkeypatch):
    *what, chunk_size, configuration = case
    problem = problem_in_chunks(*what, chunk_size)
    in_chunks(monkeypatch, chunk_size, *configuration)
    assert_problem(problem, "gpu", problem.to(torch.float64).results("reference"))
    family = KERNELS[case[0]]
    before, scan = [f"{family}_summary", "relay"], "tile" if configuration[2] else family
    assert ran == [*before, f"{scan}_forward", *before, f"{scan}_backward"]


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", [1, 4, 16])
def test_chunks_move_at_most_twice_the_least_bytes(kind, order, dtype, monkeypatch):
    """If each kernel reads or writes its tensors once, in chunks of the rule's least size, and no shorter ones.

    No kernel runs. What rounding took from the states in bfloat16 is left out: docs/gpu.md.
    """
    moved = []

    def count(launch, tensors, *integers):
        moved.append(sum(tensors[name].nbytes for name in set(launch.pointers) - {"residual_ptr", "reset_ptr"}))

    monkeypatch.setattr(gpu, "_run", count)
    forward, backward = (Scan(kind, direction, order, dtype, 1, 1, 1) for direction in ("forward", "backward"))
    ratios = []
    for chunk_size in (forward.least_chunk_size, forward.least_chunk_size // 2):
        length, blocks = 3 * chunk_size, 4
        in_chunks(monkeypatch, chunk_size)
        sizes = {"order": order, "length": length, "blocks": blocks, "batch": 1, "dtype": getattr(torch, dtype)}
        make_problem(torch.Generator(), kind, "softmax", **sizes).map(lambda x: x.to(DEVICE)).results("gpu")
        assert len(moved) == 6
        for scan in (forward, backward):
            ratios.append(sum(moved.pop(0) for _ in range(3)) / (scan.least_bytes * length * blocks))
    assert min(ratios[:2]) > 1
    assert max(ratios[:2]) <= 2 < ratios[2]


@each_kind
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_time_is_cut_where_the_sequences_do_not_fill_the_card(kind, direction, monkeypatch):
    monkeypatch.setattr(gpu, "_interpreted", lambda: False)
    monkeypatch.setattr(gpu, "_card", lambda device: CARDS["H100"])
    for order, (batch, is_cut) in itertools.product((1, 2, 3, 4), ((1, True), (64, False))):
        values = torch.empty(batch, 8192, *[order][: kind == "block"], 512, device="meta")
        assert (gpu.configure(kind, direction, values, order).chunk_size > 0) == is_cut


@each_kind
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_gradient_of_the_final_state_reaches_every_input(kind, chunk_size, monkeypatch):
    in_chunks(monkeypatch, chunk_size)
    problem, _ = problem_here(kind, "softmax", order=3, length=3, batch=1, dtype=torch.float32)
    gradients = []
    for backend, dtype in (("gpu", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
        _, final_state = statemix.scan.scan_to_state(kind, *inputs, backend=backend)
        gradients.append((final_state.detach(), *torch.autograd.grad(final_state.square().sum(), inputs)))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)


# Where exp leaves the normal numbers of float32, so that a sum is 0 or has no finite inverse.
@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name != "none"])
def test_extreme_gates_equal_the_loop_and_stay_finite(normalization):
    extremes = torch.tensor([-1e4, -740.0, -100.0, -95.0, -88.0, 0.0, 88.0, 100.0, 1e4, 1e-40], device=DEVICE)
    for kind in ("companion", "block"):
        problem, _ = problem_here(kind, normalization, order=2, length=2, blocks=10, dtype=torch.float32)
        problem.raw_gates[:, 0] = extremes
        problem.raw_gates[1, 1, ..., 0, :] = extremes
        # what the loop of float32 says: in float64 these are no extremes
        expected = {what: result.double() for what, result in problem.results("reference").items()}
        assert_problem(problem, "gpu", expected)


@each_kind
def test_nan_reaches_only_the_states_that_depend_on_it(kind):
    problem, _ = problem_here(kind, "softmax", order=3, length=4, blocks=3, batch=2, dtype=torch.float32)
    problem.values[0, 2, ..., 1] = torch.nan
    lost = problem.states("gpu").isnan()
    assert torch.equal(lost, problem.states("reference").isnan())
    assert 0 < lost.sum() < lost.numel()


@each_kind
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_the_same_call_gives_the_same_bits(kind, chunk_size, monkeypatch):
    in_chunks(monkeypatch, chunk_size)
    problem, _ = problem_here(kind, "softmax", order=3, length=4, batch=1, dtype=torch.bfloat16)
    first, second = problem.results("gpu"), problem.results("gpu")
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_bfloat16_keeps_a_residual_for_the_backward_alone():
    problem, _ = problem_here("block", "softmax", order=2, length=3, dtype=torch.bfloat16)
    inputs = (problem.raw_gates, problem.values, problem.initial_state.float(), None, "softmax", "block")
    states, final_state, residual = gpu._forward(*inputs, True)
    assert final_state.dtype == torch.float32
    assert (residual.abs().amax() > 0) & (residual.abs().amax() <= 2**-8 * states.abs().amax())
    whole = problem.to(torch.float64).states("reference")
    assert ((states.double() + residual.double()) - whole).abs().max() <= 2**-15 * whole.abs().max()
    assert gpu._forward(*inputs, False)[2].numel() == 0


@each_kind
def test_the_operator_passes_opcheck(kind):
    problem, _ = problem_here(kind, "softmax", order=2, length=3, batch=1, dtype=torch.float32, with_reset=True)
    inputs = [x.detach().requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
    arguments = (*inputs, problem.reset, "softmax", kind, True)
    checks = torch.library.opcheck(torch.ops.statemix.gpu_scan_forward, arguments)
    assert set(checks.values()) == {"SUCCESS"}
    assert len(checks) == 4


@each_kind
def test_compiled_and_eager_calls_agree(kind):
    problem, _ = problem_here(kind, "softmax", order=2, length=3, batch=1, dtype=torch.float32, with_reset=True)

    def step(raw_gates, values, initial_state):
        return SCANS[kind](2 * raw_gates, values, initial_state, reset=problem.reset, backend="gpu").tanh()

    inputs = [x.detach().requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
    both = (torch.compile(step, fullgraph=True, backend="aot_eager"), step)
    compiled, eager = ((y := f(*inputs), *torch.autograd.grad(y, inputs, problem.cotangent)) for f in both)
    for actual, expected in zip(compiled, eager, strict=True):
        assert_close(actual.detach(), expected.detach().double())


@each_kind
def test_a_second_derivative_is_refused(kind):
    problem, _ = problem_here(kind, "softmax", order=2, length=2, batch=1, dtype=torch.float32)
    values = problem.values.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.states("gpu").square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'gpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()


def test_a_call_that_the_kernels_do_not_serve_is_refused(monkeypatch):
    problem, _ = problem_here("block", "softmax", order=17, length=1, blocks=1, dtype=torch.float32)
    start = r"^block_scan: backend 'gpu' cannot be used: it "
    with pytest.raises(RuntimeError, match=start + r"serves M up to 16, got M = 17\. Use backend='auto'\.$"):
        problem.states("gpu")
    with pytest.raises(RuntimeError, match=start + r"computes in float32, got torch\.float64\. Use backend='auto'\.$"):
        problem.to(torch.float64).states("gpu")
    with pytest.raises(RuntimeError, match=start + r"needs \w+ tensors, got device meta\. Use backend='auto'\.$"):
        problem.map(lambda x: x.to("meta")).states("gpu")


@pytest.mark.parametrize(
    ("lacking", "problem"),
    [
        ("triton", "it needs triton, which is not installed: pip install 'statemix[gpu]'."),
        ("GPU", "it needs a GPU, and torch finds none here."),
    ],
)
def test_what_is_lacking_is_said(monkeypatch, lacking, problem):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if lacking == "triton":
        monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    values = torch.zeros(1, 1, 1, 1)
    assert "gpu" not in statemix.available_backends()
    with pytest.raises(RuntimeError, match=rf"^block_scan: backend 'gpu' cannot be used: {re.escape(problem)}"):
        statemix.block_scan(torch.zeros(1, 1, 1, 2, 1), values, backend="gpu")


def test_auto_never_takes_the_interpreter(ran):
    problem, expected = problem_here("block", "softmax", order=2, length=2, dtype=torch.float32)
    assert_problem(problem, "auto", expected)
    assert (ran != []) == HAS_GPU


def test_every_kernel_is_launched_by_some_configuration():
    from statemix.scan.gpu import block, chunks, lagged, tiles

    written = {
        name
        for module in (block, chunks, lagged, tiles)
        for name, function in vars(module).items()
        if any(argument.endswith("_ptr") for argument in getattr(function, "arg_names", ()))
    }
    launched = set()
    for kind, direction, chunk_size, tile in itertools.product(SCANS, ("forward", "backward"), (0, 64), (0, 8)):
        configuration = Configuration(32, 1, 2, chunk_size, tile)
        found = gpu.launches(kind, direction, 2, torch.bfloat16, configuration, reset=True)
        assert [launch.per for launch in found] == (["step", "chunk", "step"] if chunk_size else ["step"])
        for launch in found:
            launched.add(launch.kernel.__name__)
            named = {name for name in launch.kernel.arg_names if name.endswith("_ptr")}
            assert named == set(launch.pointers), launch.kernel.__name__
            assert set(launch.constants) == {name for name in launch.kernel.arg_names if name.isupper()}
    assert launched == written


def test_a_problem_may_be_replaced_by_its_strides():
    problem, expected = problem_here("block", "softmax", order=2, length=4, blocks=4, batch=2, dtype=torch.float32)
    packed = torch.cat([problem.raw_gates.flatten(2), problem.values.flatten(2)], dim=2)  # as one product makes them
    gates, values = packed.split([problem.raw_gates[0, 0].numel(), problem.values[0, 0].numel()], dim=2)
    strided = dataclasses.replace(problem, raw_gates=gates.unflatten(2, (2, 3, 4)), values=values.unflatten(2, (2, 4)))
    assert not strided.raw_gates.is_contiguous()
    assert gpu._strided(strided.raw_gates) is strided.raw_gates
    assert_problem(strided, "gpu", expected)


SYNCHRONISING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
MIXERS = {
    "block": {"name": "bd_lru", "num_blocks": 5, "block_size": 2},
    "companion": {"name": "h_lru", "num_channels": 5, "order": 2},
    "observer": {"name": "h_lru", "num_channels": 5, "order": 2, "form": "observer"},
}


@each_kind
def test_a_step_can_be_captured_in_a_graph(kind, monkeypatch):
    """On a GPU it is, and a replay goes on from the new state. Elsewhere: nothing between kernels asks for a value."""
    torch.manual_seed(0)
    model = statemix.SequenceModel(7, 8, 2, MIXERS[kind] | {"backend": "gpu"}).to(DEVICE)
    tokens, state = torch.tensor([1, 4], device=DEVICE), zero_state(model, 2)
    with torch.no_grad():
        if not HAS_GPU:
            launched = []
            monkeypatch.setattr(gpu, "_run", lambda launch, *arguments: launched.append(launch.kernel.__name__))
            for name in SYNCHRONISING:
                monkeypatch.setattr(torch.Tensor, name, mock.Mock(side_effect=RuntimeError(f"a step calls {name}")))
            model.step(tokens, state)
            assert launched == [f"{KERNELS[kind]}_forward"] * 2
            return
        wanted, expected = [], state
        for _ in range(3):
            logits, expected = model.step(tokens, expected)
            wanted.append(logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = model.step(tokens, state)
            for old, new in zip(state, after, strict=True):
                old.copy_(new)
        for one in wanted:
            graph.replay()
            assert torch.equal(logits, one)
