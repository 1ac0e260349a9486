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

"paper-bd1", "paper-bd2", "paper-bd4", "paper-bd8", "paper-bd16", "paper-h16" and "paper-lstm" are language models of
Dubinin et al. 2026 (arXiv 2602.12021), each a run of its own, model and training: about 135 million parameters besides
embedding and head, 10^10 tokens. The text is the user's own (`--task.source`), and so are the BPE learned from it,
which has fewer than 50,280 tokens of a short one, and how often it validates, on how much.

"exact" is the recipe for regular languages and groups, from labels at the end of words alone: a start token, words of
one token first and of 40 at last, half of the blocks hidden before the last length, a penalty on rows of gates that are
not one-hot, wrong words again, words of up to three tokens of every split, for these are few. When 500 batches in a row
had no error, and one-hot rows have none on 24 batches, rows are made one-hot and all blocks are taken away that these
do not miss; then one block more after another, if the run settles without it, and at last components of blocks, so that
`statemix verify` meets few states; and it goes on until 500 batches in a row had no error. Then a search asks, at most
20 times, for a word that is wrong at any length, which comes again. Its sizes follow from the task. M is the number of
points that a token moves, and one to spare: 3 for bits, k + 1 for a cycle of k; of S_n, A_n and arithmetic modulo n it
is n + 1. A product of groups needs that of its largest factor. N is 16, D 64, and steps are 5,000; for a group, of
which many products are to be told apart, twice as much of the first two, and 6,000. One layer follows what is a group;
arithmetic takes two: one for the product at hand, the next for the sum of these, a larger weight of the penalty, 0.15
in place of 0.1, averages of the optimizer that are slow and do not fall (`amsgrad`), more steps, blocks taken away
after 100 batches without an error, and three tenths of the learning rate from there on.

"exact-s3", "exact-s4" and "exact-s5" are runs too: state tracking that stays exact far beyond the trained length, by a
start token, short lengths first, and a penalty on rows of gates that are not one-hot; S5 also by hiding half of the
blocks from the read-out in the first half of training (docs/claims/exact.md).
"""

import dataclasses
import itertools
import re
from typing import Any, NamedTuple

from statemix.mixers import MIXERS, complete_mixer
from statemix.model import SequenceModel
from statemix.specs import Spec
from statemix.tasks import ModularArithmeticSimple, PermutationComposition, Setting, Task, build_task, settings
from statemix.tasks.regular import Counter
from statemix.training.config import CurriculumConfig, ModelConfig, OptimizerConfig, TrainConfig


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
LANGUAGE = TrainConfig(
    task={"name": "text", "tokenizer": "bpe", "bpe_vocab_size": 50_280, "seq_len": 2048},
    model=ModelConfig(d_model=768, num_layers=12, mlp_size=2048, init_std=0.02),
    optimizer=OptimizerConfig(lr=6e-3, final_lr=1e-5, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    steps=18_850,
    batch_size=256,
    eval_every=500,
    eval_sequences=256,
)
LANGUAGE_MIXERS: dict[str, Spec] = {
    "paper-bd1": {"name": "bd_lru", "num_blocks": 2112, "block_size": 1},
    "paper-bd2": {"name": "bd_lru", "num_blocks": 844, "block_size": 2},
    "paper-bd4": {"name": "bd_lru", "num_blocks": 302, "block_size": 4},
    "paper-bd8": {"name": "bd_lru", "num_blocks": 96, "block_size": 8},
    "paper-bd16": {"name": "bd_lru", "num_blocks": 28, "block_size": 16},
    "paper-h16": {"name": "h_lru", "num_channels": 242, "order": 16, "form": "observer"},
    "paper-lstm": {"name": "lstm", "hidden_size": 896},
}


def _exact(
    group: str, block_size: int, num_blocks: int, d_model: int, steps: int, lengths: tuple[int, ...], **changes: Any
) -> TrainConfig:
    """State tracking at length 64, which is trained last; the penalty comes in the second half of the steps."""
    return TrainConfig(
        task={"name": "permutation", "group": group, "seq_len": 64, "start": True},
        mixer={"name": "bd_lru", "num_blocks": num_blocks, "block_size": block_size},
        model=ModelConfig(d_model=d_model),
        optimizer=OptimizerConfig(lr=6e-3),
        steps=steps,
        train_lengths=lengths,
        row_entropy=0.1,
        batch_size=32,
        eval_every=100,
        eval_sequences=256,
        test_lengths=(64, 256, 1024, 4096),
        **changes,
    )


# presets that are a run each
RUNS = {name: dataclasses.replace(LANGUAGE, mixer=dict(mixer)) for name, mixer in LANGUAGE_MIXERS.items()} | {
    "exact-s3": _exact("S3", 3, 16, 64, 600, (4, 16, 64, 64)),
    "exact-s4": _exact("S4", 4, 32, 64, 1600, (4, 16, 64, 64)),
    "exact-s5": _exact("S5", 5, 64, 128, 2000, (4, 4, 16, 64, 64, 64), block_dropout=0.5),
}
EXACT = TrainConfig(
    task=settings("exact", "permutation")[0].task,
    optimizer=OptimizerConfig(lr=6e-3, final_lr=3e-4, warmup=0.0, weight_decay=0.0, schedule="linear"),
    curriculum=CurriculumConfig(first=1, quiet=500, shared=3, prune=24, queries=20),
    block_dropout=0.5,
    batch_size=8,
    eval_every=500,
    eval_sequences=1024,
    sharpen=1e4,
)
PROTOCOLS = {
    name: Protocol(run, None, (run.optimizer.lr,), (run.optimizer.weight_decay,)) for name, run in RUNS.items()
} | {
    "mad": Protocol(MAD, 200, (1e-4, 5e-4, 1e-3), (0.0, 0.1)),
    "exact": Protocol(EXACT, None, (EXACT.optimizer.lr,), (0.0,)),
    "formal": Protocol(TrainConfig(steps=2_000), None, (3e-3,), (0.1,)),
}


class Fit(NamedTuple):
    """What of "exact" depends on the task."""

    block_size: int
    num_blocks: int = 16
    d_model: int = 64
    num_layers: int = 1
    row_entropy: float = 0.1
    steps: int = 5_000
    betas: tuple[float, float] = (0.9, 0.95)
    amsgrad: bool = False
    prune_after: int = 500
    prune_lr: float = 1.0


def exact_fit(task: Task) -> Fit:
    """That of a task of "exact", by the rule of the module's docstring."""
    if isinstance(task, PermutationComposition):
        points = max(int(number) for number in re.findall(r"\d+", task.group))
        return Fit(points + 1, num_blocks=32, d_model=128, steps=6_000)
    if isinstance(task, ModularArithmeticSimple):
        return Fit(
            task.modulus + 1,
            num_layers=2,
            row_entropy=0.15,
            steps=12_000,
            betas=(0.9, 0.999),
            amsgrad=True,
            prune_after=100,
            prune_lr=0.3,
        )
    assert isinstance(task, Counter)
    return Fit(task.num_states + 1)


def preset_config(preset: str, task: str | Spec | None = None, mixer: Spec | None = None) -> TrainConfig:
    """The baseline of a task in a preset, as a run of a mixer. None: the preset's own, or those of `TrainConfig`.

    A task is its name, or a spec with options of its own, to which the sizes of "exact" are fitted.

    Raises:
        ValueError: the preset or the mixer is unknown, or the preset has no such task; the message lists the names.
    """
    if preset not in PROTOCOLS:
        raise ValueError(f"preset_config: `preset` must be one of {sorted(PROTOCOLS)}, got {preset!r}.")
    base = PROTOCOLS[preset].base
    options = {"name": base.task["name"]} if task is None else {"name": task} if isinstance(task, str) else task
    name = options["name"]
    if preset not in RUNS:
        setting = settings(preset, name)[0]
        return _config(preset, setting._replace(task={**setting.task, **options}), mixer)
    if name != base.task["name"]:
        raise ValueError(f"preset_config: `task` of {preset!r} must be {base.task['name']!r}, got {name!r}.")
    return base if mixer is None else dataclasses.replace(base, mixer=dict(mixer))


def paper_model(preset: str) -> SequenceModel:
    """The language model of a "paper-..." preset with 50,280 tokens: 0.8 GB, or none on the device "meta".

    Raises:
        ValueError: the preset is none of those.
    """
    if preset not in LANGUAGE_MIXERS:
        raise ValueError(f"paper_model: `preset` must be one of {sorted(LANGUAGE_MIXERS)}, got {preset!r}.")
    options = dataclasses.asdict(LANGUAGE.model)
    return SequenceModel(LANGUAGE.task["bpe_vocab_size"], mixer=LANGUAGE_MIXERS[preset], **options)


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
    changes: dict[str, Any] = {} if mixer is None else {"mixer": dict(mixer)}
    if preset == "exact":
        changes = _fitted(setting.task, mixer)
    changes = {"steps": steps, "eval_every": eval_every} | changes
    return dataclasses.replace(
        base,
        task=setting.task,
        train_sequences=setting.train_sequences,
        eval_sequences=setting.test_sequences,
        test_lengths=setting.test_lengths,
        **changes,
    )


def _fitted(task: Spec, mixer: Spec | None) -> dict[str, Any]:
    """Fields of a run of "exact" by its task; a mixer that was asked for has what it can have of the recipe."""
    fit = exact_fit(build_task(task))
    own = {"name": "bd_lru", "num_blocks": fit.num_blocks, "block_size": fit.block_size}
    options = complete_mixer(own if mixer is None else mixer)
    kind = MIXERS[options["name"]]
    curriculum = dataclasses.replace(EXACT.curriculum, prune_after=fit.prune_after, prune_lr=fit.prune_lr)
    return {
        "mixer": options,
        "steps": fit.steps,
        "optimizer": dataclasses.replace(EXACT.optimizer, betas=fit.betas, amsgrad=fit.amsgrad),
        "curriculum": curriculum if kind.has_gate_rows else dataclasses.replace(curriculum, prune=None, queries=0),
        "model": ModelConfig(d_model=fit.d_model, num_layers=fit.num_layers, mlp_size=2 * fit.d_model),
        "row_entropy": fit.row_entropy if kind.has_gate_rows else 0.0,
        "block_dropout": EXACT.block_dropout if kind.has_gate_rows else 0.0,
        "gate_noise": EXACT.gate_noise if kind.has_gate_rows else 0.0,
        "sharpen": EXACT.sharpen if kind.sharpens(options) else None,
    }
