"""presets.py: the protocol of a preset, number by number, and the size of its grid."""

import dataclasses
import json

import pytest

from statemix import TrainConfig
from statemix.model import SequenceModel
from statemix.presets import preset_config, preset_grid, preset_steps
from statemix.tasks import PRESETS, build_task

MIXER = {"name": "h_lru", "num_channels": 32, "order": 2}


def test_mad_is_the_protocol_of_its_authors():
    config = preset_config("mad", "in-context-recall", MIXER)
    assert dataclasses.asdict(config) == dataclasses.asdict(TrainConfig()) | {
        "task": {"name": "in-context-recall", "vocab_size": 16, "seq_len": 128, "compat": "none"} | config.task,
        "mixer": TrainConfig(mixer=MIXER).mixer,
        "model": {"d_model": 128, "num_layers": 2, "mlp_size": 352, "tied_embedding": False, "init_std": 0.02},
        "optimizer": {
            **{"lr": 5e-4, "final_lr": 1e-6, "warmup": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": None}
        },
        "train_sequences": 12_800,
        "eval_sequences": 1_280,
        "batch_size": 128,
        "steps": 20_000,  # 200 epochs of 100
        "eval_every": 100,
        "stop_accuracy": 0.999,
    }
    assert (config.task["vocab_size"], config.task["seq_len"]) == (16, 128)


def test_the_sizes_of_a_mad_model():
    """Two SwiGLU of 3 * 128 * 352, embedding and head of 16 * 128, five norms, two mixers."""
    config = preset_config("mad", "in-context-recall", MIXER)
    model = SequenceModel(16, mixer=config.mixer, **dataclasses.asdict(config.model))
    rest = model.num_parameters() - sum(p.numel() for mixer in model.mixers for p in mixer.parameters())
    assert rest == 2 * 3 * 128 * 352 + 2 * 16 * 128 + 5 * 128


def test_epochs_are_of_the_training_set():
    assert preset_steps("mad", 12_800, 128) == (20_000, 100)
    assert preset_steps("mad", 800, 128) == (1_250, 10)  # an epoch is 6.25 batches; validations are 10 apart at least
    assert preset_steps("mad", 1_600, 128) == (2_500, 13)
    assert preset_steps("mad", 256, 128) == (400, 10)
    assert preset_steps("mad", None, 128) == (20_000, 100)
    assert preset_steps("formal", None, 128) == (2_000, 100)
    memorization = preset_config("mad", "memorization")
    assert (memorization.train_sequences, memorization.steps, memorization.eval_every) == (256, 400, 10)


def test_the_mad_grid_has_396_runs_all_different():
    configs = [config for task in PRESETS["mad"] for config in preset_grid("mad", task, MIXER)]
    assert len({config.to_json() for config in configs}) == len(configs) == 396
    tried = {(config.optimizer.lr, config.optimizer.weight_decay) for config in configs}
    assert tried == {(lr, decay) for lr in (1e-4, 5e-4, 1e-3) for decay in (0.0, 0.1)}
    assert {config.mixer["name"] for config in configs} == {"h_lru"}
    for config in configs:
        assert config.steps == -(-200 * config.train_sequences // 128)
        assert TrainConfig.from_json(json.dumps(dataclasses.asdict(config))) == config


@pytest.mark.parametrize("task", PRESETS["formal"])
def test_formal_trains_at_short_lengths_and_tests_at_long_ones(task):
    [config] = preset_grid("formal", task, MIXER)
    assert config == preset_config("formal", task, MIXER)
    assert (config.task["min_len"], config.task["seq_len"]) == (3, 40)
    assert (min(config.test_lengths), max(config.test_lengths)) == (40, 256)
    assert config.train_sequences is None
    assert build_task(config.task).with_seq_len(256).sample("test", 1).tokens.shape[0] == 1


def test_unknown_names_are_told_with_the_known():
    with pytest.raises(ValueError, match=r"`preset` must be one of \['formal', 'mad'\], got 'mat'"):
        preset_config("mat", "memorization")
    with pytest.raises(ValueError, match=r"`task` must be one of \['compression', .*\], got 'parity'"):
        preset_config("mad", "parity")
    with pytest.raises(ValueError, match=r"mixer: `name` must be one of \[.*'h_lru'.*\], got 'mamba9'"):
        preset_config("mad", "memorization", {"name": "mamba9"})


def test_an_unknown_preset_has_no_grid():
    with pytest.raises(ValueError, match=r"^settings: `preset` must be one of \['formal', 'mad'\], got 'madd'\.$"):
        preset_grid("madd", "compression", {"name": "lstm", "hidden_size": 4})
