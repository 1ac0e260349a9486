"""The layers of flash-linear-attention, measured by a process of their own: to import them takes a minute.

The process imports while others are measured, and touches the card when it is asked: a line of JSON for each layer, and
a line of JSON as the answer.
"""

import json
import select
import subprocess
import sys
import warnings
from typing import Any

PEERS = ("GatedLinearAttention", "Mamba2", "DeltaNet", "GatedDeltaNet", "HGRN2", "RWKV7Attention")
PARAMETERS = 6_500_000  # of the paper's mixers at D 768
WIDTHS = range(256, 2304, 256)  # that their heads divide
PATIENCE = 120.0  # seconds for an answer; the first one waits for the import


class Peers:
    """The process. As a context: it ends with the block."""

    def __init__(self, module: str = "statemix.benchmark.gpu.peers") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def measure(self, name: str, batch: int, length: int, d_model: int) -> dict[str, Any]:
        """As `card.measure_layer`, or "unavailable" with the reason.

        Raises:
            RuntimeError: the process has ended, or takes too long.
        """
        to, of = self._process.stdin, self._process.stdout
        assert to is not None
        assert of is not None
        try:
            to.write(json.dumps({"name": name, "batch": batch, "length": length, "d_model": d_model}) + "\n")
            to.flush()
            ready, _, _ = select.select([of], [], [], PATIENCE)
        except OSError:
            ready = [of]
        answer = of.readline() if ready else ""
        if not answer:
            raise RuntimeError(f"bench: the process of fla's layers gave no answer in {PATIENCE:.0f} s, or has ended.")
        result: dict[str, Any] = json.loads(answer)
        return result


def serve() -> None:
    """Answer until the input ends."""
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
                result = _measured(getattr(fla.layers, asked["name"]), asked)
            except Exception as error:  # one that refuses this card or this triton must not stop the others
                result = {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        else:
            result = {"unavailable": problem}
        answers.write(f"{json.dumps(result)}\n")
        answers.flush()


def _measured(layer: type, asked: dict[str, Any]) -> dict[str, Any]:
    """At the width that comes nearest to as many parameters as ours; fla's layers have no other common knob."""
    import torch

    from statemix.benchmark.gpu.card import Card, measure_layer

    def build(width: int) -> torch.nn.Module:
        return layer(hidden_size=width, layer_idx=0)

    def parameters(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(width).parameters())

    width = min(WIDTHS, key=lambda width: abs(parameters(width) - PARAMETERS))
    result = measure_layer(Card(), lambda: build(width), asked["batch"], asked["length"], width)
    return {**result, "d_model": width}


if __name__ == "__main__":
    serve()
