"""Two policies of other packages: found by name, and held to what they promise."""

import io
import json
import tokenize
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import testing
from jaxinfer.cache import presets
from jaxinfer.models import registry
from tests.plugins.installed import HERE, importable, installed, write_metadata

PROMPT = list(range(3, 43))


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("site")):
        yield
    for name in ("key-norm", "snapkv"):
        presets.POLICIES._known.pop(name, None)


def key_norm(**options):
    return presets.resolve({"name": "key-norm", **options})


def snapkv(**options):
    return presets.resolve({"name": "snapkv", **options})


def hard_snapkv():
    return snapkv(budget=6, new=64, window=3, pool=3)


def test_both_are_found_by_name_once_it_is_asked_for():
    assert {"full", "h2o", "key-norm", "snapkv"} <= set(presets.POLICIES.names())
    lm = testing.tiny_model()
    for name in ("key-norm", "snapkv"):
        out = lm.generate([PROMPT], policy=name, max_new_tokens=4)[0]
        assert len(out.tokens) == 4
    assert ji.streaming() != key_norm() == key_norm()
    with pytest.raises(ValueError, match="policy 'snapkv' does not take the argument 'bits'"):
        snapkv(bits=2)


def test_the_command_line_knows_them(capsys):
    from jaxinfer.cli import main

    arguments = ["generate", "Once", "--model", "tiny-llama", "--policy", "key-norm", "--json"]
    main([*arguments, "--policy-args", "size=8,recent=4", "--max-new-tokens", "4"])
    assert json.loads(capsys.readouterr().out)["tokens"]


def test_a_broken_package_is_one_clear_line(tmp_path):
    entries = {"jaxinfer.policies": {"broken": "not_there:policy"}}
    write_metadata(tmp_path, "broken-policy", entries)
    said = "cache policy 'broken' of broken-policy cannot be loaded from 'not_there:policy'"
    with importable(tmp_path), pytest.raises(ValueError, match=said) as error:
        presets.resolve("broken")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown cache policy 'broken'; known policies: full"):
        presets.resolve("broken")


def test_names_are_taken_once_and_make_policies():
    with pytest.raises(ValueError, match="there is a cache policy 'full' already"):
        ji.register_policy("full", ji.streaming)
    ji.register_policy("no-policy", lambda: "text")
    try:
        with pytest.raises(ValueError, match="policy 'no-policy' made no Policy, but 'text'"):
            presets.resolve("no-policy")
    finally:
        del presets.POLICIES._known["no-policy"]


def test_a_family_is_registered_by_its_model_types(tmp_path):
    family = replace(registry.family_for("llama"), name="alpaca", model_types=("alpaca",))
    with pytest.raises(ValueError, match="model type 'alpaca' is not implemented"):
        registry.family_for("alpaca")
    ji.register_family(family)
    try:
        assert registry.family_for("alpaca") is family
        with pytest.raises(ValueError, match="there is a model family 'llama' already"):
            ji.register_family(replace(family, model_types=("llama",)))
    finally:
        del registry._BY_TYPE._known["alpaca"]
    write_metadata(
        tmp_path, "alpaca", {"jaxinfer.families": {"alpaca": "jaxinfer.models.llama:FAMILY"}}
    )
    with importable(tmp_path):
        assert registry.family_for("alpaca").name == "llama"
    del registry._BY_TYPE._known["alpaca"]


@pytest.mark.parametrize("package", ["key_norm", "snapkv"])
def test_each_is_one_file_of_at_most_80_lines_of_code(package):
    source = (HERE / package / f"jaxinfer_{package}.py").read_text()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {t.start[0] for t in tokens if t.type not in layout and t.string}
    assert len(lines) <= 80


def test_key_norm_keeps_what_it_promises():
    def formula(policy, geometry):
        ring, short = policy.tiers
        numbers = 2 * geometry.head_dim * jnp.dtype(geometry.dtype).itemsize
        return geometry.num_kv_heads * (numbers * (ring.size + short.size) + 8 * short.size)

    testing.check_policy(
        easy=lambda: key_norm(size=48, recent=16),
        hard=lambda: key_norm(size=4, recent=3),
        large=lambda: key_norm(size=4096, recent=1024),
        bytes_per_row=formula,
        models=("llama",),
    )


def test_snapkv_keeps_what_it_promises_and_speculates():
    def formula(policy, geometry):
        slots = policy.tiers[0].budget + policy.tiers[0].new
        numbers = 2 * geometry.head_dim * jnp.dtype(geometry.dtype).itemsize
        return geometry.num_kv_heads * slots * (numbers + 4)

    assert hard_snapkv().lossless_under_tree
    testing.check_policy(
        easy=lambda: snapkv(budget=64, new=64, window=8, pool=3),
        hard=hard_snapkv,
        large=lambda: snapkv(budget=8192, new=8192),
        bytes_per_row=formula,
        models=("llama",),
    )


def test_key_norm_keeps_the_shortest_keys():
    stepper = testing.Stepper("llama", key_norm(size=4, recent=2))
    every = testing.Stepper("llama", ji.full())
    tokens = testing.random_tokens(1, 8)
    cache, _ = stepper.step(stepper.cache(), tokens, is_prompt=True)
    whole, _ = every.step(every.cache(), tokens)
    keys = np.asarray(whole.layers[0][0].k)[0, :, :, :6]  # [K, H, T] of the first layer
    shortest = np.argsort(np.linalg.norm(keys, axis=1), axis=-1)[:, :4]
    kept = np.asarray(cache.layers[0][1].pos)[0]
    np.testing.assert_array_equal(np.sort(kept), np.sort(shortest))


def weights_of_last_queries(stepper, tokens, window: int) -> np.ndarray:
    """What the last queries of the first layer give to each key, [K, T], summed over a group."""
    every = testing.Stepper("llama", replace(ji.full(), weigh_keys="always", query_window=window))
    ctx = ji.cache.context.chain_context(
        jnp.zeros(1, jnp.int32), jnp.asarray([tokens.shape[1]]), tokens.shape[1], reads=False
    )
    _, fresh = every.read(every.cache(), tokens, ctx)
    return np.asarray(fresh[0].attn_weight.fresh)[0, :, 0]


def test_snapkv_keeps_its_window_and_what_the_window_attends_to():
    stepper = testing.Stepper("llama", snapkv(budget=6, new=8, window=3, pool=1))
    tokens = testing.random_tokens(1, 8)
    cache, _ = stepper.step(stepper.cache(), tokens, is_prompt=True)
    given = weights_of_last_queries(stepper, tokens, 3)
    kept = np.asarray(cache.layers[0][0].pos)[0]
    for head in range(2):
        best = np.argsort(-given[head, :5])[:3]
        assert kept[head].tolist() == [*sorted(best.tolist()), 5, 6, 7, *[-1] * 8]


def test_snapkv_cuts_turn_after_turn_and_appends_what_is_generated():
    lm, policy = testing.tiny_model(), snapkv(budget=8, new=16, window=4)
    chat = lm.session(policy)
    for turn in range(3):
        chat.append(PROMPT[turn : turn + 20])
        held = []
        for _ in range(2):
            chat.generate([], max_new_tokens=6, ignore_eos=True)
            pos = np.asarray(chat.cache.layers[0][0].pos)[0, 0]
            held.append(int((pos >= 0).sum()))
        assert held == [8 + 5, 8 + 5]  # the sixth token waits for the next turn
        assert pos.max() == len(chat.tokens) - 1


def test_more_new_tokens_than_a_tier_has_room_for_are_refused():
    lm = testing.tiny_model()
    policy = snapkv(budget=24, new=4)
    assert len(lm.generate([PROMPT[:24]], policy=policy, max_new_tokens=4)[0].tokens) == 4
    said = "policy 'snapkv' has room for 4 tokens behind a prompt of 24, but 24 are asked for"
    with pytest.raises(ValueError, match=said):
        lm.generate([PROMPT[:24]], policy=policy, max_new_tokens=24)
    mixed = ji.per_layer([ji.full(), policy])
    with pytest.raises(ValueError, match=said):
        lm.generate([PROMPT[:24]], policy=mixed, max_new_tokens=24)
    with pytest.raises(ValueError, match="has room for 28 tokens behind a prompt of 0, but 40"):
        lm.score([PROMPT], policy=policy)


def test_a_false_promise_of_chunk_invariance_is_caught():
    def wrong():
        return replace(key_norm(size=4, recent=3), chunk_invariant=True)

    with pytest.raises(AssertionError, match="key-norm declares chunk_invariant, but chunks"):
        testing.check_policy(
            easy=lambda: key_norm(size=48, recent=16), hard=wrong, models=("llama",)
        )


def test_a_false_promise_of_lossless_trees_is_caught():
    wrong = replace(key_norm(size=4, recent=3), lossless_under_tree=True)
    with pytest.raises(AssertionError, match="key-norm declares lossless_under_tree, but"):
        testing.check_tree_commit(wrong)


def test_a_budget_that_loses_tokens_is_caught():
    with pytest.raises(AssertionError, match="key-norm at full budget differs"):
        testing.check_full_budget(key_norm(size=4, recent=3))


def test_prompt_weights_cost_decoding_nothing():
    stepper = testing.Stepper("llama", hard_snapkv())
    cache, _ = stepper.step(stepper.cache(), testing.random_tokens(1, 8), is_prompt=True)
    one = ji.cache.context.chain_context(cache.length, jnp.ones(1, jnp.int32), 1)
    _, fresh = stepper.read(cache, testing.random_tokens(1, 1), one)
    assert all(items.attn_weight is None for items in fresh)
