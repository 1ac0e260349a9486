"""lineage.py: a run from the weights of another one, and a run that takes more steps than it was to have."""

import dataclasses
import json
import math
import re
import shutil
from unittest import mock

import pytest
from run_helpers import LSTM, TRAIN, differing, refused, run, small_config, snapshot, stopped

from statemix import AutoEncoder, SequenceModel
from statemix.files import digest_of
from statemix.runs.read import find_runs, read_run, row_of
from statemix.runs.select import group_over_seeds
from statemix.training.checkpoint import find_checkpoint
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.optimizer import learning_rate

COSINE = OptimizerConfig(lr=0.1, final_lr=0.001, warmup=0.25)
CONSTANT = OptimizerConfig(lr=0.01, final_lr=0.01, warmup=0.0)
WARM = OptimizerConfig(lr=1.0, warmup=1.0)


def config(**changes):
    return small_config(**{"steps": 4, "eval_every": 2} | changes)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of another seed, whose best checkpoint is not its last."""
    for seed in range(1, 100):
        result = run(tmp_path_factory.mktemp("other") / "run", config(seed=seed))
        if result.summary["best_step"] == 2:
            return result.out
    pytest.fail("there is no such seed")


# weights of another run


@pytest.mark.parametrize("given", ["", "step-2", "model"])
def test_the_first_weights_are_those_of_another_run(other, tmp_path, given):
    source = other / given
    if given == "model":  # as `save` leaves it, with nothing of a run
        SequenceModel.load(other / "step-2").save((source := tmp_path / "model").mkdir() or source)
    changes = {"model": ModelConfig(8, dropout=0.5), "mixer": config().mixer | {"backend": "associative"}}
    frozen = OptimizerConfig(lr=1e-30, final_lr=0.0, weight_decay=0.0)  # no step changes a weight
    result = run(tmp_path / "run", config(optimizer=frozen, **changes), init_from=source)
    assert weights(find_checkpoint(result.out)) == weights(other / "step-2") != weights(other / "step-4")
    origin = {"folder": str(source), "sha256": digest_of(other / "step-2" / "model.safetensors")}
    assert result.summary["init_from"] == origin
    assert json.loads((find_checkpoint(result.out) / "train.json").read_text())["init_from"] == origin
    assert row_of(read_run(result.out))["init_from"] == str(source)


@pytest.mark.parametrize("again", [True, False], ids=["the same call", "without it"])
def test_a_run_from_other_weights_resumes_exactly(other, tmp_path, again):
    """Also where that other run is no longer there: its weights were the first ones, and no more than that."""
    shutil.copytree(other, tmp_path / "other")
    whole = run(tmp_path / "whole", config(), init_from=tmp_path / "other")
    stopped(tmp_path / "run", config(), 3, init_from=tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    result = run(tmp_path / "run", config(), init_from=f"{tmp_path / 'other'}/" if again else None)
    assert differing(result.out, whole.out) == []
    assert run(result.out, config(), init_from=tmp_path / "other" if again else None) == result


BD_LRU = config().mixer
UNLIKE = [  # how a model that another one cannot begin with is made, and what is told of it
    ({"d_model": 9}, r"d_model=9, the config asks for 8\.$"),
    ({"num_layers": 2}, r"num_layers=2, the config asks for 1\.$"),
    ({"vocab_size": 7}, "vocab_size=7, the config asks for 6"),
    ({"mixer": LSTM}, "mixer.name='lstm', the config asks for 'bd_"),
    ({"mixer": BD_LRU | {"num_blocks": 3, "block_size": 2}}, "mixer.num_blocks=3, the config asks for 2"),
    # of the same shapes
    ({"mixer": BD_LRU | {"normalization": "tanh"}}, "mixer.normalization='tanh', the config asks for 'softmax'"),
    ({"tied_embedding": True}, "tied_embedding=True, the config asks for False"),
    ({"seq_len": 5}, "kind='AutoEncoder', the config asks for 'SequenceModel'"),
]


@pytest.mark.parametrize(("changes", "told"), UNLIKE, ids=str)
def test_a_model_that_does_not_fit_is_told_by_its_first_difference(tmp_path, changes, told):
    (folder := tmp_path / "model").mkdir()
    own = {"vocab_size": 6, "d_model": 8, "num_layers": 1, "mixer": BD_LRU}
    kind = AutoEncoder if "seq_len" in changes else SequenceModel
    kind(**(own | changes)).save(folder)
    with refused(rf"^train: .*'{re.escape(str(folder))}'.*was made with {told}"):
        run(tmp_path / "run", config(), init_from=folder)
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_without_a_model_is_refused(tmp_path):
    folder = tmp_path / "none"
    with refused(rf"^train: .*'{re.escape(str(folder))}'.*must be the folder of a run or of a checkpoint"):
        run(tmp_path / "run", config(), init_from=folder)
    assert not list((tmp_path / "run").iterdir())


def test_a_model_of_other_tokens_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 400)
    task = {"name": "text", "source": str(tmp_path / "text.txt"), "tokenizer": "characters", "seq_len": 5}
    (another := tmp_path / "model").mkdir()
    SequenceModel(4, 8, 1, LSTM).save(another)
    (another / "train.json").write_text('{"tokenizer": "another"}')
    told = r"`init_from` must have a model of the same tokens as `task`, but '.*/model' was"
    with mock.patch.dict("os.environ", {"STATEMIX_CACHE": str(tmp_path / "cache")}), refused(told):
        run(tmp_path / "run", config(task=task, mixer=LSTM), init_from=another)


def test_a_run_that_began_otherwise_is_not_taken_up(other, tmp_path):
    run(tmp_path / "drawn", config())
    run(tmp_path / "taken", config(), init_from=other)
    for name, began in (("drawn", "drawn weights"), ("taken", f"those of '{other}'")):
        before = snapshot(tmp_path / name)
        asked = tmp_path / "drawn" if name == "taken" else other
        told = rf"is of a run that began with {re.escape(began)}, not with `init_from` = '{re.escape(str(asked))}'"
        with refused(rf"^train: checkpoint '.*/{name}/step-4' {told}"):
            run(tmp_path / name, config(), init_from=asked)
        assert snapshot(tmp_path / name) == before


@pytest.mark.parametrize("below", ["", "step-4", "below/../step-4"])
def test_a_run_does_not_begin_with_what_it_deletes(tmp_path, below):
    out = run(tmp_path / "run", config()).out
    (out / "below").mkdir()
    before = snapshot(out)
    with refused(r"^train: `init_from` must be another run than `out` = '.*/run', got '"):
        run(out, config(), resume="never", init_from=out / below)
    assert snapshot(out) == before


# more steps


@pytest.mark.parametrize("killed", [None, 5, 7])
@pytest.mark.parametrize("optimizer", [COSINE, CONSTANT], ids=["cosine", "constant"])
def test_a_lengthened_run_is_one_whose_schedule_changed_at_its_end(tmp_path, optimizer, killed):
    """Bit for bit: that run, which was to have 10 steps from its start, has the rates of 4 steps in the first four."""
    short, long = config(optimizer=optimizer), config(optimizer=optimizer, steps=10)
    out = run(tmp_path / "run", short).out
    if killed is not None:
        stopped(out, long, killed, lengthen=True)
        assert not (out / "result.json").exists()
    result = run(out, long, lengthen=True)
    rate = mock.Mock(side_effect=lambda _, step, steps: learning_rate(optimizer, step, 4 if step < 4 else 10))
    with mock.patch.object(TRAIN, "learning_rate", rate):
        straight = run(tmp_path / "straight", long)
    different = differing(out, straight.out)
    assert set(different) <= {"result.json", *(f"step-{step}/train.json" for step in (2, 4, 6, 8, 10))}
    rates = {"lr_before": learning_rate(optimizer, 3, 4), "lr_after": learning_rate(optimizer, 4, 10)}
    own = {"lengthened": [{"step": 4, "steps": 4} | rates]}
    own |= {"train_tokens_per_s": result.summary["train_tokens_per_s"]}
    assert result.summary == straight.summary | own
    assert [line["lr"] for line in result.metrics if "lr" in line][4] == rates["lr_after"]
    if optimizer == CONSTANT:
        whole = run(tmp_path / "whole", long)  # without any patch
        assert weights(find_checkpoint(out)) == weights(find_checkpoint(whole.out))
    assert run(out, long, lengthen=True) == result
    assert run(out, long) == result
    assert row_of(read_run(out))["lengthened"] == "4"


def test_a_run_is_lengthened_twice_and_its_first_best_checkpoint_stays(tmp_path):
    worse = OptimizerConfig(lr=30.0, warmup=1.0)  # each validation is far worse than the one before
    with mock.patch.object(TRAIN, "learning_rate", lambda _, step, steps: 30.0 * (step + 1) / 4):
        for steps in (4, 6, 8):
            result = run(tmp_path / "run", config(steps=steps, optimizer=worse), lengthen=steps > 4)
            assert result.summary["best_step"] == 2
            assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-2"
        run(tmp_path / "straight", config(steps=8, optimizer=worse))
    assert [(part["step"], part["steps"]) for part in result.summary["lengthened"]] == [(4, 4), (6, 6)]
    told = {"result.json", "step-2/train.json", "step-8/train.json"}
    assert set(differing(tmp_path / "run", tmp_path / "straight")) <= told


AS_IN = r"as in a run of 10 steps\."
SAID = {
    "decayed": (
        {"optimizer": COSINE},
        r"^Lengthened from 4 to 10 steps: the learning rate was 0\.001 in step 4 and is 0\.0\d+ in the next, as in a "
        r"run of 10 steps\. It had already decayed from 0\.1\. What it has learned so far is not what that run would "
        r"have\.$",
    ),
    "constant": ({"optimizer": CONSTANT}, rf"the learning rate was 0\.01 in step 4 and is 0\.01 in the next, {AS_IN}$"),
    "warm": ({"optimizer": WARM}, rf"{AS_IN} What it has learned so far"),
    "other schedules": (
        {"optimizer": CONSTANT, "block_dropout": 0.5, "train_lengths": (2, 5)},
        rf"{AS_IN} train_lengths, block_dropout: as there, too\. What it has learned so far",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_it_is_said_what_becomes_of_the_schedule(tmp_path, capsys, case):
    changes, said = SAID[case]
    run(tmp_path / "run", config(**changes))
    run(tmp_path / "run", config(**changes, steps=10), lengthen=True, progress=True)
    [text] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Lengthened")]
    assert re.search(said, text), text


LONGER = {"steps": 10}
NOT_LENGTHENED = {  # the config that is asked for, other arguments, and the error
    "from its start": (LONGER, {"resume": "never"}, r"`resume` must be 'auto' with `lengthen`, which .* got 'never'"),
    "from its best": (LONGER, {"resume": "best"}, r"`resume` must be 'auto' with `lengthen`, which .* got 'best'"),
    "from others": (LONGER, {"init_from": "other"}, r"`init_from` must be None with `lengthen`, got 'other'"),
    "no flag": (LONGER, {"lengthen": 1}, r"`lengthen` must be True or False, got 1"),
    "as many steps": ({}, {}, r"`steps` must be above 4, those of '.*step-4', with `lengthen`, got 4"),
    "fewer steps": ({"steps": 3}, {}, r"`steps` must be above 4, those of '.*step-4', with `lengthen`, got 3"),
    "another config": (LONGER | {"seed": 1}, {}, r"checkpoint '.*step-4' was made with seed=0, the config asks for 1"),
}


@pytest.mark.parametrize("case", NOT_LENGTHENED)
def test_what_cannot_be_lengthened_is_left_as_it_is(tmp_path, case):
    changes, options, told = NOT_LENGTHENED[case]
    out = run(tmp_path / "run", config()).out
    before = snapshot(out)
    with pytest.raises((TypeError, ValueError), match=rf"^train: {told}"):
        run(out, config(**changes), **{"lengthen": True} | options)
    assert snapshot(out) == before


def test_a_run_that_has_not_taken_its_steps_is_not_lengthened(tmp_path):
    stopped(tmp_path / "killed", config(), 3)
    stopping = config(stop_accuracy=1e-6)
    assert run(tmp_path / "early", stopping).summary["steps"] == 2
    for name, begun in (("killed", config()), ("early", stopping)):
        told = rf"^train: `lengthen` is of a run that has taken all its steps, but '.*/{name}/step-2' is the last check"
        with refused(told):
            run(tmp_path / name, dataclasses.replace(begun, steps=10), lengthen=True)
    with refused(r"^train: `lengthen` needs a run in `out`, but '.*/none' has no checkpoint\.$"):
        run(tmp_path / "none", config(), lengthen=True)
    last = config(steps=2, stop_accuracy=1e-6)
    run(tmp_path / "last", last)
    with refused(r"^train: `lengthen` is of a run that more steps would change, but '.*/step-2'"):
        run(tmp_path / "last", dataclasses.replace(last, steps=4), lengthen=True)
    assert (tmp_path / "last" / "result.json").exists()


def test_a_longer_config_is_refused_without_being_asked_for(tmp_path):
    run(tmp_path / "run", config())
    with refused(r"made with steps=4, the config asks for 9\. Use --lengthen if it has ended, --res"):
        run(tmp_path / "run", config(steps=9))
    with refused(r"made with steps=4, the config asks for 3\. Use --resume=never, another folder"):
        run(tmp_path / "run", config(steps=3))
    run(tmp_path / "run", config(steps=9), lengthen=True)
    with refused(r"made with steps=9, the config asks for 4\. Use --resume=never, another folder"):
        run(tmp_path / "run", config())
    assert math.isfinite(read_run(tmp_path / "run").summary["test"]["5"]["loss"])


def test_a_report_tells_such_runs_from_others(other, tmp_path):
    """Of one config and seed: they are no two seeds of one group."""
    plain, taken, longer = (tmp_path / name for name in ("plain", "taken", "longer"))
    run(plain, config())
    run(taken, config(), init_from=other)
    run(longer, config(steps=2))
    run(longer, config(), lengthen=True)
    groups = group_over_seeds(find_runs([tmp_path]))
    assert {label: [one.folder.name for one in runs] for label, runs in groups.items()} == {
        "bd_lru, init_from=None, lengthened=None": ["plain"],
        f"bd_lru, init_from={other}, lengthened=None": ["taken"],
        "bd_lru, init_from=None, lengthened=2": ["longer"],
    }
