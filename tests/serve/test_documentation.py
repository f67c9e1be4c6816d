"""The `curl` and `openai` examples of the README and of the manual run against a server."""

import shlex
import subprocess

import pytest

from tests.docs.markdown import ROOT, blocks, name

PAGES = [page for page in (ROOT / "README.md", ROOT / "docs/serving.md")]
URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_clients_run(page, server, capsys):
    found = blocks(page, "py")
    assert found
    for block in found:
        assert URL in block.text
        exec(block.text.replace(URL, server.url), {})
    assert len(capsys.readouterr().out) > 20


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_curl_gets_answers(page, server):
    lines = [
        line for block in blocks(page, "shell") for line in block.text.splitlines()
        if line.startswith("curl ")
    ]  # fmt: skip
    assert lines
    for line in lines:
        words = shlex.split(line.replace(URL, server.url))
        done = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True)
        assert done.returncode == 0 and '"choices"' in done.stdout, done
