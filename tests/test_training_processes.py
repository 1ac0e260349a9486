"""processes.py, and train.py on two processes: DDP and FSDP on gloo learn what one process does, and all resume."""

import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import PROCESSES, exit_code, free_port
from run_helpers import TRAIN, refused, run, text_config, write_documents

from statemix import SequenceModel, TrainConfig
from statemix.training.config import ModelConfig, OptimizerConfig
from statemix.training.optimizer import make_optimizer
from statemix.training.processes import make_accelerator, own_rows, prepare, whole, whole_model

STEPS = 50


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Parts of a batch of these documents have unequal numbers of scored targets."""
    return write_documents(tmp_path_factory.mktemp("text"), letters="abcd \n", shortest=100)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with mock.patch.dict(os.environ, {"STATEMIX_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        yield


def config_of(source: str, **changes) -> TrainConfig:
    task, model = {"test": 0.0, "valid": 0.1}, ModelConfig(d_model=8, mlp_size=16)
    small = {"model": model, "optimizer": OptimizerConfig(lr=0.01), "steps": STEPS, "eval_every": 25}
    return text_config(source, task=task, carry=True, **small | changes)


def as_process(rank: int, processes: int, port: int, environment: dict[str, str], function, *arguments) -> None:
    """What a launcher makes of a process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", **environment)
    torch.set_num_threads(1)
    function(*arguments)
    torch.distributed.destroy_process_group()


def start_all(function, *arguments, processes: int = 2, fsdp: bool = False) -> list:
    """function(*arguments) in processes that know of each other."""
    environment = {"STATEMIX_CACHE": os.environ["STATEMIX_CACHE"], "ACCELERATE_USE_FSDP": str(fsdp).lower()}
    port, started = free_port(), []
    for rank in range(processes):
        everything = (rank, processes, port, environment, function, *arguments)
        started.append(PROCESSES.Process(target=as_process, args=everything, daemon=True))
        started[-1].start()
    return started


def train_on(out: Path, config: TrainConfig, **how) -> Path:
    """Train in new processes to the end."""
    started = start_all(run, out, config, **how)
    assert [exit_code(process) for process in started] == [0] * len(started)
    return out


def summary_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def curve_of(out: Path) -> list[tuple]:
    """(step, loss, gradient norm) of every training step, (step, loss, bits per byte) of every validation."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = [("loss", "grad_norm") if "loss" in line else ("valid_loss", "valid_bits_per_byte") for line in lines]
    return [(line["step"], *(line[key] for key in names)) for line, names in zip(lines, keys, strict=True)]


def largest_difference(a: list[tuple], b: list[tuple]) -> float:
    assert [line[0] for line in a] == [line[0] for line in b]
    return max(abs(x - y) for ours, theirs in zip(a, b, strict=True) for x, y in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory) -> Path:
    """A run on one process."""
    result = run(tmp_path_factory.mktemp("reference") / "run", config_of(source))
    assert result.summary["processes"] == 1
    return result.out


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(reference, source, tmp_path, fsdp):
    out = train_on(tmp_path / "run", config_of(source), fsdp=fsdp)
    assert summary_of(out)["processes"] == 2  # a launcher that starts one process twice would agree with itself
    curve, one = curve_of(out), curve_of(reference)
    assert len(curve) == STEPS + 2
    assert largest_difference(curve, one) <= 1e-5
    assert one[0][1] - one[-2][1] > 0.1  # it did learn
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}
    ours, theirs = (SequenceModel.load(path / "step-50").state_dict() for path in (out, reference))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-4), name


def train_until(out: Path, config: TrainConfig, stop: int) -> None:
    """The main process kills itself before a step, as a machine that fails does."""
    batch = TRAIN.training_batch

    def dying(config, task, step):
        if step == stop and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(config, task, step)

    with mock.patch.object(TRAIN, "training_batch", dying):
        run(out, config)


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory) -> Path:
    """A run of two processes under FSDP that was killed after 6 of its 8 steps."""
    out = tmp_path_factory.mktemp("killed") / "run"
    main, other = start_all(train_until, out, short(source), 6, fsdp=True)
    main.join(60)
    assert main.exitcode == -signal.SIGKILL
    other.kill()  # it waits for the dead one, until gloo or a launcher ends it
    other.join()
    assert not (out / "result.json").exists()
    assert json.loads((out / "checkpoints.json").read_text())["last"] == "step-4"
    return out


def short(source: str) -> TrainConfig:
    return config_of(source, steps=8, eval_every=4, accumulate=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_on_two_processes_goes_on_on_one_or_two(killed, source, tmp_path, processes):
    out = shutil.copytree(killed, tmp_path / "run")
    train_on(out, short(source), processes=processes, fsdp=processes == 2)
    assert summary_of(out)["processes"] == processes
    whole = run(tmp_path / "whole", short(source))
    assert largest_difference(curve_of(out), curve_of(whole.out)) <= 1e-5


def look_inside(answer: Path, config: TrainConfig) -> None:
    """What each process has of the model and of a batch."""
    accelerator = make_accelerator("no")
    torch.manual_seed(0)
    model = SequenceModel(7, 8, 2, {"name": "bd_lru", "num_blocks": 3, "block_size": 3}, tied_embedding=True)
    numbers = model.num_parameters()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wrapped, _ = prepare(accelerator, model, lambda model: make_optimizer(model, config.optimizer))
    held = sum(getattr(weight, "_local_tensor", weight).numel() for weight in wrapped.parameters())
    copy = whole_model(accelerator, wrapped)
    content = {"numbers": numbers, "held": held, "kind": type(copy).__name__}
    if accelerator.is_main_process:
        content["same"] = all(torch.equal(weight, before[name]) for name, weight in copy.state_dict().items())
        copy.save(answer.parent)
    content["gathered"] = all(torch.equal(whole(weight), before[name]) for name, weight in model.state_dict().items())
    content["rows"] = own_rows(accelerator, torch.arange(10)).tolist()
    answer.with_name(f"{accelerator.process_index}.json").write_text(json.dumps(content))


def test_under_fsdp_each_process_holds_a_part_and_the_rows_are_dealt_out(tmp_path, source):
    started = start_all(look_inside, tmp_path / "answer", config_of(source), fsdp=True)
    assert [exit_code(process) for process in started] == [0, 0]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (one["rows"], two["rows"]) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    assert (one["same"], one["gathered"], two["gathered"], one["kind"]) == (True, True, True, "SequenceModel")
    assert SequenceModel.load(tmp_path).num_parameters() == one["numbers"]
    assert one["held"] + two["held"] == one["numbers"]
    assert one["held"] < 0.6 * one["numbers"]


def test_a_batch_that_does_not_divide_is_refused(tmp_path, source):
    many = mock.Mock(num_processes=3, is_main_process=False)
    divide = r"^train: `batch_size` must be a multiple of `accumulate` times the number of processes = 6, got 8\.$"
    with mock.patch.object(TRAIN, "make_accelerator", return_value=many), refused(divide):
        run(tmp_path / "run", short(source))
    assert list((tmp_path / "run").iterdir()) == []


def test_fp16_is_refused_under_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with refused(r"^train: `mixed_precision` must be 'no' or 'bf16' under FSDP, got 'fp16'\.$"):
        make_accelerator("fp16")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
