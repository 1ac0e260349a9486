"""Presets of runs: a task in a setting it is usually reported in (tasks/presets.py), trained as its authors do.

"mad" is the protocol of Poli et al. 2024 (arXiv 2403.17844): two (mixer, SwiGLU) pairs of width 128, SwiGLU inner width
352, untied head, weights N(0, 0.02^2), no position embedding; AdamW (betas 0.9 and 0.999, which the paper does not say
and its public code leaves at torch's), batch 128, at most 200 epochs, a cosine to 1e-6 without warm-up, gradients not
clipped, training ended at an accuracy of 0.999. Where this departs from the public code:

- the accuracy that ends training, and the choice of a checkpoint, are of the validation split, not of the test;
- the cosine runs over the 200 epochs, step by step;
- RMSNorm without LayerNorm's centring, float32 and not bfloat16 (`mixed_precision` changes that);
- weight decay is of matrices only, and not of the embedding;
- validation after every epoch, but at least 10 steps apart: an epoch of memorization has 2.

"formal" has no protocol of an author's: the defaults of `TrainConfig`, for 2,000 steps.
"""

import dataclasses
import itertools
from typing import NamedTuple

from statemix.config import ModelConfig, OptimizerConfig, TrainConfig
from statemix.specs import Spec
from statemix.tasks import Setting, settings


class Protocol(NamedTuple):
    """How the runs of a preset are trained, and what is tried of each setting."""

    base: TrainConfig
    epochs: int | None  # None: as many steps as `base`
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


MAD = TrainConfig(
    model=ModelConfig(d_model=128, num_layers=2, mlp_size=352, init_std=0.02),
    optimizer=OptimizerConfig(lr=5e-4, final_lr=1e-6, warmup=0.0, betas=(0.9, 0.999), weight_decay=0.0, clip=None),
    steps=20_000,
    batch_size=128,
    stop_accuracy=0.999,
)
PROTOCOLS = {
    "mad": Protocol(MAD, 200, (1e-4, 5e-4, 1e-3), (0.0, 0.1)),
    "formal": Protocol(TrainConfig(steps=2_000), None, (3e-3,), (0.1,)),
}


def preset_config(preset: str, task: str, mixer: Spec | None = None) -> TrainConfig:
    """The baseline of a task in a preset, as a run of a mixer. None: the mixer of `TrainConfig`.

    Raises:
        ValueError: the preset or the mixer is unknown, or the preset has no such task; the message lists the names.
    """
    return _config(preset, settings(preset, task)[0], mixer)


def preset_grid(preset: str, task: str, mixer: Spec) -> list[TrainConfig]:
    """Every setting of a task in a preset, with every learning rate and weight decay that its authors try.

    In MAD a setting's score is the best of its runs (`select(rows, ("optimizer.lr", "optimizer.weight_decay"))`), and
    the task's the mean over settings.
    """
    chosen, configs = settings(preset, task), []
    protocol = PROTOCOLS[preset]
    for setting in chosen:
        config = _config(preset, setting, mixer)
        for lr, decay in itertools.product(protocol.learning_rates, protocol.weight_decays):
            optimizer = dataclasses.replace(config.optimizer, lr=lr, weight_decay=decay)
            configs.append(dataclasses.replace(config, optimizer=optimizer))
    return configs


def preset_steps(preset: str, train_sequences: int | None, batch_size: int) -> tuple[int, int]:
    """Steps, and steps between validations, of a preset's epochs over a training set."""
    base, epochs = PROTOCOLS[preset][:2]
    if epochs is None or train_sequences is None:
        return base.steps, base.eval_every
    return -(-epochs * train_sequences // batch_size), max(10, -(-train_sequences // batch_size))


def _config(preset: str, setting: Setting, mixer: Spec | None) -> TrainConfig:
    base = PROTOCOLS[preset].base
    steps, eval_every = preset_steps(preset, setting.train_sequences, base.batch_size)
    return dataclasses.replace(
        base,
        task=setting.task,
        mixer=base.mixer if mixer is None else dict(mixer),
        train_sequences=setting.train_sequences,
        eval_sequences=setting.test_sequences,
        test_lengths=setting.test_lengths,
        steps=steps,
        eval_every=eval_every,
    )
