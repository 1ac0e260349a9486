"""train.py on text: carried state, accumulated gradients, bits per byte, resume, and what it refuses."""

import dataclasses
import importlib
import json
import math
import random
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from run_helpers import (
    DAMAGED_TENSORS,
    TRAIN,
    assert_same_files,
    differing,
    refused,
    run,
    run_in_parts,
    stopped,
    text_config,
    write_documents,
)
from safetensors.torch import load_file

from statemix import SequenceModel, TrainConfig, cli
from statemix.runs.read import read_run, row_of
from statemix.tasks import IGNORE_INDEX, Text, build_task
from statemix.text.tokenizer import load_tokenizer
from statemix.training.checkpoint import load_carried
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.evaluate import evaluate, text_figures


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STATEMIX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def source(tmp_path) -> str:
    return write_documents(tmp_path / "folder")


# ---- figures


def figures_by_hand(model, task, split, *, carry):
    """Loss, bits per byte and perplexity, document by document, in NumPy: one token after the other."""
    begin, end = task.corpus.parts[split]
    last = begin + (end - begin - 1) // task.seq_len * task.seq_len
    nats, count, size = 0.0, 0, 0
    text = task.corpus.tokens.astype(np.int64)
    begins = set(task.corpus.documents.tolist())
    state = None
    for position in range(begin, last):
        if position in begins or (not carry and (position - begin) % task.seq_len == 0):
            state = None
        with torch.no_grad():
            logits, state = model.step(torch.tensor(text[position : position + 1]), state)
        if position + 1 in begins:
            continue
        shifted = logits[0].double().numpy()
        shifted = shifted - shifted.max()
        nats -= shifted[text[position + 1]] - np.log(np.exp(shifted).sum())
        count += 1
        size += len(task.vocabulary.decode(text[position + 1 : position + 2]).encode())
    return {"loss": nats / count, "bits_per_byte": nats / math.log(2) / size, "perplexity": math.exp(nats / count)}


@pytest.mark.parametrize("carry", [False, True])
def test_the_figures_of_a_text_are_those_by_hand(tmp_path, source, carry):
    config = text_config(source, carry=carry)
    result = run(tmp_path / "run", config)
    task = build_task(config.task)
    model = SequenceModel.load(result.out / f"step-{result.summary['best_step']}")
    # with carried state a row of the validation begins in the middle of it, unless there is but one
    rows = 1 if carry else 8
    for split in ("valid", "test"):
        scores = evaluate(model, task, split, 100, rows, carry=carry)
        for key, figure in figures_by_hand(model, task, split, carry=carry).items():
            assert scores[key] == pytest.approx(figure, rel=1e-5), (split, key)
        if not carry:
            of_run = result.summary["valid"] if split == "valid" else result.summary["test"]["12"]
            assert of_run == scores


def test_a_run_of_text_leaves_its_tokenizer_and_its_figures(tmp_path, source):
    config = text_config(source)
    result = run(tmp_path / "run", config)
    task = build_task(config.task)
    assert load_tokenizer(result.out) == task.vocabulary
    assert result.summary["data"] == task.fingerprint
    assert result.summary["processes"] == 1
    for line in result.metrics:
        prefix = "valid_" if "valid_loss" in line else ""
        assert line[f"{prefix}perplexity"] == pytest.approx(math.exp(line[f"{prefix}loss"]))
        bits = line[f"{prefix}loss"] / math.log(2)
        assert bits / 2 < line[f"{prefix}bits_per_byte"] < bits  # a seventh of the characters has two bytes
    run_of_text = read_run(result.out)
    assert row_of(run_of_text)["valid_bits_per_byte"] == result.summary["valid"]["bits_per_byte"]
    shutil.rmtree(source)  # a run can be read where its text is not
    assert row_of(run_of_text)["test_12_perplexity"] == result.summary["test"]["12"]["perplexity"]


def test_the_perplexity_of_a_diverged_run_is_infinite(source):
    task = build_task(text_config(source).task)
    assert text_figures(task, 1e4, torch.tensor([0, IGNORE_INDEX, 1]))["perplexity"] == math.inf


def test_without_a_part_for_the_test_nothing_is_tested(tmp_path, source):
    config = text_config(source, task={"test": 0.0})
    with mock.patch.object(Text, "evaluation", autospec=True, side_effect=Text.evaluation) as evaluation:
        result = run(tmp_path / "run", config)
    assert [call.args[1] for call in evaluation.call_args_list] == ["valid", "valid"]
    assert result.summary["test"] == {}
    assert {"valid_loss", "valid_bits_per_byte"} <= set(row_of(read_run(result.out)))
    with refused(r"`test_lengths` must be empty: the text has no part for the test, got \(24,\)"):
        dataclasses.replace(config, test_lengths=(24,))


# ---- accumulated gradients


@pytest.mark.parametrize("carry", [False, True])
def test_gradients_in_parts_are_those_of_the_whole_batch(tmp_path, source, carry):
    """AdamW's first moment after a step is a tenth of the gradient."""
    moments, losses = {}, {}
    for parts in (1, 2, 8):
        changes = {"steps": 1, "eval_every": 1, "optimizer": OptimizerConfig(clip=None)}
        config = text_config(source, accumulate=parts, carry=carry, **changes)
        result = run(tmp_path / str(parts), config)
        moments[parts] = load_file(result.out / "step-1" / "optimizer.safetensors")
        losses[parts] = {key: value for key, value in result.metrics[0].items() if key != "tokens_per_s"}
    task = build_task(config.task)
    batch = task.carried(8) if carry else task.sample("train", 8)
    scored = (batch.targets != IGNORE_INDEX).sum(1)
    assert scored[:4].sum() != scored[4:].sum()  # or the mean of the parts' means would do
    for parts in (2, 8):
        assert losses[parts] == pytest.approx(losses[1], rel=1e-5)
        for name, moment in moments[1].items():
            assert torch.allclose(moments[parts][name], moment, rtol=1e-4, atol=1e-7), name
    largest = max(moment.abs().max().item() for name, moment in moments[1].items() if name.endswith("exp_avg"))
    assert largest > 1e-3  # far above the tolerance


# ---- carried state


def calls_of_the_model(tmp_path, config):
    """(tokens, state, reset, final state) of every training step."""
    calls, forward = [], SequenceModel.forward

    def spy(self, tokens, state=None, reset=None):
        logits, after = forward(self, tokens, state, reset)
        if self.training:
            calls.append((tokens, state, reset, after))
        return logits, after

    with mock.patch.object(SequenceModel, "forward", spy):
        run(tmp_path / "run", config)
    return calls


@pytest.mark.parametrize("parts", [1, 2])
def test_each_row_goes_on_where_it_stopped_and_gradients_do_not(tmp_path, source, parts):
    calls = calls_of_the_model(tmp_path, text_config(source, carry=True, accumulate=parts))
    assert len(calls) == 6 * parts
    assert all(state is None for _, state, _, _ in calls[:parts])
    for (tokens, _, _, after), (following, state, _, _) in zip(calls[:-parts], calls[parts:], strict=True):
        assert all(map(torch.equal, after, state))
        assert all(layer.requires_grad and not kept.requires_grad for layer, kept in zip(after, state, strict=True))
        assert tokens.shape == following.shape
    assert all(state is None for _, state, _, _ in calls_of_the_model(tmp_path / "other", text_config(source)))


@pytest.mark.parametrize(("stop", "accumulate"), [(4, 1), (5, 4)])
def test_a_run_that_carries_its_state_resumes_exactly(tmp_path, source, stop, accumulate):
    config = text_config(source, carry=True, accumulate=accumulate)
    whole = run(tmp_path / "whole", config)
    out = stopped(tmp_path / "run", config, stop)
    assert json.loads((out / "checkpoints.json").read_text())["last"] == "step-3"
    # were the state lost, the run would be another one
    lost = shutil.copytree(out, tmp_path / "lost")
    with mock.patch.object(TRAIN, "load_carried", lambda *args: [torch.zeros_like(x) for x in load_carried(*args)]):
        run(lost, config)
    assert "step-6/model.safetensors" in differing(lost, whole.out)
    assert_same_files(run(out, config).out, whole.out)


@pytest.mark.parametrize("train_sequences", [None, 20])
def test_a_run_of_text_without_carried_state_resumes_exactly(tmp_path, source, train_sequences):
    config = text_config(source, train_sequences=train_sequences)
    whole = run(tmp_path / "whole", config)
    assert_same_files(run_in_parts(tmp_path / "run", config, 4).out, whole.out)
    assert not list(whole.out.rglob("state.safetensors"))


@pytest.mark.parametrize(("spoil", "message"), DAMAGED_TENSORS)
def test_a_damaged_state_is_named(tmp_path, source, spoil, message):
    config = text_config(source, carry=True)
    path = stopped(tmp_path / "run", config, 4) / "step-3" / "state.safetensors"
    spoil(path)
    with refused(re.escape(f"'{path}' {message}")):
        run(tmp_path / "run", config)


def test_bf16_with_carried_state(tmp_path, source):
    result = run(tmp_path / "run", text_config(source, carry=True, mixed_precision="bf16"))
    assert math.isfinite(result.summary["valid"]["loss"])
    states = load_file(result.out / "step-6" / "state.safetensors")
    assert {(tuple(state.shape), state.dtype) for state in states.values()} == {((8, 3, 2), torch.float32)}


def test_carried_state_does_not_validate_worse(tmp_path):
    """The text repeats itself after 50 characters, and a window has 5: only the carried state knows where it is."""
    rng = random.Random(1)
    (tmp_path / "text").write_text("".join(rng.choice("abc") for _ in range(50)) * 60)
    task = {"seq_len": 5, "test": 0.0}
    wide = {"mixer": {"name": "bd_lru", "num_blocks": 8, "block_size": 3}, "model": ModelConfig(d_model=16)}
    config = text_config(str(tmp_path / "text"), carry=True, task=task, steps=100, eval_every=100, log_every=50, **wide)
    result = run(tmp_path / "run", config)
    model, task = SequenceModel.load(result.out / "step-100"), build_task(config.task)
    carried, fresh = (evaluate(model, task, "valid", 100, 8, carry=carry)["loss"] for carry in (True, False))
    assert carried == result.summary["valid"]["loss"]
    assert carried < fresh - 0.01  # equal, were the state passed over


# ---- what is refused


def test_a_text_that_changed_since_the_checkpoint_is_refused(tmp_path, source):
    config = text_config(source)
    out = stopped(tmp_path / "run", config, 4)
    write_documents(Path(source), seed=1)
    changed = rf"^train: checkpoint '{re.escape(str(out))}/step-[36]' was made with another text .*: what `task"
    with refused(changed):
        run(out, config)
    write_documents(Path(source))
    run(out, config)
    write_documents(Path(source), seed=1)
    with refused(changed):  # nor is it taken for the result of the new one
        run(out, config)
    run(out, config, resume="never")
    assert_same_files(out, run(tmp_path / "new", config).out)


def test_a_text_too_short_is_refused_before_training(tmp_path, source):
    for task in ({"seq_len": 400}, {"seq_len": 60, "test": 0.05}):
        with refused(r"^text: `source` must have more than `seq_len` = \d+ tokens in the part"):
            run(tmp_path / "run", text_config(source, task=task))
    assert list((tmp_path / "run").iterdir()) == []


def test_no_other_task_carries_a_state():
    with refused(r"^parity: its sequences have an end, so that no state is carried"):
        build_task({"name": "parity"}).carried(4)


# ---- the command


def test_text_is_short_for_a_task_and_its_source(tmp_path, source, capsys):
    options = ["--task.seq-len=12", "--steps=2", "--batch-size=4", "--model.d-model=8", "--eval-sequences=9", "--carry"]
    with mock.patch.object(TRAIN, "plot_curves", lambda runs, path, **_: Path(path).write_bytes(b"a picture")):
        assert cli.main(["train", "--text", source, *options, "--out", str(tmp_path / "run")]) == 0
    summary, shown = read_run(tmp_path / "run").summary["valid"], capsys.readouterr().out
    assert f"validation: {summary['loss']:.4f} nats per token, {summary['bits_per_byte']:.4f} bits per byte" in shown
    config = TrainConfig.load(tmp_path / "run" / "config.json")
    assert (config.task["name"], config.task["source"], config.task["tokenizer"]) == ("text", source, "bytes")
    assert config.carry
    both = r"`--text` is short for --task text --task\.source, but `--task` is 'p"
    for arguments, message in (
        (["--text", source, "--task", "parity"], both),
        (["--text"], r"`--text` needs a value"),
        (["--text=nothing", "--out", str(tmp_path / "x")], r"`source` must be .*, but there is no 'nothing'\."),
    ):
        assert cli.main(["train", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_of_many_processes_one_prints(tmp_path, capsys, monkeypatch):
    result = mock.Mock(summary={"best_step": 0}, out=tmp_path)
    command = importlib.import_module("statemix.cli.train")
    everything = mock.patch.multiple(
        command, train=mock.Mock(return_value=result), read_run=mock.Mock(), print_tables=mock.Mock()
    )
    for rank, prints in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with everything:
            assert cli.main(["train"]) == 0
        assert (capsys.readouterr().out != "") == prints


MIXERS = [
    {"name": "mamba2", "num_heads": 2, "head_dim": 4, "state_dim": 4},
    {"name": "h_lru", "num_channels": 4, "order": 3},
    {"name": "lstm", "hidden_size": 8},
    {"name": "attention", "head_dim": 4, "context": 20},
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
def test_mixers_train_on_documents_with_carried_state(tmp_path, source, mixer):
    result = run(tmp_path / "run", text_config(source, mixer=mixer, carry=True, steps=3))
    assert math.isfinite(result.summary["valid"]["loss"])
