"""What methods are counted to read and multiply, against numbers worked out by hand."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxinfer.models.params import abstract_params
from jaxinfer.sparsity.accounting import Densities, Work, attention_work, block_work, shares
from jaxinfer.sparsity.base import Router, Rule, Static
from jaxinfer.sparsity.heads import SparseHeads, with_heads
from jaxinfer.sparsity.inputs import SparseInputs
from jaxinfer.sparsity.masked import ChosenByPrompt, LargeGate, LargestHidden, MaskedMlp
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.moefication import ExpertRouter
from tests.factories import CONFIGS

D, F, J = 32, 48, 12
GATED = CONFIGS["llama"]
PLAIN = replace(CONFIGS["learned"], mlp_bias=True)
RULE = Rule(most=3)


def block_of(cfg):
    block = abstract_params(cfg)["layers"][0]["mlp"]
    return {n: {k: jnp.zeros(x.shape, x.dtype) for k, x in p.items()} for n, p in block.items()}


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def works():
    """(block, bytes and products per token) at density 1/4."""
    gated, plain, quarter = block_of(GATED), block_of(PLAIN), 0.25
    rows, biases = F * D, 4 * F
    gated_all = 3 * rows * quarter
    masked = lambda dense, criterion: MaskedMlp(dense=dense, criterion=criterion)  # noqa: E731
    yield "oracle", masked(gated, LargestHidden(most=jnp.int32(12))), 4 * gated_all, gated_all
    yield "griffin", masked(gated, ChosenByPrompt(most=jnp.int32(12))), 4 * gated_all, gated_all
    cats = rows * (1 + 2 * quarter)  # the gate whole: (1 + 2 rho) / 3 of the block
    yield "cats", masked(gated, LargeGate(threshold=zeros())), 4 * cats, cats
    cats = rows * (1 + quarter)  # `up` and its bias whole, of `down` all of the bias
    extra = biases + 4 * D
    yield "cats, plain", masked(plain, LargeGate(threshold=zeros())), 4 * cats + extra, cats
    static = SparseMlp.of(gated, Static(selected=jnp.zeros(J, bool)))
    yield "static", static, 4 * gated_all, gated_all
    deja_vu = SparseMlp.of(plain, Router(outer=zeros(F, 4), inner=zeros(4, D), rule=RULE))
    of_plain, predictor = 2 * rows * quarter, 4 * (F + D)
    extra = biases * quarter + 4 * D
    yield "DejaVu", deja_vu, 4 * (of_plain + predictor) + extra, of_plain + predictor
    lte = SparseMlp.of(gated, Router(outer=zeros(J, D), bias=zeros(J), rule=RULE))
    yield "LTE", lte, 4 * (gated_all + J * D + J), gated_all + J * D + J
    experts = ExpertRouter(inner=zeros(J, D), outer=zeros(J, J), rule=RULE)
    learned = gated_all + J * D + J * J
    yield "MoEfication", SparseMlp.of(gated, experts), 4 * learned, learned


@pytest.mark.parametrize("case", list(works()), ids=lambda case: case[0])
def test_what_a_block_reads_is_the_sum_of_its_slices(case):
    """dejavu.md 6.10, for every method."""
    _, block, read, products = case
    assert block_work(block, 0.25) == Work(pytest.approx(read), pytest.approx(products))


def test_inputs_are_counted_weight_by_weight():
    block, used = block_of(GATED), {"gate": 0.5, "up": 0.25, "down": 0.75}
    same = {"dtype": "float32", "origin": ""}
    teal = {
        name: {"weight": SparseInputs(weight=part["weight"], threshold=zeros(), **same)}
        for name, part in block.items()
    }
    assert block_work(teal, 1.0, used) == Work(4 * 1.5 * F * D, 1.5 * F * D)
    wina = {
        name: {
            "weight": SparseInputs(
                weight=part["weight"], most=jnp.int32(4),
                norms=zeros(part["weight"].shape[1]), **same,
            )
        }
        for name, part in block.items()
    }  # fmt: skip
    norms = 2 * D + F
    assert block_work(wina, 1.0, used) == Work(4 * (1.5 * F * D + norms), 1.5 * F * D + norms)


def test_heads_save_queries_and_outputs():
    width, kv = 32, 16
    attention = {
        name: {"weight": zeros(rows, columns)}
        for name, rows, columns in (
            ("q", width, D), ("k", kv, D), ("v", kv, D), ("out", D, width),
        )
    }  # fmt: skip
    heads = SparseHeads.of(GATED, Router(outer=zeros(2, D), rule=Rule(most=1)))
    kept = D * width + 2 * D * kv + 2 * D  # half of queries and outputs, keys, values, the router
    sparse = with_heads(attention, heads)
    assert attention_work(sparse, 0.5) == Work(4 * kept, kept)
    assert attention_work(attention, 0.5) == attention_work(sparse | {"heads": ()}, 1.0)


def test_a_model_is_the_sum_of_its_layers():
    dense, attn = block_of(GATED), {"q": {"weight": zeros(D, D)}}
    layer = {"mlp": dense, "attn": attn}
    sparse = layer | {"mlp": MaskedMlp(dense=dense, criterion=LargestHidden(most=jnp.int32(1)))}
    got = shares({"layers": (layer,) * 2}, {"layers": (layer, sparse)}, Densities((1.0, 0.5)))
    assert got.mlp_products == pytest.approx(0.75)
    block, projection = 3 * F * D, D * D
    assert got.layer_bytes == pytest.approx(
        (1.5 * block + 2 * projection) / (2 * block + 2 * projection)
    )
