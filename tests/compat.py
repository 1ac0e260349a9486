"""Run the tests with the oldest and the newest releases that statemix allows, and write docs/compatibility.md.

    python tests/compat.py --only oldest newest

`make compat` does all. An environment is a folder of build/compat/ that pip fills once: without it, the releases of
that day are looked for again. What the tests said is kept beside it, so a run goes on where it stopped, as long as
neither sources nor tests change. The page is written when all is known. The status is 1 if a test failed.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from statemix.files import write_whole
from statemix.report.tables import align

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
RUNNER = ["pytest", "pytest-xdist"]
BETWEEN = ("5.2", "5.8", "5.16", "5.23")  # releases of transformers between its oldest and newest
CORE = (
    "test_scan*.py test_cpu.py test_step.py test_gates.py test_gated.py test_layer*.py test_fused.py test_mixers*.py "
    "test_model*.py test_generate.py test_golden.py test_training*.py test_sequence_parallel.py"
)
HF = "test_hf.py"


class Cell(NamedTuple):
    """A column of the table of transformers: what is said in it if a test of test_hf.py passes."""

    column: str
    test: str
    said: str = "equal"


CELLS = [
    Cell("greedy", "test_greedy_text_is_that_of_our_own_generate"),
    Cell("beams", "test_beams_are_the_likeliest_of_a_search_without_any_state"),
    Cell("samples of a seed", "test_samples_are_those_that_a_seed_draws_without_any_state"),
    Cell("a cache taken up again", "test_a_conversation_goes_on_from_a_cache"),
    Cell("pipeline", "test_the_pipeline_writes_what_generate_does"),
    Cell("Trainer", "test_the_trainer_trains"),
    Cell("Trainer resumed", "test_a_trainer_that_goes_on_ends_as_one_that_was_never_stopped"),
    Cell("LoRA of PEFT", "test_a_low_rank_adapter_changes_the_weights_by_its_product"),
    Cell("larger vocabulary", "test_what_a_checkpoint_lacks_is_drawn_as_the_constructor_does"),
    Cell("saved and opened elsewhere", "test_a_folder_opens_where_statemix_hf_was_never_imported"),
    Cell("assisted", "test_assisted_generation_is_refused", "refused"),
    Cell("base model", "test_the_base_model_is_the_layers_alone"),
    Cell("classification", "test_a_row_is_classified_by_its_last_token"),
    Cell("embeddings as input", "test_embeddings_give_what_their_tokens_give"),
    Cell("hidden states", "test_hidden_states_are_what_the_layers_read_and_make"),
    Cell("gradient checkpointing", "test_checkpointed_gradients_are_the_same_and_need_less"),
    Cell("LoRA's default targets", "test_low_rank_adapters_are_in_every_mixer_without_being_told"),
    Cell("unknown keywords", "test_what_is_not_served_is_refused", "refused"),
]


class Environment(NamedTuple):
    """What pip installs, over the packages of another environment if one is named, and the tests to run in it."""

    name: str
    requirements: list[str]
    tests: str
    over: str | None = None

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ROOT / "build" / "compat" / self.name

    @property
    def site(self) -> Path:
        """Where its packages are."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def python(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run its Python in the root of the project."""
        command = [str(self.folder / "bin" / "python"), *arguments]
        return subprocess.run(command, cwd=ROOT, check=check, text=True, stdout=subprocess.PIPE)

    def make(self) -> None:
        """Let pip fill it, unless it has done so."""
        done, wanted = self.folder / "requirements.json", json.dumps(self.requirements)
        if done.exists() and done.read_text() == wanted:
            return
        venv.create(self.folder, clear=True, with_pip=True)
        if self.over is not None:
            below = Environment(self.over, [], "").site
            (self.site / "over.pth").write_text(f"{below}\n")  # its own packages come first
        self.python("-m", "pip", "install", "-q", *self.requirements)
        done.write_text(wanted)

    def known(self, sources: str) -> dict[str, Any] | None:
        """What `test` has found with the same sources."""
        file = self.folder / "found.json"
        found = json.loads(file.read_text()) if file.exists() else {"sources": None}
        return found if found["sources"] == sources else None

    def test(self, sources: str, workers: int) -> dict[str, Any]:
        """Its versions, and how many cases of each test passed, failed and were skipped."""
        report = self.folder / "report.xml"
        paths = [str(path) for pattern in self.tests.split() for path in sorted((ROOT / "tests").glob(pattern))]
        options = ["-q", "-p", "no:cacheprovider", "-n", str(workers), "--dist", "loadfile", f"--junitxml={report}"]
        run = self.python("-m", "pytest", *options, *paths, check=False)
        (self.folder / "log").write_text(run.stdout)
        if run.returncode not in (0, 1):  # of pytest: tests passed, or failed
            raise RuntimeError(f"compat: pytest could not run in {self.folder}:\n{run.stdout[-3000:]}")
        tests: dict[str, list[int]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {part.tag for part in case}
            outcome = 1 if kinds & {"failure", "error"} else 2 if "skipped" in kinds else 0
            tests.setdefault(case.attrib["name"].split("[")[0], [0, 0, 0])[outcome] += 1
        installed = json.loads(self.python("-m", "pip", "list", "--format=json").stdout)
        versions = {package["name"]: package["version"] for package in installed}
        versions["Python"] = self.python("-c", "import platform; print(platform.python_version())").stdout.strip()
        found = {"sources": sources, "versions": versions, "tests": tests}
        write_whole(self.folder / "found.json", json.dumps(found).encode())
        return found


def oldest(requirement: str) -> str:
    """The first series of releases that a lower bound allows: torch>=2.9 -> torch==2.9.*, rich>=13 -> rich==13.0.*."""
    name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    return f"{name}=={bound if '.' in bound else bound + '.0'}.*"


def environments(torch: str) -> list[Environment]:
    """All: those of torch with what statemix needs, and those of transformers over the torch developed with."""
    [transformers] = EXTRAS["hf"]
    beside = [*EXTRAS["text"], *(requirement for requirement in EXTRAS["dev"] if requirement.startswith("peft"))]
    series = {"oldest": oldest(transformers)} | {name: f"transformers=={name}.*" for name in BETWEEN}
    series["newest"] = transformers
    others = [torch, *(name for name in NAMES if name != "torch"), *RUNNER]
    return [
        Environment("oldest", [*map(oldest, PROJECT["dependencies"]), *RUNNER], CORE),
        Environment("newest", [*NAMES, *RUNNER], CORE),
        Environment("base", others, tests=""),
        *(Environment(f"hf-{name}", [one, *beside], HF, over="base") for name, one in series.items()),
    ]


def build_wheel() -> Path:
    """The package as its users get it."""
    folder = ROOT / "build" / "compat" / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def fingerprint() -> str:
    """Of sources and tests, but for this file."""
    files = [ROOT / "pyproject.toml", *(path for name in ("src", "csrc", "tests") for path in (ROOT / name).rglob("*"))]
    files = [
        path for path in files if path.suffix in (".py", ".toml", ".h", ".cpp", ".cuh") and path.name != "compat.py"
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def total(tests: dict[str, list[int]]) -> list[str]:
    """Cases that passed, failed, were skipped."""
    return [f"{sum(counts):,}" for counts in zip(*tests.values(), strict=True)]


def core_table(found: dict[str, dict[str, Any]]) -> str:
    """A row for each environment of torch."""
    columns = ["Python", *sorted(NAMES)]
    rows = [["", *columns, "passed", "failed", "skipped"]]
    for name, one in found.items():
        rows.append([name, *(one["versions"][column] for column in columns), *total(one["tests"])])
    return align(rows, markdown=True)


def transformers_table(found: dict[str, dict[str, Any]]) -> str:
    """A row for each environment of transformers."""
    rows = [["transformers", "peft", *(cell.column for cell in CELLS), "passed", "failed", "skipped"]]
    for one in found.values():
        versions, tests = one["versions"], one["tests"]
        cells = [cell.said if sum(tests[cell.test][1:]) == 0 else "FAILS" for cell in CELLS]
        rows.append([versions["transformers"], versions["peft"], *cells, *total(tests)])
    return align(rows, markdown=True)


def write_table(name: str, table: str) -> None:
    """Put a table between its marks on the page."""
    pattern = rf"(<!-- {name} -->\n).*(\n<!-- end of {name} -->)"
    page, count = re.subn(pattern, lambda marks: marks[1] + table + marks[2], PAGE.read_text(), flags=re.DOTALL)
    assert count == 1, f"{PAGE} must have the marks of {name!r} once"
    write_whole(PAGE, page.encode())


def main() -> int:
    """Make the environments, run the tests. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the tests with the oldest and the newest releases.")
    parser.add_argument("--torch", default="torch", help="requirement under the environments of transformers")
    parser.add_argument("--only", nargs="+", help="environments to run; of the others, what is known is taken")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    options = parser.parse_args()
    every, wheel, sources, found = environments(options.torch), build_wheel(), fingerprint(), {}
    chosen = set(options.only or (environment.name for environment in every))
    chosen |= {environment.over for environment in every if environment.name in chosen}
    for environment in every:
        known = environment.known(sources)
        if known is None and environment.name in chosen:
            environment.make()
            if environment.over is None:
                environment.python("-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel))
            known = environment.test(sources, options.workers) if environment.tests else None
        if known is not None:
            found[environment.name] = known
            passed, failed, skipped = total(known["tests"])
            print(f"{environment.name}: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    for name, tests, make_table in (("core", CORE, core_table), ("transformers", HF, transformers_table)):
        rows = [environment.name for environment in every if environment.tests == tests]
        if found.keys() >= set(rows):
            write_table(name, make_table({row: found[row] for row in rows}))
    return int(any(counts[1] for one in found.values() for counts in one["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
