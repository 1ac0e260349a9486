"""benchmark/: the order of the rounds, the statistics, the check against the reference, and every command."""

import functools
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from statemix import cli, kernels
from statemix.benchmark import commands, contender, layers, measure, memory, results, scans
from statemix.benchmark.contender import PARTS, Contender, Shape, UnavailableError, Work
from statemix.mixers import BDLRU
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel
from statemix.scan import block_scan

SCAN = ["cpu", "associative", "loop", "copy", "softmax", "mambapy", "assoc-scan"]
DECODE = ["bdlru", "hlru", "lstm cell", "model of 4 layers", "Decoder of 4 layers"]
OWN_LAYERS = ["bdlru", "bdlru keep", "bdlru recompute", "associative", "hlru", "bdlru few rows"]
LAYERS = [*OWN_LAYERS, "products", "lstm", "gru", "mamba2"]
LAYERS_BFLOAT16 = [*LAYERS, "bdlru float32"]
TRAINED = ["bdlru", "bdlru first layer", "hlru", "lstm", "mamba2"]
COMMANDS = {  # name -> (arguments, tables, contenders of each)
    "scan": ("scan --sizes 1x4,3x2 --batch 2 --length 9 --kinds block,companion", 12, SCAN),
    "scan float64": ("scan --sizes 2x3 --batch 1 --length 5 --kinds observer --dtype float64", 3, SCAN),
    "layer": ("layer --sizes 1x4,3x2 --batch 2 --length 9 --d-model 16", 2, LAYERS),
    "layer bfloat16": ("layer --sizes 3x2 --batch 2 --length 9 --d-model 8 --dtype bfloat16", 1, LAYERS_BFLOAT16),
    "train-step": ("train-step --sizes 2x3 --batch 2 --length 9 --d-model 8", 1, TRAINED),
    "decode": ("decode --sizes 2x3 --d-model 8", 1, DECODE),
    "memory": ("memory --sizes 2x3 --length 5000 --d-model 8", 1, OWN_LAYERS[:4]),
    "scaling": ("scaling --sizes 2x3 --threads 1 --batch 2 --length 9 --lengths 16,64 --d-model 8", 5, None),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, threads):
    """Each test in an empty folder, on one thread, without the peers, the picture, and long decoding."""

    def not_there(module):
        raise ImportError(module)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contender, "import_module", not_there)
    monkeypatch.setattr(layers, "DECODED", 3)
    monkeypatch.setattr(commands, "plot", lambda _: b"a picture")
    threads(1)


def call(capsys, arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments.split()])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def scaled(factor: float, results: slice) -> Contender:
    """The cpu scan of this package, with some of its results times `factor`."""
    right = scans.own_scan("cpu", "associative")

    def make(shape: Shape) -> Work:
        work = right.make(shape)

        def wrong():
            all_results = list(work.call())
            all_results[results] = [factor * x for x in all_results[results]]
            return all_results

        return Work(wrong)

    return Contender("cpu", make, right.reference)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_end_to_end(capsys, monkeypatch, name):
    arguments, tables, contenders = COMMANDS[name]
    monkeypatch.setattr(memory, "peak_bytes", lambda layer, shape: 10_000 + 100 * shape.length)
    monkeypatch.setattr(commands, "plot", results.plot)
    status, text, errors = call(capsys, f"{arguments} --seconds 0.01 --out there/it.json")
    assert (status, errors) == (0, "")
    pictured = name != "scaling"
    assert {path.name for path in Path("there").iterdir()} == ({"it.json", "it.png"} if pictured else {"it.json"})
    kept = json.loads(Path("there/it.json").read_text())
    if pictured:
        with Image.open("there/it.png") as picture:
            assert picture.size[0] == 960
            assert len(set(picture.convert("L").tobytes())) > 20  # more than a blank page
        assert results.plot(kept) == Path("there/it.png").read_bytes()  # it can be drawn again without measuring
    assert kept["what"] == arguments.split()[0]
    assert kept["machine"]["threads"] == 1
    assert kept["options"]["seconds"] == 0.01
    assert len(kept["groups"]) == text.count("contender ") == tables
    facts = kept["machine"]
    line = f"instruction set {facts['instruction_set']}, threads 1, torch {torch.__version__}, {facts['date']}"
    assert f"{facts['processor']}, {facts['processors']} processors; {line}" in text
    assert text.endswith(f"in there/it.json, with all samples{', and there/it.png' if pictured else ''}.\n")
    for group in kept["groups"]:
        rows = {row["name"]: row for row in group["contenders"]}
        assert contenders is None or list(rows) == contenders
        assert contenders is None or rows.keys() <= results.LABELS.keys()
        assert set(group["baselines"]) <= rows.keys()
        for row in rows.values():
            assert re.search(rf"│ {row['name']} ", text)
            if "unavailable" not in row:
                assert len(row["samples"]) >= (1 if name == "memory" else 3)
                assert min(row["samples"]) > 0
                assert ("slow" in row["note"]) == (name != "memory" and len(row["samples"]) < 5)
                assert row["ratios"].keys() == set(group["baselines"])


def test_the_default_path_names_what_ran(capsys):
    assert call(capsys, "decode --sizes 1x2 --d-model 4 --seconds 0.01")[0] == 0
    name = "torch" if kernels.load_problem() else kernels.instruction_set()
    names = {f"decode-{name}-1t.{ending}" for ending in ("json", "png")}
    assert {path.name for path in Path("results/bench").iterdir()} == names


def test_scaling_is_over_lengths_and_over_threads():
    groups = commands.ScalingBenchmark(threads=2, lengths="64,16", length=7).groups()
    over = [(group.panel, [c.name for c in group.contenders], group.baselines, group.shape.batch) for group in groups]
    lengths, threads = ["T 16", "T 64", "T 1024"], ["1 thread", "2 threads"]
    assert over == [
        ("scan over T, B 1", lengths, ("T 1024",), 1),
        ("scan over threads, B 4", threads, ("1 thread",), 4),
        ("scan over threads, B 1", threads, ("1 thread",), 1),
        ("layer over threads, B 4", threads, ("1 thread",), 4),
        ("layer over threads, B 1", threads, ("1 thread",), 1),
    ]
    work = groups[0].contenders[1].make(groups[0].shape)
    assert (work.per, work.call()[0].shape) == (64, (1, 64, 4, 32))
    work = groups[1].contenders[1].make(groups[1].shape)
    work.before()
    assert torch.get_num_threads() == 2


def test_a_missing_peer_and_a_peer_of_other_shapes_are_named(capsys):
    arguments = "--seconds 0.01 --batch 1 --length 4"
    _, text, _ = call(capsys, f"scan --sizes 1x3 {arguments}")
    for name in ("mambapy", "assoc-scan"):
        assert len(re.findall(rf"│ {name} .* not installed \(pip install statemix\[bench\]\)", text)) == 3
    _, text, _ = call(capsys, f"scan --sizes 2x3 {arguments}")
    assert len(re.findall(r"│ (mambapy|assoc-scan) .* block scan of M = 1 only", text)) == 6
    _, text, _ = call(capsys, f"layer --sizes 2x3 --d-model 16 {arguments}")
    assert re.search(r"│ mamba2 .* not installed \(pip install statemix\[bench\]\)", text)
    _, text, _ = call(capsys, f"layer --sizes 2x3 --d-model 8 --dtype bfloat16 {arguments}")
    assert re.search(r"│ mamba2 .* D a multiple of 16 only", text)
    assert re.search(r"│ gru .* stays in float32 under autocast", text)


def test_a_peer_that_is_there_is_held_to_the_reference_and_timed(monkeypatch):
    """A loop in the place of mambapy's pscan, and one that forgets its first entry."""

    def pscan(decay, entering):  # (B, T, 1, N)
        states = [entering[:, 0]]
        for t in range(1, entering.shape[1]):
            states.append(decay[:, t] * states[-1] + entering[:, t])
        return torch.stack(states, dim=1)

    peer = next(c for c in scans.SCAN_CONTENDERS if c.name == "mambapy")
    shape = Shape(1, 3, batch=2, length=7)
    monkeypatch.setattr(contender, "import_module", lambda module: SimpleNamespace(pscan=pscan))
    measure.check_agreement(peer, shape)
    wrong = SimpleNamespace(pscan=lambda decay, entering: pscan(decay, entering * (decay < 0.5)))
    monkeypatch.setattr(contender, "import_module", lambda module: wrong)
    with pytest.raises(RuntimeError, match="'mambapy' disagrees"):
        measure.check_agreement(peer, shape)


@pytest.mark.parametrize("results", [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)])
def test_a_contender_that_is_wrong_by_a_thousandth_stops_the_run(capsys, monkeypatch, results):
    monkeypatch.setattr(commands, "PARTS", (contender.BOTH,))
    monkeypatch.setattr(commands, "SCAN_CONTENDERS", (scaled(1.001, results), *scans.SCAN_CONTENDERS[1:4]))
    status, text, errors = call(capsys, "scan --sizes 3x2 --batch 1 --length 9 --seconds 0.01 --out it")
    assert (status, text) == (1, "")
    assert re.search(
        r"error: bench: 'cpu' disagrees with the float64 loop on Shape\(order=3, blocks=2, batch=1, length=9, .*\): "
        r"its largest relative error is 0\.001, above 2e-05\.",
        errors,
    )
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("contenders", "ours"),
    [
        (scans.SCAN_CONTENDERS, {*SCAN} - {"copy", "softmax"}),
        (layers.LAYER_CONTENDERS, set(OWN_LAYERS)),
        (layers.TRAIN_CONTENDERS, set(TRAINED[:3])),
        (layers.DECODE_CONTENDERS, {*DECODE} - {"lstm cell"}),
    ],
    ids=["scan", "layer", "train-step", "decode"],
)
def test_every_contender_of_ours_is_held_to_the_reference(contenders, ours):
    assert {c.name for c in contenders if c.reference is not None} == ours


def test_relative_error():
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([1.0, -3.0]), expected) == 0.25
    assert measure.relative_error(torch.tensor([1.0, torch.nan]), expected) == torch.inf
    assert measure.relative_error(torch.tensor([[1.0, -4.0]]), expected) == torch.inf
    assert measure.relative_error(torch.tensor([0.5, 0.0]), 0 * expected) == 0.5
    forgetful = Contender("", lambda shape: Work(lambda: ()), scans.reference_scan)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        measure.check_agreement(forgetful, Shape(1, 1))


def test_rounds_are_interleaved_rotated_and_cut_short_for_the_slow(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measure, "perf_counter", lambda: clock[0])

    def work(name: str, seconds: float, **options) -> Work:
        def run():
            order.append(name)
            clock[0] += seconds

        return Work(run, **options)

    works = {"a": work("a", 1), "b": work("b", 2, per=4), "c": work("c", 5)}
    samples = measure.interleave(works, 20)
    assert "".join(order) == "abc" + "ab" + "abc" + "bca" + "cab" + "ab" + "ba" + "ab" + "ab"
    assert samples == {"a": [1] * 7, "b": [0.5] * 7, "c": [5] * 3}  # 7 rounds of 1 + 2 s are the first with 20 s

    assert {name: len(own) for name, own in measure.interleave(works, 25).items()} == {"a": 5, "b": 5, "c": 5}
    order.clear()
    short = measure.interleave({"a": works["a"], "b": works["b"]}, 0.5)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # all slow
    assert short == {"a": [1] * 3, "b": [0.5] * 3}
    assert len(measure.interleave({"a": works["a"]}, 5)["a"]) == 5
    assert measure.interleave({}, 1) == {}

    order.clear()
    prepared = work("x", 1, before=work("-", 10).call)
    assert measure.interleave({"x": prepared}, 6)["x"] == [1] * 6  # not timed, and not counted
    assert "".join(order) == "-x" * 8


def test_summarize_against_numbers_by_hand():
    samples = {"a": [1.0, 2.0, 3.0, 4.0, 10.0], "base": [2.0, 2.0, 2.0, 1.0, 4.0], "slow": [8.0, 6.0, 4.0]}
    result = measure.summarize(samples, ("base", "missing"))
    # a / base per round: 0.5, 1, 1.5, 4, 2.5; slow / base: 4, 3, 2, and the medians of the shared rounds are 6 and 2
    assert result["a"] == {"median": 3.0, "spread": (4 - 2) / 3, "ratios": {"base": [1.5, 1.0, 2.5]}}
    assert result["base"] == {"median": 2.0, "spread": 0.0, "ratios": {"base": [1.0, 1.0, 1.0]}}
    assert result["slow"] == {"median": 6.0, "spread": (7 - 5) / 6, "ratios": {"base": [3.0, 2.5, 3.5]}}
    speed = measure.summarize(samples, ("base", "a"), "speed")
    assert speed["slow"]["ratios"] == {"base": pytest.approx([1 / 3, 7 / 24, 5 / 12]), "a": [2 / 6, 11 / 48, 13 / 24]}
    assert measure.summarize({"one": [3.0]}, ())["one"] == {"median": 3.0, "spread": 0.0, "ratios": {}}


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (1.5e-6, "s", "1.5 µs"),
        (2e-7, "s", "200 ns"),
        (0.0123456, "s", "12.3 ms"),
        (1234.0, "s", "1,234 s"),
        (0.9996, "s", "1,000 ms"),
        (2.28e9, "B", "2.28 GB"),
        (4096, "B", "4.1 kB"),
        (12, "B", "12 B"),
    ],
)
def test_amounts(number, unit, text):
    assert results.amount(number, unit) == text


@pytest.mark.parametrize(("part", "passes"), [("forward", 1), ("backward", 2), ("forward + backward", 3)])
@pytest.mark.parametrize(
    ("kind", "numbers"), [("block", 4 * 5 + 4 + 4), ("companion", 5 + 1 + 1), ("observer", 5 + 1 + 4)]
)
def test_the_copy_moves_the_bytes_of_the_scan(kind, numbers, part, passes):
    shape = Shape(4, 6, batch=2, length=3, kind=kind, part=part)
    target = scans.copy(shape).call()
    assert 2 * target.numel() == passes * numbers * 2 * 3 * 6  # half of it read and half written
    assert scans.copy(replace(shape, dtype="float64")).call().numel() == 2 * target.numel()


@pytest.mark.parametrize("part", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("kind", ["block", "companion"])
def test_the_softmax_is_that_of_the_raw_gates(kind, part):
    shape = Shape(2, 5, batch=2, length=3, kind=kind, part=part)
    results = scans.softmax(shape).call()
    size = (2, 3, 2, 3, 5) if kind == "block" else (2, 3, 3, 5)
    assert [tuple(x.shape) for x in results] == [size] * (2 if part == "forward + backward" else 1)
    if part != "backward":
        torch.testing.assert_close(results[0].sum(-2), torch.ones(size[:-2] + size[-1:]))


def test_a_training_step_is_of_a_layer_without_a_table(monkeypatch):
    tables, rows = [], SequenceModel._rows
    monkeypatch.setattr(SequenceModel, "_rows", lambda model, tokens: tables.append(rows(model, tokens)) or tables[-1])
    any_layer, first_layer, *_ = layers.TRAIN_CONTENDERS
    for layer in (any_layer, first_layer):
        layer.make(Shape(2, 3, batch=2, length=200, d_model=8)).call()
    assert [table is None for table in tables] == [True, False]


def test_the_products_are_those_of_the_layer():
    """Nine at full length, of the sizes of the layer's, and the bias is in the first."""
    shape = Shape(3, 2, batch=2, length=5, d_model=4)
    results = layers.products(shape).call()
    sizes = [(2, 5, 24), (2, 5, 6), (2, 5, 4), (2, 5, 4), (24, 4), (2, 5, 4), (6, 4), (2, 5, 6), (4, 6)]
    assert [tuple(x.shape) for x in results] == sizes
    x, weight, cotangent, bias = contender.inputs(shape, (2, 5, 4), (24, 4), (2, 5, 24), (24,))
    assert torch.equal(results[0], torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(results[3], cotangent @ weight)
    torch.testing.assert_close(results[4], cotangent.flatten(0, 1).T @ x.flatten(0, 1))
    assert layers.products(replace(shape, dtype="bfloat16")).call()[4].dtype == torch.bfloat16


def test_the_backward_is_only_the_backward():
    shape = Shape(2, 3, batch=2, length=5)
    scan = functools.partial(block_scan, backend="reference")
    work = {part: scans.scan_work(replace(shape, part=part), scan) for part in PARTS}
    forward, backward, both = (work[part].call() for part in PARTS)
    assert (len(forward), len(backward), len(both)) == (1, 3, 4)
    for actual, expected in zip((*forward, *backward), both, strict=True):
        assert torch.equal(actual, expected)
    assert not forward[0].requires_grad
    work["backward"].call()  # as often as wanted


@pytest.mark.parametrize("name", ["bdlru", "hlru"])
def test_decoding_is_in_inference_mode_on_contiguous_tensors(monkeypatch, name):
    seen, step = [], LinearRecurrence.step

    def watched(self, x, state=None):
        tensors = [x] if state is None else [x, state]
        seen.append((torch.is_inference_mode_enabled(), [t.is_contiguous() for t in tensors]))
        return step(self, x, state)

    monkeypatch.setattr(LinearRecurrence, "step", watched)
    work = next(c for c in layers.DECODE_CONTENDERS if c.name == name).make(Shape(3, 2, d_model=8))
    y, state = work.call()
    assert seen == [(True, [True]), (True, [True, True]), (True, [True, True])]
    assert (y.shape, state.shape, work.per) == ((1, 8), (1, 3, 2), 3)


@pytest.mark.parametrize("target", [1, 100, 2156, 50_000])
def test_nearest_width(target):
    width = layers.nearest_width(target, lambda width: torch.nn.Linear(3, width))  # 4 numbers each
    assert width == min(range(1, 1 << 14), key=lambda w: abs(4 * w - target))


def test_rivals_have_the_parameters_of_the_layer():
    shape = Shape(3, 8, batch=1, length=2, d_model=16)
    own = sum(p.numel() for p in BDLRU(16, 8, 3).parameters())
    for name in ("lstm", "gru"):
        note = next(c for c in layers.LAYER_CONTENDERS if c.name == name).make(shape).note
        assert abs(int(re.sub(r"\D", "", note)) / own - 1) < 0.05
    wider = Shape(3, 16, batch=1, length=2, d_model=64)  # the widths of Mamba-2 are coarse
    counts = [int(re.sub(r"\D", "", c.make(wider).note)) for c in layers.TRAIN_CONTENDERS]
    assert max(counts) / min(counts) < 1.02


def test_memory_is_extrapolated_where_it_does_not_fit(monkeypatch):
    asked = []
    monkeypatch.setattr(
        memory, "peak_bytes", lambda name, shape: asked.append((name, shape.length)) or 7 + 5 * shape.length
    )
    peaks = {c.name: c for c in commands.MemoryBenchmark(length=100_000).groups()[0].contenders}
    shape = Shape(2, 3, length=100_000)
    assert peaks["bdlru"].make(shape).call() == 7 + 5 * 100_000
    work = peaks["associative"].make(shape)
    assert work.call() == pytest.approx(7 + 5 * 100_000)
    assert work.note == "EXTRAPOLATED from T 1024, 2048, 4096"
    work = peaks["associative"].make(replace(shape, length=300))
    assert (work.call(), work.note) == (7 + 5 * 300, "")
    assert asked == [("bdlru", 100_000), *[("associative", n) for n in (1024, 2048, 4096, 300)]]


def test_peak_memory_is_that_of_a_process_of_its_own():
    """Raw gates and their gradient, 20 MB each, are more than half of what the layer keeps."""
    shape = Shape(4, 32, batch=1, length=8192, d_model=8)
    ballast = torch.zeros(50_000_000)  # would be the peak if it counted
    assert 30e6 < memory.peak_bytes("bdlru", shape) < 150e6
    del ballast


@pytest.mark.parametrize(
    ("status", "errors", "reason"),
    [(-9, "", "killed by signal 9"), (1, "Traceback:\nRuntimeError: can't allocate memory", "^can't allocate memory")],
)
def test_a_process_that_fails_is_a_reason(monkeypatch, status, errors, reason):
    ended = SimpleNamespace(returncode=status, stdout="", stderr=errors)
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **options: ended)
    with pytest.raises(UnavailableError, match=reason):
        memory.peak_bytes("bdlru", Shape(1, 1))


WRONG_OPTIONS = [
    ("scan --sizes 4*8", r"bench: `sizes` must be MxN pairs of at least 1, such as '1x128,4x32', got '4\*8'\."),
    ("scan --sizes 4x0", r"bench: `sizes` must be MxN pairs of at least 1, .* got '4x0'\."),
    ("scan --batch 0", r"bench: `batch` must be at least 1, got 0\."),
    ("layer --length -1", r"bench: `length` must be at least 1, got -1\."),
    ("decode --d-model 0", r"bench: `d_model` must be at least 1, got 0\."),
    ("scan --threads 0", r"bench: `threads` must be at least 1, got 0\."),
    ("scan --threads 9999", r"bench: `threads` must be at most \d+, the processors here, got 9999\."),
    ("scan --seconds 0", r"bench: `seconds` must be above 0 and finite, got 0\.0\."),
    ("scan --seconds inf", r"bench: `seconds` must be above 0 and finite, got inf\."),
    ("scan --seconds nan", r"bench: `seconds` must be above 0 and finite, got nan\."),
    ("scan --instruction-set z80", r"bench: `instruction_set` must be one of \[.*\], got 'z80'\."),
    ("scan --dtype bfloat16", r"bench: `dtype` must be one of \['float32', 'float64'\], got 'bfloat16'\."),
    ("layer --dtype float64", r"bench: `dtype` must be one of \['bfloat16', 'float32'\], got 'float64'\."),
    ("scan --kinds block,dense", r"bench: `kinds` must be one of \['block', 'companion', 'observer'\], got 'dense'\."),
    ("scan --only cpu,gpu", r"bench: `only` must be one of \['assoc-scan', .*'softmax'\], got 'gpu'\."),
    ("scaling --lengths 1,two", r"bench: `lengths` must be numbers of at least 1, such as '256,1024', got '1,two'\."),
    ("scan --out /dev/null/it", r"bench: `out` must be a path in a folder that can be made, got '/dev/null/it': "),
    ("decode --length 4", r"Unrecognized .* options: --length"),
    ("layer --kinds block", r"Unrecognized .* options: --kinds"),
    ("flops", r"Unrecognized options: flops .* scan, layer, train-step, decode, memory, scaling"),
    ("", r"Missing subcommand"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_OPTIONS, ids=[arguments for arguments, _ in WRONG_OPTIONS])
def test_a_wrong_option_says_what_is_wrong_and_does_nothing(capsys, arguments, message):
    status, text, errors = call(capsys, arguments)
    assert status == 2
    assert re.search(message, re.sub(r"[\s│╭╮╰╯─]+", " ", errors)), errors
    assert text == ""
    assert list(Path().iterdir()) == []


def test_only_keeps_the_baselines(capsys):
    arguments = "layer --sizes 2x3 --batch 1 --length 4 --d-model 4 --seconds 0.01 --out it"
    assert call(capsys, f"{arguments} --only hlru")[0] == 0
    (group,) = json.loads(Path("it.json").read_text())["groups"]
    assert [row["name"] for row in group["contenders"]] == ["hlru", "products"]


def test_results_that_cannot_be_written_are_an_error(capsys):
    Path("it.json").mkdir()
    status, _, errors = call(capsys, "decode --sizes 1x2 --d-model 4 --seconds 0.01 --out it")
    assert status == 1
    assert re.search(r"error: bench: cannot write to 'it': ", errors)
    assert [path.name for path in Path().iterdir()] == ["it.json"]


@pytest.mark.skipif(len(kernels.instruction_sets()) < 2, reason="one instruction set")
def test_threads_and_instruction_set_are_as_before_also_after_an_error():
    slowest, own = kernels.instruction_sets()[0], kernels.instruction_set()
    seen = []

    def fail(table):
        seen.append((torch.get_num_threads(), kernels.instruction_set()))
        raise KeyboardInterrupt

    options = {"sizes": "1x2", "d_model": 4, "seconds": 0.01, "threads": 2, "instruction_set": slowest}
    with pytest.raises(KeyboardInterrupt):
        commands.run(commands.DecodeBenchmark(**options), fail)
    assert seen == [(2, slowest)]
    assert (torch.get_num_threads(), kernels.instruction_set()) == (1, own)


def test_a_run_leaves_no_trace_in_the_process(capsys):
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    for arguments in ("scan", "layer --d-model 4", "train-step --d-model 4"):
        assert call(capsys, f"{arguments} --sizes 1x2 --batch 1 --length 3 --seconds 0.01")[0] == 0
    assert call(capsys, "scaling --sizes 1x2 --batch 1 --length 3 --lengths 4 --d-model 4 --seconds 0.01")[0] == 0
    assert torch.equal(torch.get_rng_state(), expected)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (1, torch.float32)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_an_interrupted_run_says_so(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "interleave", interrupted)
    assert call(capsys, "decode --sizes 1x2 --d-model 4 --out it") == (130, "", "stopped.\n")


def test_names_of_contenders_differ():
    for kind in commands.BENCHMARKS.values():
        for group in kind(sizes="1x2").groups():
            names = [c.name for c in group.contenders]
            assert not any(a == b for a, b in itertools.combinations(names, 2))
            assert not any("," in name for name in names)  # --only is split at commas
            assert set(group.baselines) <= set(names)


def test_a_picture_has_no_more_lines_than_colours(monkeypatch):
    """Of a layer all contenders are there; the baseline has no colour, and the choice stands for its two modes."""
    drawn = []
    monkeypatch.setattr(results, "label_ends", lambda axes, lines, width: drawn.append(list(lines)))
    contenders = [{"name": name, "ratios": {"products": [1.0, 0.5, 2.0]}} for name in LAYERS]
    layer = {"panel": "", "size": "2x3", "ratio": "time", "baselines": ["products"]}
    machine = {"threads": 1, "processor": "", "instruction_set": "", "date": ""}
    kept = {"what": "layer", "options": {}, "machine": machine}
    for left in (10, 5):
        results.plot(kept | {"groups": [layer | {"contenders": contenders[-left:]}]})
    others = [name for name in LAYERS if name not in ("bdlru keep", "bdlru recompute", "products")]
    assert drawn[0] == [*(results.LABELS[name] for name in others), "the bare matrix products"]
    assert len(drawn[1]) == 5


def test_what_is_kept_is_of_its_form(tmp_path):
    files = sorted((Path(__file__).parents[1] / "results" / "bench").glob("*.json"))
    assert files
    for file in files:
        assert results.read_kept(file)["groups"]
    kept = json.loads(files[0].read_text())
    kept["groups"][0]["contenders"][0]["name"] = None
    (tmp_path / "it.json").write_text(json.dumps(kept))
    told = r"`groups\[0\]\.contenders\[0\]\.name` must be a text, got None"
    with pytest.raises(ValueError, match=rf"^bench: '{tmp_path}/it\.json' is damaged: {told}\.$"):
        results.read_kept(tmp_path / "it.json")
