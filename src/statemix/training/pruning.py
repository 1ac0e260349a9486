"""Blocks that a model can do without: found on fresh batches, and silenced for good."""

from collections.abc import Sequence

import torch
from torch import Tensor

from statemix.model import TokenModel
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.training.evaluate import answer

Blocks = list[list[int]]  # by layer, numbers of blocks


@torch.no_grad()
def silence(model: TokenModel, dead: Blocks) -> None:
    """Let the read-out of each layer see nothing of its dead blocks; of none where there are none."""
    for mixer, blocks in zip(model.mixers, dead, strict=False):
        if blocks:
            read_out(mixer.output.weight, mixer.state_shape[1])[:, :, blocks] = 0


def read_out(weight: Tensor, blocks: int) -> Tensor:
    """The weight of a read-out (D, M N), as (D, M, N)."""
    return weight.unflatten(1, (-1, blocks))


@torch.no_grad()
def dispensable(model: TokenModel, batches: Sequence[Batch], seed: int) -> Blocks:
    """Blocks, by layer, without all of which the model answers the batches without an error, as it does now.

    They are tried one after another, first layer first, in an order drawn by the seed. The model is left as it was.
    """
    order = torch.Generator().manual_seed(seed)
    weights = [mixer.output.weight.clone() for mixer in model.mixers]
    dead: Blocks = [[] for _ in model.mixers]
    if not _is_exact(model, batches):
        return dead
    for layer, mixer in enumerate(model.mixers):
        blocks = mixer.state_shape[1]
        seen = read_out(mixer.output.weight, blocks)
        for block in torch.randperm(blocks, generator=order).tolist():
            before = seen[:, :, block].clone()
            seen[:, :, block] = 0
            if _is_exact(model, batches):
                dead[layer].append(block)
            else:
                seen[:, :, block] = before
    for mixer, weight in zip(model.mixers, weights, strict=True):
        mixer.output.weight.copy_(weight)
    return [sorted(blocks) for blocks in dead]


def _is_exact(model: TokenModel, batches: Sequence[Batch]) -> bool:
    """Whether the model answers all batches without an error; it stops at the first."""
    for batch in batches:
        predictions = answer(model, batch, None)[0].argmax(-1)
        if not bool(((predictions == batch.targets) | (batch.targets == IGNORE_INDEX)).all()):
            return False
    return True
