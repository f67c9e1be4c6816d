"""What compression does to each layer, against direct computations, `LM.score` and `r_rho`."""

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.eval.memory import policy_bytes
from jaxinfer.models.walk import reread, walk
from jaxinfer.theory import r_rho
from jaxinfer.theory.diagnose import Candidate, candidates_for, diagnose, diagnosis, errors
from jaxinfer.theory.diagnose.errors import LIFT, LIFT_EVICTED, errors_of, received_mass, sample_of
from tests.factories import lm_of, random_tokens
from tests.models import hyena_models
from tests.policies import over, with_random_feature_maps

SIZE = 40
TOKENS = random_tokens(2, SIZE)
WANTED = (
    "kivi4:group=8:residual=8",
    "streaming:window=6:sinks=2",
    {"name": "h2o", "heavy": 3, "recent": 4},
    "full",
)


def measured_layer(lm, policy, *, points=1000, index=0, mass=None):
    view = list(walk(lm, TOKENS))[index]
    mass = received_mass(view) if mass is None else mass
    return view, mass, errors_of(view, reread(lm, view, policy), mass, sample_of(mass, points), 1.1)


def test_mass_is_what_the_second_half_of_the_queries_gives():
    lm = lm_of("llama")
    view = next(walk(lm, TOKENS))
    mass = received_mass(view, block=7)
    assert mass.shape == (2, 2 * SIZE) and mass.sum(axis=1) == pytest.approx(1)
    weights = np.concatenate(list(view.attention(1)))  # [T, N, T]; heads 0 and 1 share keys 0
    expected = weights[SIZE // 2 :, 2:].sum(axis=(0, 1))
    np.testing.assert_allclose(mass[1, SIZE:], expected / expected.sum() / 2, rtol=1e-4)


def test_errors_of_evicted_tokens_are_those_of_the_two_clouds():
    """Of a window with sinks, of which it is known what it keeps."""
    view, mass, found = measured_layer(lm_of("llama"), ji.streaming(2, 6))
    kept = np.zeros(SIZE, bool)
    kept[[0, 1, *range(SIZE - 6, SIZE)]] = True
    kept = np.tile(kept, 2)
    for name, own in (("keys", view.k), ("values", view.v)):
        for head in (0, 1):
            x, a = own[:, :, head].reshape(2 * SIZE, -1), mass[head]
            gone = np.linalg.norm(x, axis=1) * ~kept
            assert found[f"{name}.mean_distance"][head] == pytest.approx((a * gone).sum(), rel=1e-3)
            expected = (a * gone**2).sum() / (a * (x**2).sum(axis=1)).sum()
            assert found[f"{name}.l2"][head] == pytest.approx(expected**0.5, rel=1e-3)
            centre = a @ x
            middle = np.median(np.linalg.norm(x - centre, axis=1))
            spread = (a @ np.square(x - centre).sum(axis=1)) ** 0.5
            clouds = r_rho(
                x.astype(np.float64), x[kept].astype(np.float64), a, a[kept] / a[kept].sum(),
                lift=LIFT_EVICTED * middle, tol=1e-3,
            )  # fmt: skip
            expected = clouds.value / (a**0.9).sum() ** (1 / 1.1) / spread
            assert found[f"{name}.r_rho"][head] == pytest.approx(expected, rel=2e-2)
    np.testing.assert_allclose(found["kept_mass"], mass[:, kept].sum(axis=1), rtol=1e-4)


def test_r_rho_of_small_errors_is_the_error_of_a_pair():
    """Table 4 of the specification, for keys in eight bits and uniform mass."""
    policy = ji.kivi(bits=8, group=8, residual=8)
    mass = np.full((2, 2 * SIZE), 1 / (2 * SIZE))
    view, _, found = measured_layer(lm_of("llama"), policy, mass=mass)
    x = view.k[:, :, 0].reshape(2 * SIZE, -1)
    spread = (np.square(x - x.mean(axis=0)).sum(axis=1).mean()) ** 0.5
    again = reread(lm_of("llama"), view, policy)
    copies = np.concatenate([again.stored(text).k[0] for text in (0, 1)])
    lift = LIFT * np.median(np.linalg.norm(x - x.mean(axis=0), axis=1))
    pairs = np.hypot(np.linalg.norm(x - copies, axis=1), lift)
    assert found["keys.r_rho"][0] == pytest.approx(
        (pairs**1.1).mean() ** (1 / 1.1) / spread, rel=0.03
    )


def test_nothing_is_lost_where_everything_is_kept():
    for policy in (ji.h2o(20, 30), ji.kivi(bits=4, group=8, residual=64)):
        *_, found = measured_layer(lm_of("llama"), policy)
        for name, x in found.items():
            np.testing.assert_allclose(x, name == "kept_mass", atol=1e-4, err_msg=name)
        assert (found["keys.r_rho"] == 0).all()


def test_fewer_bits_and_smaller_windows_lose_more():
    lm = lm_of("llama")
    names = ("keys.r_rho", "values.r_rho", "keys.l2", "values.l2", "output")
    for worse, better in (
        (ji.kivi(bits=4, group=8, residual=8), ji.kivi(bits=8, group=8, residual=8)),
        (ji.streaming(2, 6), ji.streaming(2, 30)),
    ):
        one, other = (measured_layer(lm, policy, index=1)[2] for policy in (worse, better))
        assert all(one[name].mean() > other[name].mean() for name in names)
        assert one["added"] > other["added"] > 0


def test_a_sample_weighs_what_it_leaves_out():
    mass = np.random.default_rng(0).exponential(size=(2, 4000))
    mass /= mass.sum(axis=1, keepdims=True)
    sample = sample_of(mass, 256)
    assert len(set(sample.rows)) == 256 and sample.counts.sum() == pytest.approx(4000)
    top = np.argsort(-mass.mean(axis=0))[:64]
    assert set(top) <= set(sample.rows) and (sample.counts[np.isin(sample.rows, top)] == 1).all()
    assert (mass[:, sample.rows] * sample.counts).sum(axis=1) == pytest.approx(1, abs=0.1)


def test_the_low_rank_state_is_seen_in_what_attention_adds():
    lm = lm_of("llama")
    less = with_random_feature_maps(over(ji.h2o(3, 4)), lm.config)
    bare, state = (measured_layer(lm, policy)[2] for policy in (ji.h2o(3, 4), less))
    np.testing.assert_allclose(bare["keys.l2"], state["keys.l2"], rtol=1e-5)
    assert abs(bare["added"] - state["added"]) > 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    lm = lm_of("llama")
    candidates, left_out = candidates_for(lm, WANTED, SIZE)
    assert not left_out
    run = tmp_path_factory.mktemp("diagnosis")
    return lm, candidates, run, diagnose(lm, TOKENS, candidates, run, points=64, measured=True)


def test_measured_is_what_scoring_with_one_compressed_layer_loses(found):
    lm, candidates, _, made = found
    rows = TOKENS.tolist()

    def loss(policies):
        return np.mean([one.nll for one in lm.score(rows, policy=ji.per_layer(policies))])

    plain = loss(["full", "full"])
    for layer, number in ((0, 1), (1, 2)):
        policies: list = ["full", "full"]
        policies[layer] = candidates[number].policy
        expected = loss(policies) - plain
        assert abs(expected) > 1e-3
        assert made.measured[layer, number] == pytest.approx(expected, abs=2e-5)


def test_every_score_has_a_loss_for_every_layer_and_none_for_keeping_all(found):
    *_, made = found
    for by in diagnosis.SCORES:
        losses = made.losses(by)
        assert losses.shape == (2, 4) and np.isfinite(losses).all()
        np.testing.assert_allclose(losses[:, 3], 0, atol=1e-5)
        assert by == "measured" or (losses[:, :3] > 0).all()
    entropy = made.measures["relative_entropy"].mean(axis=1)
    losses = made.losses("entropy")[:, :3]
    np.testing.assert_allclose(losses[0] / losses[1], entropy[0] / entropy[1], rtol=1e-5)
    with pytest.raises(ValueError, match="by must be one of"):
        made.losses("norm")


def test_sizes_add_up_to_what_the_policies_take(found):
    lm, candidates, _, made = found
    mixed = ji.per_layer([candidates[0].policy, candidates[1].policy])
    assert made.sizes[0, 0] + made.sizes[1, 1] == policy_bytes(lm, mixed, SIZE)
    assert made.sizes[:, 3].sum() == policy_bytes(lm, "full", SIZE)


def test_a_run_goes_on_where_it_was_killed(found, tmp_path, monkeypatch):
    lm, candidates, whole, expected = found
    calls = []

    class Killed(Exception):
        pass

    def killed(*arguments):
        calls.append(arguments[0].index)
        if len(calls) == 6:  # in the middle of layer 1
            raise Killed
        return errors.errors_of(*arguments)

    monkeypatch.setattr(diagnosis, "errors_of", killed)
    with pytest.raises(Killed):
        diagnose(lm, TOKENS, candidates, tmp_path, points=64)
    again = diagnose(lm, TOKENS, candidates, tmp_path, points=64)
    assert calls == [0] * 4 + [1] * 6
    for name, x in expected.errors.items():
        np.testing.assert_array_equal(again.errors[name], x)
    # The loss alone is measured then.
    more = diagnose(lm, TOKENS, candidates, tmp_path, points=64, measured=True)
    np.testing.assert_array_equal(more.measured, expected.measured)
    with pytest.raises(ValueError, match="was not; diagnose with measured=True|was not measured"):
        again.losses("measured")


def test_another_text_or_other_candidates_need_another_folder(found):
    lm, candidates, run, _ = found
    with pytest.raises(ValueError, match="started with other crc32"):
        diagnose(lm, TOKENS[:, ::-1].copy(), candidates, run, points=64)
    with pytest.raises(ValueError, match="started with other candidates"):
        diagnose(lm, TOKENS, candidates[:2], run, points=64)


def test_layers_without_attention_lose_nothing(tmp_path):
    lm = hyena_models.lm_of("multi")
    candidates = [Candidate("h2o", {"name": "h2o"}, ji.h2o(3, 4))]
    made = diagnose(lm, TOKENS % lm.config.vocab_size, candidates, tmp_path, points=64)
    losses = made.losses("output")
    for layer in range(lm.config.num_layers):
        is_attention = lm.config.mixer(layer) == "attn"
        assert (losses[layer] > 0).all() == is_attention
        assert np.isnan(made.errors["keys.l2"][layer]).all() != is_attention


def test_candidates_are_sized_for_the_text_and_suit_the_model():
    lm = lm_of("llama")
    found, left_out = candidates_for(lm, None, 200)
    assert [one.name for one in found] == ["kivi4", "streaming", "h2o", "full"]
    for name, reason in zip(("kivi2", "less"), left_out, strict=True):
        assert reason.startswith(f"candidate {name} is left out: ")
    assert found[0].written == {"name": "kivi4", "group": 8, "residual": 48}
    assert found[1].written == {"name": "streaming", "sinks": 4, "window": 36}
    assert found[2].policy == ji.h2o(20, 20)
    for wanted, message in (
        (["kivi9"], "unknown cache policy 'kivi9'"),
        (["full", "full"], "candidate 'full' is given twice"),
        (["kivi2:residual"], "NAME or NAME:key=value"),
        (["less"], "no LESS feature maps"),
        ([], "there are no candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            candidates_for(lm, wanted, 200)
    with pytest.raises(ValueError, match="learned positions"):
        candidates_for(lm_of("learned"), ["streaming"], 60)
