"""The cost model against numbers of hexgen.md and against its own sums."""

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.models.params import abstract_params
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry
from jaxinfer.parallel.hexgen.costs import GIB, Assumptions, Costs
from jaxinfer.parallel.hexgen.inventory import Cluster, Gpu, Link, Machine
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from tests.models.hyena_models import MODES, MULTI
from tests.parallel.hexgen.clusters import cluster

LLAMA_70B = ModelConfig(
    family="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80,
    num_heads=64, num_kv_heads=8, head_dim=128, max_positions=32768,
    rope=RopeConfig(rotary_dim=128),
)  # fmt: skip
SMALL = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, max_positions=32768, tie_embeddings=True,
    rope=RopeConfig(rotary_dim=64),
)  # fmt: skip


def published(hidden=8192, **machine) -> Costs:
    """The released program's constants (hexgen.md 2.3): one rate for memory and arithmetic."""
    gpu = Gpu(name="g", memory_bytes=48e9, bytes_per_s=1e12, flops_per_s=1e12)
    link = Link(latency_s=1e-6, bytes_per_s=1e11)
    one = Machine(name="m", gpu=gpu, count=8, region="r", link=link)
    sizes = ModelSizes.published(hidden, 80)
    return Costs(Cluster(machines=(one,)), sizes, Assumptions.published(**machine))


def test_check_values_of_hexgen_md_2_3():
    costs = published()
    # a total length of 128 with a prompt of 32: 96 decode steps, and one scan for the prompt
    prefill = costs.prefill_s(0, 1, 1, 32)
    decode = costs.decode_s(0, 1, 1, 0)
    # the released program counts 2 FLOP x 12 H^2 for a token, and a scan of 2 x 12 H^2 bytes
    assert prefill == pytest.approx(0.05315022, rel=1e-6)
    assert decode == pytest.approx(0.003221225, rel=1e-6)
    assert prefill + 96 * decode == pytest.approx(0.36238787, rel=1e-6)
    assert costs.hop_s(0, 0, 32) + 96 * costs.hop_s(0, 0, 1) == pytest.approx(1.1797152e-4)
    for n, stated in ((2, 4.299430e-4), (4, 1.2269146e-3), (8, 2.7894003e-3)):
        added = costs._reduce_s(0, n, 32) + 96 * costs._reduce_s(0, n, 1)
        assert added == pytest.approx(stated, rel=1e-6)


@pytest.mark.parametrize(("degree", "stated"), [(1, 120.40), (2, 60.40), (4, 30.40), (8, 15.40)])
def test_memory_of_hexgen_md_2_3(degree, stated):
    """But for the keys and values, which the released program does not divide by the degree."""
    costs, kept = published(), 80 * 2 * 160 * 8192 * 2
    ours = costs.memory_bytes(degree, 80, False, False, 160)
    assert (ours + kept * (1 - 1 / degree)) / GIB == pytest.approx(stated, abs=0.005)


def test_real_sizes_of_llama_70b_of_hexgen_md_1_2():
    sizes = ModelSizes.of(LLAMA_70B)
    assert (sizes.attention_bytes + sizes.mlp_bytes) / 2 == 855_654_400
    final_norm = 8192
    assert sizes.weight_bytes / 2 == 68_976_648_192 - final_norm
    assert sizes.cache_bytes_per_token == 4096 and sizes.cache_bytes_per_row == 0


def test_most_layers_with_real_sizes_of_hexgen_md_2_3():
    machines = (("A4000", 2, "X"), ("A5000", 2, "X"), ("3090Ti", 2, "X"), ("A6000", 4, "X"))
    costs = Costs(
        cluster(*machines, ("A100", 4, "X")), ModelSizes.of(LLAMA_70B), Assumptions(rows=1)
    )
    stated = [(0, 2, 17), (1, 2, 26), (2, 1, 13), (2, 2, 26), (3, 4, 106), (4, 4, 88)]
    found = [(m, n, costs.most_layers(m, n, False, False, 4096)) for m, n, _ in stated]
    # four activation buffers more than the notes count: at most one layer less
    assert all(s - 1 <= f <= s for (_, _, f), (_, _, s) in zip(found, stated, strict=True)), found


def test_uniform_plans_of_the_case_study_do_not_fit():
    """hexgen.md 5.4: TP 8 and ten layers on each of eight accelerators, with real sizes."""
    costs = Costs(cluster(("A4000", 2, "X")), ModelSizes.of(LLAMA_70B), Assumptions(rows=1))
    assert costs.memory_bytes(8, 80, True, True, 160) > costs.room_bytes(0)
    assert costs.most_layers(0, 1, False, False, 160) < 10


@pytest.mark.parametrize(
    "policy",
    [ji.full(), ji.kivi(), ji.streaming(window=1020), ji.h2o(64, 64)],
    ids=lambda p: p.name,
)
@pytest.mark.parametrize("tokens", [2048, 32768])
def test_a_cache_is_a_line_in_its_tokens(policy: Policy, tokens):
    sizes = ModelSizes.of(SMALL, policy, dtype="bfloat16")
    geometry = cache_geometry(SMALL, tokens, "bfloat16")
    exact = cache_bytes_per_row(SMALL, policy, geometry)
    line = sizes.layers * (sizes.cache_bytes_per_row + tokens * sizes.cache_bytes_per_token)
    assert line == pytest.approx(exact, rel=1e-12)


def test_a_model_of_long_convolutions_has_sizes():
    """MultiHyena stores keys and values in one of three layers; modes do not grow."""
    sizes = ModelSizes.of(MULTI, dtype="float32")
    assert sizes.cache_bytes_per_token == 2 * MULTI.hidden_size * 4
    modal = ModelSizes.of(MODES, dtype="float32")
    assert modal.cache_bytes_per_token == modal.score_flops == 0
    assert modal.cache_bytes_per_row == cache_bytes_per_row(
        MODES.first(1), ji.full(), cache_geometry(MODES, 64)
    )


def test_parameters_are_all_of_the_model_but_the_final_norm():
    import jax

    total = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SMALL)))
    sizes = ModelSizes.of(SMALL, dtype="float32")
    assert sizes.weight_bytes == 4 * (total - SMALL.hidden_size)
    assert sizes.attention_flops + sizes.mlp_flops == 2 * (
        576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    )


def test_heads_that_do_not_divide_are_padded():
    sizes = ModelSizes.of(SMALL)
    shares = [sizes.attention_share(n) for n in (1, 2, 3, 4)]
    assert shares == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert [sizes.mlp_share(n) for n in (2, 5)] == [1 / 2, 308 / 1536]


def test_a_request_is_its_prompt_and_a_step_for_every_other_token():
    costs = Costs(cluster(("A5000", 4, "X")), ModelSizes.of(SMALL), Assumptions(visit_s=1e-4))
    prompt, output = 100, 17
    whole = costs.stage_s(0, 2, 30, True, prompt, output)
    parts = costs.prefill_s(0, 2, 30, prompt) + costs.ends_s(0, 2, prompt, True)
    for step in range(1, output):
        parts = parts + costs.decode_s(0, 2, 30, prompt + step) + costs.ends_s(0, 2, 1, True)
    assert whole == pytest.approx(float(parts), rel=1e-12)
    lone = costs.stage_s(0, 2, 30, True, prompt, 1)
    assert lone == pytest.approx(
        float(costs.prefill_s(0, 2, 30, prompt) + costs.ends_s(0, 2, prompt, True))
    )


def test_the_paper_counts_one_step_more_and_nothing_beside_it():
    """hexgen.md 2.3: the same scans, one decode step too many in products and messages."""
    model = ModelSizes.published(1024, 8)
    ours, paper = (
        Costs(cluster(("A5000", 4, "X")), model, Assumptions(formula=formula, rows=1))
        for formula in ("phases", "published")
    )
    read = 2 * 1024 * 2 * np.arange(65, 65 + 31).sum() / 2 / 768e9
    broadcast = ours.ends_s(0, 2, 64, False) + 31 * ours.ends_s(0, 2, 1, False)
    step = paper._token_s(0, 2) + paper._reduce_s(0, 2, 1)
    difference = paper.stage_s(0, 2, 1, False, 64, 32) - ours.stage_s(0, 2, 1, False, 64, 32)
    assert difference == pytest.approx(float(step - read - broadcast), rel=1e-9)


def test_the_table_holds_what_the_costs_say():
    machines = (("A5000", 2, "X"), ("A4000", 2, "Y"))
    costs = Costs(cluster(*machines), ModelSizes.of(SMALL), Assumptions(degrees=(1, 3)))
    table = costs.table(100, 20, 4096)
    for m, (t, n) in ((0, (0, 1)), (1, (1, 3))):
        for last in (False, True):
            time = table.stage_s[m, t] + 7 * table.layer_s[m, t] + last * table.last_s[m, t]
            assert time == pytest.approx(float(costs.stage_s(m, n, 7, last, 100, 20)), rel=1e-12)
    assert table.back_s[0, 1] == pytest.approx(19 * 0.02)
    row = costs.row_share(0, 1, 30, True, True, 4096)
    room = costs.room_bytes(0) - ModelSizes.of(SMALL).weight_bytes
    per_row = 30 * 4096 * 2 * 192 * 2 + 4 * 4096 * 576 * 2
    assert row == pytest.approx(per_row / room)


def test_rounded_caches_and_weights_allow_more_layers():
    small = cluster(("A4000", 1, "X"))
    most = {
        name: Costs(small, sizes, Assumptions(rows=64)).most_layers(0, 1, False, False, 32768)
        for name, sizes in {
            "full": ModelSizes.of(SMALL),
            "kivi": ModelSizes.of(SMALL, "kivi"),
            "streaming": ModelSizes.of(SMALL, "streaming"),
            "int8": ModelSizes.of(SMALL, "streaming", weight_bytes=1.03),
        }.items()
    }
    assert most["full"] < most["kivi"] < most["streaming"] < most["int8"]
