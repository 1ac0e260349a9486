"""What no function takes is refused at its door by the name of the argument: no tensor, another dtype, out of range."""

import contextlib
import json
import re

import pytest
import torch
from helpers import SCANS
from mixer_helpers import SPECS, D, build, each_mixer

from statemix import SequenceModel, TrainConfig
from statemix.cli import main
from statemix.decoder import Decoder
from statemix.gates import normalize
from statemix.generate import generate
from statemix.mixers import build_mixer
from statemix.tasks import build_task

NO_FLOATS = {
    "a number": (3, "be a tensor, got int"),
    "a list": ([[1.0]], "be a tensor, got list"),
    "integers": (torch.ones(2, 3, D, dtype=torch.int64), "have a floating-point dtype of 16 bits or more, got torch.i"),
    "complex": (
        torch.ones(2, 3, D, dtype=torch.complex64),
        "have a floating-point dtype of 16 bits or more, got torch",
    ),
    "eight bits": (torch.ones(2, 3, D).to(torch.float8_e4m3fn), "have a floating-point dtype of 16 bits or more, got"),
    "sparse": (torch.ones(2, 3, D).to_sparse(), "be a dense tensor, got one of the layout torch.sparse_coo"),
}
each_wrong = pytest.mark.parametrize("wrong", NO_FLOATS)


@each_wrong
@each_mixer
@pytest.mark.parametrize("argument", ["x", "state"])
def test_a_mixer_reads_and_carries_floats(generator, mixer, wrong, argument):
    value, rule = NO_FLOATS[wrong]
    layer = build(mixer, generator, torch.float32)
    told = rf"^{type(layer).__name__}: `{argument}` must {re.escape(rule)}"
    given = {"x": torch.ones(2, 3, D), argument: value}
    for with_gradients in (True, False):  # without, a step is a kernel's where one serves
        with torch.set_grad_enabled(with_gradients), pytest.raises(TypeError, match=told):
            layer(**given)
        stepped = {
            name: x[:, 0] if name == "x" and torch.is_tensor(x) and not x.is_sparse else x for name, x in given.items()
        }
        with torch.set_grad_enabled(with_gradients), pytest.raises(TypeError, match=told):
            layer.step(**stepped)


@each_wrong
@pytest.mark.parametrize("kind", SCANS)
def test_a_scan_reads_floats(kind, wrong):
    value, rule = NO_FLOATS[wrong]
    for argument in ("raw_gates", "values", "initial_state"):
        good = torch.ones(2, 3, 3)
        given = {"raw_gates": good, "values": good, argument: value}
        with pytest.raises(TypeError, match=rf"^{kind}_scan: `{argument}` must {re.escape(rule)}"):
            SCANS[kind](**given)


@each_wrong
def test_gates_are_floats(wrong):
    value, rule = NO_FLOATS[wrong]
    with pytest.raises(TypeError, match=rf"^normalize: `raw_gates` must {re.escape(rule)}"):
        normalize(value, "softmax", -1)


@pytest.mark.parametrize(
    ("dim", "error", "told"),
    [
        (None, TypeError, "be an int, got None"),
        (True, TypeError, "be an int, got True"),
        (2, ValueError, r"be an axis of the shape \(3, 2\), got 2"),
        (-(2**70), ValueError, r"be an axis of the shape \(3, 2\), got -"),
    ],
)
def test_gates_have_the_axis(dim, error, told):
    with pytest.raises(error, match=rf"^normalize: `dim` must {told}"):
        normalize(torch.ones(3, 2), "linear", dim)
    with pytest.raises(ValueError, match=r"^normalize: `raw_gates` must have an entry along `dim` = 0, got \(0, 2\)"):
        normalize(torch.ones(0, 2), "linear", 0)


def make_model() -> SequenceModel:
    return SequenceModel(11, 8, 1, SPECS["bd_lru"])


TOKENS = [  # what no model reads
    ([1, 2], TypeError, r"be a tensor, got list\.$"),
    (True, TypeError, r"be a tensor, got bool\.$"),
    (torch.ones(1), TypeError, r"be int64 or int32, got torch\.float32\.$"),
    (torch.tensor([1]).to_sparse(), TypeError, r"be a dense tensor, got one of"),
    (torch.tensor([11]), IndexError, r"be in \[0, 11\), got 11\.$"),
    (torch.tensor([-1]), IndexError, r"be in \[0, 11\), got -1\.$"),
    (torch.tensor([2**63 - 1]), IndexError, r"be in \[0, 11\), got 92"),
]


@pytest.mark.parametrize(("tokens", "error", "told"), TOKENS, ids=str)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_model_reads_tokens_of_its_vocabulary(tokens, error, told, with_gradients):
    model = make_model()
    is_dense = torch.is_tensor(tokens) and not tokens.is_sparse
    calls = [("SequenceModel", model, tokens[None] if is_dense else tokens), ("SequenceModel", model.step, tokens)]
    calls.append(("Decoder" if error is TypeError else "SequenceModel|step", Decoder(model).step, tokens))
    with torch.set_grad_enabled(with_gradients):
        for owner, call, given in calls:
            with pytest.raises(error, match=rf"^({owner}): `tokens` must {told}"):
                call(given)


@pytest.mark.parametrize(
    ("state", "error", "told"),
    [
        (3, TypeError, r"^SequenceModel: `state` must be a sequence of tensors, got int\.$"),
        (torch.ones(1, 3, 5), TypeError, r"^SequenceModel: `state` must be a sequence of tensors, got Tensor\.$"),
        ((), ValueError, r"^SequenceModel: `state` must have one tensor per layer = 1, got 0\.$"),
        ([None], None, ""),
        ("3", TypeError, r"^BDLRU: `state` must be a tensor, got str\.$"),
        ([torch.ones(1, 3, 5, dtype=torch.int64)], TypeError, r"^BDLRU: `state` must have a floating-point dtype"),
    ],
    ids=str,
)
def test_a_model_goes_on_from_a_state_of_each_layer(state, error, told):
    model, tokens = make_model(), torch.tensor([1])
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            for call in (lambda: model.step(tokens, state), lambda: model(tokens[None], state)):
                with contextlib.nullcontext() if error is None else pytest.raises(error, match=told):
                    call()


def test_a_whole_number_may_be_a_temperature():
    model = make_model()
    for temperature in (1, 2**70):  # of which numpy makes no float by itself
        assert generate(model, [[1]], 3, temperature=temperature) == generate(
            model, [[1]], 3, temperature=float(temperature)
        )


INTEGERS = [
    name for name, value in vars(TrainConfig()).items() if isinstance(value, int) and not isinstance(value, bool)
]


@pytest.mark.parametrize("number", [-1, -(2**63) - 1, 2**63, 2**64])
@pytest.mark.parametrize("name", [*INTEGERS, "task.seq_len", "mixer.num_blocks", "model.d_model"])
def test_the_whole_numbers_of_a_run_are_those_of_json(capsys, tmp_path, name, number):
    flag = f"--{name.replace('_', '-')}"
    assert main(["train", flag, str(number), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    told = name if name.startswith("model.") else name.rpartition(".")[2]
    assert re.search(rf"\w: `{re.escape(told)}` must be", error)
    assert str(number) in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_large_number_of_a_config_is_refused_wherever_it_is():
    for text in ({"steps": 2**63}, {"seed": 2**64}, {"model": {"d_model": 2**63}}, {"test_lengths": [5, 2**63]}):
        with pytest.raises((TypeError, ValueError), match=r"^TrainConfig: `[\w.]+` must be"):
            TrainConfig.from_json(json.dumps(text))
    with pytest.raises(ValueError, match=r"^TrainConfig: `optimizer\.lr` must be below 2\^63, got 1000"):
        TrainConfig(optimizer=type(TrainConfig().optimizer)(lr=10**30))


def test_a_batch_is_of_a_split_and_a_size():
    with pytest.raises(ValueError, match=r"^sample: `batch_size` must be below 2\^31, got 2147483648\.$"):
        build_task({"name": "parity", "seq_len": 9}).sample("train", 2**31)
    with pytest.raises(ValueError, match=r"^sample: `split` must be one of \['test', 'train', 'valid'\], got \{\}\.$"):
        build_task({"name": "parity", "seq_len": 9}).sample({}, 1)


def test_a_mixer_has_no_more_than_an_index_can_count():
    with pytest.raises(ValueError, match=r"^BDLRU: `num_blocks` must be below 2\^63, got 9223"):
        build_mixer({"name": "bd_lru", "num_blocks": 2**63, "block_size": 2}, D)
