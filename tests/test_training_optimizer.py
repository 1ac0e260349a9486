"""The optimizer: which parameters Muon takes, its rule against torch's own, and runs that resume with it."""

import dataclasses
import shutil

import pytest
import torch
from run_helpers import assert_same_files, refused, run, run_in_parts, seal, small_config
from torch import nn

from statemix import SequenceModel
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.optimizer import MuonAdamW, make_optimizer, orthogonalized, set_learning_rate

SMALL = small_config(model=ModelConfig(d_model=16, num_layers=2), steps=6, eval_every=2)


def a_model(mixer: dict) -> SequenceModel:
    return SequenceModel(7, 8, 2, mixer)


MIXERS = [{"name": "bd_lru", "num_blocks": 4, "block_size": 2}, {"name": "lstm", "hidden_size": 6}]


@pytest.mark.parametrize("mixer", MIXERS)
def test_muon_takes_the_matrices_of_the_layers_alone(mixer):
    model = a_model(mixer)
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.004, muon_lr=0.02))
    muon = {id(p) for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    wanted = {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    assert muon == wanted
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [group["lr_share"] for group in optimizer.param_groups] == [1.0, 1.0, 5.0]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_without_muon_all_is_adamw(mixer, amsgrad):
    """The same numbers as torch.optim.AdamW, bit for bit."""
    torch.manual_seed(0)
    model, other = a_model(mixer), a_model(mixer)
    other.load_state_dict(model.state_dict())
    mine = make_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0.0, amsgrad=amsgrad))
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, amsgrad=amsgrad)
    tokens = torch.randint(7, (2, 5))
    for _ in range(3):
        for each, optimizer in ((model, mine), (other, theirs)):
            optimizer.zero_grad()
            each(tokens)[0].square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12), (1, 5)])
def test_the_orthogonalized_matrix_keeps_the_singular_vectors(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    x = sizes / sizes.norm()  # the same polynomial, of each singular value
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonalized([matrix])[0], u @ x.diag() @ v)
    assert float(x.min()) > 0.5
    assert float(x.max()) < 1.3


def test_many_matrices_at_once_are_each_as_alone():
    torch.manual_seed(1)
    shapes = [(6, 6), (12, 6), (6, 9), (4, 12), (5, 4)]  # three of 6 rows or columns, two of 4
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [torch.randn(6, 7)]
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        torch.testing.assert_close(result, orthogonalized([matrix])[0])
    assert orthogonalized([]) == []


@pytest.mark.parametrize("shape", [(40, 10), (10, 10)])
def test_float32_orthogonalizes_a_nearly_singular_matrix(shape):
    """In the Gram matrix the smallest eigenvalue, 1e-10, is below float32's rounding, 6e-8. Four steps raise that error
    by a^8 = 20,000 to 1e-3, of which the last makes b / a: 2e-3 of such a direction."""
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u @ torch.logspace(0, -5, 10, dtype=torch.float64).diag() @ v
    (wanted,), (actual,) = orthogonalized([matrix]), orthogonalized([matrix.float()])
    assert (actual - wanted).norm() < 2e-3 * wanted.norm()


def test_the_rule_is_that_of_torch(recwarn):
    """torch's iterates in bfloat16, so a step differs by a percent of it; the momentum is the same."""
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(12, 5))
    other = nn.Parameter(weight.detach().clone())
    group = {"params": [weight], "weight_decay": 0.1, "orthogonal": True, "lr_share": 1.0}
    mine = MuonAdamW([group], OptimizerConfig(lr=0.05))
    theirs = torch.optim.Muon([other], lr=0.05, weight_decay=0.1, momentum=0.95)
    for _ in range(4):
        before = weight.detach().clone()
        weight.grad = torch.randn(12, 5)
        other.grad = weight.grad.clone()
        mine.step()
        theirs.step()
        step = (weight.detach() - before).norm()
        assert (weight.detach() - other.detach()).norm() < 0.05 * step
        other.data.copy_(weight.detach())
    torch.testing.assert_close(mine.state[weight]["momentum_buffer"], theirs.state[other]["momentum_buffer"])


def test_each_group_has_its_share_of_the_rate():
    optimizer = make_optimizer(a_model(MIXERS[0]), OptimizerConfig(lr=0.01, muon_lr=0.04))
    set_learning_rate(optimizer, 0.005)
    rates = [(group["orthogonal"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [(False, 0.005), (False, 0.005), (True, 0.02)]


def test_a_weight_without_gradient_stays():
    weight = nn.Parameter(torch.ones(3, 3))
    group = {"params": [weight], "weight_decay": 0.1, "orthogonal": True}
    MuonAdamW([group], OptimizerConfig()).step()
    assert torch.equal(weight, torch.ones(3, 3))


def test_after_a_rest_the_first_gradient_moves_little_with_amsgrad():
    """As where no batch had an error for long: then a weight without it moves by 1 / sqrt(1 - b2), as at first."""
    moved = {}
    for amsgrad in (False, True):
        weight = nn.Parameter(torch.zeros(1))
        config = OptimizerConfig(lr=1.0, betas=(0.0, 0.9), amsgrad=amsgrad)
        optimizer = MuonAdamW([{"params": [weight], "weight_decay": 0.0}], config)
        for gradient in [1.0] * 100 + [0.0] * 200 + [1.0]:
            before, weight.grad = weight.item(), torch.tensor([gradient])
            optimizer.step()
        moved[amsgrad] = before - weight.item()
    assert moved == {False: pytest.approx(0.1**-0.5, rel=1e-3), True: pytest.approx(1.0, rel=1e-3)}


@pytest.mark.parametrize(("dropout", "amsgrad"), [(0.0, False), (0.25, False), (0.0, True)])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, dropout, amsgrad):
    model = ModelConfig(d_model=16, num_layers=2, dropout=dropout)
    config = dataclasses.replace(SMALL, model=model, optimizer=OptimizerConfig(muon_lr=0.02, amsgrad=amsgrad))
    whole = run(tmp_path / "whole", config)
    assert_same_files(run_in_parts(tmp_path / "parts", config, 5).out, whole.out)


@pytest.mark.parametrize("own", [OptimizerConfig(muon_lr=0.02), OptimizerConfig(amsgrad=True)])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, own):
    config = dataclasses.replace(SMALL, steps=2, optimizer=own)
    run(tmp_path / "own", config)
    run(tmp_path / "adamw", dataclasses.replace(config, optimizer=OptimizerConfig()))
    shutil.copy(tmp_path / "adamw/step-2/optimizer.safetensors", tmp_path / "own/step-2")
    seal(tmp_path / "own/step-2")
    (tmp_path / "own/result.json").unlink()
    with refused(r"optimizer\.safetensors' is of another model"):
        run(tmp_path / "own", config)


def test_dropout_drops_in_training_alone():
    torch.manual_seed(0)
    model = SequenceModel(7, 8, 1, MIXERS[0], dropout=0.5)
    tokens = torch.randint(7, (2, 5))
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    with torch.no_grad():
        state = model(tokens[:, :-1])[1]
        torch.testing.assert_close(model.step(tokens[:, -1], state)[0], model(tokens)[0][:, -1])
        model.train()
        assert not torch.equal(model.step(tokens[:, -1], state)[0], model.step(tokens[:, -1], state)[0])
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dropout", [-0.1, 1.0, "0.1", True, float("nan")])
def test_dropout_out_of_range_is_named(dropout):
    with refused(r"SequenceModel: `dropout` must be a number in \[0, 1\), got "):
        SequenceModel(7, 8, 1, MIXERS[0], dropout=dropout)
