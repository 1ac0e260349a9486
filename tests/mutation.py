"""Plant the faults of faults.py in a copy of the sources, one at a time, and see whether a test notices each.

    python tests/mutation.py --only layer --budget 600

`make mutation` tries all. A fault is noticed if a test fails with it; at the end those tests are run without any fault.
Kernels are built for each fault of theirs, so those of the copy are of one instruction set and the same for all orders.
What was found is in results.jsonl of the `--out` folder, so a run goes on where it stopped, as long as neither sources
nor tests change. The status is 0 if every fault was noticed, 1 if one was not, 2 if some are left to be tried.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
COPIED = ("src", "csrc", "tests", "pyproject.toml")
TABLE = ("faults.py", "mutation.py", "test_faults.py")  # these may change: a fault goes by all that it says
LIBRARY = "src/statemix/kernels/statemix_cpu.so"
CASES = r"    STATEMIX_CASE\(\d+\)\n"  # of orders with kernels of their own
IMPORTED = ("torch._inductor.config", "accelerate.utils", "matplotlib.figure", "rich.progress", "safetensors.torch")
SECONDS = 900  # after which tests are taken to hang

# An editable install would find its own sources first. This is read by every Python that a test starts.
SITE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


class LastStarted:
    """A plugin of pytest that keeps the name of the last test that was started: with -x, of the one that fails."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.file.write_text(nodeid)


class Copy:
    """The sources and tests in a folder of their own, and the kernels built from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_file():
                shutil.copy(source, folder / name)
            else:
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TABLE)
        self.fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        recurrence = folder / "csrc" / "recurrence.h"
        text, count = re.subn(CASES, "", recurrence.read_text())
        assert count > 0, "no order has kernels of its own"
        recurrence.write_text(text)
        self.build()
        (folder / "sitecustomize.py").write_text(SITE)
        exec(SITE)
        sys.path[:0] = map(str, (folder, folder / "src", folder / "tests"))
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        # bytecode would be taken for that of a source of the same second and size
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as conftest.py has it, before torch
        for module in IMPORTED:  # here once, not in every process of tests
            importlib.import_module(module)

    def build(self) -> None:
        """Make the library of the kernels as they are now."""
        options = "-std=c++17 -O0 -fPIC -shared -fvisibility=hidden -fno-math-errno -Wno-psabi -fopenmp"
        sources = ["-DSTATEMIX_KERNELS=kernels_baseline", "csrc/dispatch.cpp", "csrc/kernels.cpp"]
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *options.split(), *sources, "-o", LIBRARY], cwd=self.folder, check=True)

    def failing(self, *tests: str) -> str | None:
        """The first test that fails, hangs, or ends the process; None if all pass."""
        last, log = self.folder / "last", self.folder / "log"
        process = os.fork()
        if process == 0:
            with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                os.chdir(self.folder)
                signal.alarm(SECONDS)
                options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
                os._exit(pytest.main([*options, *tests], plugins=[LastStarted(last)]))
        _, end = os.waitpid(process, 0)
        status = os.waitstatus_to_exitcode(end)
        if status == pytest.ExitCode.OK:
            return None
        if status != pytest.ExitCode.TESTS_FAILED and status >= 0:
            raise RuntimeError(f"mutation: pytest could not run {' '.join(tests)}:\n{log.read_text()}")
        return last.read_text()

    def failing_with(self, fault: Fault) -> str | None:
        """As `failing`, of the tests of a fault while it is planted."""
        file, library = self.folder / fault.file, self.folder / LIBRARY
        text, built = file.read_text(), library.read_bytes()
        assert text.count(fault.old) == 1, f"{fault.name}: its place is not in {fault.file}"
        try:
            file.write_text(text.replace(fault.old, fault.new))
            if fault.file.startswith("csrc/"):
                self.build()
            return self.failing(*fault.tests.split(), "-k", fault.select)
        finally:
            file.write_text(text)
            library.write_bytes(built)


def main() -> int:
    """Try the faults. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Plant faults, one at a time, and see whether a test notices.")
    parser.add_argument("--only", default="", help="those whose name or file has this in it")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no other is begun")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation", help="folder of what was found")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name or options.only in fault.file]
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    results.touch()
    known = {line["key"]: line for line in map(json.loads, results.read_text().splitlines())}
    began, survivors, left, noticing = time.monotonic(), 0, 0, set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for fault in faults:
            key = hashlib.sha256("\0".join((copy.fingerprint, *fault)).encode()).hexdigest()
            if key not in known:
                start = time.monotonic()
                if start - began > options.budget:
                    left += 1
                    continue
                test = copy.failing_with(fault)
                known[key] = {"key": key, "fault": fault.name, "test": test, "seconds": time.monotonic() - start}
                with results.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
            test, seconds = known[key]["test"], known[key]["seconds"]
            print(f"{fault.file}: {fault.name}: {test or 'NOT NOTICED'} ({seconds:.0f} s)", flush=True)
            survivors += test is None
            noticing |= {test} - {None}
        if noticing and (broken := copy.failing(*sorted(noticing))) is not None:
            raise RuntimeError(f"mutation: {broken} fails without a fault, too.")
    print(
        f"{len(faults) - survivors - left} of {len(faults)} faults were noticed, {survivors} were not, {left} are left."
    )
    return 1 if survivors else 2 if left else 0


if __name__ == "__main__":
    sys.exit(main())
