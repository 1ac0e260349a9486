"""train.py: what a run learns, writes and returns, and how it refuses what it cannot do."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from run_helpers import (
    CHANGES,
    LSTM,
    TRAIN,
    assert_same_files,
    differing,
    disk,
    refused,
    run,
    run_in_parts,
    small_config,
    snapshot,
    stopped,
    ten_steps,
)
from safetensors.torch import load_file

import statemix
from statemix import SequenceModel, TrainConfig, train
from statemix.files import locked
from statemix.tasks import PermutationComposition, build_task
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.evaluate import evaluate
from statemix.training.loop import build_model
from statemix.training.optimizer import learning_rate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps, validated at 4, 8 and 10, best at 4, tested at two lengths; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return run(out, ten_steps())


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished.out, tmp_path / "run")


@pytest.fixture
def spied(monkeypatch):
    """The calls of task.sample from here on: (split, seq_len, tokens)."""
    calls, sample = [], PermutationComposition.sample

    def spy(self, split, *args, **options):
        batch = sample(self, split, *args, **options)
        calls.append((split, self.seq_len, batch.tokens))
        return batch

    monkeypatch.setattr(PermutationComposition, "sample", spy)
    return calls


def test_a_small_run_learns_and_generalises_to_twice_the_length(tmp_path):
    config = TrainConfig(
        task={"name": "permutation", "group": "Z2", "seq_len": 8},
        mixer={"name": "bd_lru", "num_blocks": 4, "block_size": 2, "normalization": "tanh"},
        model=ModelConfig(d_model=16),
        optimizer=OptimizerConfig(lr=1e-2),
        steps=150,
        batch_size=32,
        eval_every=50,
        eval_sequences=128,
        test_lengths=(8, 16),
    )
    result = run(tmp_path / "run", config)
    losses = [line["loss"] for line in result.metrics if "loss" in line]
    assert losses[0] > 0.6  # log 2 = 0.69 is guessing
    assert losses[-1] < 0.1
    assert result.summary["test"]["8"]["token_accuracy"] > 0.98
    assert result.summary["test"]["16"]["token_accuracy"] > 0.9


def test_metrics_have_the_expected_lines(finished):
    lines = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == finished.metrics
    accuracies = ["token_accuracy", "sequence_accuracy", "macro_accuracy"]
    training = ["step", "loss", *accuracies, "grad_norm", "lr", "tokens_per_s"]
    validation = ["step", *(f"valid_{k}" for k in ("loss", *accuracies, "mad_accuracy", "accuracy_by_position"))]
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10, 10]
    kinds = [training, validation, training, validation, training, training, validation]
    assert [list(line) for line in lines] == kinds
    for line in lines:
        assert all(0 <= line[key] <= 1 for key in line if "accuracy" in key and "position" not in key)
        assert len(line.get("valid_accuracy_by_position", range(5))) == 5
        if "lr" in line:
            assert line["lr"] == learning_rate(ten_steps().optimizer, line["step"] - 1, 10)
            assert line["tokens_per_s"] > 0


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(finished):
    losses = {line["step"]: line["valid_loss"] for line in finished.metrics if "valid_loss" in line}
    best = min(losses, key=losses.get)
    assert best == 4  # were it the last, the test could not tell the two apart
    assert finished.summary["best_step"] == best
    assert json.loads((finished.out / "checkpoints.json").read_text()) == {"last": "step-10", "best": f"step-{best}"}
    assert {path.name for path in finished.out.iterdir() if path.is_dir()} == {"step-10", f"step-{best}"}
    model = SequenceModel.load(finished.out / f"step-{best}")
    valid = evaluate(model, build_task(ten_steps().task), "valid", 16, 8)
    line = next(line for line in finished.metrics if line["step"] == best and "valid_loss" in line)
    assert line == {"step": best} | {f"valid_{key}": value for key, value in valid.items()}


def test_the_result_holds_the_scores_of_the_best_checkpoint(finished):
    summary = json.loads((finished.out / "result.json").read_text())
    assert summary == finished.summary
    model = SequenceModel.load(finished.out / f"step-{summary['best_step']}")
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["mixer_parameters"] == 2 * 3 * (4 * 9 + 2 * 8)  # N M ((M + 1)(D + 1) + 2 D)
    assert (summary["state_size"], summary["threads"]) == (6, 1)
    assert (summary["steps"], summary["version"]) == (10, statemix.__version__)
    [best] = [line for line in finished.metrics if line["step"] == summary["best_step"] and "valid_loss" in line]
    assert {"step": best["step"], **{f"valid_{key}": value for key, value in summary["valid"].items()}} == best
    speeds = sorted(line["tokens_per_s"] for line in finished.metrics if "tokens_per_s" in line)
    assert summary["train_tokens_per_s"] == speeds[2]
    assert list(summary["test"]) == ["5", "12"]
    for length, batch_size in ((5, 8), (12, 3)):  # no more than 8 * 5 tokens at once
        scores = scores_in_numpy(model, length, sequences=16, batch_size=batch_size)
        for key, score in summary["test"][str(length)].items():
            assert score == pytest.approx(scores.pop(key), rel=1e-5), key
        assert scores == {}


def scores_in_numpy(model, length, sequences, batch_size):
    """What `evaluate` should return on the test split, from one sequence at a time."""
    task = PermutationComposition("S3", length)
    sizes = [min(batch_size, sequences - start) for start in range(0, sequences, batch_size)]
    right, losses, by_target, macros = [], [], {}, []
    for index, size in enumerate(sizes):
        counts, batch = {}, task.sample("test", size, index=index)
        for tokens, targets in zip(*batch[:2], strict=True):
            with torch.no_grad():
                logits = model(tokens[None])[0][0].double().numpy()
            predictions = logits.argmax(-1)
            right.append(predictions == targets.numpy())
            for target, prediction in zip(targets.tolist(), predictions.tolist(), strict=True):
                counts.setdefault(target, []).append(prediction == target)
                counts.setdefault(prediction, [])  # to MAD a class, even if only predicted
            shifted = logits - logits.max(-1, keepdims=True)
            log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            losses.append(-log_probabilities[np.arange(length), targets])
        macros += [np.mean([np.mean(hits) if hits else 0 for hits in counts.values()])] * size
        for target, hits in counts.items():
            by_target.setdefault(target, []).extend(hits)
    assert len(right) == sequences
    return {
        "loss": np.mean(losses),
        "token_accuracy": np.mean(right),
        "sequence_accuracy": np.mean(np.all(right, axis=1)),
        "macro_accuracy": np.mean([np.mean(hits) for hits in by_target.values() if hits]),
        "mad_accuracy": np.mean(macros),
        "accuracy_by_position": np.mean(right, axis=0).tolist(),
    }


def test_the_test_split_is_drawn_only_after_training(spied, tmp_path):
    run(tmp_path / "run", ten_steps())
    splits = [split for split, _, _ in spied]
    assert splits.count("train") == 10
    first_test = splits.index("test")
    assert set(splits[:first_test]) == {"train", "valid"}
    assert set(splits[first_test:]) == {"test"}
    assert {length for split, length, _ in spied if split != "test"} == {5}


def test_a_test_that_cannot_be_drawn_is_found_before_training(spied, tmp_path):
    """None of the 9 sequences of Z3 of length 2 belongs to the test; a run must not end with that news."""
    config = ten_steps(task={"name": "permutation", "group": "Z3", "seq_len": 5}, test_lengths=(5, 2))
    with refused("no sequence of length 2 belongs to split 'test'"):
        run(tmp_path / "run", config)
    assert spied == []
    assert list((tmp_path / "run").iterdir()) == []
    check = PermutationComposition.__post_init__

    def checked(self):
        check(self)
        if self.seq_len > 5:
            raise ValueError(f"permutation: `seq_len` must be at most 5, got {self.seq_len}.")

    limited = mock.patch.object(PermutationComposition, "__post_init__", checked)
    with limited, refused(r"permutation: `seq_len` must be at most 5, got 7"):
        ten_steps(test_lengths=(5, 7))


def test_a_finite_training_set_is_gone_through_in_epochs(spied, tmp_path):
    """20 sequences in batches of 8: after 5 steps each was seen twice; resumed at step 8 the batches are the same."""
    seen, batches = [], TRAIN.finite_batch

    def spy(*args, **options):
        batch = batches(*args, **options)
        seen.append(batch.tokens)
        return batch

    with mock.patch.object(TRAIN, "finite_batch", spy):
        whole = run(tmp_path / "run", ten_steps(train_sequences=20))
        first = torch.cat(seen[:5]).tolist()
        assert sorted(first[:20]) == sorted(first[20:])
        assert first[:20] != first[20:]
        assert len({tuple(row) for row in first}) == 20  # 6^5 sequences: two equal ones would be a rare accident
        [training_set] = {id(tokens): tokens for split, _, tokens in spied if split == "train"}.values()
        assert sorted(first[:20]) == sorted(training_set.tolist())
        stopped(tmp_path / "stopped", ten_steps(train_sequences=20), 9)
        seen.clear()
        run(tmp_path / "stopped", ten_steps(train_sequences=20))
    assert len(seen) == 2
    assert_same_files(tmp_path / "stopped", whole.out)


def test_an_evaluation_leaves_the_model_in_the_mode_it_had(finished):
    model = SequenceModel.load(finished.out / f"step-{finished.summary['best_step']}")
    for training in (True, False):
        model.train(training)
        evaluate(model, build_task(ten_steps().task), "valid", 4, 4)
        assert {module.training for module in model.modules()} == {training}


def test_an_evaluation_drops_nothing():
    task = build_task(ten_steps().task)
    model = SequenceModel(task.vocab_size, 8, 1, {"name": "bd_lru", "num_blocks": 2, "block_size": 3}, dropout=0.5)
    training, evaluating = (evaluate(model.train(mode), task, "valid", 4, 4) for mode in (True, False))
    assert training == evaluating


def test_two_processes_do_not_share_a_folder(finished, tmp_path):
    """The lock is of the open folder, so that a second one in this process stands for another process."""
    out = tmp_path / "run"
    out.mkdir()
    told = rf"^train: `out` must be a folder of its own, but another process is at work in '{out}'\. Wait for it"
    with locked(out, "another process"):
        for resume in ("auto", "never"):
            with refused(told):
                run(out, ten_steps(), resume=resume)
        assert list(out.iterdir()) == []
    run(out, ten_steps())  # the end of the other is the end of its lock
    assert differing(out, finished.out) == []


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(finished, tmp_path):
    """As on some network file systems, and where there is no fcntl."""
    no_locks = mock.Mock(LOCK_EX=2, LOCK_NB=4, flock=mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    for number, module in enumerate((no_locks, None)):
        with mock.patch("statemix.files.fcntl", module):
            assert differing(run(tmp_path / str(number), ten_steps()).out, finished.out) == []


def test_the_seed_changes_weights_and_training_data_but_not_validation_and_test(spied, tmp_path):
    drawn, weights = [], []
    for seed in (0, 1):
        spied.clear()
        run(tmp_path / str(seed), ten_steps(seed=seed, steps=4))
        drawn.append({split: torch.cat([x.flatten() for s, _, x in spied if s == split]) for split, _, _ in spied})
        torch.manual_seed(seed)
        weights.append(build_model(ten_steps(seed=seed), build_task(ten_steps().task)).head.weight)
    assert torch.equal(drawn[0]["valid"], drawn[1]["valid"])
    assert torch.equal(drawn[0]["test"], drawn[1]["test"])
    assert not torch.equal(drawn[0]["train"], drawn[1]["train"])
    assert not torch.equal(*weights)


def test_every_training_batch_is_new(spied, tmp_path):
    run(tmp_path / "run", ten_steps())
    batches = [tokens for split, _, tokens in spied if split == "train"]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])


def test_two_runs_are_equal_whatever_the_callers_random_state_and_leave_it_as_it_was(finished, tmp_path):
    config = ten_steps()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state is what is tested
    random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    run(tmp_path / "run", config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    assert differing(tmp_path / "run", finished.out) == []


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_run_stopped_by_an_exception_goes_on_from_its_checkpoint(finished, spied, tmp_path, step):
    stopped(tmp_path / "run", ten_steps(), step)
    spied.clear()
    run(tmp_path / "run", ten_steps())
    assert [split for split, _, _ in spied].count("train") == 10 - step // 4 * 4
    assert_same_files(tmp_path / "run", finished.out)


def test_a_finished_run_is_returned_and_nothing_is_done(finished, spied):
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    again = run(finished.out, ten_steps())
    assert again == finished
    assert spied == []
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before


def test_learning_rate_by_hand():
    config = OptimizerConfig(lr=1.0, final_lr=0.2, warmup=0.25)
    # 12 steps: 3 of warm-up, then a cosine from step 3 (lr) to step 11 (final_lr), half way at 7
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:4] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert rates[5] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert rates[7] == pytest.approx(0.6)
    assert rates[11] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    line = dataclasses.replace(config, schedule="linear")
    assert [learning_rate(line, step, 12) for step in range(4)] == rates[:4]
    assert [learning_rate(line, step, 12) for step in (5, 7, 11)] == pytest.approx([0.8, 0.6, 0.2])


EDGES = [(0.0, [1.0]), (1.0, [1.0]), (1.0, [0.25, 0.5, 0.75, 1.0]), (0.0, [1.0, 0.0]), (0.0, [1.0, 0.5, 0.0])]


@pytest.mark.parametrize(("warmup", "rates"), EDGES)
def test_learning_rate_at_the_edges(warmup, rates):
    config = OptimizerConfig(lr=1.0, final_lr=0.0, warmup=warmup)
    assert [learning_rate(config, step, len(rates)) for step in range(len(rates))] == pytest.approx(rates)


def first_moments(tmp_path, clip):
    """Norm of AdamW's first moment after one step, (1 - beta_1) times that of the clipped gradient, and grad_norm."""
    config = small_config(steps=1, optimizer=OptimizerConfig(betas=(0.75, 0.9), clip=clip))
    result = run(tmp_path / str(clip), config)
    tensors = load_file(result.out / "step-1" / "optimizer.safetensors")
    moments = torch.cat([value.flatten() for name, value in tensors.items() if name.endswith(".exp_avg")])
    assert len(moments) == result.summary["parameters"]
    return moments.norm().item() / 0.25, result.metrics[0]["grad_norm"]


def test_gradients_are_clipped_and_their_norm_is_logged_before(tmp_path):
    clipped, norm = first_moments(tmp_path, clip=0.01)
    assert norm > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert first_moments(tmp_path, clip=100.0) == pytest.approx((norm, norm), rel=1e-5)


DECAYING = [
    (ten_steps().mixer, False),
    (ten_steps().mixer | {"selective": False}, True),
    ({"name": "h_lru", "num_channels": 2, "order": 3, "selective": False}, False),
    (LSTM, False),
]


@pytest.mark.parametrize(("mixer", "tied"), DECAYING)
def test_weight_decay_is_of_matrices_only(tmp_path, mixer, tied):
    weights = []
    for decay in (0.0, 0.5):
        optimizer = OptimizerConfig(lr=0.1, warmup=0.0, weight_decay=decay)
        config = small_config(steps=1, mixer=mixer, model=ModelConfig(8, tied_embedding=tied), optimizer=optimizer)
        weights.append(SequenceModel.load(run(tmp_path / str(decay), config).out / "step-1").state_dict())
    torch.manual_seed(config.seed)
    start = build_model(config, build_task(config.task)).state_dict()
    without, with_decay = weights
    for name, value in start.items():
        plain = any(word in name for word in ("norm", "embedding", "bias", "constant"))
        plain |= tied and name == "head.weight"
        expected = without[name] - (0 if plain else 0.1 * 0.5 * value)  # AdamW: p - lr decay p - lr update
        assert torch.allclose(with_decay[name], expected, rtol=0, atol=1e-6), name
        assert plain == torch.equal(with_decay[name], without[name]), name


def test_bf16_after_a_run_in_float32(finished, tmp_path):
    config = ten_steps(mixed_precision="bf16")
    result = run(tmp_path / "run", config)
    assert math.isfinite(result.summary["test"]["5"]["loss"])
    weights = load_file(result.out / "step-10" / "model.safetensors")
    exact = load_file(finished.out / "step-10" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert not torch.equal(weights["head.weight"], exact["head.weight"])
    assert_same_files(run_in_parts(tmp_path / "stopped", config, 6).out, result.out)
    assert differing(run(tmp_path / "exact", ten_steps()).out, finished.out) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_is_refused_where_there_is_no_gpu(tmp_path):
    with refused(r"^train: `mixed_precision` must be .*'fp16'"):
        run(tmp_path / "run", ten_steps(mixed_precision="fp16"))


# what `out` and `resume` may not be


def test_out_must_be_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with refused(rf"^train: `out` must be a folder, but '{path}' is a file\.$"):
        run(path, ten_steps())
    for below in (path / "run", path / "a" / "run"):
        with refused(rf"^train: `out` must be a folder .*'{below}'.*Not a directory"):
            run(below, ten_steps())
    assert path.read_text() == "mine"


@pytest.mark.parametrize("out", ["/proc/statemix/run", "/sys/statemix", "a" * 300], ids=["proc", "sys", "long"])
def test_out_that_cannot_be_made(out, tmp_path):
    with refused(rf"^train: `out` must be a folder that can be written to, but '.*{out}'"):
        run(tmp_path / out, ten_steps())


def permission_denied():
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_out_that_may_not_be_written_to(tmp_path):
    """The tests may run as root, whom no permission stops; so the answers of the system are made up."""
    told = rf"^train: `out` must be a folder that can be written to, but '{tmp_path}"
    no_access = mock.patch("os.access", return_value=False)
    for out in (tmp_path, tmp_path / "run"):
        with no_access, disk(tmp_path, CHANGES, 1, permission_denied), refused(told):
            run(out, ten_steps())
    assert list(tmp_path.iterdir()) == []
    denied = rf"^train: cannot write to '{tmp_path}/run': .*Permission denied.*There is no checkpoint yet"
    with disk(tmp_path, {"replace"}, 2, permission_denied), pytest.raises(RuntimeError, match=denied):
        run(tmp_path / "run", ten_steps())


def test_resume_must_be_known(tmp_path):
    with refused(r"^train: `resume` must be one of \['auto', 'best', 'never'\], got 'always'\.$"):
        run(tmp_path / "run", ten_steps(), resume="always")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_config_is_named_and_kept(copy):
    before = snapshot(copy)
    four = ten_steps(mixer=ten_steps().mixer | {"block_size": 4})
    made_with = r"was made with mixer\.block_size=3, the config asks for 4\. Use --resume=never, "
    with refused(rf"^train: checkpoint '{re.escape(str(copy))}/step-10' {made_with}"):
        run(copy, four)
    with refused(r"was made with test_lengths=\[5, 12\], the config asks for \[\]\. Use --res"):
        run(copy, ten_steps(test_lengths=()))
    assert snapshot(copy) == before


FOREIGN = ["", "step-", "step-by-step/", ".step-x.partial/", "mine/step-3/"]


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("before", FOREIGN)
def test_foreign_files_survive(finished, tmp_path, before, resume):
    out, name = tmp_path / "run", f"{before}notes.txt"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    if resume == "never":
        shutil.copytree(finished.out, out, dirs_exist_ok=True)
    run(out, ten_steps(), resume=resume)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize(("log_every", "eval_every"), [(1, 4), (1, 5), (7, 2), (100, 100)])
def test_a_loss_that_is_not_finite_is_an_error_and_the_earlier_checkpoint_is_good(tmp_path, log_every, eval_every):
    """Step 5 makes weights that are NaN, from a loss and a gradient that are finite."""
    config = ten_steps(log_every=log_every, eval_every=eval_every)
    rate = mock.Mock(side_effect=lambda _, step, steps: math.nan if step >= 4 else 0.01)
    last = r"The last checkpoint is '?.*/run/step-4\b" if eval_every in (2, 4) else ""
    with (
        mock.patch.object(TRAIN, "learning_rate", rate),
        pytest.raises(RuntimeError, match=rf"^train: at step \d+ .*(nan|inf).*optimizer\.lr=30\.0.*{last}"),
    ):
        run(tmp_path / "run", config)
    assert not (tmp_path / "run" / "result.json").exists()
    for path in (tmp_path / "run").glob("step-*"):
        assert int(path.name.removeprefix("step-")) <= 4
        assert all(weight.isfinite().all() for weight in SequenceModel.load(path).state_dict().values())


def test_progress_is_shown_on_standard_error_or_not_at_all(finished, tmp_path, capsys):
    with mock.patch.object(TRAIN, "plot_curves"):
        train(ten_steps(), tmp_path / "run", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()  # older releases of rich end with an empty one
    assert [line.split()[1] for line in lines] == ["4", "8", "10"]
    run(tmp_path / "quiet", ten_steps())
    assert capsys.readouterr() == ("", "")
