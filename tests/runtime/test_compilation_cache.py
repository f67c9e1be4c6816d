"""The persistent compilation cache is kept in the user's folder and never overrides the user."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.files import cache_folder

SCRIPT = """
import jax, sys
from jaxinfer.runtime.compilation_cache import enable_persistent_cache
if "late" in sys.argv:
    jax.jit(lambda x: x - 1)(3.0)  # jax has already decided that there is no cache
print(enable_persistent_cache())
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
"""


def run(tmp_path, *args, **environment):
    import os

    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAXINFER"))
    }
    env |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)} | environment
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("when", ["early", "late"])
def test_small_compilations_are_stored_in_our_folder(tmp_path, when):
    printed = run(tmp_path, when, JAXINFER_CACHE=str(tmp_path / "ours"))
    assert printed == str(tmp_path / "ours" / "xla")
    assert any((tmp_path / "ours" / "xla").iterdir())


def test_a_folder_that_the_user_configured_is_left_alone(tmp_path):
    own = tmp_path / "own"
    printed = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own), JAXINFER_CACHE=str(tmp_path / "x"))
    assert printed == str(own) and not (tmp_path / "x").exists()


def test_an_unwritable_folder_only_means_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path, JAXINFER_CACHE=str(tmp_path / "file")) == "None"


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXINFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxinfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "jaxinfer"
