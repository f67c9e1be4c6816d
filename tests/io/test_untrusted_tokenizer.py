"""A folder's tokenizer is untrusted: nothing in it runs, hangs, grows without bound or panics."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
class EvilTokenizer:
    pass
"""
SLOW = {
    "sentencepiece": {"tokenizer.model": "x"},
    "word pieces": {"vocab.txt": "a\\nb\\n"},
    "merges": {"vocab.json": '{"a": 0}', "merges.txt": ""},
    "nothing": {},
}


def evil_folder(folder: Path, files: dict[str, str]) -> Path:
    auto = {"AutoTokenizer": ["evil.EvilTokenizer", None], "AutoConfig": "evil.EvilTokenizer"}
    content = {"auto_map": auto, "tokenizer_class": "EvilTokenizer"}
    config = {"model_type": "evil"} | content
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_code_of_a_folder_never_runs_whatever_standard_input_says(tmp_path):
    folders = [evil_folder(tmp_path / name, files) for name, files in SLOW.items()]
    script = (
        "import sys, jaxinfer as ji\n"
        "from jaxinfer.io.tokenizer import Tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    for load in (Tokenizer.load, ji.load):\n"
        "        try:\n"
        "            load(folder)\n"
        "        except ValueError as error:\n"
        "            print(str(error).replace(folder, ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("ran")) and "[y/N]" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(folders)
    assert sum("is not run" in line for line in lines) == 1
