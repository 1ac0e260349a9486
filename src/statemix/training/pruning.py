"""What a model can do without: blocks, and components of blocks, found on new batches, silenced, and left out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from statemix.mixers import Mixer
from statemix.model import SequenceModel, TokenModel
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.training.evaluate import answer

Silenced = list[list[int]]  # by layer, columns of the read-out's weight (D, M N): component m of block n is m N + n


@torch.no_grad()
def silence(model: TokenModel, silenced: Silenced) -> None:
    """Let the read-out of each layer see nothing of these components; all of them where there are none."""
    for mixer, columns in zip(model.mixers, silenced, strict=False):
        if columns:
            mixer.output.weight[:, columns] = 0


@torch.no_grad()
def prune(model: TokenModel, batches: Sequence[Batch]) -> Silenced:
    """Silence components without all of which the model answers the batches without an error, as it does now.

    Blocks are tried one after another, then components of those that are left, first layer first. Those with the most
    different states come first: what is left has few.

    Returns:
        What was silenced, by layer, besides what already was; nothing of a model that errs.
    """
    silenced: Silenced = [[] for _ in model.mixers]
    if not _is_exact(model, batches):
        return silenced
    for layer, states in enumerate(_states(model, batches[0])):
        seen = model.mixers[layer].output.weight
        for candidates in _candidates(states):
            columns = [column for column in candidates if seen[:, column].any()]
            if not columns:  # silenced before, or with their block
                continue
            before = seen[:, columns].clone()
            seen[:, columns] = 0
            if _is_exact(model, batches):
                silenced[layer] += columns
            else:
                seen[:, columns] = before
    return [sorted(columns) for columns in silenced]


def blocks_left(mixer: Mixer, silenced: Sequence[int]) -> int:
    """How many blocks have a component that is not silenced."""
    blocks = mixer.state_shape[1]
    return len({column % blocks for column in set(range(mixer.output.weight.shape[1])) - set(silenced)})


def _states(model: TokenModel, batch: Batch) -> list[Tensor]:
    """What each read-out reads at the tokens of a batch, (tokens, M, N)."""
    found: list[Tensor] = []

    def keep(blocks: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found.append(inputs[0].flatten(0, 1).unflatten(1, (-1, blocks)))

    hooks = [mixer.output.register_forward_pre_hook(keep(mixer.state_shape[1])) for mixer in model.mixers]
    try:
        answer(model, batch, None)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _candidates(states: Tensor) -> list[list[int]]:
    """Columns of a read-out of states (tokens, M, N) to try together: those of each block, then each alone."""
    order, blocks = states.shape[1:]
    columns = torch.arange(order * blocks).view(order, blocks)
    by_block = sorted(range(blocks), key=lambda block: -_count(states[:, :, block]))
    alone = sorted(range(order * blocks), key=lambda column: -_count(states.flatten(1)[:, column, None]))
    return [columns[:, block].tolist() for block in by_block] + [[column] for column in alone]


def _count(states: Tensor) -> int:
    """How many of the states (tokens, M) differ, to a hundredth of the largest number."""
    return len((states * (100 / states.abs().max().clamp(min=1e-30))).round().unique(dim=0))


def _is_exact(model: TokenModel, batches: Sequence[Batch]) -> bool:
    """Whether the model answers all batches without an error; it stops at the first."""
    for batch in batches:
        predictions: Tensor = answer(model, batch, None)[0].argmax(-1)
        if not bool(((predictions == batch.targets) | (batch.targets == IGNORE_INDEX)).all()):
            return False
    return True


@torch.no_grad()
def without_silent_blocks(model: SequenceModel) -> SequenceModel:
    """The model with as few blocks as its layers need, which gives the same answers, to the rounding of sums.

    Blocks that a read-out has no weight for are left out; a layer that needs fewer than another keeps some of them.

    Raises:
        ValueError: the mixer has no rows of gates.
    """
    mixers = model.mixers
    if not all(mixer.has_gate_rows for mixer in mixers):
        name = model.config["mixer"]["name"]
        raise ValueError(f"without_silent_blocks: `model` must have a mixer with rows of gates, got {name!r}.")
    blocks = mixers[0].state_shape[1]
    heard = [(mixer.output.weight != 0).any(0).view(-1, blocks).any(0) for mixer in mixers]
    count = max(1, max(int(layer.sum()) for layer in heard))
    config = model.config | {"mixer": model.config["mixer"] | {type(mixers[0]).width_option: count}}
    kept = [layer.int().argsort(descending=True, stable=True)[:count].sort().values for layer in heard]
    small = SequenceModel(**config).to(model.head.weight.dtype)
    weights = model.state_dict()
    for name, weight in small.state_dict().items():
        old = weights[name]
        for axis in range(old.ndim):
            if old.shape[axis] != weight.shape[axis]:  # it ends with the blocks: (..., N)
                own = kept[int(name.split(".")[1])].to(old.device)
                old = old.unflatten(axis, (-1, blocks)).index_select(axis + 1, own).flatten(axis, axis + 1)
        weight.copy_(old)
    return small.train(model.training)
