"""Damage what statemix reads, call it as nobody should, and kill it while it writes: it must say so, or be right.

    python tests/attack.py --seed 0                       # what `make attack` does
    python tests/attack.py --only caches --tries 17 18    # one try again, by its number

Each try is a function of its attack, the seed and its number. It runs in a process that may crash or hang, and ends as

    as before             what came out is what comes out of files that nobody has touched, or of the float64 loop
    refused               by an error that names what is wrong: the file, argument or field
    crashed               a signal ended the process
    hung                  it took more than SECONDS
    silently different    a status of 0, and another result
    traceback             an exception that is no TypeError, ValueError, RuntimeError or IndexError
    unclear               an error that is not in the form of ours, or names none of what was touched

The first two are right. What was found is printed as a table and written to `--out`; the status is 1 if anything is
wrong. That there is too little memory may also be said in torch's words, which name no argument but the bytes.
"""

import argparse
import dataclasses
import json
import multiprocessing.connection
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch, as conftest.py has it

import torch

import statemix
from statemix.benchmark import measure

SECONDS = 120
BATCH = 50  # tries of one process
RIGHT = ("as before", "refused")
WRONG = ("crashed", "hung", "silently different", "traceback", "unclear")
NO_MEMORY = (
    r"can't allocate memory|Cannot allocate memory|Storage size calculation overflowed|out of memory|not enough memory"
)


class End(NamedTuple):
    """How a try ended: one of RIGHT and WRONG, and what was tried and said."""

    kind: str
    what: str


@dataclasses.dataclass(frozen=True)
class Attack:
    """A kind of try.

    prepare: what is made once, in a folder, for all tries.
    attempt: a try, with random numbers and an empty folder of its own.
    """

    name: str
    tries: int
    prepare: Callable[[Path], object]
    attempt: Callable[[object, random.Random, Path], End]


def judge(what: str, error: BaseException | str, names: Iterable[str]) -> End:
    """How a try ended that ended with an error, or with what a command said of one.

    Args:
        what: was tried.
        error: what came.
        names: of the file, argument or field that was touched: a message is to have one of them.
    """
    told = isinstance(error, str | TypeError | ValueError | RuntimeError | IndexError)
    message = str(error).strip()
    if not told or "Traceback (most recent call last)" in message:
        return End("traceback", f"{what}: {error!r}")
    message = message.removeprefix("error: ")
    form = re.match(r"[\w.-]+: ", message) and any(name in message for name in names)
    clear = form or re.search(NO_MEMORY, message)
    return End("refused" if clear else "unclear", f"{what}: {message}")


def attacks() -> list[Attack]:
    """All there are."""
    from attack_calls import CALLS
    from attack_files import CACHES, FIELDS, FOLDERS
    from attack_kills import CACHE_KILLS, MEMORY, RUN_KILLS

    return [FOLDERS, FIELDS, CACHES, CALLS, MEMORY, RUN_KILLS, CACHE_KILLS]


class Worker:
    """A process at work on some tries of an attack, which tells the end of each as it comes."""

    def __init__(self, attack: Attack, prepared: object, numbers: list[int], seed: int, place: Path) -> None:
        self.attack, self.numbers, self.began = attack, numbers, time.monotonic()
        self.connection, theirs = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                for number in numbers:
                    with tempfile.TemporaryDirectory(dir=place) as own:
                        rng = random.Random(f"{attack.name} {seed} {number}")
                        theirs.send(attack.attempt(prepared, rng, Path(own)))
                status = 0
            except Exception:
                traceback.print_exc()  # of the attack itself
            finally:
                os._exit(status)
        theirs.close()

    def ended(self) -> End | None:
        """How its next try ended, which is then no longer among `numbers`; None if nothing is known yet."""
        try:
            if self.connection.poll():
                end: End | None = self.connection.recv()
            elif time.monotonic() - self.began > SECONDS:
                end = End("hung", f"{self.attack.name} {self.numbers[0]}")
            else:
                return None
        except EOFError:
            _, status = os.waitpid(self.process, 0)
            self.process, code = 0, os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            end = End("crashed" if code < 0 else "traceback", f"{self.attack.name} {self.numbers[0]}: {how}")
        self.began = time.monotonic()
        return end

    def stop(self) -> None:
        """End the process, if it has not ended, and what it has started."""
        self.connection.close()
        if self.process:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)


def run(attack: Attack, numbers: list[int], seed: int, jobs: int, say: Callable[[str], None]) -> list[tuple[int, End]]:
    """Make the tries of an attack. Returns number and end of each."""
    ends: list[tuple[int, End]] = []
    shown = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "prepared").mkdir()
        prepared = attack.prepare(place / "prepared")
        waiting = [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]
        workers: list[Worker] = []
        try:
            while waiting or workers:
                while waiting and len(workers) < jobs:
                    workers.append(Worker(attack, prepared, waiting.pop(0), seed, place))
                multiprocessing.connection.wait([worker.connection for worker in workers], timeout=1)
                for worker in list(workers):
                    if (end := worker.ended()) is None:
                        continue
                    ends.append((worker.numbers.pop(0), end))
                    if end.kind in WRONG:
                        say(f"{attack.name} {ends[-1][0]}: {end.kind.upper()}: {end.what}")
                    broken = end.kind in ("crashed", "hung") or worker.process == 0
                    if broken or not worker.numbers:
                        worker.stop()
                        workers.remove(worker)
                        waiting[:0] = [worker.numbers] if worker.numbers else []
                if time.monotonic() - shown > 20:
                    shown = time.monotonic()
                    say(f"{attack.name}: {len(ends)} of {len(numbers)}")
        finally:
            for worker in workers:
                worker.stop()
    return ends


def main() -> int:
    """Attack. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Damage files, call functions wrongly, kill processes, and look.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of tries; at least one of each")
    parser.add_argument("--only", nargs="+", help="names of attacks")
    parser.add_argument("--tries", nargs="+", type=int, help="only these, by their numbers")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends its processes, too
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    began, found = time.monotonic(), {}
    machine = f"{measure.machine(1)['processor']}, {os.cpu_count()} cores, {platform.system()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, statemix {statemix.__version__}"
    about = {"seed": options.seed, "scale": options.scale, "machine": machine, "versions": versions}

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line[:2000]}", file=sys.stderr, flush=True)

    for attack in attacks():
        if options.only is None or attack.name in options.only:
            numbers = options.tries or list(range(max(1, round(attack.tries * options.scale))))
            start = time.monotonic()
            ends = run(attack, numbers, options.seed, options.jobs, say)
            counts = Counter(end.kind for _, end in ends)
            found[attack.name] = {
                "tried": len(ends),
                **{kind: counts[kind] for kind in (*RIGHT, *WRONG)},
                "seconds": round(time.monotonic() - start),
                "wrong": {number: end for number, end in sorted(ends) if end.kind in WRONG},
            }
            if options.out is not None:
                options.out.write_text(json.dumps(about | {"attacks": found}, indent=2) + "\n")
            if options.tries:
                say("\n".join(f"{attack.name} {number}: {end.kind}: {end.what}" for number, end in ends))
    header = ("tried", *WRONG, *RIGHT, "seconds")
    widths = [max(map(len, found)), *map(len, header)]
    for row in [("", *header), *((name, *(line[key] for key in header)) for name, line in found.items())]:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)))
    return int(any(line[kind] for line in found.values() for kind in WRONG))


if __name__ == "__main__":
    sys.exit(main())
