"""How the tests run, and their fixtures. What they share besides is in helpers.py."""

import os

# before torch: threads that wait for work sleep, or with two in each of two workers they keep each other from working
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on a GPU, what use_deterministic_algorithms asks for

import pytest
import torch

from statemix import available_backends, kernels
from statemix.kernels import library

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)  # with it, torch.empty is filled with NaN: test_cpu.py holds that it is


def pytest_report_header() -> str:
    return (
        f"statemix backends: {', '.join(available_backends())}; instruction sets of 'cpu': "
        f"{', '.join(kernels.instruction_sets()) or kernels.load_problem()}; torch threads: {torch.get_num_threads()}"
    )


@pytest.fixture
def instruction_set(request):
    """The kernels of one instruction set, for a test parametrised over `kernels.instruction_sets()`."""
    before = kernels.instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


@pytest.fixture
def threads():
    """Sets how many threads torch and the kernels have; after the test they are what they were."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The entry points of the kernels that were called, so that a test which compares a path with itself fails."""
    names, run = [], library.Library.run
    monkeypatch.setattr(library.Library, "run", lambda self, name, *rest: names.append(name) or run(self, name, *rest))
    return names


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
