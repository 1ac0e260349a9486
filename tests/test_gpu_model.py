"""scan/gpu_model.py: bytes, occupancy, prediction and choice against numbers made by hand, and what it promises."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_problem

from statemix.cli import main
from statemix.scan import gpu_model
from statemix.scan.gpu_model import CARDS, CONFIGURATIONS, Card, Configuration, Cost, Scan, card_of, choose, predict

KINDS, DIRECTIONS, DTYPES = ("block", "companion", "observer"), ("forward", "backward"), ("float32", "bfloat16")
LANES = Configuration(32, 2, 3)
CHUNKS = replace(LANES, chunk_size=10)
CARD = Card("small", "cuda:90", multiprocessors=2, bandwidth=1e9, clock=1e6, shared=64 << 10)
SCAN = Scan("block", "forward", 2, "float32", batch=1, length=100, blocks=64)  # 2 tiles of 32 blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "order"), [*itertools.product(KINDS, (1, 3, 16))])
def test_the_least_bytes_are_those_of_the_tensors(generator, kind, order, dtype):
    problem = make_problem(generator, kind, "softmax", order=order, length=5, blocks=7, dtype=getattr(torch, dtype))
    forward = sum(x.nbytes for x in (problem.raw_gates, problem.values, problem.cotangent))
    scan = Scan(kind, "forward", order, dtype, 2, 5, 7)
    assert scan.least_bytes * 2 * 5 * 7 == forward
    assert replace(scan, direction="backward").least_bytes == 2 * scan.least_bytes


def test_the_floor_by_hand():
    """M 4: 20 raw gates, 4 values, 4 states of 4 bytes; 112 B x 8 x 512 x 4096 over 3.35 TB/s."""
    scan = Scan("block", "forward", 4, "float32", 8, 4096, 512)
    assert scan.least_bytes == 112
    assert scan.floor(CARDS["H100"]) == pytest.approx(560.9e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "programs"),
    [
        (32, 0, 4, 16),  # all 64 warps
        (33, 0, 4, 12),  # 40 registers a thread: 12 warps in each quarter of 16384
        (64, 0, 8, 4),
        (255, 0, 1, 8),
        (19, 0, 1, 32),  # no more programs than that
        (32, 100 << 10, 1, 2),
        (32, 227 << 10, 1, 1),
    ],
)
def test_resident_programs(registers, shared, num_warps, programs):
    """As NVIDIA's occupancy calculator has it for compute capability 9.0."""
    assert gpu_model.resident(CARDS["H100"], registers, shared, num_warps) == programs


@pytest.fixture
def table(monkeypatch):
    """The costs of two configurations, in place of the file."""
    step = Cost("it", "step", registers=40, shared=0, bytes=50, instructions=10, special=1, cycles=30)
    kernels = {
        LANES: (step,),
        CHUNKS: (replace(step, kernel="summary", bytes=30), replace(step, per="chunk", cycles=400, bytes=24), step),
    }
    monkeypatch.setattr(gpu_model, "costs", lambda: {("block", "forward", "float32", 3): kernels})
    monkeypatch.setattr(gpu_model, "CONFIGURATIONS", tuple(kernels))
    monkeypatch.setattr(gpu_model, "LAUNCH", 1e-6)
    choose.cache_clear()
    yield kernels
    choose.cache_clear()


def test_one_program_after_another_is_bound_by_latency(table):
    """1 ms of 30 cycles in 100 steps; 100 x 64 x 50 bytes; one program of 2 warps a multiprocessor: 10 a step."""
    prediction = predict(SCAN, LANES, CARD)
    assert prediction.latency == pytest.approx(100 * 30 / 1e6)
    assert prediction.memory == pytest.approx(100 * 64 * 50 / 1e9)
    assert prediction.issue == pytest.approx(100 * 10 / 1e6)
    assert (prediction.seconds, prediction.bound) == (prediction.latency, "latency")
    assert prediction.occupancy == 24 / 64 * 2  # 40 registers: 12 warps a quarter, 48 in all, of 64


def test_many_sequences_are_bound_by_the_schedulers(table):
    """400 tiles are 200 programs a multiprocessor, 24 at a time, 9 times; 100 warps a scheduler, 10 cycles each."""
    prediction = predict(replace(SCAN, batch=200), LANES, CARD)
    assert prediction.latency == pytest.approx(9 * 100 * 30 / 1e6)
    assert prediction.issue == pytest.approx(100 * 100 * 10 / 1e6)
    assert prediction.bound == "issue"
    busier = predict(replace(SCAN, batch=200), LANES, replace(CARD, issue=4))
    assert busier.issue == pytest.approx(4 * prediction.issue)


def test_exponentials_bind_where_there_are_many(table):
    table[LANES] = (replace(table[LANES][0], special=5),)
    assert predict(SCAN, LANES, CARD).issue == pytest.approx(100 * 40 / 1e6)  # 5 of 8 cycles, above 10 instructions


def test_chunks_take_three_kernels(table):
    """10 chunks x 2 tiles are 10 programs a multiprocessor, all at once; the relay goes over 10 chunks."""
    prediction = predict(SCAN, CHUNKS, CARD)
    assert prediction.latency == pytest.approx((10 * 30 + 10 * 400 + 10 * 30) / 1e6)
    assert prediction.memory == pytest.approx((100 * 30 + 10 * 24 + 100 * 50) * 64 / 1e9)
    steps = 5 * 10 * 10 / 1e6  # 20 warps for 4 schedulers
    assert prediction.issue == pytest.approx(2 * steps + 10 * 10 / 1e6)
    assert prediction.seconds == pytest.approx(2 * steps + 10 * 400 / 1e6)


def test_half_a_sector_costs_a_whole_one(table):
    """4 float32 side by side are 16 of the 32 bytes that memory moves."""
    narrow = replace(LANES, block_n=4)
    table[narrow] = table[LANES]
    assert predict(SCAN, narrow, CARD).memory == pytest.approx(2 * predict(SCAN, LANES, CARD).memory)


def test_no_kernel_is_faster_than_its_launch(table):
    scan, fast = replace(SCAN, length=1, blocks=1), replace(CARD, clock=1e12, bandwidth=1e15)
    assert predict(scan, LANES, fast).seconds == 1e-6
    assert predict(scan, CHUNKS, fast).seconds == pytest.approx(3e-6)


def test_the_choice_is_the_least_prediction(table):
    assert choose(SCAN, CARD) == LANES  # 3 ms against 5
    relay = table[CHUNKS]
    table[CHUNKS] = (relay[0], replace(relay[1], cycles=10), relay[2])
    choose.cache_clear()
    assert choose(SCAN, CARD) == CHUNKS  # 1.1 ms


def test_among_equals_the_choice_has_most_to_spare(table, monkeypatch):
    slow = replace(LANES, num_stages=1)
    table[slow] = (replace(table[LANES][0], cycles=31),)
    monkeypatch.setattr(gpu_model, "CONFIGURATIONS", (slow, LANES))
    card = replace(CARD, bandwidth=1e6)
    assert predict(SCAN, slow, card).seconds == predict(SCAN, LANES, card).seconds
    assert choose(SCAN, card) == LANES


def test_what_a_card_cannot_hold_is_not_taken(table):
    """100 KiB of a program are more than the card's 64."""
    assert gpu_model.fits(SCAN, LANES, CARD)
    table[LANES] = (replace(table[LANES][0], shared=100 << 10),)
    assert not gpu_model.fits(SCAN, LANES, CARD)
    assert gpu_model.fits(SCAN, LANES, replace(CARD, shared=101 << 10))
    assert choose(SCAN, CARD) == CHUNKS


def test_an_order_goes_by_the_next_whose_code_was_read(table):
    assert predict(replace(SCAN, order=1), LANES, CARD) == predict(replace(SCAN, order=3), LANES, CARD)
    with pytest.raises(ValueError, match=r"choose: no configuration of the GPU kernels serves Scan\(.*order=4"):
        choose(replace(SCAN, order=4), CARD)


def test_what_was_read_for_a_higher_order_alone_is_not_taken(table, monkeypatch):
    """It may read lines of memory that a lower one leaves half used, or spill elsewhere."""
    scan = "block", "forward", "float32"
    known = {(*scan, 2): {LANES: table[LANES]}, (*scan, 3): table}
    monkeypatch.setattr(gpu_model, "costs", lambda: known)
    assert gpu_model.fits(replace(SCAN, order=3), CHUNKS, CARD)
    assert not gpu_model.fits(SCAN, CHUNKS, CARD)
    assert choose(SCAN, CARD) == LANES


def test_cards():
    properties = SimpleNamespace(
        **{"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132, "major": 9, "minor": 0},
        **{"memory_clock_rate": 2_619_000, "memory_bus_width": 5120, "clock_rate": 1_980_000},
        shared_memory_per_multiprocessor=233472,
    )
    assert card_of(properties) is CARDS["H100"]
    properties.name, properties.multi_processor_count = "NVIDIA H200", 131
    card = card_of(properties)
    assert (card.name, card.target, card.multiprocessors, card.shared) == ("NVIDIA H200", "cuda:90", 131, 228 << 10)
    assert card.bandwidth == pytest.approx(3.352e12, rel=1e-3)
    assert card.clock == 1.98e9


def test_every_scan_has_a_configuration():
    for kind, direction, dtype, order in itertools.product(KINDS, DIRECTIONS, DTYPES, range(1, 17)):
        scan = Scan(kind, direction, order, dtype, 2, 100, 10)
        assert choose(scan, CARDS["A100"]) in CONFIGURATIONS


def test_every_configuration_is_some_scans_choice():
    """The table is short: what is never taken is not in it."""
    shapes = ((1, 4096, 512), (8, 4096, 512), (64, 4096, 512), (1, 1024, 64), (1, 1 << 18, 64), (1, 1 << 18, 512))
    taken = {
        choose(Scan(kind, direction, order, dtype, *shape), card)
        for kind, direction, order, dtype in itertools.product(KINDS, DIRECTIONS, (1, 2, 4, 8, 16), DTYPES)
        for shape, card in itertools.product(shapes, CARDS.values())
    }
    assert taken == set(CONFIGURATIONS)


@pytest.mark.parametrize(("order", "direction"), [*itertools.product((1, 2, 4, 8, 16), DIRECTIONS)])
def test_near_the_memory_bound_on_an_h100(order, direction):
    scan, card = Scan("block", direction, order, "float32", 8, 4096, 512), CARDS["H100"]
    configuration = choose(scan, card)
    assert configuration.chunk_size == 0
    assert predict(scan, configuration, card).seconds <= 1.3 * scan.floor(card)


def test_the_plan_is_printed_and_kept(tmp_path, capsys):
    arguments = f"bench gpu --plan --sizes 1x512,4x512 --gpu A100 --out {tmp_path / 'plan'}"
    assert main(arguments.split()) == 0
    text = capsys.readouterr().out
    assert "gpu, block scan, backward: M 4, N 512, B 8, T 4096, D 512, float32; least bytes 1.84 ms" in text
    assert "Predicted for A100 from compiled code; nothing was measured." in text
    results = json.loads(Path(tmp_path, "plan.json").read_text())["groups"]
    assert [(r["size"], r["shape"]["part"]) for r in results] == [
        *(("1x512", "forward"), ("1x512", "backward"), ("4x512", "forward"), ("4x512", "backward"))
    ]
    for result in results:
        (chosen,) = [row for row in result["contenders"] if row["chosen"]]
        assert chosen["seconds"] == min(row["seconds"] for row in result["contenders"])
        assert chosen["ratios"]["least bytes"][0] == pytest.approx(chosen["seconds"] / result["floor"])
    assert Path(tmp_path, "plan.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_the_benchmark_says_what_can_be_had(capsys):
    assert main(["bench", "gpu"]) == 1
    errors = capsys.readouterr().err
    assert re.search(r"gpu measures on a GPU, and torch finds none here\. `statemix bench gpu --plan`", errors)
