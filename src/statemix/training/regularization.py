"""What training adds to a step besides the loss of its task: dropout, hidden blocks, noise and entropy of gates."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from statemix.mixers import Mixer
from statemix.mixers.base import onlooker
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import TokenModel
from statemix.tasks import IGNORE_INDEX
from statemix.training.config import TrainConfig
from statemix.training.curriculum import Curriculum
from statemix.training.pruning import Silenced, heard_blocks

ENTROPY_TOKENS = 512  # of a batch: more would cost as much as the layer itself


def entropy_weight(config: TrainConfig, step: int) -> float:
    """The weight of the rows' entropy in a step: 0 in the first half of training, then a line up to `row_entropy`."""
    return config.row_entropy * max(0.0, 2 * step / config.steps - 1)


class Strengths(NamedTuple):
    """Of a training step: the share of hidden blocks, the weight of the rows' entropy, the size of the noise of gates,
    what was taken away, from which on rows are one-hot, and what the learning rate is multiplied by.
    """

    hidden: float
    entropy: float
    noise: float = 0.0
    silenced: Silenced | None = None
    learning_rate: float = 1.0


def strengths(config: TrainConfig, step: int, curriculum: Curriculum | None) -> Strengths:
    """Those of a step: by halves of training, or by where the curriculum is."""
    hidden, noise = config.block_dropout, config.gate_noise
    if curriculum is None:
        in_first_half = 2 * step < config.steps
        return Strengths(hidden * in_first_half, entropy_weight(config, step), noise * in_first_half)
    if curriculum.silenced is not None:
        return Strengths(0.0, config.row_entropy, 0.0, curriculum.silenced, config.curriculum.prune_lr)
    return Strengths(0.0 if curriculum.at_last else hidden, config.row_entropy, noise)


@contextlib.contextmanager
def regularized(
    model: TokenModel, config: TrainConfig, strong: Strengths, step: int, process: int
) -> Iterator[list[Tensor]]:
    """While it lasts the model runs as in this training step; yields a list that fills as that of `row_entropies`."""
    with (
        row_entropies(model, enabled=strong.entropy > 0) as entropies,
        hidden_blocks(model, strong.hidden),
        one_hot_gates(model, strong.silenced),
        noisy_gates(model, strong.noise, config.seed, step),
        dropout_seed(config, step, process, next(model.parameters()).device),
    ):
        yield entropies


def penalty(entropies: list[Tensor], weight: float, logits: Tensor, targets: Tensor) -> Tensor | float:
    """Weight times the sum of the layers' entropies if every scored target is predicted, else 0."""
    if not entropies:
        return 0.0
    right = (logits.argmax(-1) == targets) | (targets == IGNORE_INDEX)
    return weight * sum(entropies) if bool(right.all()) else 0.0


@contextlib.contextmanager
def dropout_seed(config: TrainConfig, step: int, process: int, device: torch.device) -> Iterator[None]:
    """What is dropped is a function of seed, step and process, so that a run can go on anywhere."""
    random = config.model.dropout > 0 or config.block_dropout > 0
    # torch.manual_seed seeds every kind of device that torch knows, and takes 260 us where it finds none
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    with torch.random.fork_rng(enabled=random):
        if random:
            seed(hash((config.seed, step, process)))
        yield


@contextlib.contextmanager
def hidden_blocks(model: TokenModel, share: float) -> Iterator[None]:
    """While the model runs, a share of each layer's blocks is zero to its read-out, for a whole sequence each."""
    mixers = _with_gate_rows(model) if share > 0 else []
    for mixer in mixers:
        mixer.hidden = share
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.hidden = 0.0


@contextlib.contextmanager
def noisy_gates(model: TokenModel, size: float, seed: int, step: int) -> Iterator[None]:
    """While it lasts, normal noise of this standard deviation is on the weights of raw gates, by seed and step.

    It is the same in every process, and for all parts of a batch: gradients are those at the weights that are moved.
    """
    layers = [mixer.raw_gates.projection for mixer in model.mixers if isinstance(mixer, LinearRecurrence)]
    weights = [layer.weight for layer in layers if layer is not None and size > 0]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(hash((seed, step)))
    with torch.no_grad():
        for weight in weights:
            weight += size * torch.randn(weight.shape, generator=generator).to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.copy_(own)


@contextlib.contextmanager
def one_hot_gates(model: TokenModel, silenced: Silenced | None) -> Iterator[None]:
    """While the model runs, each row of its gates is one-hot, and learns as if it were not: see `one_hot_rows`.

    Blocks that are silenced, of which the read-outs see nothing, are not computed. None: all is as it was.
    """
    mixers = list[LinearRecurrence]()
    for mixer, columns in zip(model.mixers, silenced or (), strict=silenced is not None):
        if isinstance(mixer, LinearRecurrence):
            mixers.append(mixer)
            mixer.one_hot, heard = True, heard_blocks(mixer, columns)
            if 0 < len(heard) < mixer.state_shape[1]:
                mixer.heard = torch.tensor(heard, device=mixer.output.weight.device)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.one_hot, mixer.heard = False, None


@contextlib.contextmanager
def row_entropies(model: TokenModel, *, enabled: bool) -> Iterator[list[Tensor]]:
    """A list that fills, while the model runs, with each layer's mean entropy of its rows of gates at the first tokens,
    and at all tokens where they are those of a table.

    It is computed within the forward, where a wrapper for many processes has the weights at hand.
    """
    entropies: list[Tensor] = []

    @onlooker
    def add(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(mixer, Mixer)
        x, _, _, rows = (*inputs, None)[:4]
        if rows is not None:
            entropies.append(rows.each(lambda table: mixer.row_entropy(table)[..., None]).mean())
        else:
            entropies.append(mixer.row_entropy(x.flatten(0, 1)[None, :ENTROPY_TOKENS]).mean())

    hooks = [mixer.register_forward_pre_hook(add) for mixer in _with_gate_rows(model)] if enabled else []
    try:
        yield entropies
    finally:
        for handle in hooks:
            handle.remove()


def _with_gate_rows(model: TokenModel) -> list[Mixer]:
    return [mixer for mixer in model.mixers if mixer.has_gate_rows]
