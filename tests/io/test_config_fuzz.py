"""Random JSON in any field of a good checkpoint: a model that works, or one line of refusal."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import hf_folder, sharded_folder

from jaxinfer.config import ModelConfig
from jaxinfer.io.convert import convert
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.safetensors_reader import INDEX
from jaxinfer.models.stack import forward

WORDS = """
    rms layer silu gelu relu tanh rope learned alibi none linear llama3 yarn llama opt falcon
    float32 bfloat16 a.safetensors b.safetensors c.safetensors ../a.safetensors
"""
NUMBERS = (
    st.integers(-3, 70) | st.floats() | st.sampled_from([2**31, 10**30, -(10**400), 1e-40, 1e38])
)
TEXTS = st.sampled_from([*WORDS.split(), "x" * 300 + ".safetensors"]) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(data, path=()):
    """Paths of all values in a JSON document, the document itself first."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else ():
        yield from places(value, (*path, key))


def replaced(data, path, value):
    if not path:
        return value
    result = copy.copy(data)
    result[path[0]] = replaced(data[path[0]], path[1:], value)
    return result


def loads_or_refuses(folder):
    try:
        checkpoint = load_checkpoint(folder, "float32")
    except ValueError as error:
        assert "\n" not in str(error)
        return
    cfg = checkpoint.config
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    tokens = jnp.zeros((1, 3), jnp.int32)
    logits = jax.eval_shape(partial(forward, cfg), checkpoint.params, tokens).logits
    assert logits.shape == (1, 3, cfg.vocab_size)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of our format, and its config.json."""
    path = tmp_path_factory.mktemp("own")
    convert(hf_folder(path / "hf", tokenizer=False), path / "m")
    return path / "m", json.loads((path / "m" / "config.json").read_text())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A Hugging Face folder of two shards, and their index."""
    folder = sharded_folder(tmp_path_factory.mktemp("sharded") / "m")
    return folder, json.loads((folder / INDEX).read_text())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::UserWarning")
@FUZZ
@given(data=st.data(), value=JSON)
def test_any_json_in_our_config_gives_a_model_or_one_line(own, data, value):
    folder, config = own
    changed = replaced(config, data.draw(st.sampled_from(list(places(config)))), value)
    (folder / "config.json").write_text(json.dumps(changed))
    loads_or_refuses(folder)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::UserWarning")
@FUZZ
@given(data=st.data(), value=JSON)
def test_any_json_in_the_shard_index_gives_a_model_or_one_line(sharded, data, value):
    folder, index = sharded
    changed = replaced(index, data.draw(st.sampled_from(list(places(index)))), value)
    (folder / INDEX).write_text(json.dumps(changed))
    loads_or_refuses(folder)
