"""`LM.generate` equals the naive loop, whatever the batch, the limits and the samples."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.presets import full
from jaxinfer.decode.capacity import capacity_for
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.settings import random_key
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from tests.factories import BASE, CONFIGS, MODELS, lm_of, params_of, random_tokens, scripted_lm

PROMPTS = [random_tokens(1, n, seed=n)[0].tolist() for n in (5, 13, 1)]
WARM = Sampler(temperature=1.5, top_k=40, top_p=0.98, min_p=0.001, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def lm() -> LM:
    return lm_of("llama")


def plain_logits(lm: LM, tokens: list[int]) -> np.ndarray:
    """Of the plain forward, padded to one shape for all lengths, that of tests/test_lm.py."""
    padded = np.zeros((1, 60), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(lm.logits(padded))[0]  # numpy: an index compiles nothing


def greedy(lm: LM, prompt: list[int], count: int) -> list[int]:
    """Argmax of the plain forward."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(lm, tokens)[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def compiled(lm: LM) -> int:
    return sum(program.traces for program in lm.engine.programs.values())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_the_naive_loop(name):
    lm = lm_of(name)
    for prompt, out in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=12), strict=True):
        assert out.tokens == greedy(lm, prompt, 12)
        assert out.finish_reason == "length" and out.text == ""


def test_bfloat16_generates_and_says_what_its_cache_costs():
    out = lm_of("llama", "bfloat16").generate(PROMPTS[0], max_new_tokens=12)[0]
    single = lm_of("llama").generate(PROMPTS[0], max_new_tokens=12)[0]
    assert len(out.tokens) == 12
    assert 0 < out.stats.cache_bytes * 2 <= single.stats.cache_bytes + 8


def test_log_probs_are_those_of_the_model_whatever_the_sampler(lm):
    for sampler in (Sampler(), WARM):
        for prompt, out in zip(
            PROMPTS, lm.generate(PROMPTS, max_new_tokens=12, sampler=sampler, seed=3), strict=True
        ):
            text = prompt + out.tokens
            log_probs = np.asarray(jax.nn.log_softmax(plain_logits(lm, text)))
            expected = log_probs[np.arange(len(prompt) - 1, len(text) - 1), np.asarray(out.tokens)]
            np.testing.assert_allclose(out.log_probs, expected, atol=2e-4)


def test_a_row_gives_the_same_tokens_alone_and_in_any_batch(lm):
    options = {"max_new_tokens": 12, "sampler": WARM}
    together = lm.generate(PROMPTS, seed=[7, 8, 9], **options)
    backwards = lm.generate(PROMPTS[::-1], seed=[9, 8, 7], **options)[::-1]
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], seed=7 + i, **options)[0]
        assert alone.tokens == together[i].tokens == backwards[i].tokens
    assert len({tuple(out.tokens) for out in together}) == 3


def test_the_seed_decides_the_text(lm):
    def tokens(seed):
        return lm.generate(PROMPTS[0], max_new_tokens=12, sampler=WARM, seed=seed)[0].tokens

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


def test_all_seeds_of_64_bits_differ_and_others_are_refused(lm):
    seeds = [0, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    outs = lm.generate([PROMPTS[0]] * len(seeds), max_new_tokens=12, sampler=WARM, seed=seeds)
    assert len({tuple(out.tokens) for out in outs}) == len(seeds)
    for seed in (2**63, -(2**63) - 1, 10**30):
        with pytest.raises(ValueError, match=f"seed must be from .*, got {seed}"):
            lm.generate(PROMPTS[0], seed=seed)


def test_a_seed_draws_as_that_of_jax():
    for seed in (0, 1, 2**32 - 1):
        assert (random_key(seed) == jax.random.key(seed)).all()


def test_draws_of_steps_rows_and_samples_are_independent():
    """Logits are constant, so that successive tokens, and those of two rows, are independent."""
    vocab, p = 4, np.array([0.4, 0.3, 0.2, 0.1])
    cfg = replace(BASE, vocab_size=vocab, num_layers=1, bos_token_id=None, eos_token_ids=())
    params = init_params(cfg, jax.random.key(0))
    params["head"]["weight"] = jnp.zeros_like(params["head"]["weight"])
    sampler = Sampler(temperature=1.0, logit_bias=dict(enumerate(np.log(p).tolist())))
    outs = LM(cfg, params).generate(
        [[0]] * 64, seed=list(range(64)), samples=2, max_new_tokens=64, sampler=sampler
    )
    tokens = np.array([out.tokens for out in outs]).reshape(64, 2, 64)  # [row, sample, step]
    pairs = {
        "steps": (tokens[..., :-1], tokens[..., 1:]),
        "distant steps": (tokens[..., :-7], tokens[..., 7:]),
        "rows": (tokens[:-1], tokens[1:]),
        "samples": (tokens[:, 0], tokens[:, 1]),
        "a row's next step": (tokens[:-1, :, 1:], tokens[1:, :, :-1]),
    }
    for name, (first, second) in pairs.items():
        seen = np.zeros((vocab, vocab))
        np.add.at(seen, (first.ravel(), second.ravel()), 1)
        expected = np.outer(p, p) * first.size
        chi2 = ((seen - expected) ** 2 / expected).sum()
        assert chi2 < 15 + 5 * np.sqrt(30), name  # mean + 5 standard deviations


def test_samples_stand_next_to_each_other_whatever_the_batch(lm):
    options = {"max_new_tokens": 12, "sampler": WARM, "samples": 2}
    found = lm.generate(PROMPTS[:2], seed=[5, 50], **options)
    expected = lm.generate(PROMPTS[0], seed=5, **options)
    expected += lm.generate(PROMPTS[1], seed=50, **options)
    assert [out.tokens for out in found] == [out.tokens for out in expected]


def test_limits_and_samplers_may_differ_by_row(lm):
    limits, samplers = [3, 12, 1], [Sampler(), WARM, replace(WARM, temperature=0.5)]
    found = lm.generate(PROMPTS, max_new_tokens=limits, sampler=samplers, seed=4)
    for i, out in enumerate(found):
        alone = lm.generate(PROMPTS[i], max_new_tokens=12, sampler=samplers[i], seed=4)[0]
        assert out.tokens == alone.tokens[: limits[i]]
        assert len(out.log_probs) == limits[i] and out.finish_reason == "length"


def test_a_repetition_penalty_sees_prompt_and_output(lm):
    never_again = replace(WARM, repetition_penalty=1e9, top_k=1)
    tokens = lm.generate(PROMPTS[1], max_new_tokens=12, sampler=never_again)[0].tokens
    assert len(set(tokens)) == 12 and not set(tokens) & set(PROMPTS[1])


def test_a_prompt_longer_than_one_chunk_is_read_in_pieces(lm):
    prompt = random_tokens(1, 530)[0].tolist()
    out = lm.generate(prompt, max_new_tokens=2)[0]
    expected = lm.logits([prompt])[0, -1]
    assert out.tokens[0] == int(expected.argmax())
    np.testing.assert_allclose(
        out.log_probs[0], float(jax.nn.log_softmax(expected).max()), atol=2e-4
    )


def test_statistics_count_tokens_steps_bytes_and_seconds(lm):
    lm.generate(PROMPTS, max_new_tokens=12)
    stats = lm.generate(PROMPTS, max_new_tokens=12)[0].stats
    assert stats["prompt_tokens"] == sum(map(len, PROMPTS)) and stats["new_tokens"] == 36
    assert stats["tokens_per_step"] == 1.0 and stats["compile_s"] == 0.0
    assert stats["prefill_s"] > 0 and stats["decode_s"] > 0 and stats["tokens_per_s"] > 0
    # 3 rows, 2 layers, keys and values of 2 heads of 8 numbers, 64 slots, 4 bytes
    assert stats["cache_bytes"] == 3 * 2 * 2 * 2 * 8 * 64 * 4
    assert set(stats) == set(dict(stats)) == set(stats.__dataclass_fields__)
    assert stats.new_tokens == stats["new_tokens"] and len(stats) == len(dict(stats))


def test_unknown_statistics_are_a_key_error(lm):
    with pytest.raises(KeyError):
        lm.generate(PROMPTS, max_new_tokens=12)[0].stats["speed"]


def test_other_prompts_lengths_and_settings_of_a_bucket_compile_nothing():
    lm = LM(CONFIGS["llama"], params_of("llama"))
    lm.generate(PROMPTS, max_new_tokens=12, sampler=WARM, seed=1)
    assert {name: p.traces for name, p in lm.engine.programs.items()} == {
        "prefill": 1,
        "init_state": 1,
        "decode": 1,
        "read": 0,
        "peek": 0,
    }
    other = replace(WARM, temperature=0.3, top_k=5)
    lm.generate([[1], [2, 3], [4] * 16], max_new_tokens=[9, 16, 3], sampler=other, seed=[4, 5, 6])
    lm.generate(PROMPTS, max_new_tokens=12, sampler=WARM, policy=full(), ignore_eos=True)
    assert compiled(lm) == 3


def test_after_warm_up_nothing_compiles():
    pieces = [bytes([c]) for c in b"abcdefghij"]
    lm = scripted_lm(pieces)
    seconds = lm.warmup(prompt_lengths=(4,), max_new_tokens=8)
    before = compiled(lm)
    assert seconds > 0 and before >= 3
    out = lm.generate("abc", max_new_tokens=8)[0]
    assert "".join(lm.stream("ab", max_new_tokens=8)) == "cdefghij"
    assert compiled(lm) == before and out.stats.compile_s == 0.0 and out.text == "defghij"


def test_warm_up_works_when_the_model_ends_at_once():
    # the model answers token 0 with EOS: the decode loop must be compiled all the same
    lm = scripted_lm([b"x"])
    lm.warmup(prompt_lengths=(1,), max_new_tokens=4)
    assert lm.engine.programs["decode"].traces == 1


def test_what_cannot_fit_in_memory_is_refused_before_compiling(monkeypatch):
    lm = LM(CONFIGS["llama"], params_of("llama"))
    monkeypatch.setattr("jaxinfer.runtime.memory.available_bytes", lambda device=None: 1 << 20)
    for refused in (
        lambda: lm.generate(PROMPTS, max_new_tokens=4000),
        lambda: lm.score([random_tokens(1, 4000)[0].tolist()]),
    ):
        with pytest.raises(ValueError, match="cache .* exceeds the 1.0 MiB of memory available"):
            refused()
    assert compiled(lm) == 0


def test_learned_positions_refuse_what_they_cannot_reach():
    lm = lm_of("learned")
    message = "60 context . 12 new tokens exceed the model's 64 positions"
    with pytest.raises(ValueError, match=message):
        lm.generate([[1] * 60], max_new_tokens=12)
    with pytest.raises(ValueError, match="65 tokens exceed the model's 64 positions; read fewer"):
        lm.score([[1] * 65])
    with pytest.raises(ValueError, match="65 tokens exceed the model's 64 positions; read fewer"):
        lm.session().append([1] * 65)


def test_learned_positions_reach_their_last_one():
    lm, prompt = lm_of("learned"), random_tokens(1, 60)[0].tolist()
    tokens = lm.generate(prompt, max_new_tokens=4)[0].tokens
    sequence = prompt + tokens
    expected = lm.logits([sequence])[0].argmax(axis=-1)[59:63].tolist()
    assert tokens == expected


def test_rotary_models_warn_beyond_their_positions():
    cfg = replace(CONFIGS["llama"], max_positions=16)
    lm = LM(cfg, params_of("llama"))
    with pytest.warns(UserWarning, match="10 context . 12 new .* the model's 16 positions"):
        assert capacity_for(lm, full(), 10, 12) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capacity_for(lm, full(), 10, 6)


def test_no_prompts_give_no_completions(lm):
    assert lm.generate([]) == []


def test_numpy_token_prompts_are_prompts(lm):
    expected = lm.generate(PROMPTS[0], max_new_tokens=12)[0].tokens
    assert lm.generate(np.asarray(PROMPTS[0]), max_new_tokens=12)[0].tokens == expected
    assert lm.generate([np.asarray(PROMPTS[0])], max_new_tokens=12)[0].tokens == expected


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "the prompt is empty and the model has no BOS token"),
        ("text", {}, "has no tokenizer"),
        ([[1, 61]], {}, "token 61 is outside the vocabulary of 61"),
        ([[1, -2]], {}, "token -2 is outside"),
        ([[1]], {"max_new_tokens": 2**29, "policy": "streaming"}, r"tokens 40.0 GiB .* exceeds"),
        ([[1]], {"max_new_tokens": 2**30 + 1}, "max_new_tokens must be from 1 to 1073741824"),
        ([[1]], {"samples": 10**9}, "exceeds the .* of memory available"),
        ([[1]], {"samples": 2**64}, "samples must be a whole number from 1 to"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be from 1 to .*, got 0"),
        ([[1], [2]], {"max_new_tokens": [3]}, "max_new_tokens has 1 entries for 2 prompts"),
        ([[1], [2]], {"seed": [1, 2, 3]}, "seed has 3 entries for 2 prompts"),
        ([[1], [2]], {"sampler": [Sampler()]}, "sampler has 1 entries for 2 prompts"),
        ([[1]], {"samples": 0}, "samples must be a whole number from 1 to .*, got 0"),
        ([[1]], {"policy": "lru"}, "unknown cache policy 'lru'"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"draft": "small"}, "draft must be a model or .prompt-lookup., got 'small'"),
        ([[1]], {"sampler": Sampler(logit_bias={61: 1.0})}, "logit_bias names token 61"),
    ],
)
def test_bad_input_is_refused_with_one_clear_line(lm, prompts, options, message):
    before = compiled(lm)
    with pytest.raises(ValueError, match=message) as caught:
        lm.generate(prompts, **options)
    assert "\n" not in str(caught.value) and compiled(lm) == before


def test_an_unknown_option_is_a_type_error(lm):
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        lm.generate([[1]], max_tokens=3)


def test_streaming_without_a_tokenizer_is_refused_at_the_call(lm):
    with pytest.raises(ValueError, match="streaming text needs a tokenizer"):
        lm.stream([1, 2])


def test_nan_in_a_row_leaves_its_neighbours_alone():
    poisoned = jax.tree.map(jnp.copy, params_of("llama"))
    poisoned["embed"]["tokens"] = poisoned["embed"]["tokens"].at[60].set(jnp.nan)
    prompts = [[60, 2, 3], [4, 5]]
    found = LM(CONFIGS["llama"], poisoned).generate(prompts, max_new_tokens=4)[1]
    assert found.tokens == greedy(lm_of("llama"), [4, 5], 4)
