"""How exact the states of a long float32 scan are, by engine and normalisation: docs/precision.md.

    python experiments/precision.py                  # some minutes; prints the table of the page
    python experiments/precision.py --backends cpu --lengths 65536

Each row of gates holds one weight of 1 - d, so that what is in the state stays there: the hardest case, which drawn
gates never show. The gates are the same at every step ("constant") or near each other ("drawn"). The error is the
largest difference from the float64 kernels on the same float32 gates, over the largest state.
"""

import argparse
import math

import torch
from torch import Tensor

from statemix.report.tables import align
from statemix.scan import scan_to_state

ORDER, BLOCKS = 2, 4
DISTANCES = {65_536: 1e-4, 1_000_000: 1e-6}  # d, by T
NORMALIZATIONS = ("softmax", "sigmoid", "tanh", "silu", "linear", "none")


def raw_gates(kind: str, normalization: str, length: int, distance: float, constant: bool) -> Tensor:
    """Raw gates (1, T, [M,] M+1, N), float32, whose first weight in a row is 1 - d, near enough."""
    rows = (ORDER,) if kind == "block" else ()
    shape = (1, 1 if constant else length, *rows, ORDER + 1, BLOCKS)
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = distance / ORDER
    peak, rest = {
        "softmax": (0.0, math.log(small) + normal / 2),
        "sigmoid": (5.0, math.log(small) + normal / 2),
        "tanh": (3.0, small * normal),
        "silu": (5.0, 10 * small * normal),
        "linear": (3.0, 3 * small * normal),
        "none": (1 - distance, small * normal),
    }[normalization]
    first = torch.arange(ORDER + 1)[:, None] == 0
    return torch.where(first, peak, rest).float().expand(1, length, *shape[2:]).contiguous()


def error(backend: str, kind: str, normalization: str, length: int, constant: bool) -> float:
    """The relative error of the states of one scan."""
    generator = torch.Generator().manual_seed(1)
    gates = raw_gates(kind, normalization, length, DISTANCES[length], constant)
    rows = (ORDER,) if kind == "block" else ()
    values = torch.randn(1, length, *rows, BLOCKS, generator=generator)
    start = torch.randn(1, ORDER, BLOCKS, generator=generator)
    wide = gates.double(), values.double(), start.double()
    exact, _ = scan_to_state(kind, *wide, normalization=normalization, backend="cpu")
    states, _ = scan_to_state(kind, gates, values, start, normalization=normalization, backend=backend)
    return ((states.double() - exact).abs().max() / exact.abs().max()).item()


def main() -> None:
    """Print a row for each engine, length and kind of gates: the largest error of the three scans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["cpu", "associative"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(DISTANCES), choices=list(DISTANCES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = [["engine", "T", "weight", "gates", *NORMALIZATIONS]]
    for backend in arguments.backends:
        for length in arguments.lengths:
            for constant in (False, True):
                cells = [backend, f"{length:,}", f"1 - {DISTANCES[length]:g}", "constant" if constant else "drawn"]
                for normalization in NORMALIZATIONS:
                    kinds = ("block", "companion", "observer")
                    worst = max(error(backend, kind, normalization, length, constant) for kind in kinds)
                    cells.append(f"{worst:.1e}")
                table.append(cells)
                print(*cells, flush=True)
    print(align(table, markdown=True))


if __name__ == "__main__":
    main()
