"""Files appear whole or not at all, whatever happens to their writers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer import files
from jaxinfer.files import (
    PARTIAL,
    check_destination,
    one_line,
    read_json,
    replacing,
    replacing_folder,
    write_json,
)

ROOT = Path(__file__).parents[1]


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
    refused = pytest.raises(ValueError, match="is a folder, not a file")
    with refused, replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "folder").is_dir()


@pytest.mark.parametrize("writing", [replacing, replacing_folder])
@pytest.mark.parametrize("leads_to", ["file", "folder", "nothing"])
def test_a_link_in_the_place_is_neither_followed_nor_replaced(tmp_path, writing, leads_to):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "folder").mkdir()
    (elsewhere / "file").write_text("mine")
    place = tmp_path / "place"
    place.symlink_to(elsewhere / leads_to)
    with pytest.raises(ValueError, match="is a link"), writing(place):
        pass
    assert place.is_symlink() and (elsewhere / "file").read_text() == "mine"
    assert names(elsewhere) == ["file", "folder"] and names(tmp_path) == ["elsewhere", "place"]


def test_a_device_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a device or a pipe"), replacing(tmp_path / "pipe"):
        pass


def test_prepared_links_among_the_hidden_folders_are_not_followed(tmp_path):
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    (elsewhere / "old").mkdir(parents=True)
    (elsewhere / "old" / "other").write_text("mine")
    here.mkdir()
    (here / f"{PARTIAL}abcdefgh").symlink_to(elsewhere)
    inside = here / f"{PARTIAL}12345678"
    inside.mkdir()
    for name in ("new", "old", ".lock"):
        (inside / name).symlink_to(elsewhere / name)
    write_json(here / "a.json", {"whole": True})
    with replacing_folder(here / "folder"):
        pass
    assert names(elsewhere) == ["old"] and names(elsewhere / "old") == ["other"]
    assert names(here) == [f"{PARTIAL}abcdefgh", "a.json", "folder"]


def test_a_hidden_folder_of_another_name_is_not_ours(tmp_path):
    for name in (PARTIAL, f"{PARTIAL}notes-of-2026", ".a.json.writing-abc"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "a.json", {})
    assert len(names(tmp_path)) == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxinfer import files
place, kind, exchanges, kill_after = Path(sys.argv[1]), *sys.argv[2:]
if exchanges == "False":
    files._exchange = lambda *names: False
calls = 0
def killed(plain):
    def call(*args, **kwargs):
        global calls
        done = plain(*args, **kwargs)
        calls += 1
        if calls == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call
os.rename, os.replace = killed(os.rename), killed(os.replace)
files._exchange = killed(files._exchange)
if kind == "file":
    with files.replacing(place) as temporary:
        temporary.write_text("new")
else:
    with files.replacing_folder(place) as temporary:
        (temporary / "content").write_text("new")
"""


@pytest.mark.parametrize(
    ("kind", "exchanges", "kill_after"),
    [("file", True, 1), ("folder", True, 1), *(("folder", False, n) for n in (1, 2, 3))],
)
def test_a_kill_between_renames_loses_nothing(tmp_path, kind, exchanges, kill_after):
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
    content = place if kind == "file" else place / "content"
    content.write_text("old")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, place, kind, str(exchanges), str(kill_after)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    write_json(tmp_path / "other.json", {})  # any write in that folder
    assert names(tmp_path) == ["other.json", "place"]
    moved_aside = (exchanges, kill_after) in ((False, 1), (False, 2))
    assert content.read_text() == ("old" if moved_aside else "new")


def test_an_error_between_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    place, plain = tmp_path / "place", os.rename
    place.mkdir()
    (place / "content").write_text("old")

    def full(source, target):
        if Path(target) == place and "new" in str(source):
            raise OSError("full")
        plain(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="full"), replacing_folder(place):
        pass
    assert names(tmp_path) == ["place"] and (place / "content").read_text() == "old"


def test_kills_at_any_moment_of_many_saves_leave_nothing_behind_the_next_write(tmp_path):
    code = """
import os, signal, sys
from jaxinfer.files import replacing
for number in range(10):
    if not os.fork():
        with replacing(f"{sys.argv[1]}/a-{number}") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True)
    assert len(names(tmp_path)) == 1  # each writer removes what the one before has left
    write_json(tmp_path / "b.json", {"whole": True})
    assert names(tmp_path) == ["b.json"] and read_json(tmp_path / "b.json") == {"whole": True}


def test_files_and_the_names_of_their_folders_reach_the_disk(tmp_path, monkeypatch):
    flushed, plain = [], os.fsync

    def fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {})
    assert [Path(name).name for name in flushed] == ["a.json", ""] and flushed[-1] == ""
    flushed.clear()
    with replacing_folder(tmp_path / "b") as temporary:
        (temporary / "c").mkdir()
        (temporary / "c" / "d").write_text("d")
    ends = [Path(name).name for name in flushed]
    assert sorted(ends) == ["", "b", "c", "d"] and ends[-1] == ""


def test_a_destination_must_be_new_empty_or_ours(tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    check_destination(ours, lambda folder: False, "a draft", overwrite=False)
    check_destination(tmp_path / "absent", lambda folder: False, "a draft", overwrite=False)
    (ours / "file").write_text("")
    check_destination(ours, lambda folder: folder == ours, "a draft", overwrite=True)
    with pytest.raises(ValueError, match="holds a draft already"):
        check_destination(ours, lambda folder: folder == ours, "a draft", overwrite=False)
    with pytest.raises(ValueError, match="is not a draft"):
        check_destination(ours, lambda folder: False, "a draft", overwrite=True)
    for wrong in (ours / "file", ours / "file" / "below"):
        with pytest.raises(ValueError, match="not a folder"):
            check_destination(wrong, lambda folder: True, "a draft", overwrite=True)


def test_a_message_from_a_file_is_one_short_line_that_a_terminal_only_shows():
    assert one_line("a\n b\tc") == "a b c"
    assert one_line("\x1b[31mred\x07 \u202egnp \ud800") == r"\x1b[31mred\x07 \u202egnp \ud800"
    assert len(one_line("x" * 10**7)) == 300
    assert one_line("\u00e9\u6587 \U0001f600") == "\u00e9\u6587 \U0001f600"


def test_the_name_of_a_file_cannot_command_a_terminal(tmp_path):
    hostile = tmp_path / "\x1b[2Jname"
    for content in (None, "{", "[]", b"\xff"):
        if content is not None:
            hostile.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=r"\\x1b\[2Jname") as refused:
            read_json(hostile)
        assert str(refused.value).isprintable()
