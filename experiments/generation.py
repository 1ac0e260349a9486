"""A million tokens from one model: does the last come as fast as the first, and does the memory stay as it was?

    python experiments/generation.py RUN          RUN: a run of the task text; writes results/generation.csv in minutes

After every tenth, bursts of tokens from there and from the beginning of another text are timed in turns, so that what
else the machine does meets both; the ratio is of their medians.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from statemix.generate import load_text_model, stream
from statemix.report.tables import align
from statemix.runs.read import Row, write_table

TOKENS, PARTS, BURST, ROUNDS = 1_000_000, 10, 1000, 9
PROMPT = "the "


def main() -> None:
    """Write the tokens, time the bursts, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, tokenizer = load_text_model(arguments.run)
    prompts = [torch.from_numpy(tokenizer.encode(PROMPT))]
    text, rows, done = stream(model, prompts, TOKENS), [], 0
    for part in range(1, PARTS + 1):
        began = time.perf_counter()
        last = part * TOKENS // PARTS - ROUNDS * BURST  # the bursts are of the text, too
        take(text, last - done)
        whole = time.perf_counter() - began
        here, first = [], []
        for _ in range(ROUNDS):
            here.append(take(text, BURST))
            first.append(take(stream(model, prompts, BURST), BURST))
        rows.append(
            Row(
                tokens=last + ROUNDS * BURST,
                tokens_per_s=(last - done) / whole,
                microseconds=1e6 * median(here) / BURST,
                microseconds_at_first=1e6 * median(first) / BURST,
                ratio=median(here) / median(first),
                peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            )
        )
        done = last + ROUNDS * BURST
        print(f"{done:,} of {TOKENS:,} tokens, ratio {rows[-1]['ratio']:.3f}", flush=True)
    write_table(rows, arguments.out, "generation")
    print(align(table(rows), markdown=True))


def take(tokens: Iterator[list[int | None]], count: int) -> float:
    """Seconds for so many tokens."""
    began = time.perf_counter()
    if sum(1 for _ in itertools.islice(tokens, count)) < count:
        raise RuntimeError(f"generation: the text ended before {count} tokens.")
    return time.perf_counter() - began


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line per part."""
    head = ["tokens", "tokens/s", "us a token here", "us a token at first", "ratio", "peak memory, MiB"]
    cells = [[f"{row['tokens']:,.0f}", *(f"{row[key]:.0f}" for key in list(row)[1:4])] for row in rows]
    ends = [[f"{row['ratio']:.3f}", f"{row['peak_mib']:.0f}"] for row in rows]
    return [head, *([*cell, *end] for cell, end in zip(cells, ends, strict=True))]


if __name__ == "__main__":
    main()
