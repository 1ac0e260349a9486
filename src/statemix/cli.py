"""The command line: statemix train | bench | info."""

import dataclasses
import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import statemix
from statemix.benchmark import BENCHMARKS, run
from statemix.config import TrainConfig
from statemix.mixers import MIXERS
from statemix.report import results_table
from statemix.scan import BACKENDS, backend_problem, cpu
from statemix.specs import Spec, options
from statemix.tasks import TASKS
from statemix.train import train

USAGE = """usage: statemix COMMAND [options]

commands:
  train   train a model on a task; `statemix train --help` lists every option with its default
  bench   time and memory of scans, layers and training steps against baselines, in one run
  info    versions, backends and the instruction set in use, and why a backend is missing
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if a run failed, 2 if it was asked for wrongly."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[list[str]], None]] = {"train": _train, "bench": _bench, "info": _info}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise ValueError(f"statemix: COMMAND must be one of {sorted(commands)}, got {arguments[0]!r}.")
        commands[arguments[0]](list(arguments[1:]))
    except SystemExit as stop:  # from tyro, which has said why
        return int(stop.code or 0)
    except KeyboardInterrupt:
        remedy = ": the same command goes on from the last checkpoint" if arguments[0] == "train" else ""
        print(f"stopped{remedy}.", file=sys.stderr)
        return 130
    except (TypeError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


def _info(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"info: takes no arguments, got {arguments}.")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    print(f"statemix {statemix.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"machine: {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {gpu}")
    facts = {"associative": "log-depth scan in torch, any device", "reference": "loop over time in torch, any device"}
    if backend_problem("cpu") is None:
        facts["cpu"] = (
            f"fused C++ kernels; instruction set {cpu.instruction_set()}, of {', '.join(cpu.instruction_sets())} "
            f"(set {cpu.INSTRUCTION_SET_VARIABLE} to choose)"
        )
    print("backends of the scans; backend='auto' takes the first that serves a call:")
    for name in BACKENDS:
        print(f"  {name:<12} {facts.get(name) or f'NOT AVAILABLE: {backend_problem(name)}'}")
    print(f"mixers: {', '.join(MIXERS)}\ntasks: {', '.join(TASKS)}")


def _train(arguments: list[str]) -> None:
    # these three decide which other options exist, so they are taken out before the rest is parsed
    path, task, mixer = (_take(arguments, flag) for flag in ("--config", "--task", "--mixer"))
    base = TrainConfig() if path is None else TrainConfig.load(path)
    task, mixer = task or base.task["name"], mixer or base.mixer["name"]
    for flag, name, known in (("--task", task, sorted(TASKS)), ("--mixer", mixer, sorted(MIXERS))):
        if name not in known:
            raise ValueError(f"train: `{flag}` must be one of {known}, got {name!r}.")

    _, config_help = (inspect.getdoc(TrainConfig) or "").split("Args:")
    description = f"""Train a model on a task, keep the checkpoint that validates best, and test it once.

--task NAME and --mixer NAME choose what is trained on and what is trained: {", ".join(TASKS)}; {", ".join(MIXERS)}.
They bring the options below that begin with their names. --config FILE gives other defaults: a config.json of a run.

Args:{config_help.split("Raises:")[0]}
    out: folder of the run: checkpoints, metrics.jsonl, result.json, curves.png.
    resume: auto goes on from the last checkpoint in the folder; never deletes that run and starts again.
"""
    fields: list[tuple[str, Any, Any]] = [
        ("task", *_options("Task", TASKS[task], base.task if base.task["name"] == task else {})),
        ("mixer", *_options("Mixer", MIXERS[mixer], base.mixer if base.mixer["name"] == mixer else {}, ("d_model",))),
    ]
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("task", "mixer"):
            fields.append((field.name, field.type, dataclasses.field(default=getattr(base, field.name))))
    fields.append(("out", str, dataclasses.field(default="runs/default")))
    fields.append(("resume", Literal["auto", "never"], dataclasses.field(default="auto")))
    form = dataclasses.make_dataclass("Train", fields, kw_only=True, namespace={"__doc__": description})
    given = dict(vars(tyro.cli(form, args=arguments, prog="statemix train")))
    out, resume = given.pop("out"), given.pop("resume")
    given["task"] = {"name": task, **vars(given["task"])}
    given["mixer"] = {"name": mixer, **vars(given["mixer"])}
    result = train(TrainConfig(**given), out, resume=resume)
    print(results_table({mixer: [result.summary]}))
    print(
        f"The run is in {result.out}: metrics.jsonl, curves.png, result.json, and the best weights in "
        f"step-{result.summary['best_step']}."
    )


def _bench(arguments: list[str]) -> None:
    benchmark = tyro.extras.subcommand_cli_from_dict(BENCHMARKS, args=arguments, prog="statemix bench")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    out = run(benchmark, console.print)
    print(f"The results are in {out}.json, with all samples, and {out}.png.")


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove "--flag VALUE" or "--flag=VALUE" from the arguments and return the value; None if it is not there."""
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise ValueError(f"train: `{flag}` needs a value.")
            del arguments[i]
            return arguments.pop(i)
        if argument.startswith(f"{flag}="):
            return arguments.pop(i).removeprefix(f"{flag}=")
    return None


def _options(title: str, cls: type, defaults: Spec, given: tuple[str, ...] = ()) -> tuple[type, Any]:
    """A dataclass of the options of a task or mixer, for tyro, and its default as a field.

    An option without a default, here or in the constructor, is required.
    """
    fields: list[tuple[str, Any, Any]] = []
    for option in options(cls, given):
        default = defaults.get(option.name, option.default)
        bare = dataclasses.field() if default is inspect.Parameter.empty else dataclasses.field(default=default)
        fields.append((option.name, option.annotation, bare))
    doc = inspect.getdoc(cls) or ""
    doc = doc.split("\n")[0] + "\n\nArgs:" + doc.partition("Args:")[2].partition("Raises:")[0]
    form = dataclasses.make_dataclass(title, fields, kw_only=True, namespace={"__doc__": doc})
    required = any(field.default is dataclasses.MISSING for field in dataclasses.fields(form))
    return form, dataclasses.field() if required else dataclasses.field(default_factory=form)
