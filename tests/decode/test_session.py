"""Sessions: a live cache gives what one long prompt gives; forks, files and failures keep it so."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.presets import full, h2o, streaming
from jaxinfer.decode.sampling import Sampler
from jaxinfer.lm import LM
from tests.factories import CONFIGS, lm_of, params_of, random_tokens, scripted_lm

A, B, C = (random_tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 6))
NEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def lm() -> LM:
    return lm_of("llama")


def whole(lm: LM, tokens: list[int], **options) -> list[int]:
    """What one prompt without a session gives."""
    return lm.generate([tokens], **{**NEW, **options})[0].tokens


def history(session) -> list[int]:
    return session.tokens + session.pending


def test_an_appended_turn_is_generated_from(lm):
    session = lm.session()
    session.append(A)
    assert session.generate(**NEW).tokens == whole(lm, A)


def test_turns_equal_one_long_prompt(lm):
    session = lm.session()
    session.append(A)
    session.append(B)
    first = session.generate(C, **NEW).tokens
    assert first == whole(lm, A + B + C)
    second = session.generate(B, **NEW).tokens
    assert second == whole(lm, A + B + C + first + B)
    assert history(session) == A + B + C + first + B + second


def test_generating_again_continues_the_text(lm):
    session = lm.session()
    tokens = session.generate(A, **NEW).tokens + session.generate(**NEW).tokens
    assert tokens == whole(lm, A, max_new_tokens=16)


def test_a_session_grows_beyond_its_first_capacity(lm):
    session = lm.session()
    before = bytes_of(session.cache.layers)
    turn = random_tokens(1, 100, seed=2)[0].tolist()
    session.append(turn)
    assert session.generate(A, **NEW).tokens == whole(lm, turn + A)
    assert bytes_of(session.cache.layers) == 2 * before


def test_a_fork_and_its_source_do_not_touch_each_other(lm):
    session = lm.session()
    session.append(A)
    fork = session.fork()
    first = session.generate(B, **NEW).tokens
    assert fork.generate(C, **NEW).tokens == whole(lm, A + C)
    assert first == whole(lm, A + B)
    assert session.generate(C, **NEW).tokens == whole(lm, A + B + first + C)


def test_a_prefix_is_read_once_and_kept(lm):
    session = lm.session()
    session.append(A)
    for _ in range(2):
        found = lm.generate([B, C], prefix=session, **NEW)
        assert [out.tokens for out in found] == [whole(lm, A + B), whole(lm, A + C)]
    assert found[0].stats.prompt_tokens < 2 * len(A) + len(B) + len(C)
    assert session.generate(**NEW).tokens == whole(lm, A)


def test_a_prefix_takes_samples_and_penalties_into_account(lm):
    session = lm.session()
    session.append(A)
    sampler = Sampler(temperature=1.3, repetition_penalty=1.5)
    options = {**NEW, "sampler": sampler, "seed": 4, "samples": 2}
    found = lm.generate([B], prefix=session, **options)
    assert [o.tokens for o in found] == [o.tokens for o in lm.generate([A + B], **options)]


def test_an_empty_prompt_after_a_prefix_continues_it(lm):
    session = lm.session()
    session.append(A)
    assert lm.generate([[]], prefix=session, **NEW)[0].tokens == whole(lm, A)


def test_only_the_first_turn_gets_a_bos():
    lm = scripted_lm([b"a", b"b", b"c"])
    session = lm.session()
    session.append("a")
    session.append("b")
    assert history(session) == [lm.tokenizer.bos_token_id, 0, 1]


def test_an_empty_session_has_nothing_to_continue(lm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        lm.session().generate(**NEW)
    with pytest.raises(ValueError, match="the prompt is empty"):
        lm.session().append([])


def test_several_samples_of_a_session_are_refused(lm):
    session = lm.session()
    session.append(A)
    with pytest.raises(ValueError, match="a session holds one text, got samples=2; fork it"):
        session.generate(B, samples=2)
    assert session.generate(**NEW).tokens == whole(lm, A)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"speed": 3}, {"policy": "lru"}])
def test_a_refused_call_leaves_the_session_usable(lm, wrong):
    session = lm.session()
    session.append(A)
    with pytest.raises((ValueError, TypeError)):
        session.generate([99] if wrong.get("policy") else B, **wrong)
    assert session.generate(**NEW).tokens == whole(lm, A)


def test_a_refused_turn_changes_nothing():
    lm = lm_of("learned")
    session = lm.session()
    session.append(A)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        session.append([1] * 60)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        session.generate([1] * 50, **NEW)
    assert history(session) == A
    assert session.generate(**NEW).tokens == whole(lm, A)


def test_a_prefix_keeps_its_policy(lm):
    session = lm.session(streaming(2, 13))
    session.append(A)
    found = lm.generate([B], prefix=session, policy=streaming(2, 13), **NEW)
    assert found[0].tokens == whole(lm, A + B, policy=streaming(2, 13))
    for call in (lambda **o: lm.generate([B], prefix=session, **o), session.generate):
        with pytest.raises(ValueError, match="under policy 'streaming', not .* leave policy out"):
            call(policy=streaming(2, 14))
        with pytest.raises(ValueError, match="not under this 'full'; leave policy out, or start"):
            call(policy="full")
    assert history(session) == A


def test_a_prefix_serves_its_own_model_only(lm):
    session = LM(CONFIGS["llama"], params_of("llama")).session()
    session.append(A)
    with pytest.raises(ValueError, match="not a session of this model; start one with lm.session"):
        lm.generate([B], prefix=session, **NEW)


def test_a_turn_that_cannot_fit_in_memory_is_refused(lm, monkeypatch):
    session = lm.session()
    session.append(A)
    with monkeypatch.context() as patch:
        patch.setattr("jaxinfer.runtime.memory.available_bytes", lambda device=None: 1 << 20)
        for call in (session.append, lambda turn: session.reserve(len(turn))):
            with pytest.raises(ValueError, match="cache .* exceeds the 1.0 MiB of memory"):
                call([1] * 4000)
    assert history(session) == A and session.capacity == 64
    assert session.generate(**NEW).tokens == whole(lm, A)


def test_a_cache_that_is_there_needs_no_memory_again(lm, monkeypatch):
    session = lm.session()
    session.reserve(4096)
    assert bytes_of(session.cache.layers) == 1 << 20
    monkeypatch.setattr("jaxinfer.runtime.memory.available_bytes", lambda device=None: 1 << 19)
    session.append(A)
    assert len(session.generate(B, **NEW).tokens) == 8


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory) -> Path:
    session = lm.session()
    session.append(A)
    session.generate(B, **NEW)
    path = tmp_path_factory.mktemp("sessions") / "chat.session"
    session.save(path)
    return path


def test_a_restored_session_continues_like_the_saved_one(lm, saved):
    session = lm.session()
    session.append(A)
    session.generate(B, **NEW)
    restored = lm.restore(saved)
    assert history(restored) == history(session)
    assert restored.generate(C, **NEW).tokens == session.generate(C, **NEW).tokens


def test_a_session_of_bfloat16_survives_a_file(tmp_path):
    lm = lm_of("llama", "bfloat16")
    session = lm.session()
    session.append(A)
    session.save(tmp_path / "x")
    assert lm.restore(tmp_path / "x").generate(**NEW).tokens == session.generate(**NEW).tokens


def test_a_grown_session_survives_a_file(lm, tmp_path):
    session = lm.session()
    session.append(random_tokens(1, 100)[0].tolist())
    session.save(tmp_path / "x")
    assert lm.restore(tmp_path / "x").generate(**NEW).tokens == session.generate(**NEW).tokens


def test_bfloat16_in_the_gpu_layout_survives_a_file_that_the_cpu_refuses(tmp_path, monkeypatch):
    params = params_of("llama", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr("jax.default_backend", lambda: "gpu")
        lm = LM(CONFIGS["llama"], params)
        session = lm.session()
        session.append(A)
        session.save(tmp_path / "x")
        restored = lm.restore(tmp_path / "x")
        assert restored.cache.layers[0][0].k.dtype == "bfloat16"
        assert restored.generate(**NEW).tokens == session.generate(**NEW).tokens
    with pytest.raises(ValueError, match="has layout 'BKSH'.* have 'BKHS'"):
        LM(CONFIGS["llama"], params).restore(tmp_path / "x")


def test_saving_does_not_change_the_session_and_leaves_one_file(lm, saved):
    assert [path.name for path in saved.parent.iterdir()] == ["chat.session"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: lm_of("llama", seed=1),
        lambda: lm_of("mpt"),
        lambda: lm_of("llama", "bfloat16"),
        lambda: LM(replace(CONFIGS["llama"], norm_eps=1e-6), params_of("llama")),
    ],
    ids=["other weights", "other family", "other dtype", "other config"],
)
def test_another_model_is_refused(other, saved):
    with pytest.raises(ValueError, match="restore it with what saved it"):
        other().restore(saved)


def test_another_policy_is_refused(lm, saved):
    with pytest.raises(ValueError, match="has policy .* restore it with what saved it"):
        lm.restore(saved, replace(full(), weigh_keys="always"))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -500])
def test_a_truncated_file_is_refused(lm, saved, tmp_path, keep):
    data = saved.read_bytes()
    (tmp_path / "cut").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="cannot read session file"):
        lm.restore(tmp_path / "cut")


def test_a_file_that_is_missing_or_of_another_kind_is_refused(lm, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="cannot read session file"):
        lm.restore(tmp_path / "none")
    save_file({"0": np.zeros(3)}, tmp_path / "weights", metadata={"format": "np"})
    with pytest.raises(ValueError, match="restore it with what saved it"):
        lm.restore(tmp_path / "weights")


def forged(saved: Path, path: Path, *, arrays=None, state=None) -> Path:
    """The saved file with other arrays or another state."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(saved, framework="numpy") as file:
        meta = file.metadata()
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if arrays is not None:
        data = arrays(data)
    if state is not None:
        meta["state"] = json.dumps(state(json.loads(meta["state"])))
    save_file(data, path, metadata=meta)
    return path


def larger(data):
    return {k: np.concatenate([x, x], axis=0) if x.ndim == 4 else x for k, x in data.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": lambda data: {k: x.astype(np.float64) for k, x in data.items()}},
        {"arrays": lambda data: {k: x for k, x in data.items() if k != "1"}},
        {"arrays": lambda data: {k: x[None] for k, x in data.items()}},
        {"arrays": larger},
        {"state": lambda state: {**state, "tokens": state["tokens"] * 30}},
        {"state": lambda state: {**state, "tokens": state["tokens"][:-1]}},
        {"state": lambda state: {**state, "pending": [61]}},
        {"state": lambda state: {**state, "capacity": 1 << 40}},
        {"state": lambda state: {"tokens": []}},
        {"state": lambda state: "x"},
    ],
    ids=[
        "other dtype",
        "missing array",
        "other rank",
        "other batch",
        "too many tokens",
        "too few tokens",
        "token outside the vocabulary",
        "forged capacity",
        "no pending",
        "no mapping",
    ],
)
def test_a_forged_file_is_refused(lm, saved, tmp_path, change):
    with pytest.raises(ValueError, match="session file"):
        lm.restore(forged(saved, tmp_path / "forged", **change))


@pytest.mark.parametrize("budget", [0, -1, 1 << 30])
def test_a_forged_budget_is_refused(lm, tmp_path, budget):
    policy = h2o(0.25, 0.25)
    session = lm.session(policy=policy)
    session.append(A)
    session.save(tmp_path / "saved")
    assert lm.restore(tmp_path / "saved", policy).tokens == session.tokens

    def other(data):
        return {k: np.full_like(x, budget) if is_budget(x) else x for k, x in data.items()}

    def is_budget(x):
        return x.dtype == np.int32 and x.shape == (1,) and x[0] != len(A)

    with pytest.raises(ValueError, match=f"a budget of {budget} tokens in"):
        lm.restore(forged(tmp_path / "saved", tmp_path / "forged", arrays=other), policy)


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(lm, tmp_path, monkeypatch):
    session = lm.session()
    session.append(A)
    path = tmp_path / "chat"
    session.save(path)
    before = path.read_bytes()
    session.append(B)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        session.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_save_killed_before_its_end_leaves_no_session_file(tmp_path):
    # the process dies between writing and renaming: what a reader may find is whole or not there
    script = """
import os, sys
from jaxinfer.lm import LM
from tests.factories import lm_of
session = lm_of("llama").session()
os.replace = lambda *_: os._exit(9)
session.save(sys.argv[1])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "chat")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
        capture_output=True,
    )
    assert done.returncode == 9, done.stderr.decode()
    assert not (tmp_path / "chat").exists()
