"""`Sampler.log_probs` equals the logits processors of Hugging Face, and draws follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.sampling import Sampler, SamplerRows

V = 50
SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k of one": {"temperature": 1.3, "top_k": 1},
    "top_k above the vocabulary": {"temperature": 1.3, "top_k": V + 5},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "tiny top_p": {"temperature": 1.0, "top_p": 1e-6},
    "min_p": {"temperature": 0.9, "min_p": 0.2},
    "min_p of one": {"temperature": 0.9, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
    "encouragement": {"temperature": 1.0, "repetition_penalty": 0.6},
    "bias": {"temperature": 1.0, "logit_bias": {3: 5.0, 0: -2.5, V - 1: 1.0}},
    "top_k and top_p": {"temperature": 0.8, "top_k": 12, "top_p": 0.8},
    "everything": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "logit_bias": {1: 2.0, 7: -1.0},
    },
}


def random_logits(rows: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, V)) * rng.uniform(0.1, 8, (rows, 1))).astype(np.float32)


def hugging_face(logits, seen: list[list[int]], setting: dict) -> np.ndarray:
    """log_softmax of the processed logits, in the order of `GenerationMixin`."""
    import torch
    from transformers.generation import logits_process as hf

    chain = []
    if setting.get("logit_bias"):
        bias = [[[token], value] for token, value in setting["logit_bias"].items()]
        chain.append(hf.SequenceBiasLogitsProcessor(bias))
    if setting.get("repetition_penalty", 1) != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
    chain.append(hf.TemperatureLogitsWarper(setting["temperature"]))
    if setting.get("top_k"):
        chain.append(hf.TopKLogitsWarper(setting["top_k"]))
    if setting.get("top_p", 1) < 1:
        chain.append(hf.TopPLogitsWarper(setting["top_p"]))
    if setting.get("min_p"):
        chain.append(hf.MinPLogitsWarper(setting["min_p"]))
    out = []
    for row, ids in zip(logits, seen, strict=True):
        scores = torch.tensor(row)[None]
        for step in chain:
            scores = step(torch.tensor([ids]), scores)
        out.append(torch.log_softmax(scores, dim=-1)[0].numpy())
    return np.stack(out)


def counts_of(seen: list[list[int]]) -> jnp.ndarray:
    return jnp.asarray([np.bincount(ids, minlength=V) for ids in seen], jnp.int32)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_log_probs_equal_those_of_hugging_face(setting):
    logits = random_logits()
    seen = np.random.default_rng(1).integers(0, V, (len(logits), 9)).tolist()
    found = np.asarray(Sampler(**setting).log_probs(jnp.asarray(logits), counts_of(seen)))
    expected = hugging_face(logits, seen, setting)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], atol=2e-5)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_probabilities_sum_to_one_also_for_tied_and_extreme_logits(setting):
    logits = random_logits(6)
    logits[0] = 0.0
    logits[1] = np.round(logits[1])  # many ties
    logits[2] *= 1e4
    logits[3, 5:] = -np.inf
    logits[4] = -1e30
    logits[5] = np.where(np.arange(V) % 2, 3.0, -0.0)
    p = np.exp(Sampler(**setting).log_probs(jnp.asarray(logits), jnp.ones((6, V), jnp.int32)))
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)


def test_equal_logits_are_kept_or_cut_together():
    logits = jnp.asarray([2.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    kept = lambda **s: np.isfinite(Sampler(temperature=1.0, **s).log_probs(logits)).sum()  # noqa: E731
    assert kept(top_k=1) == 1
    assert kept(top_k=2) == kept(top_k=3) == kept(top_k=4) == 4  # the three ones share a place
    assert kept(top_k=5) == 5
    assert kept(top_p=0.5) == kept(top_p=0.6) == 4
    assert kept(min_p=float(jnp.exp(-1.0)) * 0.999) == 4


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    logits = random_logits(32, seed=3)
    found = Sampler(temperature=1.0, top_p=0.75).log_probs(jnp.asarray(logits))
    for row, log_probs in zip(logits, found, strict=True):
        p = np.exp(row.astype(np.float64) - row.max())
        p /= p.sum()
        order = np.argsort(-p)
        needed = int(np.searchsorted(np.cumsum(p[order]), 0.75)) + 1
        assert set(np.flatnonzero(np.isfinite(log_probs))) == set(order[:needed])


def test_greedy_puts_all_mass_on_the_first_of_the_best_tokens():
    log_probs = Sampler().log_probs(jnp.asarray([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]))
    np.testing.assert_array_equal(log_probs, [[-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]])


def test_greedy_respects_bias_and_penalty():
    logits = jnp.asarray([0.0, 3.0, 2.9])
    assert int(Sampler(logit_bias={0: 4.0}).log_probs(logits).argmax()) == 0
    seen = jnp.asarray([0, 2, 0])
    assert int(Sampler(repetition_penalty=1.2).log_probs(logits, seen).argmax()) == 2


def test_a_bias_of_minus_infinity_forbids_a_token():
    sampler = Sampler(temperature=1.0, logit_bias={1: -float("inf")})
    assert np.isneginf(sampler.log_probs(jnp.asarray([0.0, 30.0, 1.0])))[1]


def test_penalties_of_the_openai_api_count_what_was_generated():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, whatever the prompt holds."""
    logits, rng = random_logits(), np.random.default_rng(2)
    counts = rng.integers(0, 4, logits.shape)
    prompt = rng.random(logits.shape) < 0.3
    sampler = Sampler(temperature=1.0, presence_penalty=0.7, frequency_penalty=-0.4)
    found = sampler.log_probs(jnp.asarray(logits), jnp.asarray(counts), jnp.asarray(prompt))
    adjusted = logits - counts * -0.4 - (counts > 0) * 0.7
    np.testing.assert_allclose(found, jax.nn.log_softmax(adjusted), atol=2e-5)


def test_only_the_repetition_penalty_regards_the_prompt():
    logits = jnp.asarray(random_logits(4))
    text = jnp.zeros((4, V), jnp.int32).at[:, 3].set(2)
    sampler = Sampler(temperature=1.0, repetition_penalty=1.5)
    expected = sampler.log_probs(logits, text)
    found = sampler.log_probs(logits, None, text > 0)
    np.testing.assert_array_equal(found, expected)


def draws(samplers, logits, count: int, seen=None) -> np.ndarray:
    """[count, B] draws; row b of draw i uses key (b, i)."""
    plan = SamplerRows.of(samplers, logits.shape[-1])
    seen = jnp.zeros((len(samplers), 1 if seen is None else V), bool) if seen is None else seen

    @jax.jit
    def draw(i):
        keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.key(b), i))(
            jnp.arange(len(samplers))
        )
        return plan.sample(keys, logits, seen)

    return np.asarray(jax.lax.map(draw, jnp.arange(count)))


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 9, "top_p": 0.9, "min_p": 0.01}],
    ids=["plain", "truncated"],
)
def test_draws_follow_the_distribution(setting):
    logits = jnp.asarray(random_logits(1, seed=4) / 3)
    sampler, count = Sampler(**setting), 20000
    p = np.exp(np.asarray(sampler.log_probs(logits)[0], np.float64))
    observed = np.bincount(draws([sampler], logits, count)[:, 0], minlength=V)
    assert observed[p == 0].sum() == 0
    likely = p * count >= 5
    expected = np.append(p[likely], p[~likely].sum()) * count
    observed = np.append(observed[likely], observed[~likely].sum())
    used = expected > 0
    chi2 = ((observed - expected)[used] ** 2 / expected[used]).sum()
    degrees = used.sum() - 1
    # mean + 5 standard deviations of chi-square: never by chance, and the seed is fixed
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


def test_greedy_draws_ignore_the_key():
    logits = jnp.asarray(random_logits(2))
    found = draws([Sampler(), Sampler(temperature=1.0)], logits, 50)
    assert (found[:, 0] == int(logits[0].argmax())).all()
    assert len(set(found[:, 1])) > 1


def test_a_row_draws_the_same_alone_and_among_other_samplers():
    names = ("temperature", "top_k", "top_p", "min_p of one", "penalty", "everything")
    settings = [Sampler(), *(Sampler(**SETTINGS[name]) for name in names)]
    logits = jnp.asarray(random_logits(len(settings)))
    plan = SamplerRows.of(settings, V)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(settings)))
    seen = jnp.asarray(np.random.default_rng(2).random((len(settings), V)) < 0.3)
    together = plan.sample(keys, logits, seen)
    log_probs = plan.log_probs(logits, seen)
    for row, sampler in enumerate(settings):
        one = slice(row, row + 1)
        alone = SamplerRows.of([sampler], V)
        assert int(alone.sample(keys[one], logits[one], seen[one])[0]) == int(together[row])
        np.testing.assert_array_equal(alone.log_probs(logits[one], seen[one])[0], log_probs[row])


def test_log_probs_take_any_leading_shape():
    logits = jnp.asarray(random_logits(6)).reshape(2, 3, V)
    sampler = Sampler(temperature=0.8, top_p=0.7)
    found = sampler.log_probs(logits)
    assert found.shape == (2, 3, V)
    np.testing.assert_array_equal(found[1, 2], sampler.log_probs(logits[1, 2]))


def test_other_values_of_the_same_settings_do_not_retrace():
    traces = []

    @jax.jit
    def log_probs(plan, logits, seen):
        traces.append(1)
        return plan.log_probs(logits, seen)

    for temperature, top_k in ((0.5, 3), (1.5, 9)):
        plan = SamplerRows.of([Sampler(temperature=temperature, top_k=top_k)], V)
        log_probs(plan, jnp.zeros((1, V)), jnp.zeros((1, 1), bool))
    assert len(traces) == 1


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": NAN},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": NAN},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": NAN},
        {"repetition_penalty": INF},
        {"logit_bias": {3: NAN}},
        {"logit_bias": {3: INF}},
        {"temperature": None},
        {"temperature": True},
        {"temperature": "0.5"},
        {"temperature": 10**400},
        {"temperature": [1.0]},
        {"temperature": 1j},
        {"top_k": 1.5},
        {"top_k": 2**31},
        {"top_k": True},
        {"top_k": None},
        {"top_p": None},
        {"min_p": False},
        {"repetition_penalty": "1"},
        {"logit_bias": None},
        {"logit_bias": 5},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1.5: 1.0}},
        {"logit_bias": {3: None}},
        {"logit_bias": [(1, 2.0, 3.0)]},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        Sampler(**wrong)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_numbers_of_arrays_are_taken_as_pythons():
    given = Sampler(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=jnp.float32(0.5), min_p=np.asarray(0)
    )
    assert given == Sampler(temperature=0.5, top_k=3, top_p=0.5)
    assert Sampler(logit_bias=[(np.int32(2), 1), (2, np.float64(0.5))]).logit_bias == ((2, 1.5),)


def test_a_bias_that_forbids_every_token_is_refused():
    everything = {i: -INF for i in range(V)}
    with pytest.raises(ValueError, match=f"logit_bias forbids all {V} tokens"):
        Sampler(logit_bias=everything).log_probs(jnp.zeros(V))
    del everything[4]
    assert int(Sampler(logit_bias=everything).log_probs(jnp.zeros(V)).argmax()) == 4


def float64(logits: np.ndarray, seen: np.ndarray, s: Sampler) -> np.ndarray:
    """Probabilities of one row by the definition, in float64."""
    x = logits.astype(np.float64)
    for token, value in s.logit_bias:
        x[token] += value
    with np.errstate(over="ignore"):
        punished = np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
    x = np.where(seen, punished, x)
    if s.temperature == 0:
        return np.eye(V)[x.argmax()]
    with np.errstate(over="ignore"):
        x = (x - x.max()) / s.temperature
    if 0 < s.top_k < V:
        x = np.where(x >= np.sort(x)[-s.top_k], x, -INF)
    p = np.exp(x) / np.exp(x).sum()
    if s.top_p < 1:
        order = np.argsort(-x)
        least = x[order][min(np.searchsorted(np.cumsum(p[order]), s.top_p), V - 1)]
        x = np.where(x >= least, x, -INF)
    if s.min_p > 0:
        x = np.where(x >= np.log(s.min_p), x, -INF)
    return np.exp(x) / np.exp(x).sum()


def any_of(rng, *values):
    return values[rng.integers(len(values))]


def extreme_sampler(rng) -> Sampler:
    """Settings at both ends of what is legal."""
    big = any_of(rng, 3.5e38, 1e300, 1e38, 5.0)
    if rng.random() < 0.1:  # all alike in float32, which cuts none or all
        return Sampler(temperature=any_of(rng, 1e38, 1e300), logit_bias={6: -INF, 8: 2.0})
    return Sampler(
        temperature=any_of(rng, 0, 1e-320, 1e-45, 1.2e-38, 1e-10, 0.7, 1, 3, 1e10),
        top_k=any_of(rng, 0, 0, 1, 5, V, 2**31 - 1),
        top_p=any_of(rng, 1, 1, 1e-320, 1e-39, 0.53, 1 - 1e-9),
        min_p=any_of(rng, 0, 0, 1e-320, 1e-39, 0.3, 0.999, 1),
        repetition_penalty=any_of(rng, 1, 1, 1e-7, 0.5, 1.5, 1e7),
        logit_bias=any_of(rng, {}, {}, {5: big}, {5: -big}, {6: -INF, 7: -big, 8: 2.0}),
    )


def test_extreme_settings_follow_the_definition_in_float64():
    rng = np.random.default_rng(0)
    samplers = [extreme_sampler(rng) for _ in range(600)]
    logits = (rng.standard_normal((600, V)) * 10).astype(np.float32)
    seen = rng.random((600, V)) < 0.3
    plan = SamplerRows.of(samplers, V)
    found = np.exp(np.asarray(plan.log_probs(jnp.asarray(logits), jnp.asarray(seen)), np.float64))
    for row, sampler in enumerate(samplers):
        expected = float64(logits[row], seen[row], sampler)
        np.testing.assert_allclose(found[row], expected, atol=1e-4, err_msg=str(sampler))


def test_no_setting_gives_anything_but_a_distribution():
    extremes = [0.0, 1e-320, 1e-39, 1.2e-38, 1.0, 1e30, 3.4e38, 1e300]
    samplers = [
        Sampler(temperature=t, repetition_penalty=r or 1.0, logit_bias={5: b, 6: -b, 7: -INF, 8: b})
        for t in extremes for r in extremes for b in (1e-320, 1.0, 3.4e38, 1e300)
    ]  # fmt: skip
    logits = jnp.asarray(np.tile(random_logits(1) * 1e3, (len(samplers), 1)))
    plan = SamplerRows.of(samplers, V)
    log_probs = np.asarray(plan.log_probs(logits, jnp.arange(V)[None] % 2 == jnp.zeros((1, V))))
    assert not np.isnan(log_probs).any() and np.isneginf(log_probs[:, 7]).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-4)


@pytest.mark.parametrize("token", [-1, V, 10**9])
def test_a_bias_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"logit_bias names token {token}"):
        Sampler(logit_bias={token: 1.0}).log_probs(jnp.zeros(V))


def test_samplers_compare_by_value():
    a, b = Sampler(logit_bias={2: 1.0, 1: 3.0}), Sampler(logit_bias={1: 3.0, 2: 1.0})
    assert a == b and hash(a) == hash(b)
