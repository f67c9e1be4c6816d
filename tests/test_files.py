"""Files appear whole or not at all, whatever happens to their writers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.files import (
    check_destination,
    one_line,
    read_json,
    replacing,
    replacing_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "a.npy"
    with replacing(path) as temporary:
        assert temporary.suffix == ".npy" and not path.exists()
        temporary.write_text("one")
    assert path.read_text() == "one" and names(path.parent) == ["a.npy"]


@pytest.mark.parametrize("writing", [replacing, replacing_folder])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, writing):
    place = tmp_path / "place"
    if writing is replacing:
        place.write_text("old")
    else:
        place.mkdir()
    with pytest.raises(OSError, match="full"), writing(place) as temporary:
        (temporary if writing is replacing else temporary / "file").write_text("half")
        raise OSError("full")
    assert names(tmp_path) == ["place"]
    assert place.is_dir() or place.read_text() == "old"


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "folder").is_dir()


def test_what_a_killed_writer_leaves_is_removed_by_the_next_write(tmp_path):
    code = """
import os, signal, sys
from jaxinfer.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"whole": True})
    assert names(tmp_path) == ["a.json"] and read_json(tmp_path / "a.json") == {"whole": True}


def test_a_destination_must_be_new_empty_or_ours(tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    check_destination(ours, lambda folder: False, "a draft")
    check_destination(tmp_path / "absent", lambda folder: False, "a draft")
    (ours / "file").write_text("")
    check_destination(ours, lambda folder: folder == ours, "a draft")
    with pytest.raises(ValueError, match="is not a draft"):
        check_destination(ours, lambda folder: False, "a draft")
    for wrong in (ours / "file", ours / "file" / "below"):
        with pytest.raises(ValueError, match="is not a folder"):
            check_destination(wrong, lambda folder: True, "a draft")


def test_a_message_from_a_file_is_one_short_line_that_a_terminal_only_shows():
    assert one_line("a\n b\tc") == "a b c"
    assert one_line("\x1b[31mred\x07 \u202egnp \ud800") == r"\x1b[31mred\x07 \u202egnp \ud800"
    assert len(one_line("x" * 10**7)) == 300
    assert one_line("\u00e9\u6587 \U0001f600") == "\u00e9\u6587 \U0001f600"
