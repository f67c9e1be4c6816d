"""Distilled drafts: they learn, resume, come back from disk, and speculate without a loss."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cli.models import open_draft
from jaxinfer.io.draft import read_draft
from jaxinfer.io.int8 import as_stored
from jaxinfer.models.quantize import quantize_params
from jaxinfer.speculative.topology import Topology
from jaxinfer.train.draft.recipe import DraftRecipe
from jaxinfer.train.draft.student import new_student
from jaxinfer.train.draft.target_data import own_text, target_states
from jaxinfer.train.draft.training import check_out, save_trained, train_draft
from jaxinfer.train.loop import read_log
from tests.factories import lm_of, random_tokens

TOKENS = random_tokens(12, 40, seed=3)
OWN_KIND = DraftRecipe(layers=1, width=32, windows=12, context=40, steps=30, batch=4)
BORROWING = DraftRecipe(
    layers=1, width=None, vocabulary=24, windows=12, context=40, steps=12, batch=4,
    learning_rate=1e-3,
)  # fmt: skip


RECURRENT = replace(BORROWING, recurrent=True)


@pytest.fixture(
    scope="module",
    params=[OWN_KIND, BORROWING, RECURRENT],
    ids=["own width", "target's layers", "recurrent"],
)
def trained(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    student, params, metrics = train_draft(lm_of(), TOKENS, request.param, run_dir)
    return request.param, run_dir, student, params, metrics


def test_the_draft_comes_nearer_to_the_target(trained):
    _, run_dir, _, _, metrics = trained
    log = read_log(run_dir / "fit")
    assert log[-1]["loss"] < log[0]["loss"]
    assert 0 < metrics["overlap"] <= 1 and 0 <= metrics["agreement"] <= 1


def test_a_killed_run_goes_on_to_the_same_draft(trained, tmp_path):
    recipe, run_dir, _, params, _ = trained
    shutil.copytree(run_dir, tmp_path / "again")
    for path in (tmp_path / "again" / "fit").iterdir():  # as if killed before the first save
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, again, _ = train_draft(lm_of(), TOKENS, recipe, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_saved_draft_speculates_with_the_targets_own_text(trained, tmp_path):
    recipe, _, student, params, metrics = trained
    target, folder = lm_of(), tmp_path / "draft"
    save_trained(folder, target, student, params, {"results": metrics})
    draft = open_draft(target, str(folder), "float32")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    spec = ji.speculate(target, draft, Topology.from_children([[[], []], []]))
    options = {"max_new_tokens": 16, "ignore_eos": True}
    found, expected = spec.generate(prompts, **options), target.generate(prompts, **options)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    check_out(folder, recipe, overwrite=True)
    with pytest.raises(ValueError, match="holds .* already"):
        check_out(folder, recipe)


def test_a_recurrent_draft_keeps_its_weights_in_full(tmp_path):
    target, folder = lm_of(), tmp_path / "draft"
    student = new_student(target, TOKENS, RECURRENT)
    save_trained(folder, target, student, student.trained, {})
    found, expected = (open_draft(target, str(folder), None, kind) for kind in ("int8", None))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_borrowing_draft_keeps_the_most_frequent_tokens_and_shares_the_embedding():
    target = lm_of()
    student = new_student(target, TOKENS, BORROWING)
    counts = np.bincount(TOKENS.ravel(), minlength=61)
    kept = np.asarray(student.fixed["draft_vocabulary"])
    assert len(kept) == 24 and counts[kept].min() >= np.delete(counts, kept).max()
    assert student.fixed["embed"]["tokens"] is target.params["embed"]["tokens"]
    assert student.trained["layers"][0] is target.params["layers"][-1]


@pytest.mark.parametrize("recipe", [BORROWING, RECURRENT])
def test_a_file_gives_back_what_it_was_given(tmp_path, recipe):
    target = lm_of()
    student = new_student(target, TOKENS, recipe)
    once = as_stored(student.trained)
    jax.tree.map(np.testing.assert_array_equal, once, as_stored(once))
    save_trained(tmp_path / "draft", target, student, once, {})
    found = read_draft(tmp_path / "draft", target.params)
    jax.tree.map(np.testing.assert_array_equal, once, found.params)
    assert found.config == student.config


def test_a_draft_of_other_weights_or_a_damaged_one_is_refused(tmp_path):
    target, folder = lm_of(), tmp_path / "draft"
    student = new_student(target, TOKENS, BORROWING)
    save_trained(folder, target, student, student.trained, {})
    with pytest.raises(ValueError, match="belongs to other weights"):
        read_draft(folder, lm_of(seed=3).params)
    weights = folder / "draft.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        read_draft(folder, target.params)
    record = json.loads((folder / "config.json").read_text()) | {"format_version": 99}
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no draft of version 1"):
        read_draft(folder, target.params)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    for recipe in (BORROWING, OWN_KIND):
        with pytest.raises(ValueError, match="choose another destination"):
            check_out(tmp_path / "other", recipe, overwrite=True)


@pytest.fixture(scope="module")
def stored():
    target = lm_of()
    params = quantize_params(target.config, target.params, "int8")
    return replace(target, params=params)


def test_a_recurrent_draft_learns_from_a_target_in_fewer_bits(stored, tmp_path):
    student, params, _ = train_draft(stored, TOKENS, replace(RECURRENT, steps=4), tmp_path / "run")
    save_trained(tmp_path / "draft", stored, student, params, {})
    for target in (stored, lm_of()):  # the same weights
        read_draft(tmp_path / "draft", target.params)
    with pytest.raises(ValueError, match="stored in fewer bits; load the target without"):
        new_student(stored, TOKENS, BORROWING)


def test_own_text_goes_on_where_it_was_killed(tmp_path):
    whole = own_text(lm_of(), TOKENS[:6], tmp_path / "a.npy", seed=0, batch=2)
    assert whole.shape == (6, 40) and (whole[:, :16] == TOKENS[:6, :16]).all()
    np.save(tmp_path / "b.npy", whole[:2])
    np.testing.assert_array_equal(
        own_text(lm_of(), TOKENS[:6], tmp_path / "b.npy", seed=0, batch=2), whole
    )


@pytest.mark.parametrize(
    "recipe, message",
    [
        (DraftRecipe(width=40), "width must be a multiple of 32, got 40"),
        (DraftRecipe(width=None, layers=2), "layers must be 1 to 1, got 2"),
    ],
)
def test_impossible_drafts_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        new_student(lm_of(), TOKENS, recipe)


def test_a_recurrent_draft_has_no_width_of_its_own():
    with pytest.raises(ValueError, match="has the target's width, got width=32"):
        DraftRecipe(recurrent=True, width=32)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of muon, adamw, got 'sgd'"):
        DraftRecipe(optimizer="sgd")


def test_states_of_other_windows_are_not_taken_for_those_that_are_asked_for(tmp_path):
    target = lm_of()
    first = target_states(target, TOKENS[:4], tmp_path, batch=4)
    other = target_states(target, TOKENS[4:8], tmp_path, batch=4)
    again = target_states(target, TOKENS[:4], tmp_path, batch=4)
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
