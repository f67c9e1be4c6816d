"""Bytes of policies, baselines of equal memory, and the tables made of them."""

import json

import jax
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.eval import compare, contenders, equal_memory, markdown, policy_bytes, save
from tests.factories import lm_of

PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, size, bytes


@pytest.mark.parametrize("policy", [ji.full(), ji.streaming(4, 28), ji.h2o(0.25, 0.25)])
def test_bytes_are_those_that_a_cache_allocates(policy):
    lm = lm_of()
    sized = policy.sized(128)
    cache = jax.eval_shape(lambda: lm.engine.new_cache(sized, 1, 128))
    assert policy_bytes(lm, policy, 128) == bytes_of(cache.layers)


@pytest.mark.parametrize("kind", ["streaming", "window", "h2o"])
def test_the_baseline_fills_the_policys_bytes(kind):
    lm, policy = lm_of(), ji.h2o(20, 30)
    budget = policy_bytes(lm, policy, 200)
    baseline = equal_memory(lm, policy, 200, kind)
    assert budget - 2 * PER_TOKEN < policy_bytes(lm, baseline, 200) <= budget


def test_a_window_of_equal_memory_is_the_window_itself():
    assert equal_memory(lm_of(), ji.streaming(4, 60), 500) == ji.streaming(4, 60)
    assert equal_memory(lm_of(), ji.full(), 100, "window") == ji.streaming(0, 100)


def test_a_budget_too_small_for_a_baseline_is_refused():
    with pytest.raises(ValueError, match="another baseline"):
        equal_memory(lm_of(), ji.streaming(0, 2), 100)


def test_tables_have_full_policy_and_equal_memory_rows_with_their_bytes():
    lm = lm_of()
    rows = compare(lm, contenders(lm, ji.h2o(10, 10), 100), 100, lambda p: {"x": float(p.sinks)})
    assert [row.label for row in rows] == ["full", "policy", "equal memory"]
    assert rows[0].bytes_per_token == PER_TOKEN and rows[0].share == 1
    assert rows[2].share <= rows[1].share < 0.25
    lines = markdown(rows).splitlines()
    assert lines[0].startswith("| row | policy | bytes_per_token |") and len(lines) == 5
    assert list(contenders(lm, "full", 100)) == ["full"]
    assert list(contenders(lm, ji.h2o(10, 10), 100, None)) == ["full", "policy"]


def test_a_saved_table_is_a_benchmark_record(tmp_path):
    lm = lm_of()
    rows = compare(lm, contenders(lm, "full", 10), 10, lambda policy: {"nll": 1.5})
    path = save("perplexity", {"model": "tiny"}, rows, tmp_path, command="jaxinfer eval", seed=3)
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["name"] == "eval-perplexity" and record["seed"] == 3
    assert record["metrics"]["rows"][0]["nll"] == 1.5 and record["env"]["jax"]


def test_a_policy_that_is_its_own_baseline_is_compared_with_a_window():
    assert contenders(lm_of(), ji.streaming(4, 60), 500)["equal memory"] == ji.streaming(0, 64)
