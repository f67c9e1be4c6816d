"""Folders of format 3: a dtype per array, matrices in int8 rows, sparse blocks; and format 2."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from broken_checkpoints import edited

from jaxinfer.cli import main
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.convert import convert
from jaxinfer.io.load import load_checkpoint
from jaxinfer.models.quantize import quantize_weights
from jaxinfer.nn.heads import Heads
from jaxinfer.nn.listed import InputMajor
from jaxinfer.nn.mlp import FeedForward, feed_forward
from jaxinfer.sparsity.base import Router, Rule, Static
from tests.factories import CONFIGS, params_of
from tests.sparsity.stored_models import sparse_model, with_sparse_heads

TINY_LLAMA = Path(__file__).parents[2] / "checkpoints" / "tiny-llama"
Q = "layers.0.attn.q.weight"


def equal(ours, theirs):
    """Bit for bit, dtypes and static fields included."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder: Path, cfg, params, **options) -> Path:
    save_checkpoint(folder, Checkpoint(cfg, params), **options)
    return folder


def with_norm(params, dtype: str):
    scale = params["final_norm"]["scale"].astype(dtype)
    return params | {"final_norm": {"scale": scale}}


def test_each_array_keeps_a_dtype_of_its_own_beside_that_of_the_model(tmp_path):
    cfg, half = CONFIGS["llama"], params_of("llama", "bfloat16")
    params = with_norm(half, "float32")
    folder = saved(tmp_path / "m", cfg, params)
    record = json.loads((folder / "config.json").read_text())
    assert record["dtype"] == "bfloat16" and record["dtypes"] == {"final_norm.scale": "float32"}
    equal(load_checkpoint(folder, "bfloat16").params, params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    equal(load_checkpoint(folder, "float32").params, wide)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), half)
    equal(load_checkpoint(folder, "float16").params, with_norm(halves, "float32"))


def test_folders_of_format_2_load_and_are_the_same_in_format_3(tmp_path):
    assert json.loads((TINY_LLAMA / "config.json").read_text())["format_version"] == 2
    old = load_checkpoint(TINY_LLAMA, "bfloat16")
    convert(TINY_LLAMA, tmp_path / "new", dtype="bfloat16")
    record = json.loads((tmp_path / "new" / "config.json").read_text())
    assert record["format_version"] == 3 and record["dtypes"] == {} and record["sparse"] is None
    new = load_checkpoint(tmp_path / "new", "bfloat16")
    equal(old.params, new.params)
    assert old.config == new.config


def test_int8_rows_take_a_byte_per_parameter_and_are_final(tmp_path):
    cfg, params = CONFIGS["llama"], params_of("llama")
    once = saved(tmp_path / "once", cfg, params, int8_rows=True)
    found = load_checkpoint(once, "float32").params
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        if ours.ndim < 2:
            np.testing.assert_array_equal(theirs, ours)
        else:
            step = np.abs(ours).max(axis=1, keepdims=True) / 127
            assert (np.abs(theirs - ours) <= 0.501 * step).all() and not (theirs == ours).all()
    arrays = [*(once / "params").glob("*/0.0"), *(once / "params").glob("*/0")]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(path.stat().st_size for path in arrays) < 1.2 * numbers  # 4 more per 32 to 48
    twice = saved(tmp_path / "twice", cfg, found, int8_rows=True)
    for path in arrays:
        assert path.read_bytes() == (twice / path.relative_to(once)).read_bytes()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), found)
    equal(load_checkpoint(once, "bfloat16").params, half)


def test_the_command_converts_to_int8_rows(tmp_path, capsys):
    arguments = ["convert", str(TINY_LLAMA), str(tmp_path / "m"), "--int8-rows", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] < 4_000_000
    assert json.loads((tmp_path / "m" / "config.json").read_text())["int8_rows"] is True


SPARSE = [
    ("llama", "low rank", None, "float32"),
    ("llama", "low rank", None, "bfloat16"),
    ("llama", "linear", "hidden", "bfloat16"),
    ("llama", "of the embedding", "down", "float32"),
    ("learned", "static", None, "float32"),
    ("biased", "static", "down", "bfloat16"),
    ("biased", "linear", None, "float32"),
]


@pytest.mark.parametrize("name, selector, codes, dtype", SPARSE)
def test_a_sparse_model_comes_back_bit_for_bit(tmp_path, name, selector, codes, dtype):
    cfg, params = sparse_model(name, selector, codes=codes, dtype=dtype)
    folder = saved(tmp_path / "m", cfg, params)
    found = load_checkpoint(folder, dtype)
    equal(found.params, params)
    again = saved(tmp_path / "again", found.config, found.params)
    assert (folder / "config.json").read_bytes() == (again / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selected_heads_come_back_bit_for_bit(tmp_path, dtype):
    cfg, params = sparse_model("llama", "low rank", dtype=dtype)
    router = Router(
        outer=jnp.asarray(np.random.default_rng(4).normal(size=(2, 32)), jnp.float32),
        rule=Rule(most=1),
    )
    params = with_sparse_heads(cfg, params, router, keys="deferred", unions=(0.5, 0.75))
    folder = saved(tmp_path / "m", cfg, params)
    equal(load_checkpoint(folder, dtype).params, params)
    cast = load_checkpoint(folder, "float16").params["layers"][0]["attn"]
    assert cast["out"]["weight"].dtype == "float16" == cast["out"]["weight"].weight.dtype
    assert cast["heads"].selector.outer.dtype == jnp.float32
    static = Static(selected=jnp.asarray([True, False]))
    params = with_sparse_heads(cfg, params_of("llama", dtype), static)
    equal(load_checkpoint(saved(tmp_path / "static", cfg, params), dtype).params, params)


def test_what_selects_and_scales_keep_their_dtype_when_the_model_is_cast(tmp_path):
    cfg, params = sparse_model("llama", "low rank", codes="hidden")
    folder = saved(tmp_path / "m", cfg, params)
    found = load_checkpoint(folder, "bfloat16").params
    assert found["embed"]["tokens"].dtype == jnp.bfloat16
    ours, theirs = params["layers"][1]["mlp"], found["layers"][1]["mlp"]
    equal(theirs, ours)


def test_a_sparse_block_in_int8_rows_computes_nearly_the_same(tmp_path):
    cfg, params = sparse_model("llama", "low rank")
    found = load_checkpoint(saved(tmp_path / "m", cfg, params, int8_rows=True), "float32").params
    assert jax.tree.structure(found) == jax.tree.structure(params)
    x = jax.random.normal(jax.random.key(1), (1, 5, cfg.hidden_size))
    blocks = (model["layers"][1]["mlp"] for model in (found, params))
    close, exact = (feed_forward(cfg, block, x, 1) for block in blocks)
    assert 0 < np.abs(close - exact).max() < 0.1 * np.abs(exact).max()
    twice = saved(tmp_path / "twice", cfg, found, int8_rows=True)
    equal(load_checkpoint(twice, "float32").params, found)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Other(Router):
    """A selector that is no plain router."""


def changed_block(params, **changes):
    first, layer = params["layers"]
    return params | {"layers": (first, layer | {"mlp": replace(layer["mlp"], **changes)})}


def with_attention(params, **changes):
    first, second = params["layers"]
    return params | {"layers": (first | {"attn": first["attn"] | changes}, second)}


def test_what_a_folder_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    cfg, dense = CONFIGS["llama"], params_of("llama")
    _, sparse = sparse_model("llama", "low rank")
    router = sparse["layers"][1]["mlp"].selector
    other = Other(inner=router.inner, outer=router.outer, rule=router.rule)
    first, second = dense["layers"]
    sparse_heads = with_sparse_heads(cfg, dense, Static(selected=jnp.ones(2, bool)))
    halved = InputMajor.of(first["attn"]["out"]["weight"].astype(jnp.bfloat16))
    foreign = {"layers": (first, second | {"mlp": FeedForward()})}
    cases = {
        "weights in fewer bits .*int8_rows=True": quantize_weights(dense, "int8"),
        "a selector of kind Other": changed_block(sparse, selector=other),
        "a block of kind FeedForward": dense | foreign,
        "heads of kind Heads": with_attention(dense, heads=Heads()),
        "made for another dtype": with_attention(sparse_heads, out={"weight": halved}),
        "more is no part of the model": dense | {"more": jnp.zeros(3)},
        "final_norm.scale is missing": {k: v for k, v in dense.items() if k != "final_norm"},
        r"shape \[61, 32\], the config asks for \[62, 32\]": dense,
        "parameters of int32 cannot": dense | {"embed": {"tokens": jnp.zeros((61, 32), jnp.int32)}},
    }
    for message, params in cases.items():
        wrong = replace(cfg, vocab_size=62) if "62" in message else cfg
        with pytest.raises(ValueError, match=message):
            saved(tmp_path / "m", wrong, params)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    cfg, params = sparse_model("llama", "linear", codes="down")
    return saved(tmp_path_factory.mktemp("good") / "m", cfg, params)


def top(**changes):
    return edited(lambda data: data.update(changes))


def block(**changes):
    return edited(lambda data: data["sparse"][1]["mlp"].update(changes))


def selector(**changes):
    return edited(lambda data: data["sparse"][1]["mlp"]["selector"].update(changes))


def router(**changes):
    return edited(lambda data: data["sparse"][1]["mlp"]["selector"]["router"].update(changes))


FORGED = {
    "an unknown version": (top(format_version=4), "format version 4; this release reads 2 and 3"),
    "a version that is a list": (top(format_version=[3]), "format version [3]"),
    "no dtype": (top(dtype=None), "lacks 'dtype'"),
    "dtypes that are a list": (top(dtypes=[]), "'dtypes' must be an object"),
    "a dtype of nothing": (top(dtypes={"more": "float32"}), "gives 'more' the dtype"),
    "a dtype of codes": (top(dtypes={"layers.1.mlp.weights.up": "float32"}), "weights.up'"),
    "an integer dtype": (top(dtypes={"final_norm.scale": "int8"}), "the dtype 'int8'"),
    "a dtype that is a list": (top(dtypes={"final_norm.scale": []}), "the dtype []"),
    "another dtype": (top(dtypes={}, dtype="bfloat16"), "config.json says bfloat16"),
    "rows that are a number": (top(int8_rows=1), "'int8_rows' true or false"),
    "rows that are not": (top(int8_rows=True), "config.json says int8[61, 32]"),
    "sparse parts of one layer": (top(sparse=[None]), "must describe 2 layers"),
    "sparse parts that are a text": (top(sparse="ab"), "must describe 2 layers"),
    "another part": (
        top(sparse=[None, {"norm": 1}]),
        "sparse of a layer may be heads and mlp, got",
    ),
    "a dense layer": (top(sparse=[None, None], dtypes={}), "layers.1.mlp.down.weight"),
    "a block that is a list": (top(sparse=[None, {"mlp": []}]), "BlockForm must be an object"),
    "blocks that do not divide": (selector(units=7), "7 blocks do not divide 48 neurons"),
    "no blocks": (selector(units=0), "at least 1 unit"),
    "other blocks": (selector(units=24), "config.json says float32[24, 32]"),
    "a huge rank": (router(rank=2**31 - 1), "config.json says float32[12, 2147483647]"),
    "a static selector": (selector(router=None), "'dtypes' gives 'layers.1.mlp.selector.outer'"),
    "a router that is a number": (selector(router=3), "RouterForm must be an object"),
    "more units than there are": (router(most=13), "selects 13 of 12 units"),
    "a look-ahead of two": (router(lookahead=2), "lookahead must be 0, 0.5 or 1"),
    "a threshold of NaN": (router(threshold=float("nan")), "threshold must be"),
    "heads of another model": (
        top(
            sparse=[
                {
                    "heads": {
                        "selector": {"units": 3, "router": None},
                        "unions": [],
                        "keys": "always",
                    }
                },
                None,
            ],
            dtypes={},
        ),
        "2 in this model of 4 query heads; the selector has 3 units",
    ),
    "keys at no time": (
        top(
            sparse=[
                {
                    "heads": {
                        "selector": {"units": 2, "router": None},
                        "unions": [],
                        "keys": "never",
                    }
                },
                None,
            ],
            dtypes={},
        ),
        "keys must be one of 'always', 'deferred'",
    ),
    "unions that fall": (block(unions=[0.5, 0.1]), "do not fall"),
    "unions of texts": (block(unions=["a"]), "unions must be a list"),
    "an unknown scale": (block(scales=["up_scale", "x"]), "scales must be a list"),
    "scales without that of up": (block(scales=["down_scale"]), "have an up_scale"),
    "no scale of the gate": (block(scales=["up_scale"]), "for matrices that are not"),
    "no codes": (block(scales=[]), "'dtypes' gives 'layers.1.mlp.weights.up_scale'"),
    "an unknown field": (block(colour="red"), "unknown config fields ['colour']"),
    "a huge width": (
        edited(lambda d: d["model"].update(intermediate_size=12 * 10**8)),
        "config.json says float32[32, 1200000000]",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", FORGED)
def test_a_forged_description_is_refused_in_one_line_before_anything_is_allocated(
    good, tmp_path, monkeypatch, case
):
    change, words = FORGED[case]
    folder = Path(shutil.copytree(good, tmp_path / "m"))
    change(folder)
    monkeypatch.setattr("jaxinfer.io.orbax.aligned_empty", None)
    with pytest.raises(ValueError) as refused:
        load_checkpoint(folder, "float32")
    line = str(refused.value)
    assert str(folder) in line and words in line, line
    assert line.isprintable() and len(line) < 1000


def test_forged_scales_of_rows_are_refused(tmp_path):
    cfg, params = CONFIGS["llama"], params_of("llama")
    folder = saved(tmp_path / "m", cfg, params, int8_rows=True)
    path = folder / "params" / f"{Q}#scale" / "0.0"
    scales = np.fromfile(path, np.float32)
    for value, words in ((np.nan, "non-finite"), (np.inf, "non-finite"), (3e38, "non-finite")):
        changed = scales.copy()
        changed[3] = value
        changed.tofile(path)
        with pytest.raises(ValueError, match=f"{Q} holds {words} values"):
            load_checkpoint(folder, "float32")
    shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match=f"cannot read {Q}#scale"):
        load_checkpoint(folder, "float32")


def test_bytes_that_are_no_bools_count_as_true(tmp_path):
    cfg, params = sparse_model("llama", "static")
    folder = saved(tmp_path / "m", cfg, params)
    path = folder / "params" / "layers.1.mlp.selector.selected" / "0"
    path.write_bytes(bytes([0, 1, 2, 255] * 3))
    selected = load_checkpoint(folder, "float32").params["layers"][1]["mlp"].selector.selected
    assert np.asarray(selected).view(np.uint8).tolist() == [0, 1, 1, 1] * 3
