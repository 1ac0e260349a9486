"""One optimiser step of each of the paper's language models on a short batch: its time and its memory.

    python experiments/paper_step.py --length 256

Each model has a process of its own, for the peak of its memory: weights, gradients, AdamW's two moments, and what the
backward keeps. The first step is not timed: it allocates. "core s" is the time of the processor, on all threads: beside
other programs, "s" is longer.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import nn

from statemix.report.tables import align
from statemix.runs.presets import LANGUAGE, LANGUAGE_MIXERS, paper_model


def measure(preset: str, batch: int, length: int) -> list[str]:
    """A row of the table, of this process."""
    torch.manual_seed(0)
    model, setting = paper_model(preset), LANGUAGE.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.lr, betas=setting.betas, weight_decay=setting.weight_decay
    )
    tokens = torch.randint(model.config["vocab_size"], (batch, length + 1))
    seconds, busy, losses = [], [], []
    for _ in range(3):
        began, worked = time.perf_counter(), time.process_time()
        logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip or float("inf"))
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
        losses.append(loss.item())
    unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    outside = model.num_parameters() - 2 * model.embedding.weight.numel()
    sizes = [f"{outside:,}", f"{model.num_parameters():,}", f"{peak / 2**30:.2f}"]
    return [preset, *sizes, f"{min(seconds[1:]):.2f}", f"{min(busy[1:]):.2f}", f"{losses[0]:.3f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--only", choices=sorted(LANGUAGE_MIXERS), help="this model, in this process")
    given = parser.parse_args()
    if given.only:
        print("\t".join(measure(given.only, given.batch, given.length)))
        return
    rows = [["model", "besides embedding and head", "parameters", "peak GiB", "s", "core s", "first loss"]]
    for preset in LANGUAGE_MIXERS:
        options = ["--only", preset, "--batch", str(given.batch), "--length", str(given.length)]
        done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
        rows.append(done.stdout.strip().split("\t"))
    print(f"batch {given.batch}, length {given.length}, float32, {torch.get_num_threads()} threads")
    print(align(rows, markdown=True))


if __name__ == "__main__":
    main()
