"""The library of CPU kernels: damaged, of other sources, turned off, and in use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cpu_kernels import loading, manifest
from jaxinfer.runtime.backend import Backend
from tests.cpu_kernels.using import needs_kernels
from tests.factories import CONFIGS, params_of

OFF = Backend()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder with a copy of the library, in which it is looked for."""
    for name in (manifest.LIBRARY, manifest.MANIFEST):
        shutil.copy(loading.FOLDER / name, tmp_path)
    monkeypatch.setenv(loading.PLACE, str(tmp_path))
    return tmp_path


def opened():
    return loading._opened.__wrapped__()


def describe(folder, library: bytes):
    (folder / manifest.LIBRARY).write_bytes(library)
    manifest.write(folder)


def test_without_a_library_xla_computes_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv(loading.PLACE, str(tmp_path))
    monkeypatch.setenv(loading.SWITCH, "1")
    found = opened()
    assert found.library is None and found.is_wanted and "not built" in found.reason
    monkeypatch.setattr(loading, "state", lambda: found)
    assert Backend.of(platform="cpu") == OFF
    with pytest.warns(UserWarning, match="^XLA computes without CPU kernels: they are not built"):
        loading.say_once_if_missing.__wrapped__()
    with pytest.raises(ValueError, match="implementation='ffi' needs the CPU kernels: they are"):
        Backend.of("ffi")


def test_the_switch_turns_kernels_off_without_a_word(monkeypatch, recwarn):
    monkeypatch.setenv(loading.SWITCH, "0")
    found = opened()
    assert found == loading.State(
        library=None, reason="turned off by JAXINFER_CPU_KERNELS=0", is_wanted=False
    )
    monkeypatch.setattr(loading, "state", lambda: found)
    loading.say_once_if_missing.__wrapped__()
    assert Backend.of(platform="cpu") == OFF and not recwarn.list


@needs_kernels
@pytest.mark.parametrize("name", ["avx1024", "0x", "\n"])
def test_a_switch_that_nobody_knows_is_refused(monkeypatch, name):
    monkeypatch.setenv(loading.SWITCH, name)
    with pytest.raises(ValueError, match="^JAXINFER_CPU_KERNELS must be 0, 1 or an instr[^\n]*$"):
        opened()


@needs_kernels
def test_the_switch_chooses_instructions(monkeypatch):
    monkeypatch.setenv(loading.SWITCH, "portable")
    try:
        assert opened().reason == "portable"
    finally:
        loading.choose(loading.instruction_sets()[0])


@needs_kernels
@pytest.mark.parametrize("kept", [0, 100, 5000, -1, -4096])
def test_a_cut_library_is_not_opened(copy, kept):
    data = (copy / manifest.LIBRARY).read_bytes()
    (copy / manifest.LIBRARY).write_bytes(data[:kept])
    assert opened().library is None and "is damaged" in opened().reason


@needs_kernels
def test_a_library_with_one_other_bit_is_not_opened(copy):
    data = bytearray((copy / manifest.LIBRARY).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / manifest.LIBRARY).write_bytes(data)
    assert opened().library is None and "is damaged" in opened().reason


@needs_kernels
def test_a_library_of_other_sources_is_not_opened(copy):
    facts = json.loads((copy / manifest.MANIFEST).read_text())
    facts["sources"] = "0" * 64
    (copy / manifest.MANIFEST).write_text(json.dumps(facts))
    assert opened().library is None and "other sources" in opened().reason


@needs_kernels
@pytest.mark.parametrize("text", ["", "{", "[]", '{"library": 3}', "\0", None])
def test_a_damaged_manifest_is_one_line(copy, text):
    (copy / manifest.MANIFEST).unlink()
    if text is not None:
        (copy / manifest.MANIFEST).write_text(text)
    found = opened()
    assert found.library is None and found.reason and "\n" not in found.reason


@needs_kernels
def test_a_file_that_is_no_library_and_one_without_kernels_are_one_line(copy):
    describe(copy, b"no library")
    assert opened().library is None and "\n" not in opened().reason
    import _ctypes  # some library that is surely there

    describe(copy, Path(_ctypes.__file__).read_bytes())
    assert opened().library is None and "jaxinfer_cpu_target" in opened().reason


@needs_kernels
def test_a_damaged_library_does_not_end_a_process(copy):
    (copy / manifest.LIBRARY).write_bytes((copy / manifest.LIBRARY).read_bytes()[:9000])
    done = subprocess.run(
        [sys.executable, "-m", "jaxinfer", "env"], capture_output=True, text=True, timeout=120
    )
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("cpu_kernels")]
    assert done.returncode == 0 and "off, XLA computes: the file jaxinfer_cpu.so is damaged" in line


@needs_kernels
def test_int8_weights_decode_by_the_kernel_and_not_when_xla_is_named():
    config, params = CONFIGS["llama"], params_of("llama")
    params = ji.models.quantize.quantize_weights(params, "int8", Backend.of("reference"))
    tokens = jnp.array([[3, 1, 4]])
    calls, logits = {}, {}
    for name in ("ffi", "reference", None):
        backend = Backend.of(name, "cpu")
        cache = ji.models.stack.init_cache(config, params, ji.full(), 1, 16, backend=backend)
        run = jax.jit(lambda params, cache: ji.forward(config, params, tokens, cache).logits)
        calls[name] = run.lower(params, cache).as_text().count("jaxinfer_int8_product")
        logits[name] = np.asarray(run(params, cache))
    assert calls["ffi"] == calls[None] > config.num_layers and calls["reference"] == 0
    np.testing.assert_allclose(logits["ffi"], logits["reference"], atol=2e-2)
    np.testing.assert_array_equal(logits["ffi"], logits[None])
