"""Relative links of the README and of docs/ lead somewhere, and the README stays short."""

import re
from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT, blocks, name, prose

LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)$", re.M)
HEADING = re.compile(r"^#+ +(.*)$", re.M)
README_BYTES = 10 * 1000


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for match in LINK.finditer(prose(page)):
        link = match[1] or match[2]
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(page)} links {link}"


def test_the_readme_stays_short():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


def test_the_readme_has_the_two_commands_alone_in_a_block():
    alone = [block.text.strip() for block in blocks(ROOT / "README.md", "")]
    assert (
        'pip install -e . && jaxinfer generate "Explain attention sinks in one paragraph."' in alone
    )
    assert "pip install -e '.[test]' && pytest" in alone
