"""Every Python block of the README and of docs/ runs, the blocks of a page in one namespace.

A comment `# -> text` states a line that the block prints; it is compared.
"""

import re

import pytest

from tests.docs.markdown import PAGES, blocks, name

STATED = re.compile(r"# -> (.*)$", re.M)
RUN = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_blocks_of_a_page_run_in_order_and_print_what_they_state(
    page, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # Empty lines in front make a traceback name the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, namespace)
        printed = capsys.readouterr().out.splitlines()
        for stated in STATED.findall(block.text):
            assert stated.strip() in printed, f"{name(page)}:{block.line} printed {printed}"
