"""Imports go one way (DESIGN.md): read from the sources with ast, and held here for every file there is."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from statemix.mixers import MIXERS

PACKAGE = Path(__file__).parents[1] / "src" / "statemix"
SCAN, BENCH, TRAINING = "statemix.scan", "statemix.benchmark", "statemix.training"


def below_statemix(names: str) -> tuple[str, ...]:
    """The full names; a dot is statemix itself."""
    return tuple("statemix" if name == "." else f"statemix.{name}" for name in names.split())


FOR_TRAINING = "model backbone mixers search tasks text files records specs style"
ALLOWED_BELOW = {
    "gates": "",
    "specs": "",
    "records": "",
    "files": "records",
    "style": "",
    "kernels": "kernels gates",
    "fused": "kernels scan.gpu",
    "scan": "scan.problem scan.reference scan.associative scan.cpu scan.gpu",
    "scan.problem": "gates",
    "scan.reference": "scan.problem",
    "scan.associative": "scan.problem",
    "scan.cpu": "scan.problem kernels",
    # NVIDIA's bindings it imports at the first call; the test of what `import statemix` asks for holds that
    "scan.gpu": "gates scan.problem scan.gpu kernels",
    "text": "text files records",
    "tasks": "tasks analysis specs text",
    "analysis": "analysis gates",
    "mixers": "mixers analysis gates scan kernels fused specs",
    "mixers.base": "gates",
    "lengths": "",
    "backbone": "mixers gates lengths kernels fused specs",
    "predictor": "backbone lengths mixers",
    "model": "backbone mixers gates kernels fused specs records",
    "decoder": "model backbone gates kernels fused",
    "search": "decoder analysis model backbone mixers kernels",
    "sequence_parallel": "gates scan mixers",
    "sizing": "mixers specs",
    "training": f". training {FOR_TRAINING}",
    "training.processes": "model",
    "runs": f". runs training {FOR_TRAINING}",
    "report": ". report runs analysis files specs style tasks",
    "benchmark.contender": "",
    "benchmark.results": "records style",
    "benchmark.measure": "benchmark.contender kernels",
    "benchmark.scans": "benchmark.contender gates scan kernels",
    "benchmark.layers": "benchmark.contender mixers model decoder",
    "benchmark.memory": "benchmark.contender benchmark.layers kernels",
}
# What a module may import of statemix: an entry stands for itself and all below it.
# A module goes by its longest prefix here; what has none may import anything but ONLY_BY.
ALLOWED = {f"statemix.{module}": below_statemix(names) for module, names in ALLOWED_BELOW.items()}
# These import torch, numpy and the standard library besides.
PLAIN = below_statemix("gates specs tasks analysis")
PLAIN_SCANS = below_statemix("scan scan.problem scan.reference scan.associative scan.cpu")
TESTS = sorted(Path(__file__).parent.glob("*.py"))
NOT_SHIPPED = ["tests", "experiments", *(path.stem for path in TESTS)]
# What only the named modules may import, and they only what is named.
ONLY_BY = {
    "tokenizers": ("statemix.text.tokenizer", "statemix.hf.tokenizer"),
    "cuda": (f"{SCAN}.gpu.compile",),
    "statemix.cli": below_statemix("__main__ cli cli.train cli.sweep cli.report"),
    "statemix.runs.sweep": ("statemix.cli.sweep",),
    "statemix.runs.executors": ("statemix.runs.sweep",),
    "onnx": ("statemix.export",),
    "ray": ("statemix.runs.executors",),
    "pyarrow": ("statemix.runs.read",),
    "datasets": ("statemix.text.corpus",),
} | dict.fromkeys(NOT_SHIPPED, ())


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every name imported anywhere in the source, also in functions and through importlib; "a.b" for a's b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield ast.unparse(node.args[0]).strip("'\"")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imported names that the rules forbid to the module."""
    rule = max((prefix for prefix in ALLOWED if is_below(module, prefix)), key=len, default=None)
    plain = module in PLAIN_SCANS or any(is_below(module, prefix) for prefix in PLAIN)
    wrong = []
    for name in imported(source, module, is_package):
        inside = is_below(name, "statemix")
        entries = ALLOWED[rule] if rule else ("statemix", name)
        # "statemix" itself is for its version: below it each room has its own entry
        allowed = any(name == entry or (entry != "statemix" and is_below(name, entry)) for entry in entries)
        owned = [target for target, owners in ONLY_BY.items() if is_below(name, target) and module not in owners]
        foreign = name.split(".")[0] not in {"torch", "numpy", *sys.stdlib_module_names}
        if owned or (inside and not allowed) or (plain and not inside and foreign):
            wrong.append(name)
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_it_may(path):
    is_package = path.name == "__init__.py"
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    assert violations(path.read_text(), module, is_package) == []


def test_the_files_are_found():
    found = {str(path.relative_to(PACKAGE)) for path in FILES}
    assert found >= {"__init__.py", "gates.py", "scan/__init__.py", "scan/reference.py", "kernels/library.py"}


def other_tests(source: str) -> list[str]:
    """What a source imports of test files: what two of them share is in a module of helpers."""
    names = imported(source, "test_this", is_package=False)
    return [name for name in names if name.removeprefix("tests.").startswith("test_")]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_test_imports_no_other(path):
    assert other_tests(path.read_text()) == []


def test_an_import_of_another_test_is_seen():
    source = "import test_scan\nfrom helpers import SCANS\ndef f():\n    from tests.test_cpu import solved"
    assert other_tests(source) == ["test_scan", "tests.test_cpu.solved"]


PLANTED = [  # (module, source, the names that are wrong)
    ("statemix.gates", "import torch, math\nimport numpy as np\nfrom torch.nn import functional", []),
    ("statemix.gates", "import statemix", ["statemix"]),
    ("statemix.gates", "from statemix.scan import cpu", ["statemix.scan.cpu"]),
    ("statemix.gates", "def f():\n    import scipy.linalg", ["scipy.linalg"]),
    (f"{SCAN}.reference", "from statemix.scan.problem import Problem", []),
    (f"{SCAN}.reference", "from . import cpu", [f"{SCAN}.cpu"]),
    (f"{SCAN}.associative", "from .reference import block_scan", [f"{SCAN}.reference.block_scan"]),
    (f"{SCAN}.associative", "import statemix.scan", [SCAN]),
    (f"{SCAN}.associative", "import cuda.bindings", ["cuda.bindings"]),
    (f"{SCAN}.cpu", "import ctypes\nfrom statemix import kernels", []),
    (f"{SCAN}.cpu", "import statemix.scan.associative", [f"{SCAN}.associative"]),
    (f"{SCAN}.cpu", "from statemix.scan import reference", [f"{SCAN}.reference"]),
    (f"{SCAN}.cpu", "from ..mixers import BDLRU", ["statemix.mixers.BDLRU"]),
    (f"{SCAN}.gpu", "from statemix.scan.gpu import plan\nfrom statemix.kernels.operators import Operator", []),
    (f"{SCAN}.gpu", "from cuda.bindings import driver", ["cuda.bindings.driver"]),
    (f"{SCAN}.gpu.compile", "def f():\n    from cuda.bindings import driver", []),
    (f"{SCAN}.gpu", "from statemix.scan.cpu import block_scan", [f"{SCAN}.cpu.block_scan"]),
    (SCAN, "from statemix.scan import associative, cpu, gpu, reference", []),
    (SCAN, "import cuda", ["cuda"]),
    (SCAN, "from ..mixers import BDLRU", ["statemix.mixers.BDLRU"]),
    ("statemix.tasks", "from statemix.tasks.base import Batch\nfrom .permutation import Task", []),
    ("statemix.tasks.copying", "from .base import Batch\nfrom . import base", []),
    ("statemix.tasks.copying", "from ..model import SequenceModel", ["statemix.model.SequenceModel"]),
    ("statemix.tasks.copying", "from statemix import SequenceModel", ["statemix.SequenceModel"]),
    ("statemix.tasks.copying", "import statemix.training.loop, datasets", ["statemix.training.loop", "datasets"]),
    ("statemix.tasks.copying", "__import__('statemix.mixers')", ["statemix.mixers"]),
    ("statemix.tasks.text", "from statemix.text.corpus import open_corpus\nfrom statemix.text import tokenizer", []),
    ("statemix.tasks.text", "import statemix.files, tokenizers", ["statemix.files", "tokenizers"]),
    ("statemix.text.corpus", "import datasets\nfrom statemix.text.tokenizer import Bytes", []),
    (
        "statemix.text.corpus",
        "from statemix.tasks import Task\nimport tokenizers",
        ["statemix.tasks.Task", "tokenizers"],
    ),
    ("statemix.text.tokenizer", "import tokenizers\nfrom statemix.files import write_whole", []),
    ("statemix.text.tokenizer", "from statemix import tasks\nimport datasets", ["statemix.tasks", "datasets"]),
    (f"{TRAINING}.processes", "import accelerate\nfrom statemix import train", ["statemix.train"]),
    ("statemix.mixers.lstm", "from statemix.scan import block_scan\nfrom .base import Mixer", []),
    ("statemix.mixers.lstm", "from statemix.model import SequenceModel", ["statemix.model.SequenceModel"]),
    ("statemix.mixers.lstm", "if TYPE_CHECKING:\n    from ..tasks import TASKS", ["statemix.tasks.TASKS"]),
    ("statemix.mixers.lstm", "from statemix.training.loop import train", ["statemix.training.loop.train"]),
    ("statemix.mixers.base", "from statemix import kernels", ["statemix.kernels"]),
    ("statemix.mixers.linear_recurrence", "from statemix import fused\nfrom statemix.analysis import transitions", []),
    ("statemix.fused", "from statemix import kernels\nimport torch", []),
    ("statemix.fused", "from statemix.mixers import BDLRU", ["statemix.mixers.BDLRU"]),
    ("statemix.scan", "from statemix import fused", ["statemix.fused"]),
    ("statemix.kernels.steps", "from statemix import fused", ["statemix.fused"]),
    ("statemix.analysis", "from statemix.gates import normalize\nimport scipy", ["scipy"]),
    ("statemix.analysis", "from statemix.mixers import BDLRU", ["statemix.mixers.BDLRU"]),
    ("statemix.report.inside", "from statemix.analysis import leak\nimport matplotlib", []),
    ("statemix.style", "from statemix.report import figures", ["statemix.report.figures"]),
    ("statemix.report.inside", "from statemix.model import load_model", ["statemix.model.load_model"]),
    ("statemix.model", "from statemix.mixers import build_mixer\nimport safetensors", []),
    ("statemix.model", "from statemix import tasks", ["statemix.tasks"]),
    ("statemix.backbone", "from statemix.model import SequenceModel", ["statemix.model.SequenceModel"]),
    (
        "statemix.predictor",
        "from statemix.backbone import Backbone\nfrom statemix.model import load_model",
        ["statemix.model.load_model"],
    ),
    ("statemix.model", "import statemix.training", ["statemix.training"]),
    (f"{TRAINING}.loop", "import statemix.model, statemix.tasks, accelerate", []),
    (f"{TRAINING}.loop", "from tests.helpers import assert_close", ["tests.helpers.assert_close"]),
    (f"{TRAINING}.loop", "import experiments.quickstart as quick", ["experiments.quickstart"]),
    (f"{TRAINING}.loop", "import statemix.cli, cuda", ["statemix.cli", "cuda"]),
    (f"{BENCH}.measure", "from statemix.benchmark.scans import copy", [f"{BENCH}.scans.copy"]),
    (f"{BENCH}.commands", "from statemix.benchmark import layers, scans\nfrom statemix.files import write_whole", []),
    ("statemix.runs.read", "import pyarrow\nfrom pyarrow import parquet\nimport ray", ["ray"]),
    ("statemix.runs.sweep", "import statemix.runs.executors, statemix.runs.read\nimport pyarrow", ["pyarrow"]),
    (f"{TRAINING}.loop", "from statemix.runs.sweep import sweep", ["statemix.runs.sweep.sweep"]),
    ("statemix", "from statemix import model\nfrom .cli import main", ["statemix.cli.main"]),
]


@pytest.mark.parametrize(("module", "source", "wrong"), PLANTED)
def test_the_checker_catches_a_planted_import(module, source, wrong):
    assert violations(source, module, is_package=module in ("statemix", SCAN, "statemix.tasks")) == wrong


def mixers_named(source: str) -> set[str]:
    """The mixers that a source names, by their classes, by their names in specs, or in a docstring."""
    nodes = list(ast.walk(ast.parse(source)))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(re.findall(r"\w+", node.value))
    return words & {name for key, cls in MIXERS.items() for name in (key, cls.__name__)}


GENERIC = [PACKAGE / "sizing.py", PACKAGE / "specs.py", *sorted((PACKAGE / "training").glob("*.py"))]


@pytest.mark.parametrize("path", GENERIC, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_generic_module_names_no_mixer(path):
    assert mixers_named(path.read_text()) == set()


def test_a_named_mixer_is_seen():
    assert mixers_named('"""Of `h_lru` alone."""\nif name == "mlstm":\n    BDLRU(3)') == {"h_lru", "mlstm", "BDLRU"}


@pytest.mark.parametrize(("module", "seen"), [("statemix.training.loop", set()), ("torch, matplotlib", {"matplotlib"})])
def test_importing_statemix_asks_for_no_optional_package(module, seen):
    """Not even in vain, so that it holds on a machine which lacks them; and the second case shows that it can fail."""
    code = f"""
import sys
sys.modules["cuda"] = None  # torch asks for it, too, so that it is enough that nothing fails without it
asked = set()
sys.addaudithook(lambda event, what: event == "import" and asked.add(what[0].split(".")[0]))
import {module}
asked &= {{"transformers", "matplotlib", "onnx", "ray", "pyarrow", "datasets", "tokenizers"}}
assert asked == {seen!r}, asked
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
