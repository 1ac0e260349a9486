"""presets.py: the protocol of a preset, number by number, and the size of its grid."""

import dataclasses
import json

import pytest
import torch
from run_helpers import refused

from statemix import TrainConfig
from statemix.model import SequenceModel
from statemix.runs.presets import paper_model, preset_config, preset_grid, preset_steps
from statemix.tasks import PRESETS, build_task
from statemix.training.config import ModelConfig, OptimizerConfig

MIXER = {"name": "h_lru", "num_channels": 32, "order": 2}
SMALL_WEIGHTS = {"tied_embedding": False, "init_std": 0.02, "dropout": 0.0}
PLAIN = {"muon_lr": None, "amsgrad": False, "schedule": "cosine"}


def test_mad_is_the_protocol_of_its_authors():
    config = preset_config("mad", "in-context-recall", MIXER)
    optimizer = OptimizerConfig(
        lr=5e-4, final_lr=1e-6, warmup=0.0, betas=(0.9, 0.999), weight_decay=0.0, clip=None, **PLAIN
    )
    assert dataclasses.asdict(config) == dataclasses.asdict(TrainConfig()) | {
        "task": {"name": "in-context-recall", "vocab_size": 16, "seq_len": 128, "compat": "none"} | config.task,
        "mixer": TrainConfig(mixer=MIXER).mixer,
        "model": dataclasses.asdict(ModelConfig(d_model=128, num_layers=2, mlp_size=352, **SMALL_WEIGHTS)),
        "optimizer": dataclasses.asdict(optimizer),
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
    steps = {12_800: (20_000, 100), 1_600: (2_500, 13), 256: (400, 10), None: (20_000, 100)}
    steps[800] = (1_250, 10)  # an epoch is 6.25 batches; validations are 10 apart at least
    assert {size: preset_steps("mad", size, 128) for size in steps} == steps
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


PRESET = r"`preset` must be one of \['exact', 'exact-s3', .*'formal', 'mad', 'paper-.*'\], got 'mat'"
NAME = r"mixer: `name` must be one of \[.*'h_lru'.*\], got 'mamba9'"
EXACT_TASK = r"`task` must be one of \['cycle-navigation', .*\], got 'modular-arithmetic'"
GRID = r"^settings: `preset` must be one of \['exact', 'formal', 'mad'\], got 'madd'\.$"
UNKNOWN = [
    (preset_config, ("mat", "memorization"), PRESET),
    (preset_config, ("mad", "parity"), r"`task` must be one of \['compression', .*\], got 'parity'"),
    (preset_config, ("mad", "memorization", {"name": "mamba9"}), NAME),
    (preset_config, ("exact", "modular-arithmetic"), EXACT_TASK),
    (preset_config, ("paper-h16", "parity"), r"^preset_config: `task` of 'paper-h16' must be 'text', got 'parity'\.$"),
    (preset_grid, ("madd", "compression", MIXER), GRID),
    (paper_model, ("mad",), r"^paper_model: `preset` must be one of \['paper-bd1', .*\], got 'mad'\.$"),
]


@pytest.mark.parametrize(("function", "names", "message"), UNKNOWN)
def test_unknown_names_are_told_with_the_known(function, names, message):
    with refused(message):
        function(*names)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_exact_tracking_has_a_start_short_lengths_first_and_the_penalty(size):
    preset = f"exact-s{size}"
    config = preset_config(preset)
    assert config.task == config.task | {"name": "permutation", "group": f"S{size}", "seq_len": 64, "start": True}
    assert config.mixer["block_size"] == size
    assert sorted(config.train_lengths) == list(config.train_lengths)
    assert config.train_lengths[-1] == config.task["seq_len"]
    assert config.row_entropy > 0
    assert max(config.test_lengths) == 64 * config.task["seq_len"]
    assert preset_config(preset, "permutation", MIXER) == dataclasses.replace(config, mixer=MIXER)
    with refused(f"`task` of '{preset}' must be 'permutation', got 'parity'"):
        preset_config(preset, "parity")


SIZES = [  # task, M, N, D, layers
    ({"name": "parity"}, 3, 16, 64, 1),
    ({"name": "even-pairs"}, 3, 16, 64, 1),
    ({"name": "cycle-navigation"}, 6, 16, 64, 1),
    ({"name": "cycle-navigation", "cycle_length": 7}, 8, 16, 64, 1),
    ({"name": "modular-counting", "modulus": 3}, 4, 16, 64, 1),
    ({"name": "modular-arithmetic-simple"}, 6, 16, 64, 2),
    ({"name": "permutation"}, 6, 32, 128, 1),
    ({"name": "permutation", "group": "A5", "generators": 12}, 6, 32, 128, 1),
    ({"name": "permutation", "group": "Z3xA4", "generators": "all"}, 5, 32, 128, 1),
]


@pytest.mark.parametrize(("task", "block_size", "num_blocks", "d_model", "layers"), SIZES)
def test_exact_fits_its_sizes_to_the_task(task, block_size, num_blocks, d_model, layers):
    config = preset_config("exact", task)
    assert config.task == {**config.task, **task, "seq_len": 40, "min_len": 1, "start": True, "scored": "last"}
    assert config.mixer == {**config.mixer, "name": "bd_lru", "block_size": block_size, "num_blocks": num_blocks}
    assert (config.model.d_model, config.model.num_layers, config.model.mlp_size) == (d_model, layers, 2 * d_model)
    assert config.curriculum.first == 1
    assert config.curriculum.quiet is not None
    assert config.batch_size * config.curriculum.row == 2048
    assert config.test_lengths == ("40-256",)
    assert config.row_entropy == (0.15 if layers == 2 else 0.1)
    assert config.block_dropout == 0.5
    optimizer = (config.optimizer.betas, config.optimizer.amsgrad)
    assert optimizer == (((0.9, 0.999), True) if layers == 2 else ((0.9, 0.95), False))
    assert config.steps == (12_000 if layers == 2 else 6_000 if task["name"] == "permutation" else 5_000)
    settled = (config.curriculum.prune_after, config.curriculum.prune_lr, config.curriculum.quiet)
    assert settled == ((100, 0.3, 500) if layers == 2 else (500, 1.0, 500))
    assert (config.curriculum.shared, config.curriculum.queries) == (3, 20)
    assert config.sharpen == 1e4
    assert config.task["name"] in PRESETS["exact"]
    assert TrainConfig.from_json(config.to_json()) == config


def test_exact_takes_from_the_recipe_what_a_mixer_can_have():
    own, lstm = preset_config("exact", "parity"), preset_config("exact", "parity", {"name": "lstm", "hidden_size": 8})
    assert (lstm.row_entropy, lstm.block_dropout, lstm.sharpen) == (0, 0, None)
    assert (own.curriculum.prune, lstm.curriculum.prune, lstm.curriculum.queries) == (24, None, 0)
    same = {name: getattr(own, name) for name in ("row_entropy", "block_dropout", "sharpen", "curriculum")}
    assert dataclasses.replace(lstm, mixer=own.mixer, **same) == own
    tanh = preset_config("exact", "parity", {**own.mixer, "normalization": "tanh"})
    assert (tanh.row_entropy, tanh.sharpen) == (own.row_entropy, None)


# as in the paper: blocks, block size, and how many numbers there are besides embedding and head
PAPER = {
    "paper-bd1": ({"name": "bd_lru", "num_blocks": 2112, "block_size": 1}, 134_549_760),
    "paper-bd2": ({"name": "bd_lru", "num_blocks": 844, "block_size": 2}, 134_486_112),
    "paper-bd4": ({"name": "bd_lru", "num_blocks": 302, "block_size": 4}, 134_645_280),
    "paper-bd8": ({"name": "bd_lru", "num_blocks": 96, "block_size": 8}, 134_582_016),
    "paper-bd16": ({"name": "bd_lru", "num_blocks": 28, "block_size": 16}, 135_180_288),
    "paper-h16": ({"name": "h_lru", "num_channels": 242, "order": 16, "form": "observer"}, 132_520_920),
    "paper-lstm": (
        {"name": "lstm", "hidden_size": 896},  # its number is not in the paper: gates, read-out, SwiGLU, norms
        12 * (4 * 896 * (768 + 896 + 2) + 896 * 768 + 3 * 768 * 2048 + 2 * 768) + 768,
    ),
}


@pytest.mark.parametrize("preset", PAPER)
def test_the_language_models_have_the_papers_size(preset):
    mixer, expected = PAPER[preset]
    with torch.device("meta"):
        model = paper_model(preset)
    assert not model.config["tied_embedding"]
    assert model.embedding.weight.shape == model.head.weight.shape == (50_280, 768)
    assert model.num_parameters() - 2 * 50_280 * 768 == expected
    assert model.config["mixer"] == preset_config(preset).mixer == TrainConfig(mixer=mixer).mixer


@pytest.mark.parametrize("preset", PAPER)
def test_the_language_models_are_trained_as_in_the_paper(preset):
    config = preset_config(preset, "text")
    assert config == preset_config(preset)
    named = {key: config.task[key] for key in ("name", "tokenizer", "bpe_vocab_size", "seq_len")}
    assert named == {"name": "text", "tokenizer": "bpe", "bpe_vocab_size": 50_280, "seq_len": 2048}
    assert config.model == ModelConfig(d_model=768, num_layers=12, mlp_size=2048, **SMALL_WEIGHTS)
    assert config.optimizer == OptimizerConfig(
        lr=6e-3, final_lr=1e-5, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, **PLAIN
    )
    assert (config.steps, config.batch_size) == (18_850, 256)
    assert preset_steps(preset, None, 256) == (18_850, config.eval_every)
    assert TrainConfig.from_json(config.to_json()) == config


def test_a_language_preset_with_another_mixer():
    assert preset_config("paper-bd4", mixer=MIXER) == dataclasses.replace(preset_config("paper-bd4"), mixer=MIXER)
