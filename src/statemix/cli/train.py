"""statemix train: one run, whose options are those of its task and of its mixer too."""

import dataclasses
import inspect
import os
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from statemix.cli.arguments import take
from statemix.cli.tables import print_tables
from statemix.mixers import MIXERS
from statemix.runs.presets import PROTOCOLS, preset_config, preset_steps
from statemix.runs.read import read_run
from statemix.specs import Spec, import_named, module_of, options
from statemix.tasks import TASKS
from statemix.training.config import TrainConfig
from statemix.training.listeners import TRACKERS
from statemix.training.loop import train

WIDTH = 80  # of the short help
SHORT_HELP = """usage: statemix train [options]

Train a model on a task, keep the checkpoint that validates best, and test it.

  --task NAME, --mixer NAME  what is trained on, and what: names that
                             `statemix info` lists, or paths of one's own,
                             my_pkg.layers:Mine
  --text SOURCE              a file, a folder, stdlib or hf:NAME as the task
  --config FILE              a run's config.json gives the defaults
  --preset NAME              a known benchmark does
  --help-all                 says what each option means

Every option, with its default:
"""


def run(arguments: list[str]) -> None:
    """Train, and print the scores and where the run is."""
    # these decide which other options exist, or their defaults, so they are taken out before the rest is parsed
    flags = ("--config", "--preset", "--task", "--mixer")
    path, preset, task, mixer = (take("train", arguments, flag) for flag in flags)
    for name in (task, mixer):
        if name is not None and ":" in name:
            import_named("train", module_of(name))  # it is named here, and not by a file
    if (text := take("train", arguments, "--text")) is not None:
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
        if name not in known and ":" not in name:
            raise ValueError(f"train: `{flag}` must be one of {known}, got {name!r}.")

    _, config_help = (inspect.getdoc(TrainConfig) or "").split("Args:")
    description = f"""Train a model on a task, keep the checkpoint that validates best, and test it once.

--task NAME and --mixer NAME choose what is trained on and what is trained: {", ".join(TASKS)}; {", ".join(MIXERS)};
or the path of one's own, my_pkg.layers:Mine. They bring the options below that begin with their names. --text SOURCE is
--task text --task.source SOURCE, whose help says what it may be. --config FILE gives other defaults: a config.json of a
run; --preset NAME ({", ".join(PROTOCOLS)}) those of the task in a known benchmark, as presets.py says. --help-all lists
every option.

Args:{config_help.split("Raises:")[0]}
    out: folder of the run: checkpoints, metrics.jsonl, result.json, curves.png.
    resume: auto goes on from the last checkpoint in the folder, best from the best one, as where the last is damaged;
        never deletes that run and starts again.
    tracker: of experiments, {", ".join(TRACKERS)}: it is given each line of metrics once, also where the run resumes;
        TensorBoard's events are in the folder of the run. Its package must be installed.
    init_from: folder of another run, or of a model, whose best weights are the first ones; of the same model options.
    lengthen: the run in the folder, of this config with fewer --steps, has ended and goes on to these; it is said what
        becomes of the learning rate.
"""
    given = _parse(arguments, base, task, mixer, description)
    if preset is not None:  # its defaults are those of the task that was asked for
        own = given["mixer"] if mixer != base.mixer["name"] else None
        given = _parse(arguments, preset_config(preset, given["task"], own), task, mixer, description)
    out = given.pop("out")
    how = {name: given.pop(name) for name in ("resume", "tracker", "init_from", "lengthen")}
    if preset is not None and PROTOCOLS[preset].epochs is not None:  # of the training set that was asked for
        written = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        steps, eval_every = preset_steps(preset, given["train_sequences"], given["batch_size"])
        given |= {} if "--steps" in written else {"steps": steps}
        given |= {} if "--eval-every" in written else {"eval_every": eval_every}
    result = train(TrainConfig(**given), out, **how)
    if os.environ.get("RANK", "0") != "0":  # of many processes that a launcher started, the first one prints
        return
    print_tables([read_run(result.out)])
    if "sharpened" in result.summary:
        scores = result.summary["sharpened"].items()
        print(
            "sharpened: "
            + ", ".join(f"{score['sequence_accuracy']:.4f} at {length}" for length, score in scores)
            + "\n"
        )
    if (bits := result.summary.get("valid", {}).get("bits_per_byte")) is not None:
        loss, perplexity = (result.summary["valid"][key] for key in ("loss", "perplexity"))
        print(f"validation: {loss:.4f} nats per token, {bits:.4f} bits per byte, perplexity {perplexity:.4g}\n")
    print(
        f"The run is in {result.out}: metrics.jsonl, curves.png, result.json, and the best weights in "
        f"step-{result.summary['best_step']}."
    )


def _parse(arguments: list[str], base: TrainConfig, task: str, mixer: str, description: str) -> dict[str, Any]:
    """The fields of a config, and what else `train` takes, from arguments and the defaults of another config."""
    fields: list[tuple[str, Any, Any]] = [
        ("task", *_options("Task", TASKS[task], base.task if base.task["name"] == task else {})),
        ("mixer", *_options("Mixer", MIXERS[mixer], base.mixer if base.mixer["name"] == mixer else {}, ("d_model",))),
    ]
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("task", "mixer"):
            fields.append((field.name, field.type, dataclasses.field(default=getattr(base, field.name))))
    fields.append(("out", str, dataclasses.field(default="runs/default")))
    fields.append(("resume", Literal["auto", "best", "never"], dataclasses.field(default="auto")))
    fields.append(("tracker", str | None, dataclasses.field(default=None)))
    fields.append(("init_from", str | None, dataclasses.field(default=None)))
    fields.append(("lengthen", bool, dataclasses.field(default=False)))
    if "--help-all" in arguments:
        arguments = ["--help"]
    elif not {"-h", "--help"}.isdisjoint(arguments):
        print(SHORT_HELP + "\n".join(_summary(fields)))
        raise SystemExit(0)
    form = dataclasses.make_dataclass("Train", fields, kw_only=True, namespace={"__doc__": description})
    given = dict(vars(tyro.cli(form, args=arguments, prog="statemix train")))
    given["task"] = {"name": task, **vars(given["task"])}
    given["mixer"] = {"name": mixer, **vars(given["mixer"])}
    return given


def _summary(fields: Sequence[tuple[str, Any, Any]]) -> list[str]:
    """Lines of all options and their defaults, those of task, mixer, model and optimizer each in a paragraph."""
    paragraphs: list[list[str]] = []
    own: list[str] = []
    for name, kind, field in fields:
        if dataclasses.is_dataclass(kind):
            base = None if field.default is dataclasses.MISSING else field.default
            parts = dataclasses.fields(kind)
            paragraphs.append([_shown(f"{name}.{p.name}", getattr(base, p.name, p.default)) for p in parts])
        else:
            own.append(_shown(name, field.default))
    layout = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    unbroken = [" ".join(option.replace(" ", "\N{NO-BREAK SPACE}") for option in part) for part in [*paragraphs, own]]
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for text in unbroken for line in layout.wrap(text)]
    return lines


def _shown(name: str, default: object) -> str:
    """An option and its default, as they would be given."""
    path, _, last = name.replace("_", "-").rpartition(".")
    before = f"--{path}." if path else "--"
    if isinstance(default, bool):
        return f"{before}{'' if default else 'no-'}{last}"
    if default is dataclasses.MISSING:
        return f"{before}{last} (required)"
    values = default if isinstance(default, tuple) else (default,)
    return " ".join([before + last, *map(str, values)])


def _options(title: str, cls: type, defaults: Spec, given: tuple[str, ...] = ()) -> tuple[type, Any]:
    """A dataclass of the options of a task or mixer, for tyro, and its default as a field.

    An option without a default, here or in the constructor, is required.
    """
    fields: list[tuple[str, Any, Any]] = []
    signature = inspect.signature(cls, eval_str=True)
    for option in options(cls, given):
        default = defaults.get(option.name, option.default)
        bare = dataclasses.field() if default is inspect.Parameter.empty else dataclasses.field(default=default)
        kind = signature.parameters[option.name].annotation
        kind = type(default) if kind is inspect.Parameter.empty else kind
        fields.append((option.name, kind, bare))
    doc = inspect.getdoc(cls) or ""
    doc = doc.split("\n")[0] + "\n\nArgs:" + doc.partition("Args:")[2].partition("Raises:")[0]
    form = dataclasses.make_dataclass(title, fields, kw_only=True, namespace={"__doc__": doc})
    required = any(field.default is dataclasses.MISSING for field in dataclasses.fields(form))
    return form, dataclasses.field() if required else dataclasses.field(default_factory=form)
