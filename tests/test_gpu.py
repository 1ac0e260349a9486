"""scan/gpu: the CUDA kernels against the float64 loop, on a GPU or in the emulator of emulate.h; the operator.

The emulator runs the sources that a GPU gets. What it cannot show, that the compiler for GPUs takes them and keeps
everything in registers, NVRTC shows without a card.
"""

import dataclasses
import itertools
import threading
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from helpers import LAYOUTS, SCANS, assert_close, assert_compiled_agrees, assert_problem, each_kind, make_problem
from kernel_helpers import GPU_FAULTS, GpuFault
from torch._subclasses.fake_tensor import FakeTensorMode

import statemix
from statemix.gates import NORMALIZATIONS
from statemix.scan import gpu
from statemix.scan.gpu import compile, plan

HAS_GPU = torch.cuda.is_available() and not compile.EMULATED
# every order with every normalisation, for every kind: minutes of g++ that not each run of all tests is to take
WHOLE = HAS_GPU or compile.EMULATED
DEVICE = "cuda" if HAS_GPU else "cpu"
ORDERS, LENGTHS = (1, 2, 3, 4, 5, 8, 16), (1, 2, 31, 64, 65, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def emulator():
    """The kernels on a CPU, where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "EMULATED", not HAS_GPU)
        yield
    forget()


def forget():
    """Compiled kernels and plans, which a test made otherwise than they should be."""
    gpu._plan.cache_clear()
    compile.load.cache_clear()
    plan.schedulers.cache_clear()


def problem_here(kind, normalization, layout="contiguous", *, seed=0, **sizes):
    """A problem on the device of these tests, and what the float64 loop says about it."""
    problem = make_problem(torch.Generator().manual_seed(seed), kind, normalization, **sizes)
    here = problem.map(lambda x: LAYOUTS[layout](x).to(DEVICE))
    return here, {k: x.to(DEVICE) for k, x in problem.to(torch.float64).results("reference").items()}


class Case(NamedTuple):
    """Kernels that are compiled once, for every length; the rest goes with the length."""

    kind: str
    normalization: str
    order: int
    dtype: torch.dtype
    has_reset: bool


def table(whole: bool) -> list[Case]:
    """Every order with every normalisation; as a whole, for every kind. Any two axes meet in all of their pairs."""
    cases = []
    for k, kind in enumerate(SCANS):
        for (i, order), (j, normalization) in itertools.product(enumerate(ORDERS), enumerate(NORMALIZATIONS)):
            if whole or (i + j) % 3 == k:
                dtype, has_reset = DTYPES[(j + k) % 3], (i // 2 + j + k) % 2 == 0
                cases.append(Case(kind, normalization, order, dtype, has_reset))
    return cases


@pytest.mark.parametrize("whole", [False, True])
def test_the_table_holds_what_it_should(whole):
    cases = table(whole)
    wanted = (SCANS, NORMALIZATIONS, ORDERS, DTYPES, (False, True))
    for axes in itertools.combinations(range(5), 2):
        met = {tuple(case[axis] for axis in axes) for case in cases}
        assert met == set(itertools.product(*(wanted[axis] for axis in axes))), axes


@pytest.mark.parametrize("case", table(WHOLE), ids=lambda case: "-".join(map(str, case)))
def test_the_kernels_equal_the_loop(case, monkeypatch):
    number = table(WHOLE).index(case)
    for i, length in enumerate(LENGTHS):
        monkeypatch.setenv("STATEMIX_EMULATE_SEED", str(number + i))
        blocks, batch = (3, 1, 17, 5, 4, 2)[i], 1 if length == 257 else 2
        if case.kind == "block" and case.order <= 4 and length == 31:
            blocks += 64 if case.order == 1 else 32  # more than a warp has
        layout, with_state = list(LAYOUTS)[(number + i) % 3], (number + i) % 4 != 0
        sizes = {"order": case.order, "length": length, "blocks": blocks, "batch": batch}
        options = {"with_state": with_state, "with_reset": case.has_reset, "dtype": case.dtype}
        problem, expected = problem_here(case.kind, case.normalization, layout, **sizes, **options)
        assert_problem(problem, "gpu", expected)


CHUNKED = (  # and the length: in chunks of 16 steps, with resets at their edges
    (Case("block", "softmax", 1, torch.float32, True), 65),
    (Case("block", "tanh", 3, torch.bfloat16, False), 48),
    (Case("block", "linear", 5, torch.float32, True), 49),
    (Case("block", "softmax", 16, torch.float32, True), 37),
    (Case("companion", "softmax", 4, torch.bfloat16, True), 49),
    (Case("companion", "linear", 16, torch.float32, False), 40),
    (Case("observer", "silu", 3, torch.float32, True), 33),
    (Case("observer", "softmax", 8, torch.bfloat16, False), 48),
)


@pytest.fixture
def in_chunks(monkeypatch):
    monkeypatch.setattr(plan, "chunk_size", lambda problem, warps, device: 16)
    forget()
    yield
    forget()


@pytest.fixture(params=["whole", "in chunks"])
def cut(request):
    """For a test of both ways through time."""
    if request.param == "in chunks":
        request.getfixturevalue("in_chunks")


@pytest.mark.parametrize(("case", "length"), CHUNKED, ids=str)
def test_chunks_equal_the_loop(case, length, in_chunks):
    generator = torch.Generator().manual_seed(1)
    sizes = {"order": case.order, "length": length, "blocks": 5, "dtype": case.dtype}
    problem = make_problem(generator, case.kind, case.normalization, **sizes)
    if case.has_reset:
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[0, 16] = reset[-1, 31] = reset[-1, 8] = True
        problem = dataclasses.replace(problem, reset=reset)
    expected = problem.to(torch.float64).results("reference")
    assert_problem(problem.map(lambda x: x.to(DEVICE)), "gpu", {k: x.to(DEVICE) for k, x in expected.items()})
    values = problem.values.to(DEVICE)
    shape = (case.kind, values.dtype, case.order, case.normalization, case.has_reset, 2, length, 5)
    assert gpu._plan(values.device, *shape).chunks == -(-length // 16)


@pytest.mark.parametrize("processors", [1, 132])
def test_time_is_cut_where_the_blocks_do_not_fill_the_card(processors, monkeypatch):
    monkeypatch.setattr(plan, "schedulers", lambda device: 4 * processors)
    problem = plan.Signature("block", torch.bfloat16, 4, "softmax", False, 1, 65536, 302)
    size = plan.chunk_size(problem, 40, torch.device(DEVICE))
    assert (size < problem.length) == (processors == 132)
    assert size % 16 == 0
    assert plan.chunk_size(problem._replace(batch=64), 40 * 64, torch.device(DEVICE)) == problem.length


@pytest.mark.parametrize("team", [plan.WARP, plan.HALF_WARP])
@pytest.mark.parametrize(("order", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)])
def test_teams_of_every_size_equal_the_loop(team, order, dtype, cut, monkeypatch):
    monkeypatch.setattr(plan, "team", lambda programs, device: team)
    forget()
    options = {"with_reset": True, "dtype": dtype}
    problem, expected = problem_here("block", "softmax", order=order, length=70, blocks=67, **options)
    assert_problem(problem, "gpu", expected)
    forget()


# Programs of whole warps and of half ones, and how many turns of 132 multiprocessors those are.
SHARED_OUT = [
    (64, 128, plan.HALF_WARP),  # one turn, and one
    (124, 248, plan.WARP),  # one, and two of half the time
    (160, 304, plan.HALF_WARP),  # two, and three
    (432, 848, plan.WARP),  # four, and seven: too little to gain
    (528, 1056, plan.WARP),
]


@pytest.mark.parametrize(("whole", "half", "team"), SHARED_OUT)
def test_programs_are_halved_where_multiprocessors_would_be_idle(whole, half, team, monkeypatch):
    monkeypatch.setattr(plan, "schedulers", lambda device: 4 * 132)
    assert plan.team({plan.WARP: whole, plan.HALF_WARP: half}.__getitem__, torch.device(DEVICE)) == team


@each_kind
def test_a_gradient_of_the_final_state_reaches_every_input(kind, cut):
    # "none" has no u - h, where float32 cancels if the decay is slow: with softmax the loop itself, in float32, is off
    # by 8e-5 of the largest gradient, since that of a single state is small
    problem, _ = problem_here(kind, "none", order=5, length=35, batch=1, dtype=torch.float32)
    gradients = []
    for backend, dtype in (("gpu", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
        _, final_state = statemix.scan.scan_to_state(kind, *inputs, normalization="none", backend=backend)
        gradients.append((final_state.detach(), *torch.autograd.grad(final_state.square().sum(), inputs)))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)


@each_kind
@pytest.mark.parametrize("order", [2, 8])
def test_an_infinity_does_not_pass_a_reset(kind, order, cut):
    """Not forward in a state, and not back in an adjoint."""
    problem, _ = problem_here(kind, "softmax", order=order, length=40, blocks=3, batch=1, dtype=torch.float32)
    reset = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    reset[:, 20] = True
    clean = dataclasses.replace(problem, reset=reset).results("gpu")
    values, cotangent = problem.values.clone(), problem.cotangent.clone()
    values[:, 3] = torch.inf
    cotangent[:, 30] = torch.nan
    spoiled = dataclasses.replace(problem, reset=reset, values=values, cotangent=cotangent).results("gpu")
    assert not spoiled["states"][:, 3:20].isfinite().all()
    assert torch.equal(spoiled["states"][:, 20:], clean["states"][:, 20:])
    assert spoiled["gradient of values"][:, 20:31].isnan().any()
    assert torch.equal(spoiled["gradient of values"][:, :20], clean["gradient of values"][:, :20])
    assert torch.equal(spoiled["gradient of initial_state"], clean["gradient of initial_state"])


# Where exp leaves the normal numbers of float32, so that a sum is 0 or has no finite inverse.
@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name != "none"])
def test_extreme_gates_equal_the_loop_and_stay_finite(normalization):
    extremes = torch.tensor([-1e4, -740.0, -100.0, -95.0, -88.0, 0.0, 88.0, 100.0, 1e4, 1e-40], device=DEVICE)
    for kind, order in (("companion", 2), ("block", 2), ("block", 5)):
        problem, _ = problem_here(kind, normalization, order=order, length=2, blocks=10, dtype=torch.float32)
        problem.raw_gates[:, 0] = extremes
        problem.raw_gates[1, 1, ..., 0, :] = extremes
        # what the loop of float32 says: in float64 these are no extremes
        expected = {what: result.double() for what, result in problem.results("reference").items()}
        assert_problem(problem, "gpu", expected)


@pytest.mark.parametrize("normalization", ["relu", "silu", "linear"])
def test_a_row_whose_sum_overflows_has_its_weights(normalization):
    for order in (2, 5):
        problem, _ = problem_here("block", normalization, order=order, length=3, blocks=4, dtype=torch.float32)
        problem.raw_gates[:, 1] = 3e38
        expected = problem.to(torch.float64).states("reference")
        assert_close(problem.states("gpu"), expected)


@each_kind
def test_nan_reaches_only_the_states_that_depend_on_it(kind):
    problem, _ = problem_here(kind, "softmax", order=5, length=4, blocks=3, batch=2, dtype=torch.float32)
    problem.values[0, 2, ..., 1] = torch.nan
    lost = problem.states("gpu").isnan()
    assert torch.equal(lost, problem.states("reference").isnan())
    assert 0 < lost.sum() < lost.numel()


@each_kind
def test_the_same_call_gives_the_same_bits(kind, cut, monkeypatch):
    problem, _ = problem_here(kind, "softmax", order=5, length=35, batch=1, dtype=torch.bfloat16)
    first = problem.results("gpu")
    monkeypatch.setenv("STATEMIX_EMULATE_SEED", "7")
    second = problem.results("gpu")
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.parametrize(("kind", "order"), [("block", 4), ("block", 5), ("companion", 4), ("observer", 4)])
def test_columns_of_a_larger_tensor_are_read_in_place(kind, order):
    """As one product makes them; what lies where M is filled up, NaN, reaches no result and has a gradient of zero."""
    batch, length, blocks, filled = 2, 9, 4, plan.filled_order(order)
    rows = (filled,) if kind == "block" else ()
    shapes = [(blocks, *rows, filled), (blocks, *rows), (blocks, *rows)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(batch, length, sum(sizes), generator=generator).to(DEVICE)
    parts = zip(columns.split(sizes, dim=2), shapes, strict=True)
    gates, input_gates, values = (part.unflatten(2, shape) for part, shape in parts)
    state = torch.randn(batch, blocks, filled, generator=generator).to(DEVICE)
    for x in (gates, state) if kind != "block" else (gates, input_gates, values, state):
        x[..., order:] = torch.nan
    if kind == "block":
        gates[..., order:, :] = torch.nan
    leaves = [x.detach().requires_grad_() for x in (gates, input_gates, values, state)]
    assert all(gpu._read(x, []) is x for x in leaves[:3])
    states, _ = gpu.scan_blocks(*leaves, None, "softmax", kind, order)
    grads = torch.autograd.grad(states.square().sum(), leaves)
    assert all(not x[..., order:].any() for x in (grads[0], grads[3]))
    if kind == "block":
        raw = torch.cat([leaves[0][..., :order, :order], leaves[1][..., :order, None]], -1).permute(0, 1, 3, 4, 2)
        public = [raw, leaves[2][..., :order].transpose(2, 3), leaves[3][..., :order].transpose(1, 2)]
    else:
        raw = torch.cat([leaves[0][..., :order], leaves[1][..., None]], -1).transpose(2, 3)
        public = [raw, leaves[2], leaves[3][..., :order].transpose(1, 2)]
    expected = SCANS[kind](*(x.detach().double() for x in public), backend="reference")
    actual = states if kind == "companion" else states[..., :order].transpose(2, 3)
    assert_close(actual.detach(), expected)


def test_states_that_a_hook_kept_without_the_room_between_steps_are_read():
    """As torch.autograd.graph.save_on_cpu does. A step has 7 numbers, 14 bytes, and room for 16."""
    problem, expected = problem_here("block", "softmax", order=1, length=9, blocks=7, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        assert_problem(problem, "gpu", expected)


def test_numbers_whose_negation_is_pending_are_read_with_it(generator):
    """As in the imaginary part of a conjugate: memory holds them with the other sign."""
    shapes = (2, 9, 4, 4, 4), (2, 9, 4, 4), (2, 9, 4, 4), (2, 4, 4)
    inputs = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    found = []
    for change in (lambda x: x, lambda x: torch._neg_view(-x)):
        leaves = [change(x).requires_grad_() for x in inputs]
        states, final_state = gpu.scan_blocks(*leaves, None, "softmax", "block", 4)
        found.append((states, final_state, *torch.autograd.grad(states, leaves, change(states.detach()))))
    assert all(torch.equal(plain, negated) for plain, negated in zip(*found, strict=True))


FAULTS = (
    *GPU_FAULTS,
    GpuFault("rows.cuh", "i % E * K + i / E", "i % E * K", "block", 16, ""),
    GpuFault("rows.cuh", "sent, half * K)", "sent, half * K ^ 1)", "block", 8, ""),
    GpuFault("slabs.cuh", "[u][i][lane] = h[u][i]", "[u][i][G - 1 - lane] = h[u][i]", "block", 1, ""),
    # on the way back
    GpuFault("lags.cuh", "wait<slots - 2>();\n      __syncwarp();", "wait<slots - 2>();", "observer", 4, ""),
    GpuFault("lags.cuh", "(index + by * kChannels) % 32", "(index + by * kChannels + 1) % 32", "companion", 4, ""),
    GpuFault("lags.cuh", "of * kChannels + index % kChannels", "of * kChannels", "observer", 4, ""),
)


@pytest.mark.skipif(HAS_GPU, reason="a fault is planted in the emulator")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}-{fault.right.strip()}")
def test_a_planted_fault_is_found(fault, monkeypatch):
    faulty = fault.planted(compile.headers())
    problem, expected = problem_here(fault.kind, "softmax", order=fault.order, length=35, dtype=torch.float32)
    assert_problem(problem, "gpu", expected)
    monkeypatch.setattr(compile, "headers", lambda: faulty)
    forget()
    found = 0
    for seed in range(4):
        monkeypatch.setenv("STATEMIX_EMULATE_SEED", str(seed))
        try:
            assert_problem(problem, "gpu", expected)
        except (AssertionError, RuntimeError):
            found += 1
    forget()
    assert found > 0


TARGETS = (  # what is compiled, and for which card
    ("block", 1, "softmax", torch.bfloat16, 90),
    ("block", 2, "silu", torch.float32, 80),
    ("block", 4, "softmax", torch.float16, 120),
    ("block", 8, "tanh", torch.bfloat16, 100),
    ("block", 16, "softmax", torch.float32, 90),
    ("block", 16, "sigmoid", torch.bfloat16, 80),
    ("companion", 16, "softmax", torch.bfloat16, 90),
    ("observer", 5, "relu", torch.float32, 100),
)


@pytest.mark.parametrize(("kind", "order", "normalization", "dtype", "card"), TARGETS)
def test_the_compiler_for_gpus_keeps_everything_in_registers(kind, order, normalization, dtype, card):
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install statemix[gpu]")
    problem = plan.Signature(kind, dtype, order, normalization, True, 1, 1, 2)
    kernels = [plan.kernel(problem, program, load) for program in plan.PROGRAMS for load in plan.LOADS]
    for kernel in dict.fromkeys([*kernels, plan.relay(problem, False)]):
        code, size = compile.compile_for_gpu(kernel, card)
        assert compile.resources(code).spilled == 0, kernel
        assert size.shared_bytes <= 227 << 10, kernel


@pytest.mark.skipif(HAS_GPU, reason="a card has the shared memory it has")
@pytest.mark.parametrize("order", [1, 4])
def test_a_card_with_little_shared_memory_has_shorter_slabs(order, monkeypatch):
    monkeypatch.setattr(compile, "shared_limit", lambda device: 64 << 10)
    forget()
    problem, expected = problem_here("block", "softmax", order=order, length=65, dtype=torch.float32)
    assert_problem(problem, "gpu", expected)
    signature = plan.Signature("block", torch.float32, order, "softmax", False, 2, 65, 3)
    chosen = plan.kernel(signature, "Backward", plan.Load())
    fitted = plan.fitting(chosen, torch.device("cpu"))
    assert fitted != chosen
    assert compile.size_of(fitted, torch.device("cpu")).shared_bytes <= 64 << 10
    forget()


def test_every_kernel_is_listed():
    for kind, order in itertools.product(SCANS, ORDERS):
        listed = plan.kernels(kind, order)
        assert len(set(listed)) == len(listed)
        problem = plan.Signature(kind, torch.float16, order, "tanh", True, 3, 70, 7)
        assert {plan.kernel(problem, program, load) for program in plan.PROGRAMS for load in plan.LOADS} <= set(listed)


@each_kind
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.14's own opcheck
def test_the_operator_passes_opcheck(kind):
    problem, _ = problem_here(kind, "softmax", order=4, length=3, batch=1, dtype=torch.float32)
    gates = problem.raw_gates[..., :-1, :].movedim(-1, 2).requires_grad_()
    input_gates = problem.raw_gates[..., -1, :].movedim(-1, 2).requires_grad_()
    values = problem.values.movedim(-1, 2).requires_grad_()
    state = problem.initial_state.transpose(1, 2).requires_grad_()
    arguments = (gates, input_gates, values, state, None, "softmax", kind, 4)
    checks = torch.library.opcheck(torch.ops.statemix.gpu_scan_forward, arguments)
    assert set(checks.values()) == {"SUCCESS"}
    assert len(checks) == 4


@each_kind
def test_compiled_and_eager_calls_agree(kind):
    problem, _ = problem_here(kind, "softmax", order=3, length=3, batch=1, dtype=torch.float32, with_reset=True)
    assert_compiled_agrees(problem, "gpu")


@each_kind
def test_fake_tensors_of_a_card_show_what_comes_out(kind):
    """Without a card: torch.compile sees a call for one as this."""
    rows = (5,) if kind == "block" else ()
    kept = () if kind == "companion" else (5,)
    with FakeTensorMode():
        gates = torch.empty(2, 7, 3, *(8,) * len(rows), 8, device="cuda", dtype=torch.bfloat16)
        values = torch.empty(2, 7, 3, *(8,) * len(rows), device="cuda", dtype=torch.bfloat16)
        state = torch.empty(2, 3, 8, device="cuda")
        states, final_state = torch.ops.statemix.gpu_scan_forward(gates, values, values, state, None, "relu", kind, 5)
    assert states.device.type == final_state.device.type == "cuda"
    assert (states.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
    assert states.shape == (2, 7, 3, *(8,) * len(kept))


@each_kind
def test_a_second_derivative_is_refused(kind):
    problem, _ = problem_here(kind, "softmax", order=2, length=2, batch=1, dtype=torch.float32)
    values = problem.values.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.states("gpu").square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scan: the 'gpu' backend has no second derivative\. Use backend='assoc"):
        gradient.sum().backward()


def test_a_call_that_the_kernels_do_not_serve_is_refused():
    problem, _ = problem_here("block", "softmax", order=17, length=1, blocks=1, dtype=torch.float32)
    start = r"^block_scan: backend 'gpu' cannot be used: it "
    with pytest.raises(RuntimeError, match=start + r"serves M up to 16, got M = 17\. Use backend='auto'\.$"):
        problem.states("gpu")
    with pytest.raises(RuntimeError, match=start + r"computes in float32, got torch\.float64\. Use backend='auto'\.$"):
        problem.to(torch.float64).states("gpu")
    with pytest.raises(RuntimeError, match=start + r"needs \w+ tensors, got device meta\. Use backend='auto'\.$"):
        problem.map(lambda x: x.to("meta")).states("gpu")


def test_what_is_lacking_is_said(monkeypatch):
    def problem():
        assert "gpu" not in statemix.available_backends("cpu")
        with pytest.raises(RuntimeError, match=r"^block_scan: backend 'gpu' cannot be used: ") as error:
            statemix.block_scan(torch.zeros(1, 1, 1, 2, 1), torch.zeros(1, 1, 1, 1), backend="gpu")
        return str(error.value)

    monkeypatch.setattr(compile, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "it needs a GPU, and torch finds none here." in problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compile, "_HAS_BINDINGS", False)
    assert "it needs cuda-bindings and NVRTC, which are not installed: pip install 'statemix[gpu]'." in problem()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "its kernels are for NVIDIA cards, and this torch was built for AMD's." in problem()


def test_a_card_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(compile, "EMULATED", False)
    monkeypatch.setattr(compile, "architecture", lambda device: 75)
    assert compile.unserved_device(torch.device("cuda", 0)) == "it needs compute capability 8.0, got 7.5."


def test_a_launch_is_made_in_the_context_of_its_card():
    """The twin, without a card, of the test below it."""
    driver, size = mock.MagicMock(), compile.Size(threads=64, blocks=2, shared_bytes=48)
    driver.cuLaunchKernel.side_effect = RuntimeError("refused")
    run = compile.launcher(driver, mock.Mock(), "context", "function", size, lambda: 7)
    with pytest.raises(RuntimeError, match="refused"):
        run(b"arguments", 3)
    assert [call[0] for call in driver.method_calls] == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert driver.cuCtxPushCurrent.call_args.args == ("context",)
    assert driver.cuLaunchKernel.call_args.args[:9] == ("function", 3, 1, 1, 64, 1, 1, 48, 7)


@pytest.mark.skipif(not HAS_GPU, reason="it needs a GPU")
def test_a_thread_that_never_called_the_card_can_scan():
    """As a thread of autograd is, whose memory torch has from the calls before."""
    problem, expected = problem_here("block", "softmax", order=4, length=9, dtype=torch.float32)
    states = []
    problem.states("gpu")  # so that there is free memory of that size, and the kernel
    thread = threading.Thread(target=lambda: states.append(problem.states("gpu")))
    thread.start()
    thread.join()
    assert_close(states[0], expected["states"])


def test_auto_never_takes_the_emulator(monkeypatch):
    problem, expected = problem_here("block", "softmax", order=2, length=2, dtype=torch.float32)
    run = mock.Mock(side_effect=gpu._run)
    monkeypatch.setattr(gpu, "_run", run)
    assert_problem(problem, "auto", expected)
    assert run.called == HAS_GPU


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
    tokens, state = torch.tensor([1, 4], device=DEVICE), model.initial_state(2)
    with torch.no_grad():
        if not HAS_GPU:
            for name in SYNCHRONISING:
                monkeypatch.setattr(torch.Tensor, name, mock.Mock(side_effect=RuntimeError(f"a step calls {name}")))
            run = mock.Mock(side_effect=gpu._run)
            monkeypatch.setattr(gpu, "_run", run)
            model.step(tokens, state)
            assert run.call_count == 2
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
