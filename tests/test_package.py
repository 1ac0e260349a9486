"""The package as its users get it: public names, what importing one costs, types, and which files are shipped."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import statemix

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "statemix"

USER = """
from typing import Any, assert_type

import torch
from torch import Tensor

import statemix
from statemix import BDLRU, HLRU, Backbone, SequenceModel, SequencePredictor, TrainConfig, train

x = torch.randn(2, 5, 64)
layer = BDLRU(64, 16, 4)
assert_type(layer(x), tuple[Tensor, Tensor])
assert_type(HLRU(64, 16, 4)(x, None, reset=None), tuple[Tensor, Tensor])
assert_type(layer.step(x[:, 0]), tuple[Tensor, Tensor])
model = SequenceModel(7, 64, 2, {"name": "bd_lru", "num_blocks": 16, "block_size": 4})
assert_type(model(torch.zeros(2, 5, dtype=torch.int64)), tuple[Tensor, tuple[Tensor, ...]])
backbone = Backbone(64, 2, {"name": "bd_lru", "num_blocks": 16, "block_size": 4})
assert_type(backbone(x, lengths=torch.tensor([5, 3])), tuple[Tensor, tuple[Tensor, ...]])
assert_type(backbone.step(x[:, 0], backbone.initial_state(2)), tuple[Tensor, tuple[Tensor, ...]])
assert_type(SequencePredictor(3, 2, backbone)(torch.randn(2, 5, 3), torch.tensor([5, 3])), Tensor)
assert_type(train(TrainConfig()).summary, dict[str, Any])
assert_type(statemix.__version__, str)
"""


WRONG = {  # a line that a type checker must refuse, and a part of what it says
    "layer(x, 3)": "Tensor | None",
    "model(None)": "Tensor",
    "from statemix import BDLRUs": "BDLRUs",
    "statemix.hlru": "hlru",
}


def public_imports() -> dict[str, str]:
    """The names that the root module imports for type checkers, and the modules they are in."""
    nodes = ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("statemix")]
    return {alias.name: node.module for node in found for alias in node.names}


def test_every_public_name_is_there_for_checkers_and_at_run_time():
    assert set(statemix.__all__) == set(public_imports())
    for name, module in public_imports().items():
        assert getattr(statemix, name) is getattr(sys.modules[module], name)
    assert set(statemix.__all__) | {"__version__"} <= set(dir(statemix))
    names: dict[str, object] = {}
    exec("from statemix import *", names)
    assert set(statemix.__all__) <= set(names)
    with pytest.raises(AttributeError, match=r"^module 'statemix' has no attribute 'hlru'$"):
        statemix.hlru  # noqa: B018 - to ask for it is the test


def modules_after(statement: str) -> set[str]:
    """What a fresh process that has torch imports besides."""
    code = f"import json, sys, torch\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps([*sys.modules]))"
    code = code.replace("[*sys.modules]", "sorted(set(sys.modules) - before)")
    return set(json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)))


def test_a_layer_is_imported_without_what_trains_it():
    """Beside torch its own few modules are all: from statemix import BDLRU takes hardly longer than import torch."""
    new = modules_after("from statemix import BDLRU, __version__")
    rooms = {name.split(".")[1] for name in new if name.startswith("statemix.")}
    assert {name for name in new if not re.match(r"(statemix|torch)(\.|$)", name)} == set()
    assert rooms <= {"analysis", "fused", "gates", "kernels", "mixers", "scan", "specs"}
    assert {"accelerate", "rich", "safetensors", "statemix.training.loop"} <= modules_after(
        "from statemix import train"
    )


CHECKERS = {
    "mypy": ["-m", "mypy", "--strict", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_file_has_the_types(tmp_path, checker):
    pytest.importorskip(checker, reason=f"{checker} is not installed: pip install statemix[dev]")
    good, bad = tmp_path / "user.py", tmp_path / "wrong.py"
    good.write_text(USER)
    bad.write_text(USER + "".join(f"{wrong}\n" for wrong in WRONG))
    command = [sys.executable, *CHECKERS[checker]]
    run = subprocess.run([*command, str(good), str(bad)], capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in run.stdout.splitlines() if "error:" in line]
    assert len(lines) == len(WRONG), run.stdout + run.stderr
    first = USER.count("\n") + 1
    for number, (line, said) in enumerate(zip(lines, WRONG.values(), strict=True), start=first):
        assert re.search(rf"wrong\.py:{number}\b.*{re.escape(said)}", line), line


def test_every_file_of_the_package_is_shipped():
    """A wheel has what git does not ignore."""
    assert (PACKAGE / "py.typed").exists()
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    kinds = (".py", ".csv", ".typed", ".css", ".html", ".js")
    files = "\n".join(str(path) for path in PACKAGE.rglob("*") if path.suffix in kinds)
    ignored = subprocess.run(command, input=files, capture_output=True, text=True, cwd=ROOT)
    assert ignored.stdout == ""
    assert ignored.returncode == 1  # of git: nothing is ignored


def test_the_sdist_has_what_builds_it_and_no_results(tmp_path):
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed: pip install statemix[dev]")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.iterdir()
    assert sdist.stat().st_size < 1e6
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert sources | modules | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert {name for name in names if re.match(r"results/|runs/|build/|dist/|.*\.(so|csv|png|npz)$", name)} == set()
