"""The tested set of versions, for every supported Python."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]
#: Packages without a release for a Python: the data set `facts` is not made there.
ABSENT = {"3.10": {"countryinfo"}}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_package_has_one_version_on_every_python(python):
    chosen = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(chosen) == len(set(chosen))
    assert {pin.name for pin in PINS} - set(chosen) == ABSENT.get(python, set())


def test_every_pin_is_one_version():
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in PINS)
