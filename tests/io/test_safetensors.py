"""Hugging Face folders load exactly, from one file or shards, in any dtype, in little memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import CONFIG, hf_folder, sharded_folder, tensors

from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.weights import aligned_empty, place


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_folder_gives_every_tensor(tmp_path):
    weights = tensors()
    params = load_checkpoint(hf_folder(tmp_path / "m"), "float32").params
    q = params["layers"][1]["attn"]["q"]["weight"]
    np.testing.assert_array_equal(q, weights["model.layers.1.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(params["head"]["weight"], weights["lm_head.weight"])
    np.testing.assert_array_equal(params["embed"]["tokens"], weights["model.embed_tokens.weight"])


def test_shards_equal_the_single_file(tmp_path):
    single = load_checkpoint(hf_folder(tmp_path / "one"), "float32")
    sharded = load_checkpoint(sharded_folder(tmp_path / "two"), "float32")
    same(single.params, sharded.params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
def test_stored_dtypes_are_cast_to_the_wanted_one(tmp_path, stored, wanted):
    weights = tensors(dtype=jnp.dtype(stored))
    params = load_checkpoint(hf_folder(tmp_path / "m", weights=weights), wanted).params
    expected = weights["model.norm.weight"].astype(jnp.dtype(wanted))
    assert params["final_norm"]["scale"].dtype == wanted
    np.testing.assert_array_equal(np.asarray(params["final_norm"]["scale"]), expected)


def test_generation_config_adds_the_ids_that_end_a_text(tmp_path):
    folder = hf_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 258]}))
    checkpoint = load_checkpoint(folder, "float32")
    assert set(checkpoint.config.eos_token_ids) == {3, 258}
    assert checkpoint.tokenizer is not None
    assert set(checkpoint.tokenizer.eos_token_ids) == {3, 258}


def test_a_folder_without_tokenizer_warns_and_loads(tmp_path):
    with pytest.warns(UserWarning, match="has no tokenizer"):
        checkpoint = load_checkpoint(hf_folder(tmp_path / "m", tokenizer=False), "float32")
    assert checkpoint.tokenizer is None


def test_unread_tensors_are_reported(tmp_path):
    folder = hf_folder(tmp_path / "m", weights=tensors() | {"model.extra": np.ones(3, np.float32)})
    with pytest.warns(UserWarning, match="1 tensors are not part of the llama model.*model.extra"):
        load_checkpoint(folder, "float32")


def test_a_second_copy_of_a_tied_head_is_not_reported(tmp_path, recwarn):
    config = CONFIG | {"tie_word_embeddings": True}
    load_checkpoint(hf_folder(tmp_path / "m", config, tensors()), "float32")
    assert not [w for w in recwarn if "not part of" in str(w.message)]


def test_an_aligned_array_is_borrowed_not_copied():
    array = aligned_empty((512, 64), np.dtype(np.float32))
    array[...] = 1
    assert place(array).unsafe_buffer_pointer() == array.ctypes.data


PEAK = """
import resource, sys, jax, numpy as np
jax.numpy.zeros(1).block_until_ready()
from jaxinfer.io.load import load_checkpoint
import jaxinfer.io.hf, jaxinfer.io.safetensors_reader, jaxinfer.models.registry
def peak():
    return [int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM")][0]
before = peak()
params = load_checkpoint(sys.argv[1], sys.argv[2]).params
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((peak() - before) / max(size, int(sys.argv[3])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("stored, wanted", [("float32", "float32"), ("bfloat16", "float32")])
def test_peak_memory_stays_under_1_3_times_the_larger_of_source_and_result(
    tmp_path, stored, wanted
):
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    folder = hf_folder(tmp_path / "m", config, tensors(config, jnp.dtype(stored)))
    source = (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, str(folder), wanted, str(source)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output) < 1.3


def test_one_shard_may_hold_tensors_that_the_index_places_elsewhere(tmp_path):
    folder = sharded_folder(tmp_path / "m")
    weights = tensors()
    name = "model.embed_tokens.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[name])
    content = {n: weights[n] for n, file in index.items() if file == other}
    save_file(content | {name: np.zeros_like(weights[name])}, folder / other)
    params = load_checkpoint(folder, "float32").params
    np.testing.assert_array_equal(params["embed"]["tokens"], weights[name])
