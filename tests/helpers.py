"""What the tests share: the tolerance table, the comparison, scan problems, and NumPy oracles."""

import dataclasses
import itertools
import multiprocessing
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from statemix import available_backends, block_scan, companion_scan, kernels, observer_scan
from statemix.analysis import NONE, Automaton
from statemix.gates import NORMALIZATIONS
from statemix.tasks import IGNORE_INDEX, Score, Task

# Largest allowed error, relative to the largest entry of a float64 reference on the same (already rounded) inputs. The
# half types round their results only (sums are float32), so theirs is their unit roundoff, 2^-8 and 2^-11, and no more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 3.95e-3, torch.float16: 4.95e-4}

SCANS = {"block": block_scan, "companion": companion_scan, "observer": observer_scan}

each_kind = pytest.mark.parametrize("kind", SCANS)
each_backend = pytest.mark.parametrize("backend", available_backends("cpu"))
each_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)
each_instruction_set = pytest.mark.parametrize("instruction_set", kernels.instruction_sets(), indirect=True)
needs_kernels = pytest.mark.skipif(kernels.load_problem() is not None, reason=f"no kernels: {kernels.load_problem()}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of `expected`; NaN if either holds a NaN."""
    difference = (actual.double() - expected).abs().max()
    scale = expected.abs().max()
    return (difference if scale == 0 else difference / scale).item()  # all zero: only zeros are right


def assert_close(actual: Tensor, expected: Tensor, what: str = "result", roundings: int = 1) -> None:
    """Hold `actual` to the tolerance of its dtype, for each rounding on its way, against the float64 `expected`."""
    assert expected.dtype == torch.float64, f"{what}: the reference must be float64, got {expected.dtype}"
    assert actual.dtype in TOLERANCE, f"{what}: no tolerance for {actual.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, limit = relative_error(actual, expected), roundings * TOLERANCE[actual.dtype]
    assert error <= limit, f"{what}: relative error {error:.3g} is above {limit:.3g} for {actual.dtype}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of one scan, and the cotangent of its states."""

    kind: str
    normalization: str
    raw_gates: Tensor
    values: Tensor
    initial_state: Tensor | None
    reset: Tensor | None
    cotangent: Tensor

    def map(self, function) -> "Problem":
        """The problem with `function` applied to every tensor."""
        tensors = {k: function(x) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors)

    def to(self, dtype: torch.dtype) -> "Problem":
        return self.map(lambda x: x if x.dtype == torch.bool else x.to(dtype))

    @property
    def order(self) -> int:
        return self.raw_gates.shape[-2] - 1

    def states(self, backend: str, **changes) -> Tensor:
        p = dataclasses.replace(self, **changes)
        options = {"normalization": p.normalization, "reset": p.reset, "backend": backend}
        return SCANS[p.kind](p.raw_gates, p.values, p.initial_state, **options)

    def results(self, backend: str) -> dict[str, Tensor]:
        """The states, and the gradient of sum(states * cotangent) in every float input."""
        names = [k for k in ("raw_gates", "values", "initial_state") if getattr(self, k) is not None]
        leaves = {k: getattr(self, k).detach().requires_grad_() for k in names}
        states = self.states(backend, **leaves)
        gradients = torch.autograd.grad(states, list(leaves.values()), self.cotangent)
        return {"states": states.detach()} | {f"gradient of {k}": g for k, g in zip(names, gradients, strict=True)}


def assert_problem(problem: Problem, backend: str, expected: dict[str, Tensor]) -> None:
    """Hold the states and all gradients of a backend to the float64 results `expected`."""
    for what, actual in problem.results(backend).items():
        # "gpu" keeps states of the half types rounded, and the gradient of raw gates is a product with them: two
        # roundings, of which up to 1.4 were measured (tests/test_gpu.py)
        twice = backend == "gpu" and what == "gradient of raw_gates" and actual.dtype.itemsize == 2
        what_of = f"{problem.kind}, {problem.normalization}, {backend}, {what}"
        assert_close(actual, expected[what], what_of, roundings=2 if twice else 1)


def make_problem(
    generator: torch.Generator,
    kind: str,
    normalization: str,
    *,
    order: int,
    length: int,
    blocks: int = 3,
    batch: int = 2,
    with_state: bool = True,
    with_reset: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random inputs, rounded to `dtype`. In every other (sequence, block) the decay is slow: see `make_raw_gates`."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (order,) if kind == "block" else ()
    raw_gates = make_raw_gates(generator, normalization, (batch, length, *rows, order + 1, blocks))
    reset = None
    if with_reset:
        reset = torch.rand(batch, length, generator=generator) < 0.05
        reset[0, -1] = reset[-1, 0] = reset[0, length // 2] = True  # the edges are where a mask fails
    kept = () if kind == "companion" else (order,)
    return Problem(
        kind,
        normalization,
        raw_gates,
        normal(batch, length, *rows, blocks),
        normal(batch, order, blocks) if with_state else None,
        reset,
        normal(batch, length, *kept, blocks),
    ).to(dtype)


def make_raw_gates(generator: torch.Generator, normalization: str, shape: tuple[int, ...]) -> Tensor:
    """Raw gates (B, T, [M,] M+1, N): normal where b + n is odd, and where it is even a nearly one-hot transition.

    There one weight per row, never the input gate and the same at all times, is within about 1e-3 of 1 or, in a signed
    normalisation, of 1 or -1: fast decay would hide a wrong carry.
    """
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    fast = 0.9 * normal / normal.abs().sum(-2, keepdim=True) if normalization == "none" else normal
    one_row = (shape[0], 1, *shape[2:-2], 1, shape[-1])
    chosen = torch.randint(shape[-2] - 1, one_row, generator=generator)
    sign = torch.randint(2, one_row, generator=generator) * 2.0 - 1
    peak, rest = {
        "softmax": (6.0, normal / 2 - 3),
        "sigmoid": (5.0, normal / 2 - 9),
        "relu": (5.0, 1e-3 * normal),
        "tanh": (3 * sign, 1e-4 * normal),
        "silu": (5.0, 1e-4 * normal),
        "linear": (5 * sign, 1e-4 * normal),
        "none": (0.999 * sign, 1e-4 * normal),
    }[normalization]
    slow = torch.where(torch.arange(shape[-2])[:, None] == chosen, peak, rest)
    even = (torch.arange(shape[0])[:, None] + torch.arange(shape[-1])) % 2 == 0  # (B, N)
    return torch.where(even.view(shape[0], *[1] * (len(shape) - 2), shape[-1]), slow, fast)


# The layouts of a non-contiguous tensor with axes (B, T or M, ..., N): strides of its own in the two first axes, which
# a kernel can take as they are, and a last axis that is not the fastest, which it cannot.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "blocks first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


def numpy_weights(normalization: str, raw: np.ndarray, axis: int) -> np.ndarray:
    """The formulas of the spec (LAYERS.md), written again."""
    if normalization == "none":
        return raw
    if normalization == "softmax":
        exponentials = np.exp(raw - raw.max(axis, keepdims=True))
        return exponentials / exponentials.sum(axis, keepdims=True)
    f = {
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "relu": lambda z: np.maximum(z, 0),
        "tanh": np.tanh,
        "silu": lambda z: z / (1 + np.exp(-z)),
        "linear": lambda z: z,
    }[normalization](raw)
    floor = 0.001 * raw.shape[axis] if normalization == "relu" else 0.0
    return f / (np.abs(f).sum(axis, keepdims=True) + floor)


def numpy_block(kind: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A (B, T, N, M, M) and a_0 (B, T, N, M) of any of the three scans as a dense block."""
    if kind == "block":
        moved = np.moveaxis(weights, -1, 2)  # (B, T, N, M, M+1)
        return moved[..., :-1], moved[..., -1]
    moved = np.moveaxis(weights, -1, 2)  # (B, T, N, M+1)
    order = moved.shape[-1] - 1
    block, input_gate = np.zeros((*moved.shape[:3], order, order)), np.zeros((*moved.shape[:3], order))
    block[..., 0, :] = moved[..., :-1]
    for i in range(1, order):
        block[..., i, i - 1] = 1
    input_gate[..., 0] = moved[..., -1]
    return (block if kind == "companion" else block.swapaxes(-1, -2)), input_gate


def numpy_states(problem: Problem) -> Tensor:
    """The states by matrix-vector products, one sequence and block at a time."""
    raw, values = problem.raw_gates.numpy(), problem.values.numpy()
    block, input_gate = numpy_block(problem.kind, numpy_weights(problem.normalization, raw, axis=raw.ndim - 2))
    batch, length, blocks, order = input_gate.shape
    states = np.zeros((batch, length, order, blocks))
    for b in range(batch):
        for n in range(blocks):
            h = np.zeros(order) if problem.initial_state is None else problem.initial_state[b, :, n].numpy()
            for t in range(length):
                if problem.reset is not None and problem.reset[b, t]:
                    h = np.zeros(order)
                h = block[b, t, n] @ h + input_gate[b, t, n] * values[b, t, ..., n]
                states[b, t, :, n] = h
    return torch.from_numpy(states[:, :, 0] if problem.kind == "companion" else states)


# A process forked from this server has all of training imported, also dynamo, which the first optimizer asks for, and
# none of the threads or open files of the tests.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["statemix.training.loop", "pytest", "torch._dynamo"])


def exit_code(process) -> int:
    process.join(60)
    process.kill()  # of use only if it hangs
    process.join()
    code = process.exitcode
    process.close()
    return code


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_compiled_agrees(problem: Problem, backend: str) -> None:
    """Hold a scan that torch.compile sees between other operations, and its gradients, to the eager one."""

    def step(raw_gates, values, initial_state):
        return SCANS[problem.kind](2 * raw_gates, values, initial_state, reset=problem.reset, backend=backend).tanh()

    inputs = [x.detach().requires_grad_() for x in (problem.raw_gates, problem.values, problem.initial_state)]
    both = (torch.compile(step, fullgraph=True, backend="aot_eager"), step)
    compiled, eager = ((y := f(*inputs), *torch.autograd.grad(y, inputs, problem.cotangent)) for f in both)
    for actual, expected in zip(compiled, eager, strict=True):
        assert_close(actual.detach(), expected.detach().double())


def chi_square(counts: np.ndarray) -> float:
    """Of equal shares, in standard deviations above its mean."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - freedom) / (2 * freedom) ** 0.5


def is_word(automaton: Automaton, word: tuple[int, ...]) -> bool:
    """Whether the automaton has a transition for each token of a word."""
    state = automaton.start
    for token in word:
        state = automaton.transitions[state, token]
        if state == NONE:
            return False
    return True


def assert_solved(task: Task, solution, seed: int) -> None:
    """Hold the targets of 10,000 sequences of a task to those of `solution(tokens, task)`, which score 1."""
    total = None
    for split, count in (("valid", 1000), ("test", 1000), ("train", 8000)):
        tokens, targets, _ = task.sample(split, count, seed=seed)
        assert tokens.shape == targets.shape == (count, task.length)
        answers = solution(tokens, task)
        assert torch.equal(answers, targets)
        part = Score.of(answers, targets)
        total = part if total is None else total + part
    assert total.sequences == 10_000
    assert total.token_accuracy == total.sequence_accuracy == total.macro_accuracy == total.mad_accuracy == 1
    answers[7][targets[7] != IGNORE_INDEX] += 1
    assert Score.of(answers, targets).sequence_accuracy == 7999 / 8000


def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of S<n> or A<n> in lexicographic order."""
    found = list(itertools.permutations(range(int(group[1:]))))
    even = [p for p in found if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    return found if group[0] == "S" else even


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")


def browse(page: Path, *options: str) -> str:
    """What Chromium prints of a page that it opens from disk, with a profile in the folder of the page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command of statemix."""
    from statemix import cli  # which most tests do without

    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
