"""The table of faults.py is of the sources and tests as they are. `make mutation` says which test notices a fault."""

import re
from pathlib import Path

import pytest
from faults import FAULTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place_and_its_tests(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    tests = "".join((ROOT / file).read_text() for file in fault.tests.split())
    for selected in fault.select.split(" or "):
        assert re.search(rf"^def test_\w*{selected.split(' and ')[0]}", tests, re.MULTILINE), selected


def test_no_fault_has_the_name_of_another():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
