"""The GPU kernels compiled for GPUs that are not there: no spills, the least bytes, loads ahead, and the model's table.

What runs here is the essential part; `python tests/gpu_resources.py` reads every shipped configuration on every target.
"""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import gpu_resources
import pytest
from gpu_resources import BARRIER, COSTS, FILE, LATENCY, instructions, lone_cycles, ptx_loop

from statemix.scan.gpu_model import Configuration, Scan

pytest.importorskip("triton", reason="triton is not installed: pip install statemix[gpu]")

WRITTEN_WITH = "3.7.1"  # of triton; gpu_costs.csv has what its compiler made
NAMES = ("kind", "direction", "dtype", "order", *(field.name for field in dataclasses.fields(Configuration)))
SM_90 = [  # options of gpu_resources.py
    "--kinds block --orders 4 --dtypes float32 bfloat16",
    "--kinds block --orders 2 --dtypes float32 --directions backward",
    "--kinds companion --orders 4 --dtypes float32 --directions backward",
]
ELSEWHERE = "--kinds block --orders 2 --dtypes float32 --directions forward --targets"


def read(options: str) -> list[dict]:
    """The rows of gpu_resources.py, which must not see the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_resources.py")), *options.split()]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for options in SM_90 for row in read(f"{options} --targets cuda:90")]


def of_scans(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows of one scan in one configuration together."""
    scans = defaultdict(list)
    for row in rows:
        scans[tuple(row[name] for name in NAMES)].append(row)
    return scans


def test_every_scan_that_was_asked_for_is_there(rows):
    asked = {
        ("block", direction, dtype, 4) for direction in ("forward", "backward") for dtype in ("float32", "bfloat16")
    }
    asked |= {("block", "backward", "float32", 2), ("companion", "backward", "float32", 4)}
    assert {key[:4] for key in of_scans(rows)} == asked
    assert {row["kernel"] for row in rows} >= {"block_forward", "block_backward", "tile_backward", "lagged_backward"}


def test_nothing_spills(rows):
    assert [row for row in rows if row["spills"]] == []


def test_the_inner_loop_moves_the_least_bytes(rows):
    """Read once and written once, in chunks at most twice.

    Two things come on top, and are not hidden: in bfloat16 what rounding left of the states, written and read beside
    them; and one state more in the backward of the companion, which reads both ends of its lags.
    """
    for key, kernels in of_scans(rows).items():
        kind, direction, dtype, order = key[:4]
        size, states = (4 if dtype == "float32" else 2), (1 if kind == "companion" else order)
        least = Scan(kind, direction, order, dtype, 1, 1, 1).least_bytes
        more = (0 if dtype == "float32" else states * size) + (size if key[:2] == ("companion", "backward") else 0)
        moved = sum(row["bytes"] for row in kernels if row["per"] == "step")
        in_chunks = key[NAMES.index("chunk_size")]
        assert moved <= 2 * least + more if in_chunks else moved == least + more, key


def test_loads_are_on_their_way_before_they_are_needed(rows):
    """With more than one stage a step does not wait a whole latency of memory; with one it does."""
    for row in rows:
        if row["per"] == "step":
            assert (row["waiting"] < LATENCY["LDG"]) == (row["num_stages"] > 1), row


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_elsewhere(target):
    found = read(f"{ELSEWHERE} {target}")
    assert found
    assert [row for row in found if row["spills"]] == []
    assert all(row["ratio"] == 1 for row in found if "ratio" in row and not row["chunk_size"])


def test_the_table_of_the_model_is_that_of_the_code(rows):
    import triton

    if triton.__version__ != WRITTEN_WITH:
        pytest.skip(f"gpu_costs.csv was written with triton {WRITTEN_WITH}, here is {triton.__version__}")
    with FILE.open(newline="") as file:
        written = {tuple(row[name] for name in (*NAMES, "kernel")): row for row in csv.DictReader(file)}
    for row in rows:
        kept = written[tuple(str(row[name]) for name in (*NAMES, "kernel"))]
        for name in COSTS[1:]:
            assert (
                float(kept[name]) == pytest.approx(row[name], abs=0.051) if name != "per" else kept[name] == row[name]
            )


def test_the_table_keeps_what_was_not_read_and_drops_what_spills(tmp_path, monkeypatch):
    scan = {"kind": "block", "direction": "forward", "dtype": "float32"}
    code = dict.fromkeys(COSTS, 1) | {"kernel": "it", "per": "step", "target": "cuda:90", "spills": 0, "cycles": 2.25}

    def row(order: int, num_stages: int, **changes) -> dict:
        configuration = dataclasses.asdict(Configuration(32, 1, num_stages))
        return {**scan, "order": order, **configuration, **code, **changes}

    monkeypatch.setattr(gpu_resources, "FILE", tmp_path / "costs.csv")
    gpu_resources.FILE.write_text(",".join((*NAMES, *COSTS)) + "\n")
    gpu_resources.write([row(4, 2), row(2, 2), row(1, 7)])
    elsewhere = {"target": "cuda:80", "cycles": 9}
    again = [row(4, 3, cycles=3.75), row(4, 5), row(4, 5, spills=8, **elsewhere), row(2, 4), row(2, 4, **elsewhere)]
    too_large = {"shared": 100 << 10}  # for an MI300X, where it may spill then
    again += [row(4, 6, **too_large), row(4, 6, target="hip:gfx942", spills=8)]
    gpu_resources.write(again)
    with gpu_resources.FILE.open(newline="") as file:
        kept = [(int(row["order"]), int(row["num_stages"]), float(row["cycles"])) for row in csv.DictReader(file)]
    assert kept == [(1, 7, 2.2), (2, 4, 2.2), (4, 3, 3.8), (4, 6, 2.2)]


def test_what_no_card_of_a_target_holds_is_not_shipped_there():
    tile = Configuration(32, 8, 3, tile=128)
    scan = ("block", "backward", "bfloat16", 1)
    assert gpu_resources.shipped(*scan, configuration=tile, target="cuda:90")
    assert not gpu_resources.shipped(*scan, configuration=tile, target="hip:gfx942")  # 112 KiB, an MI300X has 64
    assert gpu_resources.shipped(*scan, configuration=Configuration(32, 1, 7, 64), target="hip:gfx942")
    assert not gpu_resources.shipped(*scan, configuration=Configuration(64, 1, 7), target="cuda:90")


PTX = """
$L__BB0_1:
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@!%p1 ld.global.L1::evict_last.b16 { %rs1 }, [ %rd1 + 16 ];
	cp.async.ca.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 0x8, %r10;
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 16, %r10;
	st.shared.b32 [ %r9 ], %r1;
	@%p2 st.global.v2.b32 [ %rd3 + 0 ], { %r5, %r6 };
	@%p3 bra $L__BB0_1;
$L__tail:
	ld.global.b32 %r1, [ %rd1 ];
	bra $L__tail;
"""


def test_bytes_are_counted_in_the_longest_loop():
    assert ptx_loop(PTX) == {"loaded": 16 + 2 + 8 + 16, "stored": 8, "accesses": 5, "copies": 2}


def control(stall: int, result: int = 7, operands: int = 7, waited: int = 0) -> int:
    return stall | result << 5 | operands << 8 | waited << 11


def test_cycles_by_hand():
    add = ("FADD", "FADD R1, R1, R2", control(4))
    assert lone_cycles([add]) == 4
    load = ("LDS", "LDS R2, [R3]", control(1, result=0))
    assert lone_cycles([load, ("FADD", "FADD R1, R1, R2", control(4, waited=1))]) == LATENCY["LDS"] + 4
    assert lone_cycles([load, add]) == 5  # nobody waits
    store = ("STG", "STG [R3], R1", control(2, operands=1))
    assert lone_cycles([store, ("FADD", "FADD R1, R1, R2", control(4, waited=2))]) == 12 + 4
    assert lone_cycles([("MUFU", "MUFU.EX2 R1, R2", control(1))]) == 8  # the unit takes one in 8 cycles
    assert lone_cycles([("BAR", "BAR.SYNC 0x0", control(1))]) == BARRIER + 1


@pytest.mark.parametrize(("newest", "cycles"), [(0, 720 + 1), (1, 360 + 1)])
def test_copies_of_earlier_iterations_are_waited_for(newest, cycles):
    """With one group left in flight, two iterations share a latency."""
    loop = [
        ("LDGSTS", "LDGSTS.E [R1], [R2]", control(0)),
        ("LDGDEPBAR", "LDGDEPBAR", control(0, result=0)),
        ("DEPBAR", f"DEPBAR.LE SB0, 0x{newest} ;", control(0)),
    ]
    assert lone_cycles(loop) == pytest.approx(cycles, abs=2)


def test_instructions_are_those_of_the_loop():
    code = """
        /*0000*/                   S2R R0, SR_TID.X ;             /* 0x0000000000007919 */
                                                                  /* 0x000e220000002100 */
.L_x_1:
        /*0010*/              @!P0 LDG.E R6, desc[UR4][R2.64] ;   /* 0x0000000402067981 */
                                                                  /* 0x000ea8000c1e1900 */
        /*0020*/               @P0 BRA `(.L_x_1) ;                /* 0xfffffffc00940947 */
                                                                  /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                         /* 0x000000000000794d */
                                                                  /* 0x000fea0003800000 */
"""
    (load, text, control_of_load), (branch, _, control_of_branch) = instructions(code)
    assert (load, branch) == ("LDG", "BRA")
    assert text.startswith("LDG.E R6, desc")
    assert control_of_load & 15 == 4  # 0x000ea8: stall 4, scoreboard 2
    assert control_of_load >> 5 & 7 == 2
    assert control_of_branch & 15 == 5
