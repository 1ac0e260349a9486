"""train.py: runs that end before their last step, and runs of an autoencoder."""

import dataclasses
import math
import shutil

from run_helpers import assert_same_files, refused, run, run_in_parts, small_config, ten_steps

from statemix import TrainConfig
from statemix.model import AutoEncoder, load_model
from statemix.training.config import ModelConfig, OptimizerConfig


def test_training_ends_when_patience_does(tmp_path):
    """The learning rate of ten_steps grows to an absurd one: the first validation, at step 4, is the best."""
    long = ten_steps(steps=20, eval_every=2, patience=2)
    whole = run(tmp_path / "whole", dataclasses.replace(long, patience=None))
    best = min((line["valid_loss"], line["step"]) for line in whole.metrics if "valid_loss" in line)[1]
    result = run(tmp_path / "run", long)
    assert result.summary["steps"] == best + 4 < 20
    assert result.summary["best_step"] == best
    assert result.metrics[-1]["step"] == best + 4
    assert_same_files(run_in_parts(tmp_path / "stopped", long, best + 3).out, result.out)
    assert_ends_again(tmp_path, result, long)


def assert_ends_again(tmp_path, result, config):
    """As where a run was killed after its last validation, before the test."""
    killed = shutil.copytree(result.out, tmp_path / "killed")
    (killed / "result.json").unlink()
    assert_same_files(run(killed, config).out, result.out)


def test_training_ends_at_the_accuracy_asked_for(tmp_path):
    whole = run(tmp_path / "whole", small_config(steps=6))
    accuracies = {line["step"]: line["valid_token_accuracy"] for line in whole.metrics if "valid_loss" in line}
    stop = max(list(accuracies.values())[:5])
    first = next(step for step, accuracy in accuracies.items() if accuracy >= stop)
    assert 1 <= first <= 5
    config = small_config(steps=6, stop_accuracy=stop)
    result = run(tmp_path / "run", config)
    assert result.summary["steps"] == first
    assert [line["step"] for line in result.metrics if "valid_loss" in line] == list(range(1, first + 1))
    assert_ends_again(tmp_path, result, config)


def test_a_run_that_ends_before_its_first_line_of_training_has_one(tmp_path):
    config = small_config(steps=300, log_every=100, eval_every=2, stop_accuracy=1e-9)
    result = run(tmp_path / "run", config)
    assert [line["step"] for line in result.metrics] == [2, 2]
    assert result.summary["train_tokens_per_s"] == result.metrics[0]["tokens_per_s"]


def test_a_compression_task_trains_an_autoencoder(tmp_path):
    config = TrainConfig(
        task={"name": "compression", "vocab_size": 4, "seq_len": 6},
        mixer={"name": "bd_lru", "num_blocks": 4, "block_size": 2},
        model=ModelConfig(d_model=16),
        optimizer=OptimizerConfig(lr=1e-2),
        steps=60,
        batch_size=16,
        eval_every=30,
        eval_sequences=32,
        log_every=60,
    )
    result = run(tmp_path / "run", config)
    model = load_model(result.out / f"step-{result.summary['best_step']}")
    assert type(model) is AutoEncoder
    assert len(result.summary["test"]["6"]["accuracy_by_position"]) == 6
    assert result.summary["test"]["6"]["loss"] < math.log(4) - 0.1  # of guessing among four tokens
    with refused(r"`test_lengths` must be the task's `seq_len` = 6: an autoencoder has one .*12"):
        dataclasses.replace(config, test_lengths=(6, 12))
