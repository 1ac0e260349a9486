"""statemix generate: what follows a prompt."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from statemix.generate import load_text_model, stream_text


@dataclasses.dataclass(frozen=True)
class Generate:
    """Write what follows a prompt, as it comes; how fast, at the end, to stderr.

    Args:
        checkpoint: folder of a run of the task text, then its best checkpoint, or of one of its checkpoints.
        prompt: the text to go on from; given several times, one after the other, with the seeds `seed`, `seed` + 1, ...
        max_new_tokens: tokens that follow each prompt.
        temperature: what the logits are divided by; 0: always the likeliest token.
        top_k: only so many of the likeliest tokens are drawn from. None: all.
        top_p: only the likeliest tokens that together have this probability are drawn from. None: all.
        seed: of the draws.
        stop: a text before which it ends, may be given several times.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    max_new_tokens: int = 500
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


def run(arguments: list[str]) -> None:
    """Print prompts and what follows them, as it comes."""
    given = tyro.cli(Generate, args=arguments, prog="statemix generate")
    model, tokenizer = load_text_model(given.checkpoint)
    if not given.prompt:
        raise ValueError("generate: `--prompt` must be given, with a text to go on from.")
    options = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "stop")}
    texts = [
        stream_text(model, tokenizer, prompt, given.max_new_tokens, seed=given.seed + row, **options)
        for row, prompt in enumerate(given.prompt)
    ]
    count, began = 0, time.perf_counter()
    for row, (prompt, text) in enumerate(zip(given.prompt, texts, strict=True)):
        print("\n" if row else "", prompt, sep="", end="", flush=True)
        for piece in text:
            print(piece, end="", flush=True)
            count += 1
        print()
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)
