"""What a layer's import costs: `from statemix import BDLRU` against `import torch`, in fresh processes, in turns.

    python experiments/import_time.py [ROUNDS]

Prints the medians in seconds of the processes' whole time, and their ratio, which is to be at most 1.2.
"""

import statistics
import subprocess
import sys
import time

STATEMENTS = ("import torch", "from statemix import BDLRU")


def seconds(statement: str) -> float:
    """The time of a fresh process that executes a statement."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    rounds = [[seconds(statement) for statement in STATEMENTS] for _ in range(int((sys.argv[1:] or ["7"])[0]))]
    torch_alone, with_layer = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"{STATEMENTS[0]}: {torch_alone:.2f} s; {STATEMENTS[1]}: {with_layer:.2f} s")
    print(f"ratio {with_layer / torch_alone:.2f}")
