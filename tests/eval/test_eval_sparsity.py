"""Judging methods of sparsity: pairs with the dense model, tasks, and what selections are like."""

import numpy as np
import pytest

from jaxinfer.eval.selection import judged, neighbour_overlap, selections, unions
from jaxinfer.eval.sparsity import SparsityEvaluation, Tasks, agreement, evaluate, text_losses
from jaxinfer.eval.sparsity_methods import methods_at
from jaxinfer.io.sparsity import save_sparsity
from jaxinfer.sparsity.baseline import Baseline
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.trained import Trained
from tests.factories import lm_of, random_tokens
from tests.sparsity.artefacts import artefact_of

SMALL = Tasks(recall_tokens=8, recall_rows=2, prompts=2, prompt_tokens=8, new_tokens=4)
NONE = Tasks(recall_rows=0, prompts=0)
ROWS = random_tokens(3, 17)


def test_every_row_is_paired_with_the_dense_model_on_the_same_tokens():
    """dejavu.md 6.2 and 6.8: density 1 is the dense model; the oracle is above random."""
    lm = lm_of()
    made = [
        (name, Baseline(name=name, density=density, block_size=4))
        for name, density in (("oracle", 1.0), ("oracle", 0.25), ("random", 0.25))
    ]
    dense, whole, oracle, random = evaluate(lm, made, ROWS, tasks=SMALL)
    assert dense["relative"] == 1 and dense["tokens"] == 48 and dense["agreement"] == 1
    assert whole["relative"] == pytest.approx(1, abs=1e-5) and whole["agreement"] == 1
    assert whole["copied"] == dense["copied"] and whole["mlp_products"] == pytest.approx(1)
    nll = [np.mean([score.nll for score in lm.score(row.tolist())]) for row in ROWS]
    assert dense["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert abs(np.log(oracle["relative"])) < abs(np.log(random["relative"]))
    assert oracle["relative_low"] <= oracle["relative"] <= oracle["relative_high"]
    assert random["used"] == pytest.approx(0.25) == random["mlp_bytes"]
    assert len(random["recall_per_layer"]) == 2 and "recall_per_layer" not in oracle


def test_griffin_is_judged_behind_its_prompt_and_generates_from_one():
    lm = lm_of()
    evaluation = SparsityEvaluation(lm, ROWS, SMALL)
    row = evaluation.judge(Baseline(name="griffin", density=1.0))
    assert row["tokens"] == 24 and row["relative"] == pytest.approx(1, abs=1e-5)
    assert row["agreement"] == 1
    less = evaluation.judge(Baseline(name="griffin", density=0.125))
    assert less["used"] == pytest.approx(0.125, abs=0.01) and less["agreement"] < 1


def test_a_random_selection_recalls_its_density():
    """dejavu.md 6.7."""
    lm, tokens = lm_of(), random_tokens(4, 48, seed=3)
    calibration = Calibration(lm.config, lm.params, tokens)
    sparse = lm.sparsified(Baseline(name="random", density=0.25, calibration=calibration))
    for one in judged(lm.config, sparse.params, tokens):
        assert one is not None and one["density"] == pytest.approx(0.25)
        assert one["recall"] == pytest.approx(0.25, abs=0.03)
        assert one["mass"] == pytest.approx(0.25, abs=0.03)
    static = lm.sparsified(Baseline(name="static", density=0.25, calibration=calibration))
    assert all(one["recall"] > 0.28 for one in judged(lm.config, static.params, tokens))


def test_unions_grow_as_those_of_independent_tokens_and_static_ones_do_not():
    """dejavu.md 6.9, lte.md 7.11."""
    lm, tokens = lm_of(), random_tokens(4, 48, seed=3)
    random = selections(
        lm.config, lm.sparsified(Baseline(name="random", density=0.25)).params, tokens
    )
    found = unions(random[0], (1, 2, 4))
    assert found == pytest.approx([0.25, 1 - 0.75**2, 1 - 0.75**4], abs=0.02)
    assert neighbour_overlap(random[0]) == pytest.approx(0.25, abs=0.04)
    same = np.broadcast_to(random[0][:1, :1], random[0].shape)
    assert unions(same, (1, 8)) == pytest.approx([0.25, 0.25]) and neighbour_overlap(same) == 1


def test_trained_methods_come_at_every_density_under_their_folders_name(tmp_path):
    folders = {"with-context": "deja_vu", "routers": "lte"}
    for name, method in folders.items():
        save_sparsity(tmp_path / name, artefact_of(forms=("router",), method=method))
    paths = [str(tmp_path / name) for name in folders]
    made = methods_at([*paths, "oracle", "oracle-neurons"], (0.5, 0.25), block_size=4)
    found = [(label, method.describe()["density"]) for label, method in made]
    assert found == [
        ("with-context", 0.5), ("with-context", 0.25), ("routers", None), ("oracle", 0.5),
        ("oracle", 0.25), ("oracle-neurons", 0.5), ("oracle-neurons", 0.25),
    ]  # fmt: skip
    assert [method.describe().get("block_size") for _, method in made[3:]] == [4, 4, 1, 1]
    row = SparsityEvaluation(lm_of(), ROWS, NONE).judge(made[1][1], made[1][0])
    assert row["method"] == "with-context" and row["used"] == 0.25
    predictor = 6 * (32 + 12) / (3 * 32 * 48)
    assert row["mlp_products"] == pytest.approx(0.25 + predictor)


def test_selected_heads_are_measured_and_counted():
    method = Trained(
        name="deja_vu", artefact=artefact_of(forms=(None, "heads"), method="deja_vu"), heads=0.5
    )
    row = SparsityEvaluation(lm_of(), ROWS, NONE).judge(method)
    assert row["heads_per_layer"] == [1, 0.5] and row["used"] == 1
    block, attention, saved, router = 3 * 32 * 48, 32 * 96, 32 * 32, 2 * 32
    whole = 2 * (block + attention)
    assert row["layer_products"] == pytest.approx((whole - saved + router) / whole)


def test_texts_that_fill_no_batch_are_read_alike():
    lm = lm_of()
    alone = text_losses(lm.config, lm.params, ROWS[2:])
    np.testing.assert_allclose(text_losses(lm.config, lm.params, ROWS)[2:], alone, atol=1e-5)


def test_agreement_ends_at_the_first_difference():
    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 0.75


def test_prompts_longer_than_the_texts_are_refused():
    with pytest.raises(ValueError, match="prompts of 64 tokens are longer than the texts of 17"):
        SparsityEvaluation(lm_of(), ROWS)
    with pytest.raises(ValueError, match="static learns from a text"):
        Baseline(name="static", density=0.5)
    with pytest.raises(ValueError, match="baseline must be one of 'oracle'"):
        Baseline(name="luck", density=0.5)
