"""benchmark/gpu: all that needs no card, and the rest with a clock that is no clock and the kernels in the emulator."""

import itertools
import json
import operator
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from statemix import SequenceModel
from statemix.benchmark.contender import Shape
from statemix.benchmark.gpu import GpuBenchmark, card, check, host, results
from statemix.benchmark.gpu.peers import PEERS, Peers
from statemix.benchmark.gpu.records import RECORD, Records
from statemix.benchmark.scans import SCANS
from statemix.cli import main
from statemix.records import read_lines
from statemix.scan import gpu
from statemix.scan.gpu import compile, plan

has_compiler = pytest.mark.skipif(not compile._HAS_BINDINGS, reason="cuda-bindings is not installed: statemix[gpu]")


class NoCard(card.Card):
    """Every call is made once, and took 2 ms."""

    device, copied = "cpu", 1000

    def name(self):
        return "no card"

    def alone(self, call):
        call()
        return 0.002

    with_host = alone


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(compile, "EMULATED", True)
    yield
    gpu._plan.cache_clear()
    compile.load.cache_clear()


class TestRecords:
    def test_they_outlive_the_process(self, tmp_path):
        records = Records(tmp_path / "new" / "a.jsonl")
        records.add({"key": "a", "x": 1})
        records.add({"key": "b", "x": 2})
        records.add({"key": "a", "x": 3})
        again = Records(records.path)
        assert dict(again) == dict(records) == {"a": {"key": "a", "x": 3}, "b": {"key": "b", "x": 2}}

    def test_half_a_line_is_none(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"key": "a"}\n{"key": "b", "x"')
        records = Records(path)
        assert list(records) == ["a"]
        records.add({"key": "c"})
        assert list(Records(path)) == ["a", "c"]

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("[]", r"`the content` must be an object, got \[\]"),
            ("{", "it is not JSON at line 2, column 1"),
            ("{}", "`key` is missing"),
            ('{"key": 1}', "`key` must be a text, got 1"),
            ('{"key": "a", "forward": "fast"}', "`forward` must be a number, got 'fast'"),
            ('{"key": "a", "bytes": [1, null]}', r"`bytes\[1\]` must be a number, got None"),
        ],
    )
    def test_what_is_no_record_is_named_with_its_line(self, tmp_path, line, told):
        path = tmp_path / "a.jsonl"
        path.write_text('{"key": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=rf"^bench: '{path}' is damaged: line 2: {told}\. Mend that line"):
            Records(path)

    def test_those_of_the_repository_are_of_the_form(self):
        for file in (Path(__file__).parents[1] / "results" / "bench").glob("*.jsonl"):
            assert read_lines(file, RECORD, "bench")


def compiled_record(target, **changes):
    kernel = target.kernel
    record = {"key": target.key, "program": kernel.program, "order": kernel.order, "architecture": target.architecture}
    return record | {"registers": 100, "spilled": 0, "shared_bytes": 2048, "seconds": 0.5} | changes


class TestCheck:
    def wanted(self, dtypes=("float32",), architectures=(90,)):
        return check.targets(["block"], [4, 5], ["softmax"], dtypes, architectures)

    def first(self, family):
        """One of the targets: of rows and of slabs, a forward program."""
        return next(target for target in self.wanted() if target.kernel.family == family)

    def test_every_kernel_of_a_scan_is_among_the_targets(self):
        found = {target.kernel for target in self.wanted(dtypes=["float32", "bfloat16"])}
        dtypes = (torch.float32, torch.bfloat16)
        for order, dtype, load, program in itertools.product((4, 5), dtypes, plan.LOADS, plan.PROGRAMS):
            problem = plan.Signature("block", dtype, order, "softmax", True, 2, 70, 9)
            assert plan.kernel(problem, program, load) in found
            assert plan.relay(problem, True) in found
        assert {kernel.dtype for kernel in found} == set(dtypes)
        assert {kernel.normalization for kernel in found if kernel.family != "relay"} == {"softmax"}

    def test_each_architecture_has_them_all(self):
        one, two = self.wanted(), self.wanted(architectures=[80, 120])
        assert [target.kernel for target in two] == [target.kernel for target in one] * 2
        assert len({target.key for target in two}) == len(two) == 2 * len(one)

    def test_another_source_is_another_kernel(self, monkeypatch):
        target, other = self.first("slabs"), self.first("rows")
        before = target.key, other.key
        texts = compile.headers() | {"slabs.cuh": compile.headers()["slabs.cuh"] + "\n"}
        monkeypatch.setattr(check, "headers", lambda: texts)
        check._texts.cache_clear()
        after = target.key, other.key
        check._texts.cache_clear()
        assert after[0] != before[0]
        assert after[1] == before[1]  # rows.cuh does not include it

    @has_compiler
    def test_a_kernel_is_compiled(self):
        record = check.compiled(self.first("rows"))
        assert record["registers"] > 16
        assert record["spilled"] == 0
        assert 0 < record["seconds"] < 60
        assert json.loads(json.dumps(record)) == record

    @has_compiler
    def test_a_card_that_shares_little_has_shorter_slabs(self):
        target = self.first("slabs")
        here, small = (check.compiled(target._replace(architecture=architecture)) for architecture in (90, 120))
        assert here["shared_bytes"] > check.SHARED_LIMITS[120] >= small["shared_bytes"]
        assert here["kernel"] != small["kernel"]

    @has_compiler
    def test_an_error_of_the_compiler_is_a_fault(self, monkeypatch):
        texts = compile.headers() | {"relay.cuh": "mistake"}
        monkeypatch.setattr(compile, "headers", lambda: texts)
        compile.compile_for_gpu.cache_clear()
        assert "NVRTC cannot compile" in check.fault(check.compiled(self.first("relay")))

    @pytest.mark.parametrize(
        ("changes", "wrong"),
        [
            ({}, None),
            ({"spilled": 8}, "spills 8 bytes"),
            ({"seconds": 2.0}, "takes 2.0 s to compile"),
            ({"shared_bytes": 228 << 10}, "shares 233472 bytes, the card has 232448"),
            ({"error": "no\nlog"}, "no"),
        ],
    )
    def test_a_fault_is_named(self, changes, wrong):
        assert check.fault(compiled_record(self.wanted()[0], **changes)) == wrong

    def test_it_goes_on_says_what_is_cut_off_and_fails(self, tmp_path, monkeypatch):
        monkeypatch.setattr(check, "compiler_version", lambda: "of a test")
        wanted, shown = self.wanted(), []
        records = Records(tmp_path / "a.jsonl")
        records.add(compiled_record(wanted[0]))

        def in_processes(missing, jobs, time_is_left):
            for target in missing:
                if not time_is_left():
                    return
                made.append(target)
                yield compiled_record(target)

        monkeypatch.setattr(check, "_in_processes", in_processes)
        made, ticks = [], itertools.count(step=2)
        found = check.check_kernels(wanted, records, 1, 9, shown.append, clock=lambda: next(ticks))
        assert made == wanted[1 : 1 + len(made)]
        assert 0 < len(made) < len(wanted) - 1
        assert len(found) == 1 + len(made)
        assert f"CUT OFF after 9 s: {len(wanted) - len(found)} kernels; the same command goes on." in shown
        made.clear()
        assert len(check.check_kernels(wanted, records, 1, 1e9, shown.append)) == len(wanted)
        assert made == wanted[len(found) :]
        records.add(compiled_record(wanted[3], spilled=16))
        told = r"^bench: 1 of \d+ kernels are wrong:\nSTATEMIX_KERNEL.*spills 16 bytes"
        with pytest.raises(RuntimeError, match=told):
            check.check_kernels(wanted, records, 1, 1e9, shown.append)

    def test_processes_compile_what_they_are_given(self, monkeypatch):
        """In threads, so that the compiler need not be there."""
        from concurrent.futures import ThreadPoolExecutor

        monkeypatch.setattr(check, "ProcessPoolExecutor", lambda jobs, context, begin: ThreadPoolExecutor(jobs))
        monkeypatch.setattr(check, "compiled", lambda target: {"key": target})
        wanted = self.wanted()
        found = [record["key"] for record in check._in_processes(wanted, 2, lambda: True)]
        assert sorted(found, key=wanted.index) == wanted
        assert list(check._in_processes(wanted, 2, lambda: False)) == []

    @has_compiler
    def test_the_command_compiles(self, tmp_path, capsys):
        out = tmp_path / "kernels"
        kernels = "--orders 4 --kinds companion --normalizations softmax --dtypes bfloat16 --architectures 90"
        arguments = f"bench gpu --check {kernels} --jobs 1 --budget 1e-9".split()
        status, shown = main([*arguments, "--out", str(out)]), capsys.readouterr().out
        assert status == 0
        assert "CUT OFF after 0 s" in shown
        assert f"The results are in {out}.jsonl." in shown


class TestHost:
    def test_a_line_a_scan(self, monkeypatch, capsys):
        monkeypatch.setattr(host, "CALLS", 1)
        assert main(["bench", "gpu", "--host"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(SCANS) + 1
        for line, kind in zip(lines, SCANS, strict=False):
            assert re.fullmatch(rf"{kind} forward \d+\.\d us backward \d+\.\d us", line)

    def test_the_fastest_round_counts(self):
        times = iter([0.0, 5.0, 5.0, 7.0, 10.0, 10.5, 20.0, 21.0])
        with host.without_a_card():
            forward, backward = host.microseconds("block", 2, lambda: next(times))
        assert forward == pytest.approx(2e6 / host.CALLS)
        assert backward == pytest.approx(0.5e6 / host.CALLS)

    def test_launches_are_left_out_and_nothing_else(self, monkeypatch):
        launches = []
        monkeypatch.setattr(host.NO_DRIVER, "cuLaunchKernel", lambda *them: (launches.append(them), 0)[1:])
        with host.without_a_card():
            host.microseconds("companion", 1)
        assert len(launches) == 1 + 2 * host.CALLS  # the states that are differentiated, and each call
        assert compile.load.cache_info() is not None  # the engine's own again


class TestCard:
    def test_least_bytes_are_those_of_the_prototypes(self):
        paper = Shape(16, 28, 16, 2048, dtype="bfloat16")
        assert card.least_bytes(paper) == (557_842_432, 1_115_684_864)  # 0.132 and 0.264 ms at 4.23 TB/s
        companion = Shape(16, 242, 16, 2048, dtype="bfloat16", kind="companion")
        forward, backward = card.least_bytes(companion)
        assert (forward, backward) == (2 * 2048 * 16 * 242 * 19, 2 * 2048 * 16 * 242 * 38)
        observer = Shape(16, 1, 1, 1, dtype="float32", kind="observer")
        assert card.least_bytes(observer) == (4 * (18 + 16), 4 * (2 * 18 + 16 + 1))

    def test_the_shapes_are_those_that_were_asked_for(self):
        shapes = card.scan_shapes()
        assert len(set(shapes)) == len(shapes)
        sizes = {(shape.kind, shape.order, shape.batch, shape.length, shape.blocks) for shape in shapes}
        assert {("block", M, 16, 2048, N) for M, N in card.PAPER} <= sizes
        assert {("block", M, 8, 4096, 512) for M in (1, 2, 4, 8, 16)} <= sizes
        assert {("block", 1, 4, 16384, 1946), ("block", 4, 1, 65536, 302), ("companion", 16, 16, 2048, 242)} <= sizes

    @pytest.mark.parametrize(
        "shape",
        [
            Shape(3, 5, 2, 9, dtype="float32"),
            Shape(1, 3, 2, 9, dtype="bfloat16"),
            Shape(5, 2, 1, 9, dtype="float32", kind="companion"),
            Shape(4, 3, 2, 9, dtype="bfloat16", kind="observer"),
        ],
        ids=card.scan_name,
    )
    def test_a_scan_is_held_to_float64_and_timed(self, shape, emulated):
        record = card.measure_scan(NoCard(), shape)
        assert 0 < record["error"] <= card.TOLERANCES[shape.dtype]
        assert "wrong" not in record
        times = ("forward", "backward", "forward_with_host", "backward_with_host")
        assert [record[what] for what in times] == [0.002] * 4
        inputs = card.leaves(shape, "cpu")
        assert all(gpu._read(x, []) is x for x in inputs[:3])  # no copy is timed

    def test_a_wrong_scan_is_found_and_not_timed(self, emulated, monkeypatch):
        right = gpu.scan_blocks

        def wrong(gates, *others):
            return right(gates.transpose(3, 4).contiguous(), *others)

        monkeypatch.setattr(gpu, "scan_blocks", wrong)
        record = card.measure_scan(NoCard(), Shape(3, 5, 2, 9, dtype="float32"))
        assert record["wrong"].startswith("relative error ")
        assert "forward" not in record

    def test_copy_speed(self):
        assert card.copy_speed(NoCard()) == {"bytes_per_second": 2 * 1000 / 0.002}

    @pytest.mark.parametrize("name", ["paper-bd4", "products of paper-bd4", "attention", "paper-lstm"])
    def test_a_layer_and_its_products_are_measured(self, name, monkeypatch):
        small = {"name": "bd_lru", "num_blocks": 3, "block_size": 4, "backend": "associative"}
        mixers = {"paper-bd4": small, "paper-lstm": {"name": "lstm", "hidden_size": 5}}
        monkeypatch.setattr(card, "LANGUAGE_MIXERS", mixers)
        monkeypatch.setattr(card, "PAPER", ((4, 3),))
        record = card.measure_layer(NoCard(), card.layer_builders(24)[name], 2, 7, 24)
        assert record["forward"] == record["forward_backward"] == 0.002
        assert record["parameters"] > 24

    def test_products_are_as_large_as_the_layers(self):
        """Up to biases, 242 channels filled up to 248, and what else is small."""
        builders = card.layer_builders()
        with torch.device("meta"):
            sizes = {name: sum(p.numel() for p in build().parameters()) for name, build in builders.items()}
        for name in set(card.LANGUAGE_MIXERS) - {"paper-lstm"}:
            assert sizes[f"products of {name}"] == pytest.approx(sizes[name], rel=0.03)

    def test_a_training_step_is_measured(self):
        def model():
            return SequenceModel(card.VOCABULARY, 4, 1, {"name": "lru", "num_channels": 2})

        record = card.measure_step(NoCard(), model, 2, 3)
        assert record["tokens_per_second"] == pytest.approx(6 / 0.002)

    def test_a_run_goes_on_and_says_what_is_cut_off(self, tmp_path):
        ran, shown, ticks = [], [], itertools.count()

        def one(name, **result):
            def run():
                ran.append(name)
                if "error" in result:
                    raise ValueError(result["error"])
                return result

            return card.Measurement("scan", name, run)

        wanted = [one("a", x=1), one("b", error="no memory"), one("c", wrong="relative error 1"), one("d", x=4)]
        records = Records(tmp_path / "a.jsonl")
        found = card.measure_all(wanted, records, "card 1", 5, shown.append, clock=lambda: next(ticks))
        assert ran == ["a", "b", "c"]
        assert [record["name"] for record in found] == ["a", "c"]
        assert "FAILED b: ValueError: no memory" in shown
        assert "CUT OFF after 5 s: d. The same command goes on." in shown
        again = Records(records.path)
        ran.clear()
        card.measure_all(wanted, again, "card 1", 100, shown.append)
        assert ran == ["b", "d"]
        ran.clear()
        card.measure_all(wanted, again, "another card", 100, shown.append)
        assert ran == ["a", "b", "c", "d"]

    def test_what_matters_most_comes_first(self):
        peers = mock.Mock()
        names = [(one.part, one.name) for one in card.measurements(NoCard(), peers)]
        peers.measure.assert_not_called()
        parts = [part for part, _ in itertools.groupby(names, key=operator.itemgetter(0))]
        assert parts == ["copy", "scan", "layer", "step", "layer"]
        assert len(set(names)) == len(names)
        assert {("layer", f"fla {name}, T {length}") for name in PEERS for length in (2048, 8192)} <= set(names)


class TestPeers:
    def test_what_is_not_installed_is_said(self):
        with Peers(names=["Mamba2"]) as peers:
            assert peers.prepare([(1, 4)]) > 0
            result = peers.measure("Mamba2", 1, 4)
        assert "unavailable" in result or "forward" in result

    @pytest.mark.parametrize(
        ("module", "patience"), [("bisect", 60.0), ("statemix.benchmark.gpu.peers", 0.0)], ids=["ended", "not ready"]
    )
    def test_a_process_that_does_not_answer_is_an_error(self, module, patience):
        with Peers(module, ["Mamba2"]) as peers:
            peers.prepare([(1, 4)], patience)
            with pytest.raises(RuntimeError, match=r"^bench: the process of fla's Mamba2 gave no answer in"):
                peers.measure("Mamba2", 1, 4)


TIMES = {"forward": 0.0011, "backward": 0.0024, "forward_with_host": 0.003, "backward_with_host": 0.004}
SCAN = {"part": "scan", "kind": "block", "dtype": "float32"}
LAYER = {"part": "layer", "parameters": 7, "forward": 0.001}
FOUND = [
    {"part": "copy", "name": "copy", "bytes_per_second": 4e12},
    SCAN | {"name": "block M 4", "order": 4, "error": 1e-7, "bytes": [4e9, 8e9]} | TIMES,
    SCAN | {"name": "block M 8", "order": 8, "error": 0.5, "bytes": [1, 2], "wrong": "relative error 0.5"},
    LAYER | {"name": "paper-bd4, T 2048", "forward_backward": 0.003},
    LAYER | {"name": "products of paper-bd4, T 2048", "forward_backward": 0.002},
    {"part": "layer", "name": "fla GLA, T 2048", "unavailable": "not here"},
    {"part": "step", "name": "paper-bd4", "parameters": 211, "seconds": 0.5, "tokens_per_second": 65536.0},
]


class TestResults:
    def test_the_tables_say_what_was_measured(self):
        scans, layers, steps = results.tables(FOUND, "a card")
        cells = [list(column.cells) for column in scans.columns]
        assert cells[2:6] == [["1.100", "WRONG"], ["1.10", ""], ["2.400", ""], ["1.20", ""]]
        assert scans.caption == "a card, copy 4.00 TB/s"
        assert list(layers.columns[4].cells) == ["1.50", "", ""]
        assert list(layers.columns[1].cells) == ["7", "7", "not here"]
        assert list(steps.columns[3].cells) == ["65,536"]

    def test_a_table_of_what_there_is(self):
        assert [drawn.title for drawn in results.tables(FOUND[-1:], "a card")] == ["training steps, B 16, T 2048"]

    def test_the_roofline_is_a_picture(self):
        assert results.roofline(FOUND, "a card").startswith(b"\x89PNG")


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"orders": "0"}, r"`orders` must be M or M-M of 1 to 16, got '0'"),
            ({"orders": "5-4"}, r"`orders` must be M or M-M of 1 to 16, got '5-4'"),
            ({"kinds": "blocks"}, r"`kinds` must be one of"),
            ({"dtypes": "float64"}, r"`dtypes` must be one of"),
            ({"architectures": "75"}, r"`architectures` must be one of"),
            ({"normalizations": "max"}, r"`normalizations` must be one of"),
            ({"jobs": 0}, r"`jobs` must be"),
            ({"budget": 0.0}, r"`budget` must be above 0 and finite, got 0.0"),
            ({"check": True, "host": True}, r"`check` and `host` are two commands"),
        ],
    )
    def test_a_wrong_option_is_refused(self, options, message):
        with pytest.raises(ValueError, match=rf"^bench: {message}"):
            GpuBenchmark(**options).run(print)

    def test_without_a_card_it_says_what_can_be_done(self, monkeypatch, capsys):
        monkeypatch.setattr(compile, "EMULATED", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["bench", "gpu"]) == 1
        assert "torch finds none here. `--check` and `--host` need no GPU." in capsys.readouterr().err

    def test_a_run_writes_what_it_measured(self, tmp_path, monkeypatch):
        def of(record):
            return card.Measurement(record["part"], record["name"], lambda: dict(record))

        wanted = [of(record) for record in FOUND if "wrong" not in record]
        peers = mock.Mock(prepare=mock.Mock(return_value=3.0))
        monkeypatch.setattr(card, "measurements", lambda on, peers: wanted)
        records, picture, shown = Records(tmp_path / "a.jsonl"), tmp_path / "a.png", []
        files = GpuBenchmark()._measure(NoCard(), records, peers, picture, shown.append)
        peers.prepare.assert_called_once_with([(16, 2048), (4, 8192)])
        GpuBenchmark()._measure(NoCard(), records, peers, picture, shown.append)
        peers.prepare.assert_called_once()  # nothing of them was missing
        assert files == [records.path, picture]
        assert picture.exists()
        assert len(records) == len(wanted)
        assert "no card" in shown[0]
        monkeypatch.setattr(card, "measurements", lambda on, peers: [of(record) for record in FOUND])
        with pytest.raises(RuntimeError, match=r"^bench: 1 scans have wrong values: block M 8: relative error 0\.5\."):
            GpuBenchmark()._measure(NoCard(), records, peers, picture, shown.append)
