"""Too little memory, and processes that are killed while they write: tries of attack.py."""

import ctypes
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attack import WRONG, Attack, End, judge
from attack_files import command, content_of, plain, text_config
from run_helpers import differing, extra

from statemix import TrainConfig, train
from statemix.text.corpus import open_corpus

MEGABYTE = 1 << 20


def fork(function: Callable[[], object]) -> int:
    """The id of a process that calls a function."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return process


def killed_after(seconds: float, function: Callable[[], object]) -> bool:
    """Call a function in a process that is killed after so long. Whether it was before its end."""
    process = fork(function)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) > 0:
        raise RuntimeError("the function failed before it was killed")
    return os.waitstatus_to_exitcode(status) < 0


# ---- memory


class Whole(NamedTuple):
    """A run that was never stopped, and how long it took."""

    config: TrainConfig
    out: Path
    seconds: float


def make_large(place: Path) -> Whole:
    """A run whose steps need some 20 MB."""
    (place / "text").write_text("".join(random.Random(0).choices("ab \n", k=200_000)))
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    task = text_config(place / "text").task | {"seq_len": 64}
    config = text_config(place / "text", task=task, steps=2, batch_size=512, eval_sequences=64)
    with plain():
        train(config, place / "whole", progress=False)
    return Whole(config, place / "whole", 0.0)


def limit_memory(whole: Whole, rng: random.Random, place: Path) -> End:
    """Give a run only a little more address space than it has at its start, and then let it end without a limit."""
    limit = round(2 ** rng.uniform(-3, 5) * MEGABYTE)
    (place / "config.json").write_text(whole.config.to_json())
    arguments = ("train", "--config", place / "config.json", "--out", place / "run")
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def limited() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tries left free
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + limit
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        ended = command(*arguments)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        theirs.send(ended)

    process = fork(limited)
    theirs.close()
    what = f"{limit / MEGABYTE:.1f} MB"
    try:
        status, _, errors = ours.recv()
    except EOFError:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return End("crashed" if code < 0 else "traceback", f"{what}: status {code}")
    os.waitpid(process, 0)
    first = End("as before", what) if status == 0 else judge(what, errors.partition("error: ")[2] or errors, {"memory"})
    if first.kind in WRONG:
        return first
    status, _, errors = command(*arguments)  # what it left is good for another try
    if status:
        return judge(f"{what}, and again", errors, {"never refused"})
    wrong = differing(place / "run", whole.out)
    return End("silently different", f"{what}: {wrong}") if wrong else first


MEMORY = Attack("memory limits", 50, make_large, limit_memory)


# ---- runs


def make_whole(place: Path) -> Whole:
    (place / "text").write_text("".join(random.Random(0).choices("ab \n", k=2000)))
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    config = text_config(place / "text", steps=12, eval_every=2)
    with plain():
        train(config, place / "first", progress=False)  # what is imported and cached by then takes no time
        began = time.monotonic()
        train(config, place / "whole", progress=False)
    return Whole(config, place / "whole", time.monotonic() - began)


def kill_run(whole: Whole, rng: random.Random, place: Path) -> End:
    """Kill a run, maybe again and again, let it end, and compare all its files."""
    out, times = place / "run", []

    def at_work() -> None:
        with plain():
            train(whole.config, out, progress=False)

    while not times or (rng.random() < 0.5 and len(times) < 5):
        times.append(rng.uniform(0, 1.2 * whole.seconds))
        killed_after(times[-1], at_work)
    what = f"killed after {', '.join(f'{seconds:.3f}' for seconds in times)} s"
    try:
        at_work()
    except Exception as error:
        return judge(what, error, {"never refused"})
    wrong = differing(out, whole.out) + extra(out, whole.out)
    return End("silently different" if wrong else "as before", f"{what}: {wrong}")


RUN_KILLS = Attack("kills of a run", 200, make_whole, kill_run)


# ---- caches


class Built(NamedTuple):
    """What opens a corpus, what it then holds, and how long that took."""

    arguments: tuple
    holds: tuple
    seconds: float


def make_built(place: Path) -> Built:
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    (place / "text").write_text("".join(random.Random(0).choices("abcdefgh \n", k=300_000)))
    arguments = (str(place / "text"), "characters", 0, "text", (0.1, 0.1))
    began = time.monotonic()
    corpus = open_corpus(*arguments)
    return Built(arguments, content_of(corpus), time.monotonic() - began)


def kill_cache(built: Built, rng: random.Random, place: Path) -> End:
    """Kill what builds a cache, and open the corpus from what it left."""
    os.environ["STATEMIX_CACHE"] = str(place / "cache")
    seconds = rng.uniform(0, 1.1 * built.seconds)
    killed_after(seconds, lambda: open_corpus(*built.arguments))
    what = f"killed after {seconds:.3f} s"
    try:
        holds = content_of(open_corpus(*built.arguments))
    except Exception as error:
        return judge(what, error, {"never refused"})
    [folder] = (place / "cache" / "text").iterdir()
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    same = holds == built.holds and not left
    return End("as before" if same else "silently different", f"{what}: {left}")


CACHE_KILLS = Attack("kills of a cache", 100, make_built, kill_cache)
