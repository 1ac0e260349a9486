"""Hidden blocks: what the read-out sees, when, and that a run resumes with them. The penalty: test_training_exact."""

from unittest import mock

import pytest
import torch
from run_helpers import assert_same_files, run, run_in_parts, small_config

from statemix import SequenceModel
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.training import regularization
from statemix.training.config import ModelConfig
from statemix.training.evaluate import answer, cross_entropy
from statemix.training.regularization import (
    dropout_seed,
    entropy_weight,
    hidden_blocks,
    noisy_gates,
    penalty,
    row_entropies,
    strengths,
)

MIXERS = [
    {"name": "bd_lru", "num_blocks": 40, "block_size": 3},
    {"name": "h_lru", "num_channels": 40, "order": 3},
    {"name": "h_lru", "num_channels": 40, "order": 3, "form": "observer"},
]


@pytest.mark.parametrize("mixer", MIXERS, ids=["block", "companion", "observer"])
def test_whole_blocks_are_hidden_for_whole_sequences(mixer):
    """What the read-out of each layer is given, against what it is given without."""
    torch.manual_seed(0)
    model = SequenceModel(7, 16, 2, mixer)
    seen, tokens = [], torch.randint(7, (6, 9))
    for layer in model.mixers:  # a hook, so that neither run is fused
        layer.output.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].unflatten(2, (-1, 40))))
    model(tokens)
    whole = seen.pop(0)[:, 2:]  # lags before the beginning are zero
    seen.clear()
    with hidden_blocks(model, 0.25):
        model(tokens)
    first, second = (states[:, 2:] for states in seen)
    factor = first / whole  # (6, 7, M or 1, 40)
    assert whole.abs().min() > 0
    assert factor.min() == 0
    assert torch.allclose(factor, (factor > 0) / 0.75, rtol=1e-5)
    assert torch.equal(factor > 0, (factor > 0)[:, :1, :1].expand(factor.shape))
    assert 0.15 < (factor == 0).float().mean() < 0.35
    assert len({tuple(row.tolist()) for row in factor[:, 0, 0] > 0}) == 6  # a sequence has blocks of its own
    assert not torch.equal(second[:, 0, 0] == 0, first[:, 0, 0] == 0)


def test_nothing_is_hidden_afterwards_or_at_zero():
    torch.manual_seed(0)
    model = SequenceModel(7, 16, 1, MIXERS[0])
    tokens = torch.randint(7, (4, 20))
    before = model(tokens)[0]
    with hidden_blocks(model, 0.0):
        assert torch.equal(model(tokens)[0], before)
    with hidden_blocks(model, 0.5):
        assert not torch.allclose(model(tokens)[0], before)
    assert torch.equal(model(tokens)[0], before)


def test_what_is_dropped_is_of_the_seed_the_step_and_the_process():
    def drawn(seed, step, process, callers):
        torch.manual_seed(callers)
        with dropout_seed(small_config(seed=seed, block_dropout=0.5), step, process, torch.device("cpu")):
            return torch.rand(4)

    assert torch.equal(drawn(0, 3, 0, callers=1), drawn(0, 3, 0, callers=2))
    for other in ((1, 3, 0), (0, 4, 0), (0, 3, 1)):
        assert not torch.equal(drawn(*other, callers=1), drawn(0, 3, 0, callers=1))


def test_the_schedules_turn_in_the_middle():
    config = small_config(steps=8, row_entropy=0.4, block_dropout=0.5, gate_noise=0.3)
    assert [entropy_weight(config, step) for step in (0, 4, 5, 6, 8)] == pytest.approx([0, 0, 0.1, 0.2, 0.4])
    found = [strengths(config, step, None) for step in (0, 3, 4, 7)]
    assert [strong.hidden for strong in found] == [0.5, 0.5, 0, 0]
    assert [strong.noise for strong in found] == [0.3, 0.3, 0, 0]


@pytest.mark.parametrize("mixer", MIXERS, ids=["block", "companion", "observer"])
def test_noise_is_on_raw_gates_while_it_lasts(mixer):
    torch.manual_seed(0)
    model = SequenceModel(5, 16, 2, mixer)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def moved(size, seed, step):
        with noisy_gates(model, size, seed, step):
            return {key: value - before[key] for key, value in model.state_dict().items()}

    first = moved(0.5, seed=1, step=7)
    for key, change in first.items():
        if "raw_gates.projection.weight" in key:
            assert change.std().item() == pytest.approx(0.5, rel=0.2)
        else:
            assert not change.any()
    assert all(torch.equal(change, first[key]) for key, change in moved(0.5, seed=1, step=7).items())
    gates = next(key for key in first if "raw_gates.projection.weight" in key)
    for other in (moved(0.5, seed=2, step=7), moved(0.5, seed=1, step=8)):
        assert not torch.allclose(other[gates], first[gates], atol=0.1)
    assert not moved(0.0, seed=1, step=7)[gates].any()
    with pytest.raises(KeyError), noisy_gates(model, 0.5, 1, 7):
        raise KeyError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_penalty_is_of_batches_without_an_error_alone():
    logits = torch.eye(3)[torch.tensor([[0, 2, 1]])]
    entropies = [torch.tensor(0.5), torch.tensor(0.25)]
    right, wrong = torch.tensor([[0, IGNORE_INDEX, 1]]), torch.tensor([[0, 2, 2]])
    assert float(penalty(entropies, 0.1, logits, right)) == pytest.approx(0.075)
    assert penalty(entropies, 0.1, logits, wrong) == 0
    assert penalty([], 0.1, logits, right) == 0


def test_blocks_are_hidden_in_the_first_half_of_training(tmp_path):
    first_losses = set()
    for share in (0.0, 0.5):
        config = small_config(steps=7, eval_every=7, block_dropout=share)
        with mock.patch.object(regularization, "hidden_blocks", side_effect=hidden_blocks) as spy:
            first_losses.add(run(tmp_path / str(share), config).metrics[0]["loss"])
        assert [call.args[1] for call in spy.call_args_list] == [share] * 4 + [0.0] * 3
    assert len(first_losses) == 2


def test_a_resumed_run_hides_the_same_blocks(tmp_path):
    """With dropout beside it: both draw from the same stream of the step."""
    dropping = {"block_dropout": 0.5, "gate_noise": 0.1, "model": ModelConfig(d_model=8, dropout=0.1)}
    config = small_config(steps=8, eval_every=2, **dropping)
    whole = run(tmp_path / "whole", config)
    assert_same_files(run_in_parts(tmp_path / "stopped", config, 3).out, whole.out)


@pytest.mark.parametrize(("length", "shared"), [(40, True), (5, False)])
def test_the_entropy_of_a_table_is_that_of_all_its_tokens(length, shared):
    torch.manual_seed(0)
    model = SequenceModel(5, 8, 2, {"name": "bd_lru", "num_blocks": 4, "block_size": 2}).double()
    tokens = torch.randint(5, (3, length))
    assert (model._rows(tokens) is not None) == shared
    with row_entropies(model, enabled=True) as entropies:
        model(tokens)
    x, wanted = model.embedding(tokens), []
    for layer in model.layers:
        wanted.append(layer.mixer.row_entropy(layer.mixer_norm(x)).mean().item())
        x, _ = layer(x, None, None)
    assert [entropy.item() for entropy in entropies] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_logits_that_are_not_scored_are_zeros_where_most_are_not(share):
    torch.manual_seed(0)
    model = SequenceModel(5, 8, 2, {"name": "bd_lru", "num_blocks": 4, "block_size": 2}).double()
    tokens, scored = torch.randint(5, (3, 40)), torch.rand(3, 40) < share
    batch = Batch(tokens, torch.where(scored, tokens, IGNORE_INDEX))
    logits, state = answer(model, batch, None)
    wanted, wanted_state = model(tokens)
    assert torch.allclose(logits[scored], wanted[scored], rtol=1e-12)
    assert bool((logits[~scored] == 0).all()) == (share < 0.5)
    assert torch.allclose(state[1], wanted_state[1], rtol=1e-12)
    assert cross_entropy(logits, batch.targets).item() == pytest.approx(cross_entropy(wanted, batch.targets).item())
