"""Decoding: a prompt through the scan, chunk by chunk, then a step per token from a state of constant size.

Memory grows neither with the prompt nor with what is generated, and a token takes as long at any position. Each prompt
is read on its own and each row has random numbers of its own, so a row does not depend on the others of its batch.
"""

import codecs
import math
import reprlib
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statemix import records
from statemix.backbone import State
from statemix.decoder import Decoder, without_dropout
from statemix.gates import check_dense
from statemix.mixers.base import check_sizes
from statemix.model import MODEL, SequenceModel, load_model
from statemix.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from statemix.training.checkpoint import TRAIN_FILE, find_checkpoint

CHUNK = 1024  # tokens of a prompt that are read at once


def generate(
    model: SequenceModel,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """What follows each prompt: tokens drawn one by one from softmax(logits / temperature).

    A row is what its prompt alone gives with the seed `seed` + row. Bit for bit so in a `Decoder` with kernels;
    elsewhere the products of a batch are rounded differently, which can turn a close decision.

    Args:
        model: predicts the next token.
        prompts: B sequences of tokens, each of any length of at least 1.
        max_new_tokens: of each row.
        temperature: at least 0. 0: always the token of the largest logit.
        top_k: only the k likeliest tokens are drawn from, with all that tie with the last. None: no limit.
        top_p: only the likeliest tokens that together have at least this probability are drawn from, in (0, 1], after
            `top_k`. None: all.
        seed: at least 0; row b draws with `seed` + b.
        stop: tokens that end a row; it ends with that token.

    Returns:
        The new tokens of each row.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or a prompt is empty or has a token
            outside the vocabulary.
        RuntimeError: the model's logits are not finite.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
    drawn = stream(model, prompts, max_new_tokens, **options)  # type: ignore[arg-type]
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in drawn:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: SequenceModel,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """`generate`, one token of each row at a time, as soon as they are there; None in a row that has ended.

    Args, Raises: as of `generate`, and they are checked now. Without limit in memory: nothing of the past is kept.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"generate: `model` must be a SequenceModel, got {type(model).__name__}.")
    check_sizes("generate", max_new_tokens=max_new_tokens)
    check_sizes("generate", least=0, seed=seed)
    sampler = Sampler(temperature, top_k, top_p)
    tokens, size = _check_prompts(prompts, model), model.config["vocab_size"]
    if not isinstance(stop, Collection):
        raise TypeError(f"generate: `stop` must be a collection of tokens, got {stop!r}.")
    if wrong := [token for token in stop if token not in range(size)]:
        raise ValueError(f"generate: `stop` must be of tokens in [0, {size}), got {wrong[0]!r}.")
    return _stream(model, tokens, max_new_tokens, sampler, seed, frozenset(stop))


@torch.no_grad()
def _stream(
    model: SequenceModel, prompts: list[Tensor], count: int, sampler: "Sampler", seed: int, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    generators = [np.random.default_rng(seed + row) for row in range(len(prompts))]
    states = zip(*(read_prompt(model, prompt[:-1]) for prompt in prompts), strict=True)  # by layer, of every prompt
    decoder = Decoder(model, tuple(torch.cat(parts) for parts in states))
    tokens, ended = torch.stack([prompt[-1] for prompt in prompts]), [False] * len(prompts)
    for _ in range(count):
        drawn = sampler(decoder.step(tokens), generators)
        yield [None if over else token for token, over in zip(drawn, ended, strict=True)]
        ended = [over or token in stop for token, over in zip(drawn, ended, strict=True)]
        if all(ended):
            return
        tokens = tokens.new_tensor(drawn)


def stream_text(
    model: SequenceModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """What follows a text, a piece for each token: empty while a character, or what may become a `stop`, is not whole.

    Args:
        model: predicts the next token.
        tokenizer: of the model.
        prompt: a text of at least one character.
        max_new_tokens: how many tokens follow it, unless `stop` comes first.
        stop: texts before the first of which it ends.
        options: `temperature`, `top_k`, `top_p` and `seed` of `generate`.

    Raises:
        TypeError, ValueError: now, an argument is out of range, a character of the prompt is not in the vocabulary, or
            the tokenizer is not the model's.
        RuntimeError: later, the model's logits are not finite.
    """
    if tokenizer.vocab_size != model.config["vocab_size"]:
        raise ValueError(
            f"generate: the tokenizer must be the model's, of {model.config['vocab_size']} tokens, but this one "
            f"({tokenizer.name}) has {tokenizer.vocab_size}."
        )
    if not prompt:
        raise ValueError("generate: `prompt` must have at least one character, got ''.")
    if "" in stop:
        raise ValueError("generate: `stop` must be of texts of at least one character, got ''.")
    tokens = stream(model, [torch.from_numpy(tokenizer.encode(prompt))], max_new_tokens, **options)
    return _stream_text(tokens, tokenizer, max_new_tokens, stop)


def _stream_text(
    tokens: Iterator[list[int | None]], tokenizer: Tokenizer, count: int, stop: Sequence[str]
) -> Iterator[str]:
    utf8, held = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    for number, new in enumerate(tokens, 1):
        held += utf8.decode(tokenizer.decode_bytes(token for token in new if token is not None), final=number == count)
        if found := [held.index(text) for text in stop if text in held]:
            yield held[: min(found)]
            return
        begun = [n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])]
        ready = len(held) - (max(begun, default=0) if number < count else 0)
        yield held[:ready]
        held = held[ready:]


def load_text_model(folder: str | Path) -> tuple[SequenceModel, Tokenizer]:
    """The model and the tokenizer of a run of text: of its folder, then the best checkpoint, or of a checkpoint's.

    Raises:
        RuntimeError: the tokenizer is BPE and the `tokenizers` library is not installed.
        ValueError: a file is missing or damaged, the run is not of text, or the tokenizer is of another model.
    """
    checkpoint = find_checkpoint(folder)
    model = load_model(checkpoint)
    homes = [home for home in (checkpoint, checkpoint.resolve().parent) if (home / TOKENIZER_FILE).exists()]
    if not homes or not isinstance(model, SequenceModel):
        lack = f"there is no {TOKENIZER_FILE}" if not homes else f"its model is of the kind {type(model).__name__}"
        raise ValueError(f"generate: '{folder}' is not a run of text: {lack}. `statemix train --task text` makes one.")
    tokenizer = load_tokenizer(homes[0])
    size, trained_with = model.config["vocab_size"], _tokenizer_of(checkpoint)
    if tokenizer.vocab_size != size or trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"generate: '{homes[0] / TOKENIZER_FILE}' must be of the model in '{checkpoint}', of {size} tokens, but is "
            f"another, {tokenizer.name} of {tokenizer.vocab_size}."
        )
    return model, tokenizer


def _tokenizer_of(checkpoint: Path) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint was trained with; None if it is not known."""
    try:
        fingerprint: str | None = records.read(checkpoint / TRAIN_FILE, {"tokenizer?": str}, "generate").get(
            "tokenizer"
        )
    except FileNotFoundError:
        return None
    return fingerprint


def read_prompt(model: SequenceModel, tokens: Tensor) -> State:
    """The state after tokens (T,), in memory that does not grow with T; of zeros for T = 0."""
    state = model.initial_state(1)
    # the head is needed for the last token only; but what waits for a call of the model wants to see every token
    read = model.run_layers if MODEL.plainly_called(model) else model
    with without_dropout(model):
        for chunk in tokens.split(CHUNK) if len(tokens) else ():
            _, state = read(chunk[None], state, None)
    return state


class Sampler:
    """Tokens from logits, see `generate`. Raises TypeError or ValueError as it says."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        for name, number in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise TypeError(f"generate: `{name}` must be a number, got {number!r}.")
        if not 0 <= temperature <= sys.float_info.max:
            raise ValueError(f"generate: `temperature` must be at least 0 and finite, got {temperature!r}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: `top_p` must be above 0 and at most 1, got {top_p!r}.")
        if top_k is not None:
            check_sizes("generate", top_k=top_k)
        self.temperature, self.top_k, self.top_p = float(temperature), top_k, top_p

    def __call__(self, logits: Tensor, generators: Sequence[np.random.Generator]) -> list[int]:
        """Logits (B, V) and a generator for each row to B tokens. Row by row, in float64, on the CPU."""
        rows = logits.double().cpu().numpy()
        return [self._draw(row, generator) for row, generator in zip(rows, generators, strict=True)]

    def _draw(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):
            raise RuntimeError("generate: the model's logits are not finite: its training diverged or a weight is NaN.")
        if self.temperature == 0:
            return likeliest
        shares = np.exp((logits - logits[likeliest]) / self.temperature)  # at most 1: no temperature is too low
        if self.top_k is not None and self.top_k < len(shares):
            shares[shares < np.partition(shares, -self.top_k)[-self.top_k]] = 0
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-shares, kind="stable")
            sums = shares[order].cumsum()
            shares[order[1:][sums[:-1] >= self.top_p * sums[-1]]] = 0  # the likeliest stays
        sums = shares.cumsum()
        # the first token whose sum is above the draw: one of share 0 never is
        return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))


def _check_prompts(prompts: Sequence[Sequence[int] | Tensor], model: SequenceModel) -> list[Tensor]:
    """The prompts as int64 tensors on the device of the model."""
    size, weight = model.config["vocab_size"], model.embedding.weight
    if not isinstance(prompts, Collection):
        raise TypeError(f"generate: `prompts` must be a sequence of prompts, got {prompts!r}.")
    if len(prompts) == 0:
        raise ValueError("generate: `prompts` must have at least one prompt, got none.")
    checked = []
    for row, prompt in enumerate(prompts):
        try:
            tokens = torch.as_tensor(prompt)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            got = reprlib.repr(prompt)
            raise TypeError(f"generate: `prompts[{row}]` must be a sequence of int64 tokens, got {got}.") from error
        check_dense("generate", f"prompts[{row}]", tokens)
        if tokens.ndim != 1:
            raise ValueError(f"generate: `prompts[{row}]` must be a sequence of tokens, got {prompt!r}.")
        if len(tokens) == 0:
            raise ValueError(f"generate: `prompts[{row}]` must have at least one token, got none.")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"generate: `prompts[{row}]` must be of integers, got {tokens.dtype}.")
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= size:
            token = low if low < 0 else high
            raise ValueError(f"generate: `prompts[{row}]` must be of tokens in [0, {size}), got {token}.")
        checked.append(tokens.to(weight.device, torch.int64))
    return checked
