"""statemix info: what is installed and in use here, and the sizes of all mixers."""

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
import tyro

import statemix
from statemix import kernels
from statemix.mixers import MIXERS, library_kernels
from statemix.report.tables import align
from statemix.scan import BACKENDS, backend_problem
from statemix.scan.gpu.compile import compiler_version
from statemix.sizing import table
from statemix.tasks import TASKS

PACKAGES = ("numpy", "accelerate", "safetensors", "tokenizers", "datasets", "pyarrow", "transformers", "peft", "ray")
PACKAGES_OF_GPU = ("cuda-bindings", "triton")


@dataclasses.dataclass(frozen=True)
class Info:
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


def run(arguments: list[str]) -> None:
    """Print what `statemix info` was asked for."""
    given = tyro.cli(Info, args=arguments, prog="statemix info")
    if given.sizes:
        return _print_sizes(given)
    if given != Info():
        raise ValueError("info: `--budget`, `--what` and `--d-model` are of `--sizes`.")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    print(f"statemix {statemix.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"packages: {', '.join(map(_version, PACKAGES))}")
    print(f"for GPUs: {', '.join([_toolkit(), *map(_version, PACKAGES_OF_GPU), _nvrtc()])}")
    print(f"machine: {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {gpu}")
    facts = {"associative": "log-depth scan in torch, any device", "reference": "loop over time in torch, any device"}
    if backend_problem("cpu") is None:
        facts["cpu"] = (
            f"fused C++ kernels; instruction set {kernels.instruction_set()}, "
            f"of {', '.join(kernels.instruction_sets())} (set {kernels.INSTRUCTION_SET_VARIABLE} to choose)"
        )
    if backend_problem("gpu") is None:
        facts["gpu"] = "fused CUDA kernels, compiled when first used"
    print("backends of the scans; backend='auto' takes the first that serves a call:")
    for name in BACKENDS:
        print(f"  {name:<12} {facts.get(name) or f'NOT AVAILABLE: {backend_problem(name)}'}")
    print(f"mixers: {', '.join(MIXERS)}\ntasks: {', '.join(TASKS)}")
    print("kernels of other libraries for the mixers:")
    for name, fact in library_kernels().items():
        print(f"  {name:<22} {fact}")


def _version(package: str) -> str:
    """Its name and version, or that it is not there."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _toolkit() -> str:
    """What torch was built with."""
    if torch.version.hip is not None:
        return f"torch of ROCm {torch.version.hip}"
    return "torch without CUDA" if torch.version.cuda is None else f"torch of CUDA {torch.version.cuda}"


def _nvrtc() -> str:
    """The compiler of the kernels for GPUs."""
    try:
        return f"NVRTC {compiler_version()}"
    except RuntimeError:  # cuda-bindings are not there, or found no NVRTC
        return "no NVRTC"


def _print_sizes(given: Info) -> None:
    rows = [["mixer", "width", "parameters", "state", "off"]]
    for solution in table(given.d_model, given.budget, given.what):
        name = solution.spec["name"]
        knob = MIXERS[name].width_option
        width = f"{knob}={solution.spec[knob]}"
        rows.append([name, width, f"{solution.parameters:,}", f"{solution.state_size:,}", f"{solution.off:+.1%}"])
    print(f"one mixer of d_model {given.d_model} for {given.budget:,} {given.what}; off: what it has over that, less 1")
    print(align(rows, markdown=False))
