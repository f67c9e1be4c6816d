"""Tables of the documentation list what exists, all of it and nothing else."""

import re

import jaxinfer as ji
from jaxinfer.cache.presets import POLICIES
from jaxinfer.models.registry import FAMILIES
from tests.docs.markdown import ROOT, prose

DOCS = ROOT / "docs"


def listed(page: str, heading: str) -> set[str]:
    """The code in the first column of the tables below a heading."""
    section = prose(DOCS / page).partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*)\|", section, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_kernel_is_listed():
    folders = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/api.py")}
    assert listed("kernels.md", "The list") == folders


def test_every_cpu_kernel_is_listed():
    folders = {path.parent.name for path in (ROOT / "jaxinfer" / "cpu_kernels").glob("*/api.py")}
    assert listed("kernels.md", "On a CPU") == folders


def test_every_family_is_listed():
    assert listed("models.md", "Families") == {family.name for family in FAMILIES}


def test_every_policy_of_the_library_is_listed():
    presets = {name for name in ji.__all__ if name in POLICIES.names()}
    assert listed("cache_policies.md", "Choosing a policy") == presets
