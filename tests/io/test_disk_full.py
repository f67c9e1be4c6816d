"""A disk without room: one error that says so, no word on the terminal, and nothing left behind."""

import contextlib
import resource
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import optax
import pytest
from test_fetch import index  # noqa: F401 (a fixture)
from tiny_checkpoints import gguf_file

from jaxinfer.io import orbax
from jaxinfer.io.convert import convert
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.model_index import ModelUnavailable
from jaxinfer.train.loop import fit
from tests.factories import lm_of

Usage = namedtuple("Usage", "total used free")


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system refuses to write more into any file of this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_conversion(tmp_path, capfd):
    file = gguf_file(tmp_path / "m.gguf")
    with files_of_at_most(64), pytest.raises(OSError, match="File too large") as caught:
        convert(file, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    monkeypatch.setattr(orbax, "writing", lambda folder: pytest.fail("wrote"))
    with pytest.raises(OSError, match="No space left on device.*out'"):
        convert(gguf_file(tmp_path / "m.gguf"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_a_fetched_model_is_unavailable(index, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.raises(ModelUnavailable, match="No space left .*; free some space, .*'tiny-llama'"):
        load_checkpoint("tiny")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_session(tmp_path, capfd):
    session = lm_of().session()
    session.append([1, 2, 3])
    session.save(tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    with files_of_at_most(64), pytest.raises(OSError, match="File too large|os error 27"):
        session.save(tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


def test_a_training_state_and_the_run_goes_on_from_the_one_before(tmp_path, capfd):
    def loss(params, batch, key):
        return (params["x"] * batch).sum(), {"loss": params["x"].sum()}

    def run(steps):
        params = {"x": jax.random.normal(jax.random.key(0), 2**16)}  # nothing to compress
        return fit(
            loss, params, optax.sgd(0.1), lambda step: jnp.float32(1), steps=steps,
            folder=tmp_path, save_every=1,
        )  # fmt: skip

    run(1)
    capfd.readouterr()
    with files_of_at_most(2**15), pytest.raises(OSError, match="File too large"):
        run(2)
    assert capfd.readouterr() == ("", "")
    assert int(run(2).step) == 2
