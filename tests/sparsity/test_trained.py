"""`ji.deja_vu` and `ji.lte`: what they take, which density they have, and for which model."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.sparsity import save_sparsity
from jaxinfer.lm import LM
from jaxinfer.models.quantize import quantize_params
from jaxinfer.names import NAMED
from jaxinfer.sparsity.baseline import BASELINES, BY_TEXT
from jaxinfer.sparsity.trained import Trained
from tests.factories import CONFIGS, lm_of, params_of, random_tokens
from tests.sparsity.artefacts import artefact_of

PROMPT = random_tokens(1, 9)[0].tolist()
NEW = {"max_new_tokens": 12, "ignore_eos": True}
PREDICTORS = artefact_of(forms=("router",), method="deja_vu")
TRAINED = artefact_of(forms=("adapters", "new weights"), method="lte")


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(CONFIGS["llama"], params_of("llama"), name="llama")


@pytest.fixture
def folder(tmp_path) -> str:
    save_sparsity(tmp_path / "predictors", PREDICTORS)
    return str(tmp_path / "predictors")


def applied(lm: LM, artefact) -> LM:
    """The model to which the artefact was applied by hand; it shares the compiled programs."""
    made = LM(lm.config, artefact.apply(lm.config, lm.params))
    made.engine = replace(lm.engine, params=made.params)
    return made


def rules(lm: LM) -> list[int]:
    return [layer["mlp"].selector.rule.most for layer in lm.params["layers"]]


def test_density_one_is_the_dense_model(lm):
    """dejavu.md 6.1."""
    heads = artefact_of(forms=("router", "heads"), method="deja_vu")
    wanted = lm.logits([PROMPT])
    for whole in (ji.deja_vu(PREDICTORS, density=1.0), ji.deja_vu(heads, density=1.0, heads=1.0)):
        found = lm.sparsified(whole).logits([PROMPT])
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    half = lm.sparsified(ji.deja_vu(heads, density=1.0, heads=0.5)).logits([PROMPT])
    assert np.abs(half - wanted).max() > 1e-3  # one of two groups


@pytest.mark.parametrize("density, most", [(None, 3), (0.5, 6), (0.25, 3), (0.01, 1), (1, 12)])
def test_a_density_is_a_share_of_the_blocks_and_at_least_one(lm, density, most):
    sparse = lm.sparsified(ji.deja_vu(PREDICTORS, density))
    assert rules(sparse) == [most] * lm.config.num_layers
    blocks = [layer["mlp"] for layer in sparse.params["layers"]]
    assert [block.union(1) for block in blocks] == pytest.approx([most / 12] * len(blocks))
    # What two tokens use together was measured at the artefact's own density.
    assert all((block.unions == (0.25, 0.5)) == (density is None) for block in blocks)


def test_a_density_goes_to_the_layers_that_need_it(lm):
    """On average over layers, by the recalls of the artefact; blocks of 12."""
    steep, slow = (np.minimum(np.arange(1, 129) / part, 1) for part in (32, 96))
    layers = [
        replace(layer, recalls=tuple(curve.tolist()))
        for layer, curve in zip(PREDICTORS.layers, (steep, slow), strict=True)
    ]
    measured = replace(PREDICTORS, layers=tuple(layers))
    assert rules(lm.sparsified(ji.deja_vu(measured, 0.5))) == [3, 9]
    assert rules(lm.sparsified(ji.deja_vu(measured, 0.25))) == [2, 4]
    assert rules(lm.sparsified(ji.deja_vu(measured, 1.0))) == [12, 12]
    assert rules(lm.sparsified(ji.deja_vu(measured))) == [3, 3]  # its own rule


def test_one_argument_gives_what_the_applied_artefact_gives(lm, folder):
    wanted = applied(lm, PREDICTORS).generate([PROMPT], **NEW)[0]
    ways = (
        ji.deja_vu(PREDICTORS), folder, {"name": "deja-vu", "source": folder},
        {"name": "deja_vu", "source": PREDICTORS}, ji.deja_vu(folder),
    )  # fmt: skip
    for way in ways:
        found = lm.generate([PROMPT], sparsity=way, **NEW)[0]
        assert found.tokens == wanted.tokens
        assert found.stats.sparsity == found.stats["sparsity"] == "deja_vu"
    assert wanted.stats.sparsity is None
    trained = lm.generate([PROMPT], sparsity=ji.lte(TRAINED), **NEW)[0]
    own = applied(lm, TRAINED).generate([PROMPT], **NEW)[0]
    assert trained.tokens == own.tokens != wanted.tokens and trained.stats.sparsity == "lte"


def test_a_folder_is_read_again_only_when_it_was_replaced(lm, folder):
    first = lm.sparsified(folder)
    assert lm.sparsified({"name": "deja_vu", "source": folder}) is first
    other = artefact_of(forms=(None, "router"), method="deja_vu")
    save_sparsity(folder, other, overwrite=True)
    second = lm.sparsified(folder)
    assert second is not first and isinstance(second.params["layers"][0]["mlp"], dict)


def test_a_method_without_a_source_takes_the_artefact_of_the_model(lm, folder, monkeypatch):
    monkeypatch.setitem(NAMED, "deja-vu-llama", folder)
    wanted = lm.sparsified(folder)
    for way in ("deja-vu", "deja_vu", "deja-vu-llama", {"name": "deja-vu-llama", "density": 0.25}):
        assert rules(lm.sparsified(way)) == rules(wanted)
    with pytest.raises(ValueError, match="lte needs source, what it has learned .* lte-tiny-opt"):
        lm.sparsified("lte")
    stranger = LM(lm.config, lm.params, name="stranger")
    with pytest.raises(ValueError, match="deja_vu needs source, .* or one of .*deja-vu-llama"):
        stranger.sparsified("deja-vu")


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_known_by_its_name(name, lm):
    asked = {"name": name.replace("-", "_"), "density": 0.5, "block_size": 4}
    if name in BY_TEXT:
        with pytest.raises(ValueError, match=f"{name} learns from a text"):
            lm.sparsified(asked)
    else:
        made = lm.sparsified(asked)
        assert made.sparsity.name == name and made is lm.sparsified(dict(asked))


def test_an_artefact_of_another_model_or_method_is_refused(lm):
    with pytest.raises(ValueError, match="artefact belongs to 'llama'"):
        lm_of("mpt").generate([PROMPT], sparsity=ji.deja_vu(PREDICTORS))
    with pytest.raises(ValueError, match="is an artefact of deja_vu, not of lte; use ji.deja_vu"):
        ji.lte(PREDICTORS)
    with pytest.raises(ValueError, match="no sparsity artefact at 'nowhere'"):
        ji.deja_vu("nowhere")
    with pytest.raises(ValueError, match="source must be a path, got 3"):
        ji.deja_vu(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan"), "0.5", True, np.inf])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="density must be"):
        ji.deja_vu(PREDICTORS, density)


def test_a_share_needs_routers_to_which_it_applies():
    with pytest.raises(ValueError, match="no routers of heads to which heads would apply"):
        ji.deja_vu(PREDICTORS, heads=0.5)
    heads = artefact_of(forms=("heads",), method="deja_vu")
    with pytest.raises(ValueError, match="no routers of neurons to which density would apply"):
        ji.deja_vu(heads, 0.5)
    assert ji.deja_vu(heads, heads=0.5).heads == 0.5
    with pytest.raises(ValueError, match="no routers of heads whose keys could be deferred"):
        ji.deja_vu(PREDICTORS, keys="deferred")
    with pytest.raises(ValueError, match="keys must be one of 'always', 'deferred'; got 'later'"):
        ji.deja_vu(heads, keys="later")


def test_keys_of_skipped_heads_may_be_deferred(lm):
    """dejavu.md 2.8: a layer with a router of heads keeps a tail of inputs beside its cache."""
    heads, sizes = artefact_of(forms=(None, "heads"), method="deja_vu"), {}
    ways = {keys: ji.deja_vu(heads, heads=0.5, keys=keys) for keys in ("always", "deferred")}
    for keys, way in ways.items():
        cache = lm.sparsified(way).engine.new_cache(ji.full(), 1, 64)
        sizes[keys] = bytes_of(cache.layers)
    assert sizes["deferred"] - sizes["always"] == 16 * lm.config.hidden_size * 4
    assert ways["always"].describe() != ways["deferred"].describe()


def test_methods_are_told_apart_by_what_they_do(lm, tmp_path):
    described = [
        ji.deja_vu(PREDICTORS), ji.deja_vu(PREDICTORS, 0.5), ji.lte(TRAINED),
        ji.deja_vu(artefact_of(forms=(None, "router"), method="deja_vu")),
    ]  # fmt: skip
    texts = {json.dumps(one.describe(), sort_keys=True) for one in described}
    assert len(texts) == len(described)
    same = artefact_of(forms=("router",), method="deja_vu")
    assert ji.deja_vu(same).describe() == described[0].describe()
    session = lm.session(sparsity=described[0])
    session.append(PROMPT)
    session.save(tmp_path / "session")
    assert lm.restore(tmp_path / "session", sparsity=ji.deja_vu(same)).pending == PROMPT[-1:]
    for other in described[1:]:
        with pytest.raises(ValueError, match="it has sparsity"):
            lm.restore(tmp_path / "session", sparsity=other)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_model_is_loaded_sparse_before_its_weights_are_stored(weights, lm, tmp_path):
    save_checkpoint(tmp_path / "llama", Checkpoint(lm.config, lm.params, None))
    method = ji.lte(TRAINED)
    found = ji.load(tmp_path / "llama", weights=weights, sparsity=method)
    params = TRAINED.apply(lm.config, lm.params)
    if weights is not None:
        params = quantize_params(lm.config, params, weights, backend=found.engine.backend)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.sparsity is method and isinstance(method, Trained)
    assert found.sparsified(method) is found
