"""The command line: statemix train | sweep | generate | report | bench | info."""

import dataclasses
import inspect
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

import statemix
from statemix import kernels
from statemix.benchmark import BENCHMARKS, run
from statemix.generate import load_text_model, stream_text
from statemix.mixers import MIXERS, library_kernels
from statemix.report.html import sections_of, write_report
from statemix.report.tables import align, group_rows
from statemix.runs.presets import PROTOCOLS, preset_config, preset_steps
from statemix.runs.read import Run, find_runs, read_run, unfinished_runs
from statemix.runs.sweep import load_configs, sweep
from statemix.scan import BACKENDS, backend_problem
from statemix.sizing import table
from statemix.specs import Spec, options
from statemix.tasks import TASKS
from statemix.training.config import TrainConfig
from statemix.training.loop import train

USAGE = """usage: statemix COMMAND [options]

commands:
  train     train a model on a task; `statemix train --help` lists every option with its default
  sweep     train many: every config of a Python file, side by side; started again, what is missing
  generate  text that goes on from a prompt, from a run of the task text
  report    tables, pictures and one HTML page of runs
  bench     time and memory of scans, layers and training steps against baselines, in one run
  info      versions, backends and the instruction set in use, and why a backend is missing; --sizes: of all mixers
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if a run failed, 2 if it was asked for wrongly."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        **{"train": _train, "sweep": _sweep, "generate": _generate, "report": _report, "bench": _bench, "info": _info}
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise ValueError(f"statemix: COMMAND must be one of {sorted(commands)}, got {arguments[0]!r}.")
        commands[arguments[0]](list(arguments[1:]))
    except SystemExit as stop:  # from tyro, which has said why
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        remedy = ": the same command goes on from the last checkpoint" if arguments[0] in ("train", "sweep") else ""
        print(f"stopped{remedy}.", file=sys.stderr)
        return 130
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError | OSError) else 2
    return 0


@dataclasses.dataclass(frozen=True)
class _Info:
    """Versions, backends and the instruction set in use; or the sizes of all mixers.

    Args:
        sizes: print, instead, what each mixer of about one budget has: a fair comparison starts from it.
        budget: numbers per mixer.
        what: the numbers that the budget is of.
        d_model: D, the width of the model.
    """

    sizes: bool = False
    budget: int = 65_536
    what: Literal["parameters", "state"] = "parameters"
    d_model: int = 128


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """Train every config of a Python file. Started again, it does what is missing.

    Args:
        file: ends with `configs`: a list of TrainConfig, a dict {label: config}, or a function of the budget.
        out: folder of the sweep: a folder per run, results.csv, and results.parquet where pyarrow is installed. None:
            runs/ and the name of the file.
        jobs: runs at a time, a process of one thread each. None: as many as there are cores.
        executor: processes of this machine, or workers of a Ray cluster that see `out` under the same path.
        address: of the Ray cluster. None: a Ray of this machine's own.
        budget: what `configs` is called with if it is a function.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    out: Path | None = None
    jobs: int | None = None
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    budget: Literal["quick", "full"] | None = None


@dataclasses.dataclass(frozen=True)
class _Generate:
    """Write what follows a prompt, as it comes; how fast, at the end, to stderr.

    Args:
        checkpoint: folder of a run of the task text, then its best checkpoint, or of one of its checkpoints.
        prompt: the text to go on from; given several times, one after the other, with the seeds `seed`, `seed` + 1, ...
        max_new_tokens: tokens that follow each prompt.
        temperature: what the logits are divided by; 0: always the likeliest token.
        top_k: only so many of the likeliest tokens are drawn from. None: all.
        top_p: only the likeliest tokens that together have this probability are drawn from. None: all.
        seed: of the draws.
        stop: a text before which it ends, may be given several times.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    max_new_tokens: int = 500
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class _Report:
    """Tables and pictures of runs, and report.html with all of them.

    Args:
        runs: folders of runs or of sweeps. Runs that differ only in their seed are one row.
        out: folder of the report.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS...")]
    out: Path = Path("report")


def _info(arguments: list[str]) -> None:
    given = tyro.cli(_Info, args=arguments, prog="statemix info")
    if given.sizes:
        return _print_sizes(given)
    if given != _Info():
        raise ValueError("info: `--budget`, `--what` and `--d-model` are of `--sizes`.")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    print(f"statemix {statemix.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"machine: {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {gpu}")
    facts = {"associative": "log-depth scan in torch, any device", "reference": "loop over time in torch, any device"}
    if backend_problem("cpu") is None:
        facts["cpu"] = (
            f"fused C++ kernels; instruction set {kernels.instruction_set()}, "
            f"of {', '.join(kernels.instruction_sets())} (set {kernels.INSTRUCTION_SET_VARIABLE} to choose)"
        )
    if backend_problem("gpu") is None:
        facts["gpu"] = "fused Triton kernels, CUDA tensors"
    print("backends of the scans; backend='auto' takes the first that serves a call:")
    for name in BACKENDS:
        print(f"  {name:<12} {facts.get(name) or f'NOT AVAILABLE: {backend_problem(name)}'}")
    print(f"mixers: {', '.join(MIXERS)}\ntasks: {', '.join(TASKS)}")
    print("kernels of other libraries for the mixers:")
    for name, fact in library_kernels().items():
        print(f"  {name:<22} {fact}")


def _print_sizes(given: _Info) -> None:
    rows = [["mixer", "width", "parameters", "state", "off"]]
    for solution in table(given.d_model, given.budget, given.what):
        name = solution.spec["name"]
        knob = MIXERS[name].width_option
        width = f"{knob}={solution.spec[knob]}"
        rows.append([name, width, f"{solution.parameters:,}", f"{solution.state_size:,}", f"{solution.off:+.1%}"])
    print(f"one mixer of d_model {given.d_model} for {given.budget:,} {given.what}; off: what it has over that, less 1")
    print(align(rows, markdown=False))


def _train(arguments: list[str]) -> None:
    # these decide which other options exist, or their defaults, so they are taken out before the rest is parsed
    path, preset, task, mixer = (_take(arguments, flag) for flag in ("--config", "--preset", "--task", "--mixer"))
    if (text := _take(arguments, "--text")) is not None:
        if task not in (None, "text"):
            raise ValueError(f"train: `--text` is short for --task text --task.source, but `--task` is {task!r}.")
        task = "text"
        arguments += ["--task.source", text]
    if path is not None and preset is not None:
        raise ValueError("train: `--config` and `--preset` both give the defaults: use one of them.")
    base = TrainConfig() if path is None else TrainConfig.load(path)
    if preset is not None:
        base = preset_config(preset, task)
    task, mixer = task or base.task["name"], mixer or base.mixer["name"]
    for flag, name, known in (("--task", task, sorted(TASKS)), ("--mixer", mixer, sorted(MIXERS))):
        if name not in known:
            raise ValueError(f"train: `{flag}` must be one of {known}, got {name!r}.")

    _, config_help = (inspect.getdoc(TrainConfig) or "").split("Args:")
    description = f"""Train a model on a task, keep the checkpoint that validates best, and test it once.

--task NAME and --mixer NAME choose what is trained on and what is trained: {", ".join(TASKS)}; {", ".join(MIXERS)}.
They bring the options below that begin with their names. --text SOURCE is --task text --task.source SOURCE, whose help
says what it may be. --config FILE gives other defaults: a config.json of a run;
--preset NAME ({", ".join(PROTOCOLS)}) those of the task in a known benchmark, as presets.py says.

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
    if preset is not None:  # its epochs are of the training set that was asked for
        written = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        steps, eval_every = preset_steps(preset, given["train_sequences"], given["batch_size"])
        given |= {} if "--steps" in written else {"steps": steps}
        given |= {} if "--eval-every" in written else {"eval_every": eval_every}
    given["task"] = {"name": task, **vars(given["task"])}
    given["mixer"] = {"name": mixer, **vars(given["mixer"])}
    result = train(TrainConfig(**given), out, resume=resume)
    if os.environ.get("RANK", "0") != "0":  # of many processes that a launcher started, the first one prints
        return
    _print_tables([read_run(result.out)])
    if (bits := result.summary.get("valid", {}).get("bits_per_byte")) is not None:
        loss, perplexity = (result.summary["valid"][key] for key in ("loss", "perplexity"))
        print(f"validation: {loss:.4f} nats per token, {bits:.4f} bits per byte, perplexity {perplexity:.4g}\n")
    print(
        f"The run is in {result.out}: metrics.jsonl, curves.png, result.json, and the best weights in "
        f"step-{result.summary['best_step']}."
    )


def _sweep(arguments: list[str]) -> None:
    given = tyro.cli(_Sweep, args=arguments, prog="statemix sweep")
    entries = load_configs(given.file, given.budget)
    out = given.out or Path("runs") / given.file.stem
    done = sweep(entries, out, jobs=given.jobs, executor=given.executor, address=given.address)
    runs = [read_run(row["folder"]) for row in done.rows if row["status"] == "done"]
    _print_tables(runs)
    print(
        f"{len(runs)} of {len(done.rows)} runs have ended; all are in {done.tables[0]}. statemix report {out}: a page."
    )
    if done.failed:
        errors = "".join(f"\n  {row['label']}: {row['error']}" for row in done.failed)
        raise RuntimeError(
            f"sweep: {len(done.failed)} of {len(done.rows)} runs failed; the same command tries them again:{errors}"
        )


def _generate(arguments: list[str]) -> None:
    given = tyro.cli(_Generate, args=arguments, prog="statemix generate")
    model, tokenizer = load_text_model(given.checkpoint)
    if not given.prompt:
        raise ValueError("generate: `--prompt` must be given, with a text to go on from.")
    options = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "stop")}
    texts = [
        stream_text(model, tokenizer, prompt, given.max_new_tokens, seed=given.seed + row, **options)
        for row, prompt in enumerate(given.prompt)
    ]
    count, began = 0, time.perf_counter()
    for row, (prompt, text) in enumerate(zip(given.prompt, texts, strict=True)):
        print("\n" if row else "", prompt, sep="", end="", flush=True)
        for piece in text:
            print(piece, end="", flush=True)
            count += 1
        print()
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)


def _report(arguments: list[str]) -> None:
    given = tyro.cli(_Report, args=arguments, prog="statemix report")
    runs, left = find_runs(given.runs), unfinished_runs(given.runs)
    notes = [f"Runs without a result, left out: {', '.join(map(str, left))}."] if left else []
    page, *_ = write_report(runs, given.out, notes)
    _print_tables(runs)
    print("\n".join([*notes, f"The page is {page}."]))


def _print_tables(runs: Sequence[Run]) -> None:
    for task, groups in sections_of(runs).items():
        print(f"{task}\n{align(group_rows(groups), markdown=False)}\n")


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
