"""What the compiled GPU kernels cost: registers, spills, shared memory, bytes and cycles a step. No GPU is needed.

    python tests/gpu_resources.py --kinds block --orders 1 4 --dtypes float32 --targets cuda:90   # a line each
    python tests/gpu_resources.py                    # every shipped configuration, on every target that holds it
    python tests/gpu_resources.py --write            # the same of all configurations, into the model's table

Run without TRITON_INTERPRET. Registers are read from the cubin, spills from ptxas, bytes from the loop of the PTX.
The cycles of a step are those of one warp that has a scheduler to itself: the loop of the machine code is played
through in order, with the stalls and scoreboards that ptxas wrote into each instruction, until it repeats.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from statemix.scan import gpu_model
from statemix.scan.gpu_model import (
    CARDS,
    CHUNK_SIZES,
    CONFIGURATIONS,
    SECTOR,
    SPECIAL,
    WARPS,
    Configuration,
    Scan,
    resident,
)

# Cycles until a result is there. Shared memory 29 and global memory 480 on an H100 that does nothing else: Luo et al.
# 2024 (arXiv 2402.13499), table of latencies. Half as much again for memory that is busy, which is an assumption.
LATENCY = {"LDG": 720, "LDGSTS": 720, "LDS": 30, "LDSM": 33, "MUFU": 24, "SHFL": 24, "S2R": 24}
OTHER_LATENCY, READ_LATENCY = 20, 12  # of what else has no fixed latency; until the operands of a store are read
BARRIER = 20  # a barrier of all warps of a program

BLOCKS = 512  # N of what is compiled
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.bool: "i1", torch.uint8: "u8"}
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def compiled(launch: Any, target: str) -> Any:
    """The kernel of a launch, compiled for a target such as "cuda:90" or "hip:gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch = target.split(":")
    machine = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: machine))  # what kernels ask for
    signature: dict[str, str] = {}
    aligned = {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in launch.pointers:
            signature[name] = f"*{TRITON_TYPE[launch.pointers[name]]}"
            aligned[(i,)] = [["tt.divisibility", 16]]  # as torch allocates
        else:
            signature[name] = "i32"
            if name.endswith("_stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]  # as the launcher finds them where N is a multiple of 16
    source = ASTSource(launch.kernel, signature, launch.constants, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=machine, options=options)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    process = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return process.stdout + process.stderr


def cuda_resources(kernel: Any, arch: int) -> dict[str, Any]:
    """Of a kernel compiled for CUDA, per thread, and the loop of its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "-c", "-hex", str(cubin))
        name = re.findall(r"\.target (\w+)", kernel.asm["ptx"])[0]
        assembler = "ptxas-blackwell" if arch >= 100 else "ptxas"
        spills = 0  # where there is no memory for them; only else is the assembler worth asking, which may take minutes
        if any(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))):
            notes = _tool(assembler, "-v", f"--gpu-name={name}", str(ptx), "-o", os.devnull)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", notes)))
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return {
        **{"registers": registers, "spills": spills, "shared": kernel.metadata.shared, "code": code},
        **ptx_loop(kernel.asm["ptx"]),
    }


def amd_resources(kernel: Any) -> dict[str, Any]:
    """Of a kernel compiled for AMD: vector registers and what went to scratch memory."""
    code = kernel.asm["amdgcn"]
    fact = {name: int(value) for name, value in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", code)}
    spills = fact["vgpr_spill_count"] + fact["sgpr_spill_count"] + fact["private_segment_fixed_size"]
    return {"registers": fact["vgpr_count"], "spills": spills, "shared": kernel.metadata.shared}


def _loop(lines: list[str], label: str, branch: str) -> list[str]:
    """The longest stretch between a label and a later branch back to it: the loop over time."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(label, line))}
    backward = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := re.search(branch, line)) and labels.get(match[1], i) < i
    ]
    if not backward:
        return []
    begin, end = max(backward, key=lambda span: span[1] - span[0])
    return lines[begin + 1 : end + 1]


def ptx_loop(ptx: str) -> dict[str, int]:
    """Bytes that one thread loads and stores in an iteration of the loop over time, and whether it copies ahead."""
    loaded = stored = accesses = copies = 0
    for line in _loop(ptx.splitlines(), r"(\$L__\w+):", r"bra(?:\.uni)?\s+(\$L__\w+);"):
        if match := re.search(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b", line):
            size = int(match[2] or 1) * BYTES[match[3]]
            loaded += size if match[1] == "ld" else 0
            stored += size if match[1] == "st" else 0
        elif match := re.search(r"cp\.async\.c[ag]\.shared\.global .*?\],\s*(0x[0-9a-f]+|\d+)", line):
            loaded += int(match[1], 0)
            copies += 1
        else:
            continue
        accesses += 1
    return {"loaded": loaded, "stored": stored, "accesses": accesses, "copies": copies}


def instructions(code: str) -> list[tuple[str, str, int]]:
    """(operation, the whole text, control bits) of the instructions of the loop over time."""
    lines = [line for line in code.splitlines() if line.strip()]
    found = []
    loop = _loop(lines, r"(\.L_\w+):", r"BRA(?:\.\w+)*\s.*`\((\.L_\w+)\)")
    after = lines[lines.index(loop[-1]) + 1] if loop else ""
    for line, following in zip(loop, [*loop[1:], after], strict=True):
        if match := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*.*?);\s+/\* 0x", line):
            high = re.findall(r"/\* 0x([0-9a-f]{16}) \*/", following)[-1]  # the second half, on a line of its own
            found.append((match[1].split()[0].split(".")[0], match[1], int(high, 16) >> 41))
    return found


def lone_cycles(loop: list[tuple[str, str, int]], memory: int = LATENCY["LDG"]) -> float:
    """Cycles of an iteration in a warp that runs alone, once loads of earlier iterations are on their way.

    The control bits of an instruction: 4 of stall, 1 of yield, 3 that name the scoreboard of its result, 3 that of its
    operands, 6 of scoreboards that it waits for. Source: Jia et al. 2018 (arXiv 1804.06826), section 2.
    """
    now, ready, ends = 0.0, [0.0] * 6, []
    special_free = 0.0  # when the special-function unit takes the next one
    copied, groups = 0.0, []  # when the copies since the last group are there; and those of every group
    for _ in range(24):
        for operation, text, control in loop:
            stall, result, operands, waited = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            now = max([now, *(ready[i] for i in range(6) if waited >> i & 1)])
            if operation == "MUFU":
                now = max(now, special_free)
                special_free = now + SPECIAL
            latency = memory if operation in ("LDG", "LDGSTS") else LATENCY.get(operation, OTHER_LATENCY)
            if operation == "LDGSTS":
                copied = now + latency
            elif operation == "LDGDEPBAR":
                groups.append(copied)
            elif operation == "DEPBAR":
                newest = int(text.split(",")[1].strip(" ;{}"), 0)
                done = groups[: len(groups) - newest]
                now = max([now, *done[-1:]])
            elif operation == "BAR":
                now += BARRIER
            elif result < 6:
                ready[result] = max(ready[result], now + latency)
            if operands < 6:
                ready[operands] = max(ready[operands], now + READ_LATENCY)
            now += max(stall, 1)
        ends.append(now)
    return (ends[-1] - ends[7]) / (len(ends) - 8)


def resources(
    kind: str, direction: str, dtype: str, order: int, configuration: Configuration, target: str
) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a scan: what gpu_costs.csv keeps, and what the compile test holds."""
    from statemix.scan import gpu

    scan = Scan(kind, direction, order, dtype, 1, 1, BLOCKS)
    for launch in gpu.launches(kind, direction, order, getattr(torch, dtype), configuration, blocks=BLOCKS):
        kernel = compiled(launch, target)
        row = {
            **{"kind": kind, "direction": direction, "dtype": dtype, "order": order},
            **{"target": target, **dataclasses.asdict(configuration), "kernel": launch.kernel.__name__},
        }
        if target.startswith("hip"):
            yield row | amd_resources(kernel)
            continue
        found = cuda_resources(kernel, int(target.partition(":")[2]))
        code, loaded, stored, accesses = (found.pop(name) for name in ("code", "loaded", "stored", "accesses"))
        steps = launch.constants.get("STEPS", max(launch.constants.get("AHEAD", 0), 1))  # in an iteration of the loop
        lanes = 32 * launch.num_warps / launch.constants["BLOCK_N"]  # of a block; in lagged_summary all read the same
        each = (1 if launch.kernel.__name__ == "lagged_summary" else lanes) / steps
        row |= found | {"per": launch.per, "bytes": (loaded + stored) * each}
        row["ratio"] = row["bytes"] / scan.least_bytes
        card = next(card for card in CARDS.values() if card.target == target)
        at_once = resident(card, found["registers"], found["shared"], launch.num_warps)
        row["occupancy"] = at_once * launch.num_warps / WARPS
        if target == "cuda:90":  # whose control bits lone_cycles knows
            loop = instructions(code)
            again = sum(operation in ("LDG", "LDGSTS", "STG") for operation, _, _ in loop) / accesses
            steps *= again  # ptxas may have unrolled the loop
            row["instructions"] = len(loop) / steps
            row["special"] = sum(operation == "MUFU" for operation, _, _ in loop) / steps
            row["cycles"] = lone_cycles(loop) / steps
            row["waiting"] = row["cycles"] - lone_cycles(loop, memory=LATENCY["LDS"]) / steps  # for memory
        yield row


KINDS, DIRECTIONS, DTYPES = ("block", "companion", "observer"), ("forward", "backward"), ("float32", "bfloat16")
SCAN = ("kind", "direction", "dtype", "order")
COSTS = ("kernel", "per", "registers", "shared", "bytes", "instructions", "special", "cycles")  # of gpu_costs.csv
FILE = Path(gpu_model.__file__).with_name("gpu_costs.csv")


def worth_trying(kind: str, dtype: str, order: int, configuration: Configuration) -> bool:
    """Whether a warp reads whole sectors of memory, its lanes share out the rows, and 15 to 40 loads are on the way.

    Of a tile a lane takes few steps, because it keeps all of their maps.
    Above M 8 half a sector of bfloat16 has to do: with whole ones a lane has 8 rows, and they spill.
    """
    if configuration.tile:
        in_lane = configuration.tile * configuration.block_n / (32 * configuration.num_warps)
        sectors = configuration.block_n * (4 if dtype == "float32" else 2) / SECTOR
        whole = kind == "block" and not configuration.chunk_size
        return whole and sectors == 2 and order == (1 if in_lane > 4 else 2)
    if configuration.chunk_size and order > 8 and kind == "block":
        return False  # the map of a chunk takes more registers than there are
    lanes = 1 << (order - 1).bit_length() if kind == "block" else 1
    block_n = max(32 // lanes, 8 if dtype == "float32" or order > 8 else 16)
    rows = -(-order * block_n // 32) if kind == "block" else 1
    loads = rows * (order + 2) * (configuration.num_stages - 1)
    return configuration.block_n == block_n and (15 <= loads <= 40 or (configuration.num_stages == 2 and loads > 40))


def shipped(*scan: Any, configuration: Configuration, target: str) -> bool:
    """Whether the rule may take the configuration for a scan on a card of that target, if it is long enough."""
    kind, direction, dtype, order = scan
    if configuration.chunk_size:
        configuration = dataclasses.replace(configuration, chunk_size=CHUNK_SIZES[-1])
    endless = Scan(kind, direction, order, dtype, 1, 2 * CHUNK_SIZES[-1], BLOCKS)
    return any(gpu_model.fits(endless, configuration, card) for card in CARDS.values() if card.target == target)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of everything that was asked for; what the rule never takes on a target is left out there."""
    products = itertools.product(
        options.kinds, options.directions, options.dtypes, options.orders, CONFIGURATIONS, options.targets
    )
    for *scan, configuration, target in products:
        if configuration.chunk_size not in (0, CHUNK_SIZES[0]):
            continue  # the code is the same for all sizes of a chunk
        kind, _, dtype, order = scan
        if options.write:
            read = worth_trying(kind, dtype, order, configuration)
        else:
            read = shipped(*scan, configuration=configuration, target=target)
        if read:
            yield from resources(*scan, configuration, target)


def write(found: list[dict[str, Any]]) -> None:
    """Rewrite the model's table for the scans that were read: the costs on sm_90 of what spills nowhere.

    Nowhere where the rule may take it: what a card holds, it finds by the registers and shared memory of sm_90.
    """
    names = [*SCAN, *(field.name for field in dataclasses.fields(Configuration))]

    def scan_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["kind"], row["direction"], row["dtype"], int(row["order"])

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in names)

    def held(row: dict[str, Any]) -> bool:
        card = next(card for card in CARDS.values() if card.target == row["target"])
        kernels = [it for it in sm_90 if key(it) == key(row)]
        return all(resident(card, it["registers"], it["shared"], it["num_warps"]) for it in kernels)

    sm_90 = [row for row in found if row["target"] == "cuda:90"]
    read, spilling = set(map(scan_of, found)), {key(row) for row in found if row["spills"] and held(row)}
    with FILE.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if scan_of(row) not in read]
    for row in sm_90:
        if key(row) not in spilling:
            table.append({name: round(x, 1) if isinstance(x, float) else x for name, x in row.items()})
    order = list(itertools.product(KINDS, DIRECTIONS, DTYPES))
    table.sort(key=lambda row: (order.index(scan_of(row)[:3]), int(row["order"])))
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *COSTS], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    """Print a line of JSON for every kernel."""
    several = {"nargs": "+", "metavar": "X"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=KINDS, **several)
    parser.add_argument("--directions", default=DIRECTIONS, **several)
    parser.add_argument("--dtypes", default=DTYPES, **several)
    parser.add_argument("--orders", default=[1, 2, 4, 8, 16], type=int, **several)
    parser.add_argument("--targets", default=[card.target for card in CARDS.values()], **several)
    parser.add_argument("--write", action="store_true", help=f"rewrite what is read in {FILE.name}")
    options = parser.parse_args()
    found = []
    for row in rows(options):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        found.append(row)
    if options.write:
        write(found)


if __name__ == "__main__":
    main()
