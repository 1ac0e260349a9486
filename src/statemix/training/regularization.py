"""What training adds to a step besides the loss of its task: dropout, hidden blocks, and the entropy of gates."""

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from statemix.mixers.base import LinearRecurrence
from statemix.model import TokenModel
from statemix.training.config import TrainConfig

ENTROPY_TOKENS = 512  # of a batch: more would cost as much as the layer itself


@contextlib.contextmanager
def dropout_seed(config: TrainConfig, step: int, process: int) -> Iterator[None]:
    """What is dropped is a function of seed, step and process, so that a run can go on anywhere."""
    random = config.model.dropout > 0 or config.block_dropout > 0
    with torch.random.fork_rng(enabled=random):
        if random:
            torch.manual_seed(hash((config.seed, step, process)))
        yield


@contextlib.contextmanager
def hidden_blocks(model: TokenModel, share: float) -> Iterator[None]:
    """While the model runs, a share of each layer's blocks is zero to its read-out, for a whole sequence each."""

    def hide(blocks: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            states = inputs[0].unflatten(2, (-1, blocks))  # (B, T, M or 1, N)
            kept = torch.rand(len(states), 1, 1, blocks, device=states.device) >= share
            return (states * kept / (1 - share)).flatten(2)

        return hook

    # the fused layer makes way for hooks
    hooks = [mixer.output.register_forward_pre_hook(hide(mixer.state_shape[1])) for mixer in _mixers(model, share > 0)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def row_entropies(model: TokenModel, *, enabled: bool) -> Iterator[list[Tensor]]:
    """A list that fills, while the model runs, with each layer's mean entropy of its rows of gates at the first tokens.

    It is computed within the forward, where a wrapper for many processes has the weights at hand.
    """
    entropies: list[Tensor] = []

    def add(mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entropies.append(cast(LinearRecurrence, mixer).row_entropy(inputs[0].flatten(0, 1)[None, :ENTROPY_TOKENS]))

    hooks = [mixer.register_forward_pre_hook(add) for mixer in _mixers(model, enabled)]
    try:
        yield entropies
    finally:
        for handle in hooks:
            handle.remove()


def _mixers(model: TokenModel, wanted: bool) -> list[LinearRecurrence]:
    return [cast(LinearRecurrence, mixer) for mixer in model.mixers] if wanted else []
