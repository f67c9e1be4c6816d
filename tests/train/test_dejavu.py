"""DejaVu's predictors trained on a toy: what they find, that a run resumes, what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cli import main
from jaxinfer.io.int8 import as_stored
from jaxinfer.io.sparsity import load_sparsity, save_sparsity
from jaxinfer.models.stack import forward
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.recall import BATCHES, PARTS
from jaxinfer.testing.quick import quick_jit
from jaxinfer.train.dejavu.training import train_dejavu
from tests.train.toy_opt import CFG, HELD_OUT, RECIPE, TOKENS, toy_params

SHORT = replace(RECIPE, steps=20, batch=32, evaluations=4)


def train(run, recipe=RECIPE, tokens=TOKENS, **options):
    return train_dejavu(CFG, toy_params(), tokens, recipe, run, model="toy", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def from_embeddings(tmp_path_factory):
    """The non-contextual predictors."""
    return train(tmp_path_factory.mktemp("embeddings"), replace(RECIPE, lookahead=None))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """An uninterrupted run of few steps, and its folder."""
    run = tmp_path_factory.mktemp("short")
    return train(run, SHORT), run


@quick_jit
def logits_of(cfg, params, tokens):
    return forward(cfg, params, tokens).logits


def rows_of(artefact, kind):
    return [row[kind] for row in artefact.config.results["layers"]]


def recall(row, times: float) -> float:
    return next(one["recall"] for one in row["times"] if one["times"] == times)


def test_predictors_find_what_is_needed(trained):
    """dejavu.md 6.7: recall at 1, 1.5 and 2 times the true density, on sequences held out whole;
    by chance it would be the density (`test_random_scores_find_their_share`)."""
    assert trained.config.results["held_out_rows"] == HELD_OUT * TOKENS.shape[1]
    for row in rows_of(trained, "neurons"):
        assert 0.1 < row["density"] < 0.2
        assert recall(row, 1.0) > 0.8 and recall(row, 1.5) > 0.93 and recall(row, 2.0) > 0.98
        assert row["half"]["recall"] > 0.9 and row["half"]["density"] < 0.3
    for row in rows_of(trained, "heads"):
        assert row["units"] == 2 and row["recall"] > 0.65  # by chance 0.5


def test_without_context_they_find_less(trained, from_embeddings):
    """dejavu.md 6.7: predictors that read the token's embedding are clearly worse."""
    pairs = zip(rows_of(trained, "neurons"), rows_of(from_embeddings, "neurons"), strict=True)
    for ours, theirs in pairs:
        assert recall(ours, 1.5) > recall(theirs, 1.5) + 0.08
        assert ours["units"] < theirs["units"]  # for the same recall
    assert all(layer.router.lookahead is None for layer in from_embeddings.layers)


def test_capacities_are_those_that_reach_the_recall(trained):
    """dejavu.md 6.9, on held-out rows: multiples of what a kernel reads, never fewer for a larger
    batch; the rule and the unions of the layers are the results'."""
    for layer, row in zip(trained.layers, rows_of(trained, "neurons"), strict=True):
        counts = [one["units"] for one in row["schedule"]]
        assert [one["rows"] for one in row["schedule"]] == list(BATCHES)
        assert counts == sorted(counts) and all(count % 16 == 0 for count in counts)
        assert all(one["recall"] >= RECIPE.recall for one in row["schedule"])
        assert layer.router.rule.most == row["units"] == counts[0] < CFG.intermediate_size
        assert layer.unions == tuple(row["unions"]) and layer.unions[0] == counts[0] / 128
        assert list(layer.unions) == sorted(layer.unions) and layer.unions[3] < 1
        assert layer.heads.rule.most == 2
        assert layer.recalls[round(row["units"] / 128 * PARTS) - 1] == round(row["recall"], 4)


def test_served_predictors_lose_little_and_random_ones_much(trained):
    params, tokens = toy_params(), jnp.asarray(TOKENS[-HELD_OUT:])

    def served(change):
        layers = tuple(
            replace(layer, heads=None, router=replace(layer.router, outer=change(layer.router)))
            for layer in trained.layers
        )
        return SparsityArtefact(trained.config, layers).apply(CFG, params)

    def error(params):
        return float(jnp.abs(logits_of(CFG, params, tokens) - dense).mean())

    dense = logits_of(CFG, params, tokens)
    noise = jax.random.normal(jax.random.key(2), trained.layers[0].router.outer.shape)
    ours, random = error(served(lambda router: router.outer)), error(served(lambda _: noise))
    assert 0 < ours < 0.1 * random


def test_a_density_or_a_cap_decides_instead_of_the_recall(tmp_path):
    few = replace(SHORT, steps=2, evaluations=1, heads=None)
    fixed = train(tmp_path / "fixed", replace(few, density=0.3))
    for layer, row in zip(fixed.layers, rows_of(fixed, "neurons"), strict=True):
        assert layer.router.rule.most == row["units"] == 48 and layer.heads is None
    capped = train(tmp_path / "capped", replace(few, most=0.25))
    for row in rows_of(capped, "neurons"):
        assert {one["units"] for one in row["schedule"]} == {32}
        assert row["schedule"][0]["recall"] < 0.99  # told, where the cap ended the search


def test_layers_too_early_for_the_lookahead_stay_dense(tmp_path):
    """dejavu.md 2.4."""
    found = train(tmp_path, replace(SHORT, lookahead=1.0))
    assert found.layers[0] is None and "neurons" not in found.config.results["layers"][0]
    assert found.layers[1].router.lookahead == 1.0 == found.layers[1].heads.lookahead
    logits = logits_of(CFG, found.apply(CFG, toy_params()), jnp.asarray(TOKENS[:1]))
    assert np.isfinite(logits).all()


def test_predictors_are_stored_as_they_were_measured(trained, tmp_path):
    save_sparsity(tmp_path / "out", trained)
    loaded = load_sparsity(tmp_path / "out")
    assert same(loaded, trained) and loaded.config == trained.config
    for layer in trained.layers:
        for name in ("inner", "outer"):
            value = getattr(layer.router, name)
            np.testing.assert_array_equal(value, as_stored(value))


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: bool((np.asarray(x) == y).all()), a.layers, b.layers)
    return all(jax.tree.leaves(equal))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(short, tmp_path):
    class Killed(Exception):
        pass

    def at(label: str, count: int):
        def report(what, done, total, note=""):
            if (what, done) == (label, count):
                raise Killed

        return report

    for label, count in (("reading", 20), ("training", 13)):
        with pytest.raises(Killed):
            train(tmp_path, SHORT, report=at(label, count))
    found = train(tmp_path, SHORT)
    assert same(found, short[0]) and found.config == short[0].config
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.npz", "options.json", "results.json", "trained.npz",
    ]  # fmt: skip


def test_a_finished_run_is_only_read_and_goes_on_with_its_own_options_only(short):
    artefact, run = short
    reports = []
    again = train(run, SHORT, report=lambda *what, **more: reports.append(what))
    assert same(again, artefact) and again.config == artefact.config and not reports
    with pytest.raises(ValueError, match="other learning_rate; use a new --run-dir"):
        train(run, replace(SHORT, learning_rate=1.0))
    with pytest.raises(ValueError, match="other crc32"):
        train(run, SHORT, tokens=(TOKENS + 1) % 61)


def test_parameters_are_chosen_layer_by_layer_among_the_evaluations(short):
    """dejavu.md trap 3.6: by recall at as many units as are needed."""
    artefact, run = short
    with np.load(run / "best.npz") as best:
        for place, row in enumerate(rows_of(artefact, "neurons")):
            chosen = float(best["neurons.recall"][place])
            assert abs(chosen - recall(row, 1.0)) < 0.02  # all rows, and some of them
            value = artefact.layers[place].router.outer
            np.testing.assert_array_equal(best["neurons.outer"][place], value)


BAD = {
    "lookahead": ("--lookahead", "0.7"),
    "no lookahead": ("--lookahead", "soon"),
    "density": ("--density", "0"),
    "recall": ("--recall", "1.5"),
    "heads": ("--heads", "nan"),
    "blocks": ("--block-size", "7"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_the_command_refuses_bad_input_in_one_line(arguments, tmp_path, capsys):
    places = ("--out", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run"))
    assert main(["train", "dejavu", "tiny-llama", *places, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    places = ("--out", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert main(["train", "dejavu", "tiny-llama", *places]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_the_command_trains_predictors_of_a_gated_model(tmp_path, capsys):
    from jaxinfer.texts import write_source

    pairs = [(f"document {i}", " ".join(f"d{i}w{j}" for j in range(900))) for i in range(30)]
    write_source(tmp_path / "texts", "jargon", pairs)
    arguments = (
        "train dejavu tiny-llama --sequences 4 --context 64 --steps 4 --batch 16 --block-size 8 "
        f"--density 0.5 --heads 0.5 --source jargon --texts {tmp_path / 'texts'} "
        f"--out {tmp_path / 'out'} --run-dir {tmp_path / 'run'} --json"
    )
    assert main(arguments.split()) == 0
    record = json.loads(capsys.readouterr().out)
    artefact = load_sparsity(record["folder"])
    assert artefact.config.block_size == 8 and artefact.config.model == "tiny-llama"
    assert all(layer.router.rule.share(layer.router.units) == 0.5 for layer in artefact.layers)
