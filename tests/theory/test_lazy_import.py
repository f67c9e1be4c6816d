"""`ji.theory` is there when it is used, and costs nothing before."""

import sys

import pytest

import jaxinfer as ji
from jaxinfer.theory.extra import needed


def test_theory_and_its_parts_are_reached_by_name():
    assert ji.theory.joma.__name__ == "jaxinfer.theory.joma"
    assert "theory" in dir(ji) and "joma" in dir(ji.theory)
    with pytest.raises(AttributeError, match=r"jaxinfer\.theory.*'jomma'"):
        _ = ji.theory.jomma
    with pytest.raises(AttributeError, match=r"'jaxinfer'.*'theorie'"):
        _ = ji.theorie


def test_a_missing_package_of_the_extra_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ValueError, match=r"this needs diffrax; pip install 'jaxinfer\[theory\]'"):
        needed("diffrax", "this")
