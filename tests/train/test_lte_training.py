"""LTE from a dense model to what serves: both stages, resumed, saved, applied."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.io.sparsity import load_sparsity
from jaxinfer.lm import LM
from jaxinfer.models.quantize import quantize_params
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.train.loop import latest_state, new_state, read_log
from jaxinfer.train.lte.measure import measure
from jaxinfer.train.lte.saving import check_out, is_model, save_trained
from jaxinfer.train.lte.student import check_model
from jaxinfer.train.lte.training import train_lte, transform
from tests.train.lte_toys import HELD_OUT, TEXT, TOYS, recipe, toy

RECIPE = recipe(trainable="adapters", rank=4, target_density=0.5, eta=1.0, start="normal")
COMPARED = {
    "soft, everything": recipe("paper"),
    "straight-through, blocks": recipe(trainable="mlp"),
    "random": recipe("random", trainable="mlp", target_density=0.5),
    "dense": recipe("dense"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, train_lte(toy(), TEXT, HELD_OUT, RECIPE, run_dir, save_every=8)


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_both_stages_learn_and_are_logged_by_layer(trained):
    run_dir, found = trained
    first, second = (read_log(run_dir / f"stage-{i}") for i in (1, 2))
    assert first[-1]["task"] < first[0]["task"] and "lambda" not in second[0]
    for line in (first[-1], second[-1]):
        layers = [line[f"density_{i}"] for i in range(2)]
        assert line["density"] == pytest.approx(np.mean(layers), abs=1e-6)
        assert 0 <= line["empty_0"] <= 1
    results = found.results
    assert results["after"]["perplexity"] < results["before"]["perplexity"]
    assert 0 < results["after"]["density"] < 1
    json.dumps(results)


def test_stage_2_leaves_the_routers_bit_for_bit(trained):
    """lte.md 7.3"""
    run_dir, found = trained
    student = found.student
    start = student.parts() | student.routers() | {"log_eta": jnp.float32(0.0)}
    like = new_state(start, transform(RECIPE, RECIPE.steps))
    before = latest_state(run_dir / "stage-1", like)
    assert int(before.step) == RECIPE.steps
    _equal(before.params["routers"], found.state["routers"])
    moved = [
        (a != b).any() for a, b in zip(
            jax.tree.leaves(start["routers"]), jax.tree.leaves(found.state["routers"]), strict=True
        )
    ]  # fmt: skip
    assert all(moved)
    assert float(before.params["log_eta"]) != 0


def test_a_killed_run_goes_on_to_the_same_model(trained, tmp_path):
    """lte.md 7.13: killed in stage 1, of which the last eight steps are lost."""
    run_dir, found = trained
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "stage-2")
    shutil.rmtree(again / "stage-1" / "state" / "24")
    resumed = train_lte(toy(), TEXT, HELD_OUT, RECIPE, again, save_every=8)
    _equal(found.state, resumed.state)
    assert resumed.results == found.results
    with pytest.raises(ValueError, match="was started with other eta"):
        train_lte(toy(), TEXT, HELD_OUT, replace(RECIPE, eta=0.5), again)


def test_an_artefact_gives_the_model_that_was_measured(trained, tmp_path):
    lm, (_, found) = toy(), trained
    results = save_trained(tmp_path / "lte", lm, found, HELD_OUT, record={"windows": 48})
    artefact = load_sparsity(tmp_path / "lte")
    assert artefact.config.results == results and artefact.config.recipe["windows"] == 48
    params = artefact.apply(lm.config, lm.params)
    assert measure(lm.config, params, HELD_OUT).record(lm.config, 16) == results["stored"]
    kept = results["stored"]["perplexity"] / results["after"]["perplexity"]
    assert kept == pytest.approx(1, abs=0.02)
    assert all(isinstance(layer["mlp"], SparseMlp) for layer in params["layers"])
    assert params["layers"][0]["attn"] is lm.params["layers"][0]["attn"]
    check_out(tmp_path / "lte", RECIPE, overwrite=True)
    with pytest.raises(ValueError, match="holds .* already"):
        check_out(tmp_path / "lte", RECIPE)


def test_layers_and_tokens_have_their_own_number_of_blocks_and_blocks_know_the_unions(trained):
    """lte.md 7.10, 7.11 in form; how much they differ is a slow test of `test_lte_comparison`."""
    _, found = trained
    record, unions = found.results["after"], found.measured.unions()
    assert max(record["density_deviation"]) > 0 and len(set(record["densities"])) == 2
    for shares, density in zip(unions, record["densities"], strict=True):
        assert shares[0] == pytest.approx(density, abs=0.05)
        assert (np.diff(shares) >= 0).all() and len(shares) == 7
    for layer, shares in zip(found.params()["layers"], unions, strict=True):
        assert layer["mlp"].unions == shares


def test_greedy_text_is_the_same_by_masks_and_by_lists(trained):
    """lte.md 7.14"""
    _, found = trained
    params, texts = found.params(), []
    for share in (1.0, 0.01):  # the union that says which form is taken
        layers = tuple(
            layer | {"mlp": replace(layer["mlp"], unions=(share,) * 7)}
            for layer in params["layers"]
        )
        lm = LM(TOYS["gated"], params | {"layers": layers})
        assert lm.params["layers"][0]["mlp"].lists(1, lm.engine.backend) is (share < 0.5)
        out = lm.generate([[3, 4, 5], [10, 12]], max_new_tokens=64, ignore_eos=True)
        texts.append([one.tokens for one in out])
    assert texts[0] == texts[1] and len(texts[0][0]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("made", COMPARED.values(), ids=COMPARED)
def test_what_lte_is_and_is_compared_with_goes_the_same_way(kind, made, tmp_path):
    lm = toy(kind)
    found = train_lte(lm, TEXT, HELD_OUT, made, tmp_path / "run")
    results = save_trained(tmp_path / "out", lm, found, HELD_OUT)
    if made.method != "soft":  # its separation takes all of the clipped gradient at first
        assert results["after"]["perplexity"] < results["before"]["perplexity"]
    if is_model(made):
        params = ji.load(tmp_path / "out", dtype="float32").params
    else:
        params = load_sparsity(tmp_path / "out").apply(lm.config, lm.params)
    blocks = [isinstance(layer["mlp"], SparseMlp) for layer in params["layers"]]
    assert blocks == [made.method != "dense"] * 2
    stored = measure(lm.config, params, HELD_OUT)
    assert stored.perplexity == pytest.approx(results["stored"]["perplexity"], rel=1e-3)
    if made.method == "random":
        _equal(found.state["routers"], found.student.routers()["routers"])
        assert set(results["stored"]["densities"]) == {0.5}


def test_models_that_cannot_be_trained_are_refused():
    lm = toy()
    with pytest.raises(ValueError, match="64 neurons cannot be cut into blocks of 24"):
        check_model(lm.config, lm.params, recipe(block_size=24))
    stored = quantize_params(lm.config, lm.params, "int8")
    with pytest.raises(ValueError, match="load it without `weights`"):
        check_model(lm.config, stored, RECIPE)
