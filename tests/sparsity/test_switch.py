"""One argument makes a model sparse, wherever it generates or scores."""

import gc
import json
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import names
from jaxinfer.config import RopeConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.sparsity.mlp import SparseMlp
from tests.factories import CONFIGS, lm_of, random_tokens
from tests.policies import over, with_random_feature_maps
from tests.sparsity.methods import MaskedBlocks, RandomBlocks

A, B, C = (random_tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 6))
NEW = {"max_new_tokens": 12, "ignore_eos": True}
# One layer compiles soon; 16 numbers of a head are a word of 2 bits.
CFG = replace(CONFIGS["llama"], num_layers=1, head_dim=16, rope=RopeConfig(rotary_dim=16))
QUARTER = RandomBlocks()
POLICIES = {
    "full": ji.full(),
    "kivi2": ji.kivi(bits=2, group=16, residual=16),
    "streaming": ji.streaming(2, 6),
    "h2o": ji.h2o(3, 3),
    "less": over(ji.h2o(3, 3)),
}


@pytest.fixture(autouse=True)
def lists_small_blocks(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.mlp.SMALLEST_BLOCK", 1)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(CFG, init_params(CFG, jax.random.key(0)))


@pytest.fixture(scope="module")
def sparse(lm) -> LM:
    return lm.sparsified(QUARTER)


def tokens(completions) -> list[list[int]]:
    return [one.tokens for one in completions]


def test_all_blocks_are_the_dense_model(lm):
    whole = RandomBlocks(density=1.0)
    wanted, found = lm.generate([A, B], **NEW), lm.generate([A, B], sparsity=whole, **NEW)
    assert tokens(found) == tokens(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_under_every_policy_the_text_is_that_of_the_masked_model(lm, name):
    options = {"policy": with_random_feature_maps(POLICIES[name], lm.config), **NEW}
    found = lm.generate([A, B], sparsity=QUARTER, **options)
    assert tokens(found) == tokens(lm.generate([A, B], sparsity=MaskedBlocks(), **options))


def test_a_text_is_the_same_alone_and_in_a_batch(lm):
    alone = [lm.generate([one], sparsity=QUARTER, **NEW)[0].tokens for one in (A, B, C)]
    assert tokens(lm.generate([A, B, C], sparsity=QUARTER, **NEW)) == alone
    assert alone[0] != lm.generate([A], **NEW)[0].tokens  # it does select


def test_a_hundred_masks_are_one_trace(lm):
    fresh = LM(lm.config, lm.params)
    fresh.generate([A], max_new_tokens=2, ignore_eos=True)
    dense = fresh.engine.programs["decode"].traces
    for _ in range(2):
        out = fresh.generate([A], sparsity=RandomBlocks(), max_new_tokens=100, ignore_eos=True)
    assert len(out[0].tokens) == 100
    assert fresh.engine.programs["decode"].traces == dense + 1


def test_the_sparse_model_holds_its_blocks_once(lm):
    dense = LM(lm.config, lm.params)
    sparse = dense.sparsified(QUARTER)
    before, after = (jax.tree.leaves(one.params) for one in (dense, sparse))
    shared = {id(leaf) for leaf in before} & {id(leaf) for leaf in after}
    downs = [layer["mlp"]["down"]["weight"] for layer in dense.params["layers"]]
    assert len(shared) == len(before) - len(downs)
    routers = sum(layer["mlp"].selector.outer.nbytes for layer in sparse.params["layers"])
    assert sum(x.nbytes for x in after) == sum(x.nbytes for x in before) + routers
    gone = weakref.ref(dense)
    del dense
    gc.collect()
    assert gone() is None  # nothing of the sparse model keeps the dense one


def test_a_form_is_made_again_only_when_nobody_uses_it(lm):
    dense = LM(lm.config, lm.params)
    first = dense.sparsified(QUARTER)
    assert dense.sparsified(RandomBlocks()) is first and first.sparsified(QUARTER) is first
    assert dense.sparsified(None) is dense and first.sparsified(None) is first
    other = dense.sparsified(RandomBlocks(density=0.5))
    assert other is not first and dense.sparsified(QUARTER) is first  # `first` is still in use
    gone = weakref.ref(first)
    del first
    dense.sparsified(other.sparsity)
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="this model is sparse by 'random_blocks' already; give"):
        other.sparsified(QUARTER)


def test_layers_may_stay_dense():
    lm = lm_of("llama")
    first, second = (x["mlp"] for x in lm.sparsified(RandomBlocks(dense=(0,))).params["layers"])
    assert first is lm.params["layers"][0]["mlp"] and isinstance(second, SparseMlp)


def test_as_a_draft_of_its_dense_self_it_gives_the_dense_text(lm, sparse):
    wanted = lm.generate([A, B], **NEW)
    ahead = ji.speculate(lm, sparse, ji.Topology.chain(3))
    found = lm.generate([A, B], draft=ahead, **NEW)
    assert tokens(found) == tokens(wanted)
    assert found[0].stats.sparsity is None and found[0].stats.step_tokens


def test_under_a_draft_a_sparse_target_gives_its_own_text(lm, sparse):
    wanted = sparse.generate([A, B], **NEW)
    ahead = ji.speculate(sparse, lm, ji.Topology.from_children([[[], []], []]))
    found = lm.generate([A, B], sparsity=QUARTER, draft=ahead, **NEW)
    assert tokens(found) == tokens(wanted)
    assert found[0].stats.sparsity == "random_blocks" and found[0].stats.step_tokens
    with pytest.raises(ValueError, match="the draft was made for another model"):
        lm.generate([A], draft=ahead, **NEW)


def test_a_score_reads_with_the_sparse_model(lm):
    (made,) = lm.generate([A], sparsity=QUARTER, **NEW)
    (found,) = lm.score([A + made.tokens], sparsity=QUARTER)
    np.testing.assert_allclose(found.log_probs[-12:], made.log_probs, atol=1e-4)


def test_warming_up_compiles_what_a_sparse_generation_needs(lm):
    fresh = LM(lm.config, lm.params)
    assert fresh.warmup([9], max_new_tokens=12, sparsity=QUARTER) > 0
    assert fresh.generate([A], sparsity=QUARTER, **NEW)[0].stats.compile_s == 0


def test_turns_of_a_session_equal_one_long_prompt(lm):
    session = lm.session(sparsity=QUARTER)
    session.append(A)
    first = session.generate(B, **NEW)
    assert first.tokens == lm.generate([A + B], sparsity=QUARTER, **NEW)[0].tokens
    assert first.stats.sparsity == "random_blocks"
    second = session.generate(C, sparsity=RandomBlocks(), **NEW).tokens
    text = A + B + first.tokens + C
    assert second == lm.generate([text], sparsity=QUARTER, **NEW)[0].tokens


def test_a_prefix_is_gone_on_from_with_its_own_sparsity(lm):
    session = lm.session(sparsity=QUARTER)
    session.append(A)
    wanted = [lm.generate([A + one], sparsity=QUARTER, **NEW)[0].tokens for one in (B, C)]
    lm.sparsified(RandomBlocks(density=0.5))  # the session's form is not the last one any more
    assert tokens(lm.generate([B, C], prefix=session, **NEW)) == wanted
    assert tokens(lm.generate([B, C], prefix=session, sparsity=QUARTER, **NEW)) == wanted


def test_a_session_keeps_its_sparsity(lm):
    dense, session, half = lm.session(), lm.session(sparsity=QUARTER), RandomBlocks(density=0.5)
    with pytest.raises(ValueError, match="goes on with sparsity 'none', not with 'random_blocks'"):
        dense.generate(A, sparsity=QUARTER)
    for options in ({"sparsity": half}, {"sparsity": MaskedBlocks()}):
        with pytest.raises(ValueError, match="the session goes on with sparsity 'random_blocks'"):
            session.generate(A, **options)
        session.append(B)
        with pytest.raises(ValueError, match="the session goes on with sparsity 'random_blocks'"):
            lm.generate([A], prefix=session, **options)


def test_a_saved_session_is_refused_under_another_sparsity(lm, tmp_path):
    session, place = lm.session(sparsity=QUARTER), tmp_path / "session"
    session.append(A)
    session.save(place)
    restored = lm.restore(place, sparsity=RandomBlocks())
    assert restored.generate(B, **NEW).tokens == session.generate(B, **NEW).tokens
    for other in (None, RandomBlocks(density=0.5), RandomBlocks(dense=(1,))):
        with pytest.raises(ValueError, match="it has sparsity .*random_blocks"):
            lm.restore(place, sparsity=other)
    lm.session().save(tmp_path / "dense")
    with pytest.raises(ValueError, match="it has sparsity 'none', this model and policy have"):
        lm.restore(tmp_path / "dense", sparsity=QUARTER)


def test_a_session_of_an_older_release_has_no_sparsity(lm, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    session, place = lm.session(), tmp_path / "session"
    session.append(A)
    session.save(place)
    with safe_open(place, "np") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sparsity"}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["state"])["pending"]
    save_file(arrays, place, metadata)
    assert lm.restore(place).generate(B, **NEW).tokens == session.generate(B, **NEW).tokens
    with pytest.raises(ValueError, match="it has sparsity 'none'"):
        lm.restore(place, sparsity=QUARTER)


def test_a_method_is_known_by_its_name(lm, monkeypatch):
    monkeypatch.setattr(names.SPARSITIES, "_known", dict(names.SPARSITIES._known))
    ji.register_sparsity("random_blocks", RandomBlocks)
    wanted = lm.generate([A], sparsity=RandomBlocks(density=0.5), **NEW)
    for name in ("random_blocks", "random-blocks"):
        found = lm.generate([A], sparsity={"name": name, "density": 0.5}, **NEW)
        assert tokens(found) == tokens(wanted)
    assert lm.sparsified("random-blocks").sparsity == QUARTER
    with pytest.raises(ValueError, match="there is a sparsity method 'random_blocks' already"):
        ji.register_sparsity("random_blocks", MaskedBlocks)
    with pytest.raises(ValueError, match="did you mean 'random_blocks'\\? known methods: "):
        lm.sparsified("random-block")
    with pytest.raises(ValueError, match="does not take the argument 'densty'; did you mean"):
        lm.sparsified({"name": "random-blocks", "densty": 0.5})
    ji.register_sparsity("text", lambda: "text")
    with pytest.raises(ValueError, match="the factory of method 'text' made no Sparsity"):
        lm.score([A], sparsity="text")


@pytest.mark.parametrize("wrong", [3, True, ["lte"], object(), {"density": 0.5}, "", b"lte"])
def test_what_is_no_method_is_refused(wrong):
    with pytest.raises(ValueError, match="sparsity"):
        lm_of("llama").generate([A], sparsity=wrong)
