"""The command line, a module per command, and the only `print`."""

import codecs
import difflib
import io
import sys
from collections.abc import Sequence
from importlib import import_module

import statemix
from statemix.cli.arguments import take
from statemix.specs import import_named

COMMANDS = ("train", "sweep", "generate", "report", "verify", "explore", "export", "bench", "info")
USAGE = """usage: statemix COMMAND [options]

commands:
  train     train a model on a task; `statemix train --help-all` lists every option with its default
  sweep     train many: every config of a Python file, side by side; started again, what is missing
  generate  text that goes on from a prompt, from a run of the task text
  report    tables, pictures and one HTML page of runs
  verify    whether a run's model is right at every length: all states that it can reach are visited
  explore   a page on which one types a word and sees the blocks of a trained model move
  export    a run's model as ONNX or for torch.export.load, or its verified automaton as C
  bench     time and memory of scans, layers and training steps against baselines, in one run
  info      versions, backends and the instruction set in use, and why a backend is missing; --sizes: of all mixers

options:
  --version               the version of statemix
  --completion SHELL      a script that completes commands: eval "$(statemix --completion bash)"; also zsh, fish

options of every command:
  --help, --help-all      its options: on one screen, and all that is to be said of each
  --import MODULE         import it first: a run that names its mixer or task by a path is read only then
"""

_COMPLETE = f"""_statemix() {{
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{" ".join(COMMANDS)}" -- "$2")); fi
}}
complete -o default -F _statemix statemix"""
COMPLETIONS = {
    "bash": _COMPLETE,
    "fish": f'complete -c statemix -n __fish_use_subcommand -f -a "{" ".join(COMMANDS)}"',
    "zsh": f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{_COMPLETE}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 if it failed, 2 if it was asked for wrongly, or one of its own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show ends no command
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name = arguments[0]
    try:
        if name == "--version":
            print(f"statemix {statemix.__version__}")
            return 0
        if name.partition("=")[0] == "--completion":
            shell = take("statemix", arguments, "--completion")
            if shell is None or shell not in COMPLETIONS:
                raise ValueError(f"statemix: `--completion` must be one of {sorted(COMPLETIONS)}, got {shell!r}.")
            print(COMPLETIONS[shell])
            return 0
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"statemix: COMMAND must be one of {sorted(COMMANDS)}, got {name!r}.{hint}")
        while (module := take("statemix", arguments, "--import")) is not None:
            import_named("statemix", module)
        if name != "train":  # all options of the others are on one screen
            arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
        command = import_module(f"{__name__}.{name}")  # of the others' imports none is waited for
        status: int | None = command.run(arguments[1:])
    except SystemExit as stop:  # from tyro, which has said why
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        remedy = ": the same command goes on from the last checkpoint" if name in ("train", "sweep") else ""
        print(f"stopped{remedy}.", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"error: {name}: there is too little memory. {error}".rstrip(), file=sys.stderr)
        return 1
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError | OSError) else 2
    return status or 0
