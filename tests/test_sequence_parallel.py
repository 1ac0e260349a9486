"""sequence_parallel.py: 2 and 4 processes, each with a piece of time, against one loop over the whole sequence."""

import dataclasses
import itertools
import warnings
from unittest import mock

import pytest
import torch
from helpers import PROCESSES, Problem, exit_code, free_port, make_problem, numpy_states, relative_error
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from statemix import BDLRU, HLRU, LSTM, sequence_parallel
from statemix.scan import available_backends, scan_to_state
from statemix.sequence_parallel import SIGNATURE_BYTES, bytes_sent, sequence_parallel_layer, sequence_parallel_scan

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3.95e-3}  # relative to the largest entry


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan over pieces of these lengths, one for each process."""

    kind: str
    lengths: tuple[int, ...]
    order: int
    normalization: str = "softmax"
    backend: str = "auto"
    resets: str = "some"  # none, some, or one in every piece but the first
    with_state: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in vars(self).values())

    def problem(self) -> Problem:
        """Half of its blocks decay slowly: what crosses all pieces is as large as what is new."""
        generator = torch.Generator().manual_seed(len(str(self)))
        options = {"order": self.order, "length": sum(self.lengths), "with_state": self.with_state}
        problem = make_problem(generator, self.kind, self.normalization, dtype=self.dtype, **options)
        reset = None
        if self.resets != "none":
            reset = torch.zeros(problem.raw_gates.shape[:2], dtype=torch.bool)
            begins = [0, *itertools.accumulate(self.lengths)][1:-1]
            if self.resets == "some":  # one sequence: at the first step of a piece, and at the last of another
                reset[0, begins[0]] = reset[0, begins[-1] - 1] = True
            else:
                reset[:, [begin + length // 2 for begin, length in zip(begins, self.lengths[1:], strict=True)]] = True
        return dataclasses.replace(problem, reset=reset)

    def end_cotangents(self) -> torch.Tensor:
        """Of the state after each piece, (R, B, M, N)."""
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.lengths), 2, self.order, 3)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def cases(ranks: int) -> list[Case]:
    equal, unequal = (8,) * ranks, {2: (5, 20), 4: (12, 1, 5, 9)}[ranks]
    splits = itertools.cycle([(equal, "some"), (unequal, "none"), (unequal, "some"), (equal, "none"), (unequal, "all")])
    backends = [name for name in ("reference", "associative", "cpu") if name in available_backends("cpu")]
    every = itertools.product(("block", "companion", "observer"), (1, 3, 4), backends if ranks == 4 else ["auto"])
    return [
        *(
            Case(kind, lengths, order, backend=backend, resets=resets)
            for (kind, order, backend), (lengths, resets) in zip(every, splits, strict=False)
        ),
        *(Case(kind, unequal, 3, normalization="tanh", resets="none") for kind in ("block", "companion", "observer")),
        *(Case(kind, unequal, 3, dtype=torch.float64) for kind in ("block", "companion", "observer")),
        Case("companion", unequal, 3, with_state=False),
        Case("block", equal, 4, dtype=torch.bfloat16, resets="none"),
        Case("companion", (1,) * ranks, 4, resets="none"),  # a piece shorter than its order
        Case("block", (60,) * ranks, 2, resets="none"),
    ]


def pieces_of(problem: Problem, lengths: tuple[int, ...]) -> list[Problem]:
    """The piece of each process; the first has the initial state."""
    pieces = []
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        alone = dataclasses.replace(problem, initial_state=None).map(lambda x, cut=slice(begin, end): x[:, cut])
        pieces.append(dataclasses.replace(alone, initial_state=problem.initial_state if begin == 0 else None))
    return pieces


def leaves_of(problem: Problem) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(problem, name) for name in ("raw_gates", "values", "initial_state")}
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items() if tensor is not None}


def loss_of(states: torch.Tensor, end: torch.Tensor, cotangent: torch.Tensor, end_cotangent: torch.Tensor):
    return (states * cotangent).sum(dtype=end.dtype) + (end * end_cotangent.to(end.dtype)).sum()


class Collectives(TorchDispatchMode):
    """Every operation of torch.distributed that runs: its name and the bytes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls.append((function.__name__, sum(tensor.numel() * tensor.itemsize for tensor in args[1])))
        return function(*args, **(kwargs or {}))


def count_scans(scans: list[bool]):
    """A context in which each scan adds to `scans` whether it is differentiated."""

    def counted(*args, **kwargs):
        states, end = scan_to_state(*args, **kwargs)
        scans.append(states.requires_grad)
        return states, end

    return mock.patch.object(sequence_parallel, "scan_to_state", counted)


def run_case(case: Case, rank: int, group: dist.ProcessGroup | None = None) -> dict:
    """What one process sees: its states, the state after its piece, gradients, scans and collectives."""
    piece = pieces_of(case.problem(), case.lengths)[rank]
    leaves = leaves_of(piece)
    scans: list[bool] = []
    with Collectives() as forward, count_scans(scans):
        options = {"normalization": case.normalization, "reset": piece.reset, "backend": case.backend}
        states, end = sequence_parallel_scan(case.kind, **leaves, **options, group=group)
    with Collectives() as backward, count_scans(scans):
        loss_of(states, end, piece.cotangent, case.end_cotangents()[rank]).backward()
    found = {"states": states.detach(), "end": end.detach(), "scans": scans}
    found |= {"forward": forward.calls, "backward": backward.calls}
    return found | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def expected_of(case: Case) -> list[dict]:
    """The same of one process: the float64 loop over the pieces, one after another."""
    problem = case.problem().to(torch.float64)
    leaves = leaves_of(problem)
    state, loss, found = leaves.get("initial_state"), torch.zeros((), dtype=torch.float64), []
    whole = dataclasses.replace(problem, **leaves)
    for piece, end_cotangent in zip(pieces_of(whole, case.lengths), case.end_cotangents(), strict=True):
        how = {"normalization": case.normalization, "reset": piece.reset, "backend": "reference"}
        states, state = scan_to_state(case.kind, piece.raw_gates, piece.values, state, **how)
        loss = loss + loss_of(states, state, piece.cotangent, end_cotangent)
        found.append({"states": states.detach(), "end": state.detach()})
    loss.backward()
    for name, leaf in leaves.items():
        grads = [leaf.grad] if name == "initial_state" else leaf.grad.split(case.lengths, dim=1)
        for rank, grad in enumerate(grads):
            found[rank][f"gradient of {name}"] = grad
    return found


def refusal(call) -> str:
    """The error of a call, as "type: message"."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refused(rank: int) -> dict[str, str]:
    """The errors of this process where the arguments of one or of all are wrong."""
    gates, values, state = torch.zeros(2, 3, 4, 3), torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)

    def observer(gates=gates, values=values, kind="observer", **others) -> str:
        return refusal(lambda: sequence_parallel_scan(kind, gates, values, **others))

    odd = rank == 1
    found = {
        "initial state": observer(initial_state=state),
        "backend": observer(backend="abacus" if odd else "auto"),
        "tensor": observer(gates=None if odd else gates),
        "length": observer(values=values[:, :2] if odd else values),
        "kind": observer(kind="diagonal"),
        "B": observer(gates[: 2 - odd], values[: 2 - odd]),
        "M": observer(gates[:, :, : 4 - odd], values),
        "N": observer(gates[..., : 3 - odd], values[..., : 3 - odd]),
        "dtype": observer(*((gates.double(), values.double()) if odd else (gates.bfloat16(), values.bfloat16()))),
        "normalization": observer(normalization="relu" if odd else "tanh"),
        "kinds": observer(kind="companion" if odd else "observer"),
    }
    with torch.set_grad_enabled(not odd):
        found["gradients"] = observer()
    found["other group"] = observer(group=dist.new_group([0]))
    return found


def run_alone() -> tuple[list[str], list]:
    """In a group of one process: what is sent, and the results."""
    problem = Case("companion", (9,), 3, resets="none").problem()
    with Collectives() as sent:
        arguments = problem.kind, problem.raw_gates, problem.values, problem.initial_state
        found = sequence_parallel_scan(*arguments, group=dist.new_group([0]))
    return sent.calls, [found, scan_to_state(*arguments)]


LENGTHS = (6, 2, 1, 5)  # of the layers; one piece is shorter than the order


def make_layers() -> torch.nn.ModuleList:
    generator = torch.Generator().manual_seed(3)
    layers = torch.nn.ModuleList([BDLRU(6, 4, 3), HLRU(6, 4, 3), HLRU(6, 4, 3, form="observer")]).double()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layers


def layer_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, T, D), the state before each layer, and which steps begin a sequence."""
    generator = torch.Generator().manual_seed(4)
    length = sum(LENGTHS)
    x = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[1, 7] = True
    return x, torch.randn(3, 2, 3, 4, generator=generator, dtype=torch.float64), reset


def run_layers(rank: int) -> dict[str, torch.Tensor]:
    """Three layers on top of each other, the gradients of one loss per process."""
    layers, (x, states, reset) = make_layers(), layer_inputs()
    x, reset = (tensor.split(LENGTHS, dim=1)[rank] for tensor in (x, reset))
    y, loss = x.requires_grad_(), 0.0
    for layer, state in zip(layers, states, strict=True):
        y, end = sequence_parallel_layer(layer, y, state if rank == 0 else None, reset)
        loss = loss + end.square().sum()
    (loss + y.sin().sum()).backward()
    weights = {name: parameter.grad for name, parameter in layers.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights}


def run_frozen(rank: int) -> torch.Tensor | None:
    """Only the values of process 1 want a gradient: of the last state of the last process."""
    problem = pieces_of(FROZEN.problem(), FROZEN.lengths)[rank]
    values = problem.values.clone().requires_grad_(rank == 1)
    raw_gates, state = problem.raw_gates, problem.initial_state
    _, end = sequence_parallel_scan(problem.kind, raw_gates, values, state)
    (end.sum() * (rank == 3)).backward()
    assert state is None or not state.requires_grad  # an argument is left as it was
    return values.grad


FROZEN = Case("block", (3, 4, 5, 6), 3, resets="none", dtype=torch.float64)


def run_poisoned(rank: int) -> torch.Tensor:
    """NaN in the piece of process 0, and a reset in that of process 1: the states."""
    problem = pieces_of(dataclasses.replace(FROZEN, resets="all").problem(), FROZEN.lengths)[rank]
    values = problem.values.fill_(torch.nan) if rank == 0 else problem.values
    return sequence_parallel_scan(problem.kind, problem.raw_gates, values, reset=problem.reset)[0]


def run_pair(rank: int) -> dict | None:
    """Processes 1 and 3 as a group of their own, while 0 and 2 do nothing."""
    pair = dist.new_group([1, 3])
    return run_case(PAIR, rank // 2, pair) if rank in (1, 3) else None


PAIR = Case("block", (4, 7), 3, resets="none")


def work(rank: int, ranks: int, port: int, folder) -> None:
    """One process: everything it sees, in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found = {str(case): run_case(case, rank) for case in cases(ranks)} | {"refused": refused(rank)}
    if rank == 0:
        found["alone"] = run_alone()
    else:
        dist.new_group([0])  # all take part in making a group
    if ranks == 4:
        found["pair"] = run_pair(rank)
        found |= {"layers": run_layers(rank), "frozen": run_frozen(rank), "poisoned": run_poisoned(rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """For 2 and 4 processes, what each saw."""
    seen = {}
    for ranks in (2, 4):
        folder, port = tmp_path_factory.mktemp("ranks"), free_port()
        calls = [(rank, ranks, port, folder) for rank in range(ranks)]
        started = [PROCESSES.Process(target=work, args=call, daemon=True) for call in calls]
        for process in started:
            process.start()
        assert [exit_code(process) for process in started] == [0] * ranks
        seen[ranks] = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return seen


def hold_to_one_process(case: Case, actual: list[dict]) -> None:
    for rank, expected in enumerate(expected_of(case)):
        for name, tensor in expected.items():
            wide = name == "end" and case.dtype == torch.bfloat16
            assert actual[rank][name].dtype == (torch.float32 if wide else case.dtype)
            error = relative_error(actual[rank][name], tensor)
            assert error <= LIMIT[case.dtype], f"{name} of rank {rank}: {error}"


EVERY = [pytest.param(case, id=str(case)) for ranks in (2, 4) for case in cases(ranks)]


@pytest.mark.parametrize("case", EVERY)
def test_pieces_on_many_processes_are_one_scan(found, case):
    hold_to_one_process(case, [process[str(case)] for process in found[len(case.lengths)]])


@pytest.mark.parametrize("case", EVERY)
def test_the_oracle_is_the_recurrence(case):
    states = torch.cat([piece["states"] for piece in expected_of(case)], dim=1)
    assert relative_error(states, numpy_states(case.problem().to(torch.float64))) <= 1e-13


@pytest.mark.parametrize("case", EVERY)
def test_what_is_sent_and_scanned_is_as_stated(found, case):
    """Batch 2 and 3 blocks: SIGNATURE_BYTES and 6 M (M + 1) numbers forward, 6 M backward."""
    ranks = len(case.lengths)
    number = 8 if case.dtype == torch.float64 else 4
    forward, backward = 6 * case.order * (case.order + 1) * number, 6 * case.order * number
    assert bytes_sent(2, case.order, 3, case.dtype) == (SIGNATURE_BYTES + forward, backward)
    for rank in range(ranks):
        actual = found[ranks][rank][str(case)]
        gather = "allgather_.default"
        assert actual["forward"] == [(gather, SIGNATURE_BYTES), (gather, forward)]
        assert actual["backward"] == [(gather, backward)]
        probes = 0 if rank in (0, ranks - 1) else case.order + 1
        assert actual["scans"] == [False] * probes + [True]


def test_a_group_of_some_processes(found):
    hold_to_one_process(PAIR, [found[4][rank]["pair"] for rank in (1, 3)])


def test_with_one_process_it_is_a_scan_and_sends_nothing(found):
    for ranks in (2, 4):
        sent, (ours, plain) = found[ranks][0]["alone"]
        assert sent == []
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_layers_on_many_processes_are_the_layers(found):
    layers, (x, states, reset) = make_layers(), layer_inputs()
    y, loss = x.requires_grad_(), 0.0
    for layer, state in zip(layers, states, strict=True):
        pieces = []
        for piece, cut in zip(y.split(LENGTHS, dim=1), reset.split(LENGTHS, dim=1), strict=True):
            output, state = layer(piece, state, cut)
            pieces.append(output)
            loss = loss + state.square().sum()
        y = torch.cat(pieces, dim=1)
    (loss + y.sin().sum()).backward()
    actual = [process["layers"] for process in found[4]]
    assert relative_error(torch.cat([one["y"] for one in actual], dim=1), y.detach()) <= 1e-12
    assert relative_error(torch.cat([one["x"] for one in actual], dim=1), x.grad) <= 1e-12
    for name, parameter in layers.named_parameters():
        assert relative_error(sum(one["weights"][name] for one in actual), parameter.grad) <= 1e-12, name


def test_a_process_without_gradients_passes_on_those_of_others(found):
    problem = FROZEN.problem()
    values = problem.values.requires_grad_()
    _, end = scan_to_state("block", problem.raw_gates, values, problem.initial_state, backend="reference")
    end.sum().backward()
    expected = values.grad.split(FROZEN.lengths, dim=1)[1]
    actual = [process["frozen"] for process in found[4]]
    assert relative_error(actual[1], expected) <= 1e-13
    assert expected.abs().max() > 0
    assert (actual[0], actual[2], actual[3]) == (None, None, None)


def test_nan_does_not_pass_a_reset_in_a_piece(found):
    states = [process["poisoned"] for process in found[4]]
    expected = expected_of(dataclasses.replace(FROZEN, resets="all"))
    assert states[0].isnan().all()
    assert states[1][:, 0].isnan().all()  # its reset comes at the third step
    for rank in (2, 3):
        assert relative_error(states[rank], expected[rank]["states"]) <= 1e-13


SIZES = "kind, normalization, B, M, N, bytes of a state, gradients enabled"
OTHERS = "RuntimeError: {}: rank 1 refused its arguments. Its own error says why."
REFUSED = {  # what process 0 raises, and process 1
    "initial state": (
        OTHERS,
        "ValueError: {}: the initial state must be None on all ranks but 0, which holds the first piece; got one on "
        "rank 1.",
    ),
    "backend": (OTHERS, "ValueError: observer_scan: `backend` must be 'auto' or one of "),
    "tensor": (OTHERS, "TypeError: observer_scan: `raw_gates` must be a tensor, got NoneType."),
    "length": (
        OTHERS,
        "ValueError: observer_scan: `values` must have shape (B, T, N) = (2, 3, 3) to match `raw_gates`, got ",
    ),
    "kind": ("ValueError: {}: `kind` must be one of ['block', 'companion', 'observer'], got 'diagonal'.",) * 2,
    "other group": ("none", "ValueError: {}: `group` must contain this process, rank 1 of all."),
}
DISAGREE = {  # what process 0 has, and process 1
    "B": ("observer, softmax, 2, 3, 3, 4, True", "observer, softmax, 1, 3, 3, 4, True"),
    "M": ("observer, softmax, 2, 3, 3, 4, True", "observer, softmax, 2, 2, 3, 4, True"),
    "N": ("observer, softmax, 2, 3, 3, 4, True", "observer, softmax, 2, 3, 2, 4, True"),
    "dtype": ("observer, softmax, 2, 3, 3, 4, True", "observer, softmax, 2, 3, 3, 8, True"),
    "normalization": ("observer, tanh, 2, 3, 3, 4, True", "observer, relu, 2, 3, 3, 4, True"),
    "kinds": ("observer, softmax, 2, 3, 3, 4, True", "companion, softmax, 2, 3, 3, 4, True"),
    "gradients": ("observer, softmax, 2, 3, 3, 4, True", "observer, softmax, 2, 3, 3, 4, False"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_arguments_of_one_process_are_an_error_of_all(found, what):
    for ranks, rank in itertools.product((2, 4), (0, 1)):
        message = REFUSED[what][rank].format("sequence_parallel_scan")
        assert found[ranks][rank]["refused"][what].startswith(message)


@pytest.mark.parametrize("what", DISAGREE)
def test_processes_that_disagree_all_say_so(found, what):
    one, two = DISAGREE[what]
    message = f"all ranks must agree in {SIZES}; rank 0 has {one}, rank 1 has {two}."
    told = [process["refused"][what] for process in found[2] + found[4]]
    assert told == [f"ValueError: sequence_parallel_scan: {message}"] * 6


def test_it_asks_for_a_group():
    problem = FROZEN.problem()
    told = r"torch\.distributed is not initialised\. Call torch\.distributed\.init_process_group first\."
    with pytest.raises(RuntimeError, match=rf"^sequence_parallel_scan: {told}$"):
        sequence_parallel_scan("block", problem.raw_gates, problem.values)


def test_other_layers_are_refused():
    wanted = r"^sequence_parallel_layer: `layer` must be a BDLRU or HLRU, got LSTM\.$"
    with pytest.raises(TypeError, match=wanted):
        sequence_parallel_layer(LSTM(4, 4), torch.zeros(1, 2, 4))
