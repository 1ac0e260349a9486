"""The layers of flash-linear-attention, each measured by a process of its own: to import and compile takes minutes.

A process imports, compiles when it is told the shapes, and touches the card again when it is asked for a measurement: a
line of JSON for each, and a line of JSON as the answer.
"""

import json
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

PEERS = ("GatedLinearAttention", "Mamba2", "DeltaNet", "GatedDeltaNet", "HGRN2", "RWKV7Attention")
PARAMETERS = 6_500_000  # of the paper's mixers at D 768
WIDTHS = range(256, 2304, 256)  # that their heads divide
PATIENCE = 120.0  # seconds for an answer
ROUNDS = 7  # whose median counts


class Peers:
    """The processes, all at work from the first `prepare` on. As a context: they end with the block."""

    def __init__(self, module: str = "statemix.benchmark.gpu.peers", names: Iterable[str] = PEERS) -> None:
        self._module, self._names = module, tuple(names)
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._ready: set[str] = set()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()

    def prepare(self, shapes: Iterable[tuple[int, int]], patience: float = PATIENCE) -> float:
        """Have all of them compiled for some (B, T), side by side, before anything is timed. Returns the seconds."""
        began, wanted = time.monotonic(), list(shapes)
        for name in self._names:
            command = [sys.executable, "-m", self._module, name]
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        asked = [name for name in self._names if self._ask(name, prepare=wanted)]
        self._ready = {name for name in asked if self._answer(name, began + patience - time.monotonic())}
        return time.monotonic() - began

    def measure(self, name: str, batch: int, length: int) -> dict[str, Any]:
        """As `card.measure_layer`, or "unavailable" with the reason.

        Raises:
            RuntimeError: the process has ended, or takes too long.
        """
        asked = name in self._ready and self._ask(name, measure=(batch, length))
        answer = self._answer(name, PATIENCE) if asked else ""
        if not answer:
            self._ready.discard(name)  # what it says later would be taken for another answer
            raise RuntimeError(f"bench: the process of fla's {name} gave no answer in {PATIENCE:.0f} s, or has ended.")
        result: dict[str, Any] = json.loads(answer)
        return result

    def _ask(self, name: str, **what: object) -> bool:
        """Whether the process takes it."""
        to = self._processes[name].stdin
        assert to is not None
        try:
            to.write(json.dumps(what) + "\n")
            to.flush()
        except OSError:
            return False
        return True

    def _answer(self, name: str, patience: float) -> str:
        """A line; empty if the process has ended or takes too long."""
        of = self._processes[name].stdout
        assert of is not None
        ready, _, _ = select.select([of], [], [], max(patience, 0))
        return of.readline() if ready else ""


def serve(name: str) -> None:
    """Answer for a layer until the input ends."""
    problem = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import fla.layers
        except Exception as error:  # an import of many packages fails in many ways
            problem = f"fla cannot be imported: {type(error).__name__}: {error}"
    answers, sys.stdout = sys.stdout, sys.stderr  # what others print is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        if problem is None:
            try:
                layer = getattr(fla.layers, name)
                if "prepare" in asked:
                    for batch, length in asked["prepare"]:
                        _measured(layer, batch, length, 1)
                    result: dict[str, Any] = {"prepared": name}
                else:
                    batch, length = asked["measure"]
                    result = _measured(layer, batch, length, ROUNDS)
            except Exception as error:  # one that refuses this card or this triton must not stop the others
                result = {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        else:
            result = {"unavailable": problem}
        answers.write(f"{json.dumps(result)}\n")
        answers.flush()


def _measured(layer: type, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """At the width that comes nearest to as many parameters as ours; fla's layers have no other common knob."""
    import torch

    from statemix.benchmark.gpu.card import Card, measure_layer

    def build(width: int) -> torch.nn.Module:
        return layer(hidden_size=width, layer_idx=0)

    def parameters(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(width).parameters())

    width = min(WIDTHS, key=lambda width: abs(parameters(width) - PARAMETERS))
    result = measure_layer(Card(rounds), lambda: build(width), batch, length, width)
    return {**result, "d_model": width}


if __name__ == "__main__":
    serve(sys.argv[1])
