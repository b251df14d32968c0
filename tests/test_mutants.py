"""The faults that `python -m tests.mutants` plants still have their places in the sources."""

from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.wrong[:40]}")
def test_a_fault_has_one_place_and_tests_that_are_there(fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.right) == 1
    assert all((ROOT / "tests" / name).is_file() for name in fault.tests)
