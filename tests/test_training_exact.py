"""What exact state tracking is trained with: the start token, shorter lengths first, the penalty on blurred rows."""

import math
import re

import pytest
import torch
from helpers import needs_kernels
from run_helpers import (
    ROWS_OF_GATES,
    TRAIN,
    assert_same_files,
    each_kind_of_rows,
    refused,
    run,
    run_in_parts,
    small_config,
)

from statemix import BDLRU, HLRU, SequenceModel, TrainConfig, kernels
from statemix.mixers import build_mixer
from statemix.mixers.base import Rows
from statemix.mixers.linear_recurrence import one_hot_rows
from statemix.model import load_model
from statemix.tasks import IGNORE_INDEX, PermutationComposition
from statemix.tasks.permutation import group_table
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.pruning import silence
from statemix.training.regularization import one_hot_gates, row_entropies

START = {"name": "permutation", "group": "S3", "seq_len": 5, "start": True}


def test_a_start_token_stands_before_the_sequence_and_is_not_scored():
    task = PermutationComposition("S3", seq_len=7, start=True)
    tokens, targets, _ = task.sample("train", 50)
    assert (task.vocab_size, task.length, task.seq_len, task.chance) == (7, 8, 7, 1 / 6)
    assert tokens.shape == (50, 8)
    assert (tokens[:, 0] == 6).all()
    assert (targets[:, 0] == IGNORE_INDEX).all()
    assert tokens[:, 1:].max() == 5
    bare = PermutationComposition("S3", seq_len=7).oracle(tokens[:, 1:].numpy())
    assert targets[:, 1:].tolist() == bare.tolist()
    longer = task.with_seq_len(9)
    assert (longer.start, longer.length) == (True, 10)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_start_must_be_a_bool(value):
    with pytest.raises(TypeError, match=f"^permutation: `start` must be True or False, got {value!r}.$"):
        PermutationComposition(start=value)


def test_lengths_come_one_after_another_with_as_many_tokens(tmp_path, monkeypatch):
    shapes, training_batch = [], TRAIN.training_batch

    def spy(*args):
        batch = training_batch(*args)
        shapes.append(tuple(batch.tokens.shape))
        return batch

    monkeypatch.setattr(TRAIN, "training_batch", spy)
    config = small_config(task=START, steps=7, train_lengths=(1, 2, 5), eval_every=2)
    whole = run(tmp_path / "whole", config)
    assert shapes == [(24, 2)] * 3 + [(16, 3)] * 2 + [(8, 6)] * 2
    assert_same_files(run_in_parts(tmp_path / "stopped", config, 5).out, whole.out)


def test_a_length_without_training_sequences_is_found_before_training(tmp_path):
    config = small_config(task=START | {"group": "Z1"}, train_lengths=(1, 5))
    with refused("no sequence of length 6 belongs to split 'train'"):
        run(tmp_path / "run", config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_penalty_makes_rows_one_hot_and_chooses_the_checkpoint(tmp_path):
    changes = {"steps": 80, "eval_every": 10, "log_every": 20, "task": START | {"group": "S2"}, "batch_size": 4}
    plain = run(tmp_path / "plain", small_config(**changes))
    sharp = run(tmp_path / "sharp", small_config(**changes, row_entropy=3.0))
    lines = [line for line in sharp.metrics if "valid_loss" in line]
    assert all("valid_row_entropy" not in line for line in plain.metrics)
    first_half = [[line["loss"] for line in r.metrics if "loss" in line and line["step"] <= 40] for r in (plain, sharp)]
    assert first_half[0] == first_half[1]  # the penalty begins in the middle
    assert lines[-1]["valid_row_entropy"] < 0.3 * lines[3]["valid_row_entropy"]
    sums = {line["step"]: line["valid_loss"] + 3.0 * line["valid_row_entropy"] for line in lines}
    assert sharp.summary["best_step"] == min(sums, key=sums.__getitem__)
    [best] = [line for line in lines if line["step"] == sharp.summary["best_step"]]
    assert sharp.summary["valid"]["row_entropy"] == best["valid_row_entropy"]


def test_the_entropy_of_a_run_is_that_of_its_layers(tmp_path):
    """By hand: the gates of every validation token, which are fewer than the penalty looks at."""
    config = small_config(task=START, row_entropy=0.5, model=ModelConfig(d_model=8, num_layers=2))
    result = run(tmp_path / "run", config)
    model = load_model(result.out / f"step-{result.summary['best_step']}")
    task = PermutationComposition("S3", 5, start=True)
    tokens = torch.cat([task.sample("valid", 8, index=index).tokens for index in (0, 1)])
    x, entropies = model.embedding(tokens), []
    for layer in model.layers:
        inputs = layer.mixer_norm(x)
        weights = torch.softmax(layer.mixer.raw_gates(inputs), dim=-2)
        entropies.append(-(weights * weights.log()).sum(-2).mean().item())
        x, _ = layer(x, None, None)
    assert result.summary["valid"]["row_entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-5)


def test_a_row_entropy_by_hand():
    layer = BDLRU(4, num_blocks=3, block_size=2)
    with torch.no_grad():
        layer.raw_gates.projection.weight.zero_()
        layer.raw_gates.projection.bias.view(2, 3, 3).copy_(torch.tensor([[0.0, 0.0, 0.0], [9e9, 0.0, 0.0]])[..., None])
    assert layer.row_entropy(torch.randn(1, 5, 4)).mean().item() == pytest.approx(math.log(3) / 2)
    signed = HLRU(4, num_channels=2, order=1, normalization="linear")
    with torch.no_grad():
        signed.raw_gates.projection.weight.zero_()
        signed.raw_gates.projection.bias.view(2, 2).copy_(torch.tensor([[-1.0], [3.0]]))
    by_hand = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert signed.row_entropy(torch.randn(1, 5, 4)).mean().item() == pytest.approx(by_hand)


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "relu", "tanh"])
def test_a_row_entropy_of_weights_that_are_zero_has_a_gradient(normalization):
    layer = BDLRU(4, num_blocks=3, block_size=2, normalization=normalization)
    with torch.no_grad():
        layer.raw_gates.projection.weight.mul_(1e4)
    layer.row_entropy(torch.randn(1, 5, 4)).mean().backward()
    assert layer.raw_gates.projection.weight.grad.isfinite().all()


@pytest.mark.parametrize("selective", [True, False])
def test_sharpened_rows_are_powers(selective):
    torch.manual_seed(0)
    layer = BDLRU(4, num_blocks=3, block_size=2, selective=selective)
    x = torch.randn(2, 5, 4)
    before = torch.softmax(layer.raw_gates(x), dim=-2).detach()
    layer.sharpen(3.0)
    after = torch.softmax(layer.raw_gates(x), dim=-2)
    assert torch.allclose(after, before**3 / (before**3).sum(-2, keepdim=True), rtol=1e-5)
    layer.sharpen(1e6)
    assert layer.row_entropy(x).mean().item() == 0


def test_what_cannot_be_sharpened():
    text = "sharpen: `normalization` must be 'softmax' and `factor` above 0 and finite, got "
    for layer, factor, what in (
        (BDLRU(4, 3, 2, normalization="tanh"), 2.0, "normalization='tanh' and factor=2.0"),
        (BDLRU(4, 3, 2), 0.0, "normalization='softmax' and factor=0.0"),
        (BDLRU(4, 3, 2), math.inf, "normalization='softmax' and factor=inf"),
    ):
        with refused(f"^{re.escape(text + what)}.$"):
            layer.sharpen(factor)


def test_a_start_token_and_one_hot_rows_track_a_group_exactly():
    """By construction: components 0-2 of a block hold marks that the start token writes, and every token permutes."""
    torch.manual_seed(0)
    elements, table = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], group_table("S3")
    model = SequenceModel(7, 8, 1, {"name": "bd_lru", "num_blocks": 1, "block_size": 3})
    layer = model.mixers[0]
    gates = torch.zeros(7, 3, 4)
    for token, element in enumerate(elements):
        for i in range(3):
            gates[token, i, element[i]] = 1  # h'[i] = h[element[i]]
    gates[6, :, 3] = 1
    with torch.no_grad():
        layer.raw_gates.projection.bias.zero_()
        layer.raw_gates.projection.weight[:, :7].copy_(1e4 * gates.flatten(1).T)
        layer.raw_gates.projection.weight[:, 7].zero_()
        layer.values.weight.zero_()
        layer.values.weight[:, 6] = torch.tensor([1.0, 2.0, 3.0])
    tokens = PermutationComposition("S3", 4096, start=True).sample("test", 4).tokens
    x = torch.eye(8)[tokens]
    state = None
    with torch.no_grad():
        for chunk in x.split(1000, dim=1):
            _, state = layer(chunk, state)
    products = torch.zeros(4, dtype=torch.int64)
    for column in tokens[:, 1:].T:
        products = torch.from_numpy(table.astype("int64"))[products, column]
    # (x_1 o x_2)[i] = x_1[x_2[i]], and each token moves what those before it have moved: the marks are the product
    assert state[:, :, 0].tolist() == [[1.0 + elements[p][i] for i in range(3)] for p in products.tolist()]


def test_the_recipe_is_exact_far_beyond_its_lengths(tmp_path):
    """S2, a few seconds: no error in 64 sequences at 64 times the longest trained length."""
    config = TrainConfig(
        task={"name": "permutation", "group": "S2", "seq_len": 16, "start": True},
        mixer={"name": "bd_lru", "num_blocks": 8, "block_size": 2},
        model=ModelConfig(d_model=16),
        optimizer=OptimizerConfig(lr=2e-2),
        steps=200,
        batch_size=32,
        eval_every=50,
        eval_sequences=64,
        log_every=100,
        seed=1,
        train_lengths=(4, 16),
        row_entropy=0.1,
        test_lengths=(1024,),
    )
    assert run(tmp_path / "run", config).summary["test"]["1024"]["sequence_accuracy"] == 1


@pytest.mark.parametrize("length", [5, 40])  # of the longer ones the first layer's gates are a table
@each_kind_of_rows
def test_one_hot_gates_are_what_sharpened_ones_come_to(mixer, length):
    torch.manual_seed(0)
    model = SequenceModel(5, 8, 2, mixer).double()
    tokens, state = torch.randint(5, (3, length)), None
    before = model(tokens)[0]
    with one_hot_gates(model, [[], []]):
        trained = model(tokens)[0]
        with torch.no_grad():
            steps = []
            for t in range(length):
                logits, state = model.step(tokens[:, t], state)
                steps.append(logits)
            assert torch.allclose(torch.stack(steps, 1), trained, rtol=1e-10, atol=1e-12)
            assert torch.allclose(model(tokens)[0], trained, rtol=1e-10, atol=1e-12)
    assert torch.allclose(model(tokens)[0], before, rtol=1e-12, atol=1e-13)
    for layer in model.mixers:
        layer.sharpen(1e9)
    assert torch.allclose(model(tokens)[0], trained, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(before, trained, rtol=1e-3)


@pytest.mark.parametrize("length", [5, 40])
@each_kind_of_rows
def test_blocks_that_are_silenced_are_not_computed_and_change_nothing(mixer, length):
    """Outputs, gradients, entropies, and the state of the blocks that are heard; there the others are zero."""
    torch.manual_seed(0)
    model = SequenceModel(5, 8, 2, mixer).double()
    tokens, (size, blocks) = torch.randint(5, (3, length)), model.mixers[0].state_shape
    silenced = [[m * blocks + n for m in range(size) for n in gone] for gone in ((0, 2), (1,))]
    silenced[1].append(3)  # a part of a block, which is still heard
    silence(model, silenced)

    def results(names):
        state = tuple(torch.full((3, *layer.state_shape), 0.1, dtype=torch.float64) for layer in model.mixers)
        with one_hot_gates(model, names), row_entropies(model, enabled=True) as entropies:
            logits, after = model(tokens, state)
        total = logits.square().sum()
        grads = torch.autograd.grad(total, list(model.parameters()))
        return logits, grads, entropies, after

    wanted, got = results([[], []]), results(silenced)
    torch.testing.assert_close(got[0], wanted[0])
    for name, own, other in zip(dict(model.named_parameters()), got[1], wanted[1], strict=True):
        if not name.endswith("output.weight"):  # of which the columns that are silenced are set to zero again
            torch.testing.assert_close(own, other, msg=name)
    assert all(bool(own < other) for own, other in zip(got[2], wanted[2], strict=True))
    for layer, gone in enumerate(((0, 2), (1,))):
        heard = [n for n in range(blocks) if n not in gone]
        torch.testing.assert_close(got[3][layer][..., heard], wanted[3][layer][..., heard])
        assert not got[3][layer][..., gone].any()
    with one_hot_gates(model, [list(range(size * blocks)), []]):  # nothing of a layer is heard
        assert bool(model(tokens)[0].isfinite().all())
    assert all(mixer.heard is None and not mixer.one_hot for mixer in model.mixers)


@needs_kernels
@pytest.mark.parametrize("heard", [None, [4, 1]], ids=["all are heard", "two are heard"])
@pytest.mark.parametrize("normalization", ["softmax", "tanh"])
@pytest.mark.parametrize("mixer", [mixer for mixer in ROWS_OF_GATES if mixer.get("selective", True)], ids=str)
def test_one_hot_rows_of_few_tokens_are_read_from_a_table(mixer, normalization, heard, monkeypatch):
    """Of outputs, states and gradients, against gates and values at full length."""
    torch.manual_seed(0)
    layer = build_mixer(mixer | {"normalization": normalization}, 8).double()
    layer.one_hot, layer.heard = True, None if heard is None else torch.tensor(heard)
    table, places = torch.randn(5, 8).double(), torch.randint(5, (3, 40))
    state, reset = torch.randn(3, *layer.state_shape).double(), torch.rand(3, 40) < 0.1
    calls, kernel = [], kernels.layer
    monkeypatch.setattr(kernels, "layer", lambda *given, **others: calls.append(1) or kernel(*given, **others))

    def results(table):
        inputs = [each.requires_grad_() for each in (table.clone(), state.clone(), *layer.parameters())]
        layer.hidden = 0.5
        torch.manual_seed(1)
        y, final = layer.mix_rows(Rows(inputs[0], places), inputs[1], reset)
        layer.hidden = 0.0
        return y, final, *torch.autograd.grad((y.sin().sum() + final.sin().sum()), inputs, materialize_grads=True)

    got = results(table)
    assert calls == [1]
    monkeypatch.setattr(type(layer), "_fused_one_hot", lambda *given: None)
    wanted = results(table)
    assert calls == [1]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_more_tokens_than_a_layer_is_wide_have_no_table_of_one_hot_rows():
    torch.manual_seed(0)
    model = SequenceModel(20, 8, 1, {"name": "bd_lru", "num_blocks": 6, "block_size": 3})
    tokens = torch.arange(40)[None] % 20
    with one_hot_gates(model, [[]]):
        trained = model(tokens)[0]
    model.mixers[0].sharpen(1e6)
    torch.testing.assert_close(model(tokens)[0], trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_one_hot_rows_have_the_gradient_of_all_weights(signed):
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, -0.7 if signed else 0.7], [0.0, 0.0, 0.0]])[..., None]
    weights.requires_grad_()
    rows = one_hot_rows(weights)
    assert rows[..., 0].tolist() == [[0, 1, 0], [0, 0, -1 if signed else 1], [0, 0, 0]]
    scale = torch.arange(9.0).view(3, 3, 1)
    (rows * scale).sum().backward()
    assert torch.equal(weights.grad, scale)
