"""Operations and bytes of a token by the rule of LTE's paper."""

from dataclasses import replace

import pytest

from jaxinfer.sparsity.flops import density_of, feed_forward_share, token_flops
from tests.factories import CONFIGS
from tests.models.hyena_models import MULTI

LLAMA_7B = replace(
    CONFIGS["llama"], hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
    num_kv_heads=32, head_dim=128, rope=replace(CONFIGS["llama"].rope, rotary_dim=128),
)  # fmt: skip
TABLE = {"XSum": (5.38, 0.16), "E2E": (4.65, 0.07), "WikiText": (6.59, 0.31)}


def test_llama_7b_takes_the_papers_operations():
    """lte.md 7.12"""
    dense = token_flops(LLAMA_7B)
    assert (dense.total, dense.feed_forward, dense.attention) == (12.0625, 8.0625, 4.0)
    assert dense.router == 0
    routed = token_flops(LLAMA_7B, block_size=32)
    assert round(routed.router, 3) == 0.084
    assert round(routed.router / routed.feed_forward, 4) == 0.0104


@pytest.mark.parametrize("total, density", TABLE.values(), ids=TABLE)
def test_the_densities_of_table_1_follow_from_its_operations(total, density):
    assert abs(density_of(LLAMA_7B, total, block_size=32) - density) < 0.01
    found = token_flops(LLAMA_7B, density_of(LLAMA_7B, total, block_size=32), block_size=32)
    assert found.total == pytest.approx(total)


def test_each_layer_has_its_density_and_its_kind():
    cfg = replace(CONFIGS["llama"], mlps=("gated", "plain"), gated_mlp=True)
    one = 2 * cfg.hidden_size * cfg.intermediate_size / 2**30
    found = token_flops(cfg, [0.5, 0.25])
    assert found.feed_forward == pytest.approx((3 * 0.5 + 2 * 0.25) * one)
    assert token_flops(cfg, 0.5).attention == token_flops(cfg).attention


def test_a_hyena_layer_has_its_own_projections():
    assert token_flops(MULTI).attention == pytest.approx(2 * (4 + 4 + 3) * 32**2 / 2**30)
    assert token_flops(MULTI).feed_forward == 3 * token_flops(MULTI.first(1)).feed_forward


def test_bytes_of_a_token():
    assert feed_forward_share(0.25, 32, gated=True) == pytest.approx(0.25 + 0.0104, abs=1e-4)
    assert feed_forward_share(0.25, 32, gated=False) == pytest.approx(0.25 + 0.0156, abs=1e-4)


def test_other_densities_are_refused():
    with pytest.raises(ValueError, match="3 densities are given for 2 layers"):
        token_flops(CONFIGS["llama"], [1, 1, 1])
    with pytest.raises(ValueError, match=r"densities lie in \[0, 1\], got 0.5 to 1.5"):
        token_flops(CONFIGS["llama"], [0.5, 1.5])
    with pytest.raises(ValueError, match="48 neurons cannot be cut into blocks of 32"):
        token_flops(CONFIGS["llama"], block_size=32)
