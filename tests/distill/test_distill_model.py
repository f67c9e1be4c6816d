"""`ji.distill` and `jaxinfer distill`: a model of long convolutions becomes one of recurrences."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.cli import main
from jaxinfer.cli.distill import distill as command_of
from jaxinfer.distill import model as distillation
from jaxinfer.distill.filters.distill import NAMES
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.models.filter_form import long_filters
from tests.distill.toy_hyena import DELAYED, LAGS, MODES, NOISY, SIZE, filters, toy_lm
from tests.factories import lm_of, random_tokens

QUICK = {"order": MODES, "steps": 100, "tolerance": 1e-3}
PROMPTS = random_tokens(3, 11).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder in which `distilled` was made."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def distilled(run):
    return ji.distill(toy_lm(), **QUICK, run=run)


@pytest.fixture(scope="module")
def errors(distilled):
    """`errors(lm)`: how far its logits are from the exact model's, as a share of their scale."""
    tokens = random_tokens(2, LAGS)
    exact = np.asarray(toy_lm().logits(tokens))

    def of(lm):
        return np.abs(np.asarray(lm.logits(tokens)) - exact).max() / np.abs(exact).max()

    return of


def test_filters_that_are_modes_or_delays_are_found_and_noise_stays_exact(distilled):
    forms = {one.layer: one.form for one in distilled.report.layers}
    assert forms == {0: "modal", DELAYED: "modal", NOISY: "exact"}
    assert distilled.config.hyena.modes == (MODES, 0, MODES, 0)
    assert distilled.config.hyena.taps[0] == 0 < distilled.config.hyena.taps[DELAYED]
    reports = {one.layer: one.filters for one in distilled.report.layers}
    assert reports[0].worst < 1e-4 and not reports[0].fallbacks
    assert len(reports[NOISY].fallbacks) == len(filters()[NOISY])
    assert "layer 3 exact" in distilled.report.summary()
    rows = distilled.report.table().splitlines()
    assert len(rows) == 5 and rows[-1].startswith("| 3 | exact | 8 |")


def test_logits_and_greedy_text_are_those_of_the_exact_model(distilled, errors):
    assert errors(distilled) < 1e-3
    ours, theirs = (
        [one.tokens for one in lm.generate(PROMPTS, max_new_tokens=60)]
        for lm in (distilled, toy_lm())
    )
    assert ours == theirs
    assert len({token for row in ours for token in row}) > 10  # it is a text


@pytest.mark.slow
def test_texts_part_only_where_the_two_best_logits_are_within_the_error():
    """laughing_hyena.md 5.6, of modes that are too few for the filters."""
    rough, length = ji.distill(toy_lm(), 1, method="balanced", taps=0, all_modal=True), 60
    prompts = random_tokens(8, 11, seed=3).tolist()
    ours, theirs = (
        [one.tokens for one in lm.generate(prompts, max_new_tokens=length)]
        for lm in (rough, toy_lm())
    )
    texts = np.asarray([[*p, *text] for p, text in zip(prompts, theirs, strict=True)])
    exact, found = (np.asarray(lm.logits(texts))[:, 10:-1] for lm in (toy_lm(), rough))
    error = np.abs(found - exact).max(axis=2)
    best = np.sort(exact, axis=2)
    gap = best[..., -1] - best[..., -2]
    parted = 0
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        differ = np.flatnonzero(np.asarray(one) != np.asarray(other))
        if len(differ):  # behind the first difference they are other texts
            parted += 1
            assert gap[row, differ[0]] < 2 * error[row, differ[0]]
    assert parted  # or nothing was tested


def test_all_modal_gives_up_exactness_and_says_what_it_loses(run, errors):
    found = ji.distill(toy_lm(), **QUICK, all_modal=True, run=run)
    assert {one.form for one in found.report.layers} == {"modal"}
    assert found.report.layers[-1].filters.worst > 0.3
    assert errors(found) > 0.03
    # The layer stores no inputs any more.
    sizes = [
        bytes_of(found.engine.new_cache(ji.full(), 1, capacity).layers[NOISY])
        for capacity in (64, 96)
    ]
    assert sizes[0] == sizes[1]


def test_fir_filters_of_equal_bytes_are_the_first_samples(distilled, tmp_path):
    found = ji.distill(toy_lm(), MODES, method="fir", all_modal=True)
    taps = SIZE * MODES  # keys and values of a token take a quarter of a mode's bytes
    assert found.config.hyena.taps == (taps, 0, taps, taps) and found.config.hyena.modes is None
    ours, theirs = (lm.engine.new_cache(ji.full(), 1, 64).layers[0] for lm in (found, distilled))
    assert bytes_of(ours) == bytes_of(theirs) and ours.inputs is ours.re is None
    found.save(tmp_path / "fir")
    again = ji.load(tmp_path / "fir", dtype="float32")
    assert again.config == found.config
    params, layers = toy_lm().params, []
    for layer in params["layers"]:
        if "hyena" in layer:
            h = layer["hyena"]["filter"]["h"].at[:, taps + 1 :].set(0)
            layer = layer | {"hyena": layer["hyena"] | {"filter": {"h": h}}}
        layers.append(layer)
    cut = ji.LM(toy_lm().config, params | {"layers": tuple(layers)})
    texts = again.generate(PROMPTS, max_new_tokens=30)
    tokens = np.asarray([[*p, *one.tokens] for p, one in zip(PROMPTS, texts, strict=True)])
    logits = np.asarray(cut.logits(tokens))[:, 10:-1]
    chosen = np.take_along_axis(logits, tokens[:, 11:, None], axis=2)[..., 0]
    assert (logits.max(axis=2) - chosen < 1e-4 * np.abs(logits).max()).all()


def test_an_automatic_order_takes_what_the_layer_needs():
    params = toy_lm().params
    first = ji.LM(toy_lm().config.first(1), params | {"layers": params["layers"][:1]})
    (one,) = ji.distill(first, method="balanced", tolerance=1e-3).report.layers
    assert one.form == "modal" and one.filters.modes >= MODES and one.filters.worst <= 1e-3
    (few,) = ji.distill(first, 1, method="balanced", tolerance=1e-3).report.layers
    assert few.form == "exact" and few.filters.worst > 0.1


def test_a_saved_model_comes_back_with_both_forms(distilled, tmp_path):
    distilled.save(tmp_path / "out")
    again = ji.load(tmp_path / "out", dtype="float32")
    assert again.config == distilled.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, distilled.params))
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["source"] == "toy-hyena" and record["distilled"]["exact"] == [NOISY]
    tokens = random_tokens(1, 40)
    np.testing.assert_array_equal(again.logits(tokens), distilled.logits(tokens))
    exact = ji.load(tmp_path / "out", dtype="float32", filters="exact")
    assert exact.config == toy_lm().config
    np.testing.assert_array_equal(exact.logits(tokens), toy_lm().logits(tokens))
    with pytest.raises(ValueError, match="choose another destination"):
        distilled.save(tmp_path / "out")
    distilled.save(tmp_path / "out", overwrite=True)


def test_a_distilled_model_still_has_the_filters_that_it_was_made_from(distilled):
    ours, theirs = (long_filters(lm.config, lm.params) for lm in (distilled, toy_lm()))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)


def test_a_killed_run_goes_on_to_the_same_bits(distilled, tmp_path, monkeypatch):
    made = []

    class Killed(Exception):
        pass

    def one(h, **options):
        if len(made) == 1:
            made.append("killed")
            raise Killed
        made.append("layer")
        return whole(h, **options)

    whole = distillation.distill_filters
    monkeypatch.setattr(distillation, "distill_filters", one)
    with pytest.raises(Killed):
        ji.distill(toy_lm(), **QUICK, run=tmp_path)
    seen = []
    found = ji.distill(toy_lm(), **QUICK, run=tmp_path, report=lambda *what: seen.append(what[:3]))
    assert made == ["layer", "killed", "layer", "layer"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, distilled.params))
    assert found.report == distilled.report
    assert [what[1:] for what in seen if what[0] == "layers"] == [(i, 3) for i in range(4)]
    ji.distill(toy_lm(), **QUICK, run=tmp_path, all_modal=True)  # modes are there for all layers
    assert len(made) == 4
    with pytest.raises(ValueError, match="started with other seed; use a new --run-dir"):
        ji.distill(toy_lm(), **QUICK, run=tmp_path, seed=1)
    path = tmp_path / "layers" / "02.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="02.npz is damaged"):
        ji.distill(toy_lm(), **QUICK, run=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 48}, "order 48 means 96 states, but the filters have 95 samples"),
        ({"order": 0}, "order must be a number of modes from 1 or 'auto', got 0"),
        ({"tolerance": 0}, "tolerance must be a number from 1e-09 to 1, got 0"),
        ({"method": "adam"}, "method must be one of 'hankel"),
        ({"order": 3, "taps": 90}, "taps must be a whole number from 0 to 89, got 90"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_wrong_options_are_refused_before_a_run_is_begun(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ji.distill(toy_lm(), **options, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_without_long_filters_are_refused():
    from tests.models import hyena_models

    with pytest.raises(ValueError, match="'llama' has no long filters to distil; give one with"):
        ji.distill(lm_of("llama"))
    modes = hyena_models.lm_of("modes")
    assert long_filters(modes.config, modes.params) == (None, None)
    with pytest.raises(ValueError, match="'modes' has no long filters .* are modes already"):
        ji.distill(modes)


def test_a_filter_that_is_not_finite_is_named():
    params, own = toy_lm().params, toy_lm().params["layers"][DELAYED]
    h = own["hyena"]["filter"]["h"].at[4, 7].set(jnp.nan)
    spoiled = own | {"hyena": own["hyena"] | {"filter": {"h": h}}}
    layers = (*params["layers"][:DELAYED], spoiled, *params["layers"][DELAYED + 1 :])
    lm = ji.LM(toy_lm().config, params | {"layers": layers}, name="toy")
    with pytest.raises(ValueError, match="layer 2: filter 4 is not finite at lag 7"):
        ji.distill(lm, **QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "toy-hyena"
    save_checkpoint(path, Checkpoint(toy_lm().config, toy_lm().params))
    return str(path)


def command(model, folder, *more):
    return ["distill", model, "--out", str(folder / "out"), "--run-dir", str(folder / "run"), *more]


def test_the_command_writes_a_model_that_loads(folder, distilled, tmp_path, capsys):
    options = ["--order", str(MODES), "--steps", "100", "--tolerance", "1e-3"]
    picture = tmp_path / "errors.png"
    assert main(command(folder, tmp_path, *options, "--plot", str(picture), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modal"] == [0, DELAYED] and found["exact"] == [NOISY]
    assert [one["modes"] for one in found["layers"]] == [MODES] * 3
    assert found["bytes"] > 1000 and picture.read_bytes().startswith(b"\x89PNG")
    lm = ji.load(tmp_path / "out", dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, lm.params, distilled.params))
    # A destination that is there is refused before anything is done, and replaced if asked.
    assert main(command(folder, tmp_path, *options)) == 2
    assert "--force" in capsys.readouterr().err
    assert main(command(folder, tmp_path, *options, "--force")) == 0
    out = capsys.readouterr().out
    assert "| 3 | exact |" in out and "layer 3 exact; wrote" in out


def test_the_command_refuses_bad_input_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    other = tmp_path / "other"
    for arguments, message in (
        (command("tiny-llama", other), "model 'tiny-llama' has no long filters to distil"),
        (command(folder, other, "--order", "48"), "order 48 means 96 states"),
        (command(folder, other, "--order", "many"), "--order must be a whole number or auto"),
        (command(folder, other, "--taps", "-1"), "--taps must be a whole number or auto"),
        (command(folder, other, "--method", "magic"), "method must be one of"),
        (command(folder, tmp_path), "exists and is not a jaxinfer checkpoint"),
        (command(str(other / "none"), other), "no model"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_help_names_the_methods():
    text = command_of.__annotations__["method"].__metadata__[0].help
    assert all(name in text for name in NAMES)
