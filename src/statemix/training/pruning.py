"""Blocks that a model can do without: found on new batches, silenced, and left out."""

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from statemix.mixers import Mixer
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel, TokenModel
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.training.evaluate import answer

ONE_HOT = 1e4  # times the raw gates
Silenced = list[list[int]]  # by layer, numbers of blocks


def columns_of(mixer: Mixer, block: int) -> slice:
    """Those of the read-out's weight (D, M N) that a block has: component m of block n is m N + n."""
    return slice(block, None, mixer.state_shape[1])


@torch.no_grad()
def silence(model: TokenModel, silenced: Silenced) -> None:
    """Let the read-out of each layer see nothing of these blocks."""
    for mixer, blocks in zip(model.mixers, silenced, strict=True):
        for block in blocks:
            mixer.output.weight[:, columns_of(mixer, block)] = 0


@torch.no_grad()
def prune(model: TokenModel, batches: Sequence[Batch]) -> Silenced:
    """Silence blocks without all of which the model answers the batches without an error, as it does now.

    They are tried one after another, first layer first, those with the most different states before others: what is
    left has few.

    Returns:
        What was silenced, by layer, besides what already was; nothing of a model that errs.
    """
    silenced: Silenced = [[] for _ in model.mixers]
    batches = list(batches)
    if _errors(model, batches, 0):
        return silenced
    for layer, blocks in enumerate(_heard_blocks(model, batches[0])):
        for block in blocks:
            seen = model.mixers[layer].output.weight[:, columns_of(model.mixers[layer], block)]
            before = seen.clone()
            seen[:] = 0
            if _errors(model, batches, 0):
                seen[:] = before
            else:
                silenced[layer].append(block)
    return [sorted(blocks) for blocks in silenced]


@torch.no_grad()
def least_needed(
    model: TokenModel, batches: Sequence[Batch], staying: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """The block without which the fewest answers to the batches are wrong; of equals that of the most different states.

    Args:
        model: as it answers now.
        batches: what it is asked.
        staying: blocks that are not to be named.

    Returns:
        Its layer and number. None: there are no others, or each layer has only one.
    """
    best, fewest = None, None
    for layer, blocks in enumerate(_heard_blocks(model, batches[0])):
        for block in blocks if len(blocks) > 1 else []:
            if (layer, block) in staying or fewest == 0:
                continue
            seen = model.mixers[layer].output.weight[:, columns_of(model.mixers[layer], block)]
            before = seen.clone()
            seen[:] = 0
            wrong = _errors(model, list(batches), fewest)
            seen[:] = before
            if fewest is None or wrong < fewest:
                best, fewest = (layer, block), wrong
    return best


def one_hot_copy(model: TokenModel) -> TokenModel:
    """A copy whose rows of gates are one-hot: where it can be by sharpening, which the kernels serve."""
    made = copy.deepcopy(model)
    for mixer in made.mixers:
        assert isinstance(mixer, LinearRecurrence)
        if mixer.normalization == "softmax":
            mixer.sharpen(ONE_HOT)
        else:
            mixer.one_hot = True
    return made


def _heard_blocks(model: TokenModel, batch: Batch) -> list[list[int]]:
    """By layer the blocks that its read-out has weights for, those of the most different states in a batch first."""
    found: list[list[int]] = []

    def rank(mixer: Mixer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        blocks = mixer.state_shape[1]
        heard = [n for n in range(blocks) if bool(mixer.output.weight[:, columns_of(mixer, n)].any())]

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].flatten(0, 1).unflatten(1, (-1, blocks))
            found.append(sorted(heard, key=lambda n: -_count(states[:, :, n])))

        return hook

    hooks = [mixer.output.register_forward_pre_hook(rank(mixer)) for mixer in model.mixers]
    try:
        answer(model, batch, None)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _count(states: Tensor) -> int:
    """How many of the states (tokens, M) differ, to a hundredth of the largest number."""
    return len((states * (100 / states.abs().max().clamp(min=1e-30))).round().unique(dim=0))


def _errors(model: TokenModel, batches: list[Batch], enough: int | None) -> int:
    """How many answers to the batches are wrong; counting stops above `enough`, and that batch is put first."""
    wrong = 0
    for number, batch in enumerate(batches):
        predictions: Tensor = answer(model, batch, None)[0].argmax(-1)
        wrong += int(((predictions != batch.targets) & (batch.targets != IGNORE_INDEX)).sum())
        if enough is not None and wrong > enough:
            batches.insert(0, batches.pop(number))
            break
    return wrong


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
