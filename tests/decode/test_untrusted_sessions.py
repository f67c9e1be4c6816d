"""Session files are as untrusted as weights."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.factories import lm_of


@pytest.fixture
def talk(tmp_path):
    chat = lm_of().session("streaming")
    cache = replace(chat.cache, length=jnp.full_like(chat.cache.length, 3))
    chat.put_back(cache, [1, 2, 3], [4])
    chat.save(tmp_path / "talk")
    return tmp_path / "talk"


def rewrite(path, state=None, arrays=None):
    with safe_open(str(path), framework="numpy") as file:
        meta = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in sorted(file.offset_keys())}
    if state is not None:
        meta["state"] = state(json.loads(meta["state"]))
    if arrays is not None:
        arrays(tensors)
    save_file(tensors, path, metadata=meta)


def other(**changes):
    return lambda state: json.dumps(state | changes)


STATES = {
    "nesting": lambda state: "[" * 100_000,
    "no JSON": lambda state: "{",
    "a list": lambda state: "[1]",
    "infinite capacity": other(capacity=float("inf")),
    "a huge capacity": other(capacity=2**62),
    "a capacity of no bucket": other(capacity=100),
    "a fraction": other(capacity=64.5),
    "tokens that are truth values": other(tokens=[True, True, True]),
    "tokens that are text": other(tokens="123"),
    "tokens that are fractions": other(tokens=[1.0, 2.0, 3.0]),
    "tokens outside": other(tokens=[1, 2, 61]),
    "negative tokens": other(pending=[-1]),
    "fewer tokens than the cache": other(tokens=[1, 2]),
    "another field": other(more=1),
    "no tokens": lambda state: json.dumps({k: v for k, v in state.items() if k != "tokens"}),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_forged_state_is_refused_in_one_line(talk, state):
    rewrite(talk, state)
    check_refused(talk)


def not_finite(tensors):
    name = next(name for name, x in tensors.items() if x.dtype == np.float32)
    tensors[name].fill(np.nan)


ARRAYS = {
    "NaN in the cache": not_finite,
    "an array more": lambda tensors: tensors.update(x=np.zeros(2, np.float32)),
    "an array less": lambda tensors: tensors.pop("0"),
    "another shape": lambda tensors: tensors.update({"0": tensors["0"][None]}),
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_a_forged_cache_is_refused_in_one_line(talk, arrays):
    rewrite(talk, arrays=arrays)
    check_refused(talk)


def check_refused(path):
    with pytest.raises(ValueError) as refused:
        lm_of().restore(path, "streaming")
    line = str(refused.value)
    assert line.startswith(f"cannot read session file {path}: ") and line.isprintable()
    assert len(line) < 1000


def test_a_good_one_is_restored(talk):
    chat = lm_of().restore(talk, "streaming")
    assert (chat.tokens, chat.pending) == ([1, 2, 3], [4])
