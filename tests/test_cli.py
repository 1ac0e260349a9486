"""cli.py: what each command prints, its exit status, and that a wrong call says what is wrong with it."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import accelerate
import numpy as np
import pytest
from helpers import call
from run_helpers import NEEDING_SPACE, TRAIN, differing, disk, disk_is_full, small_config

import statemix
from statemix import TrainConfig, cli
from statemix.cli import info
from statemix.cli.explore import Explore
from statemix.cli.export import Export
from statemix.cli.generate import Generate
from statemix.cli.report import Report
from statemix.cli.sweep import Sweep
from statemix.cli.verify import Verify
from statemix.mixers import MIXERS
from statemix.runs.presets import preset_config
from statemix.runs.sweep import SweepResult
from statemix.scan.gpu import compile
from statemix.specs import options
from statemix.tasks import PRESETS, TASKS, PermutationComposition
from statemix.training.config import CurriculumConfig, ModelConfig, OptimizerConfig

SMALL_FLAGS = """
    --task.seq-len 5 --mixer.num-blocks 2 --mixer.block-size 3 --model.d-model 8
    --steps 4 --batch-size 8 --eval-every 2 --eval-sequences 16 --log-every 1"""
SMALL = SMALL_FLAGS.split()
SMALL_CONFIG = small_config(optimizer=OptimizerConfig(), steps=4, eval_every=2)
PROGRAM = Path(sys.executable).with_name("statemix")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, without the picture, which takes longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TRAIN, "plot_curves", lambda runs, path, **_: Path(path).write_bytes(b"a picture"))


def plain(text: str) -> str:
    """Text without the frames and line breaks of tyro's boxes."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def config_of(out: str) -> TrainConfig:
    return TrainConfig.load(Path(out) / "config.json")


HOW = ["--tracker", "--init-from", "--lengthen"]


def flags() -> list[str]:
    names = []
    for field in dataclasses.fields(TrainConfig):
        nested = getattr(TrainConfig(), field.name)
        if dataclasses.is_dataclass(nested):
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(nested)]
        else:
            names.append(field.name)
    return [f"--{name.replace('_', '-')}" for name in names]


def test_help_names_every_field_option_and_name(capsys):
    status, text, errors = call(capsys, "train", "--help-all")
    assert (status, errors) == (0, "")
    assert len(flags()) == 49
    options = [f"--task.{name}" for name in ("group", "seq-len", "generators")]
    options += [f"--mixer.{name}" for name in ("num-blocks", "block-size", "normalization", "selective", "backend")]
    for flag in [*flags(), *options, "--config", "--preset", "--out", "--resume", *HOW]:
        assert re.search(rf"{re.escape(flag)}[ ,]", text), flag
    for name in (*MIXERS, *TASKS, *PRESETS):
        assert name in plain(text), name
    for default in ("600", "0.003", "0.9 0.95", "runs/default", "S3"):
        assert f"(default: {default})" in plain(text)
    assert list(Path().iterdir()) == []


def test_help_is_of_the_chosen_mixer(capsys):
    _, text, _ = call(capsys, "train", "--mixer", "lstm", "--help-all")
    assert "--mixer.hidden-size INT" in text
    assert "--mixer.block-size" not in text


def test_the_short_help_is_one_screen_with_every_option(capsys):
    status, text, errors = call(capsys, "train", "--mixer", "lstm", "--optimizer.lr", "1", "-h")
    assert (status, errors) == (0, "")
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    for flag in [*flags(), *HOW, "--task.seq-len", "--out", "--resume", "--config", "--preset", "--text", "--help-all"]:
        path, _, last = flag.removeprefix("--").rpartition(".")
        assert re.search(rf"--{path + '.' if path else ''}(no-)?{last}\b", text), flag
    for default in ("--steps 600", "--optimizer.betas 0.9 0.95", "--no-carry", "--mixer.hidden-size (required)"):
        assert default in text
    assert list(Path().iterdir()) == []


def undocumented(cls: type, given: tuple[str, ...] = ()) -> list[str]:
    """The options of a class of which its docstring says nothing."""
    told = (inspect.getdoc(cls) or "").partition("Args:")[2].partition("Raises:")[0]
    return [p.name for p in options(cls, given) if not re.search(rf"^    {p.name}: \S", told, re.MULTILINE)]


FORMS = [Sweep, Generate, Report, Verify, Export, Explore, info.Info, TrainConfig, CurriculumConfig, *TASKS.values()]


@pytest.mark.parametrize("cls", [*FORMS, ModelConfig, OptimizerConfig], ids=lambda cls: cls.__name__)
def test_every_option_has_help(cls):
    assert undocumented(cls) == []


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_option_of_a_mixer_has_help(mixer):
    assert undocumented(MIXERS[mixer], ("d_model",)) == []


def test_an_option_without_help_is_seen():
    form = dataclasses.make_dataclass("Form", ["steps"], namespace={"__doc__": "Args:\n    step: x"})
    assert undocumented(form) == ["steps"]


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"statemix {statemix.__version__}\n", "")


def test_commands_are_completed(capsys):
    assert call(capsys, "--completion", "tcsh")[0] == 2
    status, script, errors = call(capsys, "--completion", "bash")
    assert (status, errors) == (0, "")
    ask = 'COMP_WORDS=(statemix "$1"); COMP_CWORD=$2; _statemix statemix "$1"; echo "${COMPREPLY[@]}"'
    for typed, place, expected in (("re", "1", "report"), ("", "1", " ".join(cli.COMMANDS)), ("re", "2", "")):
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}", "bash", typed, place], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")
    for shell in ("fish", "zsh"):
        assert " ".join(cli.COMMANDS) in call(capsys, f"--completion={shell}")[1]


def test_usage(capsys):
    for arguments, expected in (((), 2), (("--help",), 0), (("-h",), 0), (("--help-all",), 0)):
        status, text, _ = call(capsys, *arguments)
        assert status == expected
        assert "usage: statemix COMMAND" in text
        assert tuple(re.findall(r"^  ([a-z]+) ", text, re.MULTILINE)) == cli.COMMANDS


WRONG_CALLS = [
    ("tran", r"COMMAND must be one of \['bench', 'explore', .*'verify'\], got 'tran'\. Did you mean 'train'\?"),
    ("quit", r"COMMAND must be one of \[.*'verify'\], got 'quit'\. ?$"),
    ("--steps 5", r"COMMAND must be one of \[.*'train', 'verify'\], got '--steps'"),
    ("info now", r"Unrecognized options: now"),
    ("info --budget 5", r"info: `--budget`, `--what` and `--d-model` are of `--sizes`\."),
    ("info --sizes --what speed", r"invalid choice 'speed' for argument '--what'"),
    ("info --sizes --budget 0", r"`budget` must be at least 1, got 0"),
    ("sweep", r"Missing from statemix sweep: FILE"),
    ("sweep none.py", r"sweep: `FILE` must be a Python file, but there is no 'none\.py'\."),
    ("sweep none.py --executor slurm", r"invalid choice 'slurm' for argument '--executor'"),
    ("sweep none.py --budget half", r"invalid choice 'half' for argument '--budget'"),
    ("report", r"report: `runs` must hold at least one finished run, got none\."),
    ("report none", r"runs: 'none' is not a folder\."),
    ("report .", r"runs: there is no finished run in '\.': no result\.json at or below it\."),
    (
        "train --preset mat",
        r"`preset` must be one of \['exact', 'exact-s3', .*'formal', 'mad', 'paper-bd1', .*\], got 'mat'",
    ),
    ("train --preset mad", r"`task` must be one of \['compression', .*\], got 'permutation'"),
    ("train --preset mad --task parity", r"`task` must be one of \['compression', .*\], got 'parity'"),
    ("train --preset mad --config c.json", r"`--config` and `--preset` both give the defaults: use one of them"),
    ("train --preset", r"`--preset` needs a value"),
    ("train --preset mad --task in-context-recall --task.vocab-size 1", r"`vocab_size` must be at least \d+, got 1"),
    ("train --task compression --test-lengths 8", r"`test_lengths` must be the task's `seq_len` = 32: an autoencoder"),
    ("train --stop-accuracy 2", r"`stop_accuracy` must be above 0 and at most 1, got 2\.0"),
    ("train --train-sequences 0", r"`train_sequences` must be at least 1, got 0"),
    ("train --stepz 5", r"Unrecognized options: --stepz"),
    ("train 5", r"Unrecognized options: 5"),
    ("train --mixer.hidden-size 4", r"Unrecognized options: --mixer\.hidden-size"),
    ("train --steps", r"Missing value for argument '--steps'"),
    ("train --steps ten", r"--steps: invalid literal for int\(\) with base 10: 'ten'"),
    ("train --steps 2.5", r"--steps: invalid literal for int\(\) with base 10: '2\.5'"),
    ("train --optimizer.lr fast", r"--optimizer\.lr: could not convert string to float: 'fast'"),
    ("train --optimizer.betas 0.9", r"--optimizer\.betas"),
    (
        "train --resume maybe",
        r"invalid choice 'maybe' for argument '--resume'. Expected one of \('auto',\s+'best', 'never'\)",
    ),
    ("train --steps 0", r"`steps` must be at least 1, got 0"),
    ("train --seed -1", r"`seed` must be at least 0, got -1"),
    ("train --test-lengths 4 0", r"`test_lengths` must be all at least 1, got \(4, 0\)"),
    ("train --mixed-precision fp17", r"`mixed_precision` must be one of \['bf16', 'fp16', 'no'\], got 'fp17'"),
    ("train --optimizer.lr -1", r"`optimizer\.lr` must be above 0 and finite, got -1\.0"),
    ("train --optimizer.betas 0.9 1.5", r"`optimizer\.betas` must be in \[0, 1\), got \(0\.9, 1\.5\)"),
    ("train --model.d-model 0", r"`(model\.)?d_model` must be at least 1, got 0"),
    ("train --mixer gpu", rf"`--mixer` must be one of {re.escape(str(sorted(MIXERS)))}, got 'gpu'"),
    ("train --mixer --steps 5", r"`--mixer` must be one of \[.*'bd_lru'.*\], got '--steps'"),
    ("train --mixer", r"`--mixer` needs a value"),
    ("train --mixer lstm", r"--mixer\.hidden-size INT .*\(required\)"),
    ("train --mixer h_lru --mixer.order 2", r"--mixer\.num-channels INT .*\(required\)"),
    ("train --mixer.block-size 0", r"`block_size` must be at least 1, got 0"),
    ("train --mixer.normalization max", r"`normalization` must be one of \['linear', .*'tanh'\], got 'max'"),
    ("train --task=party", rf"`--task` must be one of {re.escape(str(sorted(TASKS)))}, got 'party'"),
    ("train --task.group Q8", r"`group` must be S<n>, A<n>, Z<n> or a product such as A4xZ5, got 'Q8'"),
    ("train --task.seq-len 0", r"`seq_len` must be at least 1, got 0"),
    ("train --config", r"`--config` needs a value"),
    ("train --config none.json", r"cannot read 'none\.json': .*No such file"),
    ("train --out /dev/null", r"`out` must be a folder, but '/dev/null' is a file"),
    (f"train --out {'a' * 300}", r"`out` must be a folder .*File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS, ids=[arguments[:40] for arguments, _ in WRONG_CALLS])
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(capsys, arguments, message):
    status, text, errors = call(capsys, *arguments.split())
    assert status == 2
    assert re.search(message, plain(errors)), errors
    assert text == ""
    assert "Traceback" not in errors
    assert list(Path().iterdir()) == []


def test_a_wrong_config_file_is_named_with_the_key(capsys):
    for content, message in (
        ('{"stepz": 3}', r"cannot read 'wrong\.json': TrainConfig: unknown key `stepz`"),
        ('{"steps": "3"}', r"cannot read 'wrong\.json': TrainConfig: `steps` must be of type int, got '3'"),
        ('{"steps": 3', r"cannot read 'wrong\.json': TrainConfig: cannot be read: it is not JSON"),
    ):
        Path("wrong.json").write_text(content)
        status, _, errors = call(capsys, "train", "--config", "wrong.json")
        assert status == 2
        assert re.search(message, errors)


def test_train_prints_the_result_and_the_folder(capsys):
    status, text, errors = call(capsys, "train", *SMALL, "--out", "run", "--test-lengths", "5", "9")
    assert status == 0
    summary = json.loads(Path("run/result.json").read_text())
    for length in ("5", "9"):
        scores = summary["test"][length]
        head, row = text[text.index(f"test, length {length}") :].splitlines()[:2]
        assert head.split() == ["test,", "length", length, "token", "sequence", "macro"]
        shown = [f"{scores[f'{name}_accuracy']:.3f}" for name in ("token", "sequence", "macro")]
        assert row.split() == ["bd_lru", *shown]
    assert "bd_lru" in text
    assert f"and the best weights in step-{summary['best_step']}." in text
    assert "The run is in run: " in text
    assert [line.split()[1] for line in errors.splitlines()] == ["2", "4"]
    assert config_of("run") == dataclasses.replace(SMALL_CONFIG, test_lengths=(5, 9))


EVERY_FLAG = """--task=permutation --task.group A4xZ5 --task.seq-len 6 --task.generators all
    --mixer h_lru --mixer.num-channels 5 --mixer.order 2 --mixer.normalization tanh --mixer.no-selective
    --mixer.form observer --mixer.backend reference
    --model.d-model 4 --model.num-layers 2 --model.mlp-size 5 --model.tied-embedding --model.init-std 0.5
    --model.dropout 0.25
    --optimizer.lr 0.5 --optimizer.final-lr 0.25 --optimizer.warmup 0.5 --optimizer.betas 0.5 0.75
    --optimizer.weight-decay 0.0 --optimizer.clip 2 --optimizer.muon-lr 0.125 --optimizer.amsgrad
    --optimizer.schedule linear
    --steps 7 --batch-size 6 --seed 5 --eval-every 4 --eval-sequences 3 --test-lengths 2 1 --log-every 9
    --train-sequences 8 --patience 2 --stop-accuracy 0.75
    --mixed-precision bf16 --accumulate 3 --row-entropy 0.5 --block-dropout 0.25 --gate-noise 0.5"""


THERE = "--resume=never --tracker wandb --init-from other --lengthen"


def asked_for(capsys, *arguments: str):
    """What `statemix train` would call `train` with."""
    given = mock.Mock(return_value=mock.Mock(summary={"best_step": 0}))
    with (
        mock.patch("statemix.cli.train.train", given),
        mock.patch.multiple("statemix.cli.train", read_run=mock.Mock(), print_tables=mock.Mock()),
    ):
        status, _, errors = call(capsys, "train", *arguments)
    assert status == 0, errors
    given.assert_called_once()
    return given.call_args


def trained_config(capsys, *arguments: str) -> TrainConfig:
    return asked_for(capsys, *arguments).args[0]


def test_every_flag_sets_its_field(capsys):
    asked = asked_for(capsys, *EVERY_FLAG.split(), "--out", "there", *THERE.split())
    task = {"name": "permutation", "group": "A4xZ5", "seq_len": 6}
    mixer = {"name": "h_lru", "num_channels": 5, "order": 2, "normalization": "tanh", "selective": False}
    config = TrainConfig(
        task=task,
        mixer=mixer | {"form": "observer", "backend": "reference"},
        model=ModelConfig(4, 2, 5, True, 0.5, 0.25),
        optimizer=OptimizerConfig(0.5, 0.25, 0.5, (0.5, 0.75), 0.0, 2.0, 0.125, True, "linear"),
        steps=7,
        batch_size=6,
        seed=5,
        eval_every=4,
        eval_sequences=3,
        log_every=9,
        test_lengths=(2, 1),
        mixed_precision="bf16",
        train_sequences=8,
        patience=2,
        stop_accuracy=0.75,
        accumulate=3,
        row_entropy=0.5,
        block_dropout=0.25,
        gate_noise=0.5,
    )
    assert asked.args == (config, "there")
    assert asked.kwargs == {"resume": "never", "tracker": "wandb", "init_from": "other", "lengthen": True}
    # the first is of text, the others not with --train-sequences
    others = {"--carry", "--sharpen", "--train-lengths"}
    others |= {flag for flag in flags() if flag.startswith("--curriculum.")}
    assert set(flags()) <= {*others, *EVERY_FLAG.replace("=", " ").split()}


def test_what_is_not_of_a_training_set_is_set(capsys):
    assert trained_config(capsys, "--train-lengths", "4", "16").train_lengths == (4, 16)
    written = """--task parity --task.min-len 2 --curriculum.first 2 --curriculum.growth 1.5 --curriculum.accuracy 0.9
        --curriculum.row 64 --curriculum.again 0.2 --curriculum.kept 8 --curriculum.rights 3 --curriculum.quiet 9
        --curriculum.shared 2 --curriculum.prune 4 --curriculum.prune-after 7 --curriculum.prune-settle 5
        --curriculum.prune-lr 0.5 --sharpen 10 --test-lengths 8 40-256"""
    config = trained_config(capsys, *written.split())
    assert config.curriculum == CurriculumConfig(2, 1.5, 0.9, 64, 0.2, 8, 3, 9, 2, 4, 7, 5, 0.5)
    assert (config.sharpen, config.test_lengths) == (10, (8, "40-256"))


def test_a_preset_gives_the_defaults_and_flags_change_them(capsys):
    preset = ["--task", "in-context-recall", "--preset", "mad"]
    base = preset_config("mad", "in-context-recall")
    assert trained_config(capsys, *preset) == base
    wide = trained_config(capsys, *preset, "--task.vocab-size", "64", "--optimizer.lr", "1e-4", "--seed", "3")
    assert wide == dataclasses.replace(
        base, task=base.task | {"vocab_size": 64}, optimizer=dataclasses.replace(base.optimizer, lr=1e-4), seed=3
    )
    mixed = trained_config(capsys, *preset, "--mixer", "lstm", "--mixer.hidden-size=4")
    assert mixed == preset_config("mad", "in-context-recall", {"name": "lstm", "hidden_size": 4})
    formal = trained_config(capsys, "--preset=formal", "--task=parity", "--test-lengths", "50")
    assert formal == dataclasses.replace(preset_config("formal", "parity"), test_lengths=(50,))


def test_the_sizes_of_a_preset_are_of_the_task_that_was_asked_for(capsys):
    preset = ["--preset", "exact", "--task", "permutation", "--task.group", "A4", "--task.generators", "3"]
    config = trained_config(capsys, *preset, "--seed", "2")
    spec = {"name": "permutation", "group": "A4", "generators": 3}
    assert config == dataclasses.replace(preset_config("exact", spec), seed=2)
    assert (config.mixer["block_size"], config.task["min_len"], config.task["start"]) == (5, 1, True)
    assert trained_config(capsys, *preset, "--mixer.block-size", "7").mixer["block_size"] == 7
    lstm = trained_config(capsys, *preset, "--mixer", "lstm", "--mixer.hidden-size", "9")
    assert lstm == preset_config("exact", spec, {"name": "lstm", "hidden_size": 9})
    ranges = trained_config(capsys, *preset, "--test-lengths", "40-256", "1000")
    assert ranges.test_lengths == ("40-256", 1000)


def test_the_epochs_of_a_preset_are_of_the_training_set_that_was_asked_for(capsys):
    preset = ["--task", "in-context-recall", "--preset", "mad", "--train-sequences", "1600"]
    small = trained_config(capsys, *preset)
    assert (small.train_sequences, small.steps, small.eval_every) == (1600, 2500, 13)
    large_batches = trained_config(capsys, *preset, "--batch-size=320", "--eval_every", "7")
    assert (large_batches.steps, large_batches.eval_every) == (1000, 7)
    assert trained_config(capsys, *preset, "--steps=20000").steps == 20_000


def test_config_of_an_earlier_run_gives_the_same_config_and_flags_change_it(capsys):
    assert call(capsys, "train", *SMALL, "--out", "first", "--seed", "3", "--mixer.normalization", "tanh")[0] == 0
    assert call(capsys, "train", "--config", "first/config.json", "--out", "second")[0] == 0
    assert differing(Path("second"), Path("first")) == []
    assert call(capsys, "train", "--config=first/config.json", "--out=third", "--steps=2")[0] == 0
    assert config_of("third") == dataclasses.replace(config_of("first"), steps=2)
    lstm = ["--mixer", "lstm", "--mixer.hidden-size", "4"]
    assert call(capsys, "train", "--config", "first/config.json", *lstm, "--out", "fourth")[0] == 0
    expected = dataclasses.replace(config_of("first"), mixer={"name": "lstm", "hidden_size": 4})
    assert config_of("fourth") == expected


def test_the_same_command_goes_on_and_then_returns_the_result(capsys):
    sample = PermutationComposition.sample

    def interrupted(self, split, *args, **options):
        if split == "train" and options["index"] == 3:
            raise KeyboardInterrupt
        return sample(self, split, *args, **options)

    with mock.patch.object(PermutationComposition, "sample", interrupted):
        status, text, errors = call(capsys, "train", *SMALL, "--out", "run")
    assert (status, text) == (130, "")
    assert errors.splitlines()[-1] == "stopped: the same command goes on from the last checkpoint."
    assert json.loads(Path("run/checkpoints.json").read_text())["last"] == "step-2"

    status, text, errors = call(capsys, "train", *SMALL, "--out", "run")
    assert status == 0
    assert [line.split()[1] for line in errors.splitlines()] == ["4"]
    assert call(capsys, "train", *SMALL, "--out", "whole")[0] == 0
    assert differing(Path("run"), Path("whole")) == []
    assert call(capsys, "train", *SMALL, "--out", "run") == (0, text, "")

    status, _, errors = call(capsys, "train", *SMALL, "--steps", "5", "--out", "run")
    assert status == 2
    longer = "Use --lengthen if it has ended, --resume=never"
    assert f"checkpoint 'run/step-4' was made with steps=4, the config asks for 5. {longer}" in errors
    assert call(capsys, "train", *SMALL, "--steps", "5", "--out", "run", "--resume", "never")[0] == 0
    assert config_of("run").steps == 5


def test_a_run_that_fails_has_exit_status_1(capsys):
    with disk(Path("run"), NEEDING_SPACE, 30, disk_is_full):
        status, text, errors = call(capsys, "train", *SMALL, "--out", "run")
    assert (status, text) == (1, "")
    assert re.search(r"^error: train: cannot write to 'run': .*No space left on device", errors, re.MULTILINE)
    assert "Traceback" not in errors


def test_info(capsys):
    status, text, errors = call(capsys, "info")
    assert (status, errors) == (0, "")
    assert text.startswith(f"statemix {statemix.__version__}, torch ")
    assert f"\npackages: numpy {np.__version__}, accelerate {accelerate.__version__}, " in text
    assert re.search(r"^for GPUs: torch (without CUDA|of CUDA [\d.]+), cuda-bindings .*, NVRTC \d+\.\d+$", text, re.M)
    for name in ("cpu", "associative", "reference"):
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
    assert f"mixers: {', '.join(MIXERS)}\n" in text
    assert f"tasks: {', '.join(TASKS)}\n" in text
    assert re.search(r"^  mamba-ssm +.*installed; runs mamba2 for CUDA tensors of 16 bits$", text, re.MULTILINE)


def test_info_where_less_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(compile, "_HAS_BINDINGS", False)
    compile.compiler_version.cache_clear()
    _, text, _ = call(capsys, "info")
    assert re.search(r"^packages: numpy [\d.]+, no no-such-package\nfor GPUs: .*, no NVRTC$", text, re.MULTILINE)


def test_info_of_sizes(capsys):
    status, text, errors = call(capsys, "info", "--sizes", "--budget", "5000", "--d-model", "32")
    assert (status, errors) == (0, "")
    first, head, *rows = text.splitlines()
    assert first.startswith("one mixer of d_model 32 for 5,000 parameters")
    assert head.split() == ["mixer", "width", "parameters", "state", "off"]
    assert [row.split()[0] for row in rows] == list(MIXERS)
    # N M ((M + 1)(D + 1) + 2 D) with M = 4: 916 a block, so that 5 blocks are nearest to 5000
    [bd_lru] = [row.split() for row in rows if row.startswith("bd_lru ")]
    assert bd_lru == ["bd_lru", "num_blocks=5", "4,580", "20", "-8.4%"]
    _, text, _ = call(capsys, "info", "--sizes", "--budget", "64", "--what", "state")
    assert "bd_lru num_blocks=16 " in re.sub(" +", " ", text)
    assert " 64 state; off: " in text


def test_report(capsys):
    for seed in ("0", "1"):
        assert call(capsys, "train", *SMALL, "--seed", seed, "--out", f"runs/{seed}")[0] == 0
    Path("runs/2").mkdir()
    Path("runs/2/config.json").write_text("{}")
    status, text, errors = call(capsys, "report", "runs", "--out", "pages")
    assert (status, errors) == (0, "")
    summaries = [json.loads(Path(f"runs/{seed}/result.json").read_text()) for seed in (0, 1)]
    low, high = sorted(summary["test"]["5"]["token_accuracy"] for summary in summaries)
    assert re.search(rf"^bd_lru +2 +{summaries[0]['parameters']:,} +6 ", text, re.MULTILINE)
    spread = rf"{(low + high) / 2:.3f} \({low:.3f}-{high:.3f}\)"
    assert re.search(rf"^test, length 5 +token +sequence +macro\nbd_lru +{spread} ", text, re.MULTILINE)
    assert text.endswith("Runs without a result, left out: runs/2.\nThe page is pages/report.html.\n")
    assert "Runs without a result, left out: runs/2." in Path("pages/report.html").read_text()
    assert call(capsys, "report", "runs/0")[0] == 0
    assert Path("report/report.html").exists()


def test_sweep_prints_its_results_and_where_they_are(capsys):
    Path("two.py").write_text(f"configs = [{{**{json.loads(SMALL_CONFIG.to_json())!r}, 'seed': s}} for s in (0, 1)]")
    row = {"label": "0", "status": "done", "error": None, "folder": "there/a"}
    assert call(capsys, "train", *SMALL, "--out", "there/a")[0] == 0
    done = mock.Mock(return_value=SweepResult([row], [Path("there/results.csv")]))
    with mock.patch("statemix.cli.sweep.sweep", done):
        arguments = ["--out", "there", "--jobs", "3", "--executor", "ray", "--address", "auto"]
        status, text, _ = call(capsys, "sweep", "two.py", *arguments)
    assert status == 0
    assert list(done.call_args.args[0]) == ["0", "1"]
    assert done.call_args.args[1] == Path("there")
    assert done.call_args.kwargs == {"jobs": 3, "executor": "ray", "address": "auto"}
    assert re.search(r"^permutation\n.*\nbd_lru +1 ", text, re.MULTILINE)
    assert text.endswith("1 of 1 runs have ended; all are in there/results.csv. statemix report there: a page.\n")


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, with warnings as errors."""
    environment = os.environ | {"PYTHONWARNINGS": "error"} | environment
    return subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_the_installed_command_trains():
    done = program("train", *SMALL, "--out", "run", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "The run is in run" in done.stdout
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["2", "4"]
    assert config_of("run") == SMALL_CONFIG
    assert json.loads(Path("run/result.json").read_text())["threads"] == 1
    files = {path.name for path in Path("run").iterdir() if path.is_file()}
    assert files == {"config.json", "metrics.jsonl", "checkpoints.json", "result.json", "manifest.json", "curves.png"}


def test_the_installed_command_tells_why_a_backend_is_missing():
    done = program("info", STATEMIX_INSTRUCTION_SET="z80")
    assert (done.returncode, done.stderr) == (0, "")
    line = next(line for line in done.stdout.splitlines() if line.startswith("  cpu "))
    assert re.fullmatch(r"  cpu +NOT AVAILABLE: STATEMIX_INSTRUCTION_SET must be one of \[.*\] .*, got 'z80'\.", line)
    assert "  associative  " in done.stdout
