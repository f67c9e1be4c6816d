"""What DejaVu's predictors learn from: labels, files of activations, the loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.layer_reader import LayerReader
from jaxinfer.models.quantize import quantize_weights
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.train.dejavu.collection import collect, place_of
from jaxinfer.train.dejavu.labels import contributions, needed_groups, needed_neurons
from jaxinfer.train.dejavu.objective import loss_of, weighted_cross_entropy
from jaxinfer.train.dejavu.recipe import DejavuRecipe
from jaxinfer.train.dejavu.training import split
from tests.factories import CONFIGS, params_of, random_tokens
from tests.train.toy_opt import CFG, TOKENS, toy_params

LENGTHS = [20, 7, 13]


def everything(index, layer, view):
    return {name: x for name, x in vars(view).items() if x is not None}


def gathered(tmp_path, model: str = "llama", **options):
    """A collection, and what a walk sees of each layer."""
    cfg, params = CONFIGS[model], params_of(model)
    tokens = random_tokens(3, 20)
    found = collect(cfg, params, tokens, DejavuRecipe(**options), tmp_path, lengths=LENGTHS)
    walk = LayerReader(cfg, 20, everything)
    hidden = walk.embed(params, tokens)
    first = np.concatenate([x[:n] for x, n in zip(hidden, LENGTHS, strict=True)])
    seen = [walk.read(i, one, hidden, LENGTHS) for i, one in enumerate(params["layers"])]
    return cfg, params, found, first, seen


def labels(found, kind, layer):
    return found.labels(kind, layer, slice(None))


@pytest.mark.parametrize("lookahead", [0.0, 0.5, 1.0, None])
def test_inputs_are_those_that_the_lookahead_reads(tmp_path, lookahead):
    """dejavu.md 2.4."""
    cfg, _, found, first, seen = gathered(tmp_path, lookahead=lookahead, heads=0.5)
    sites = [first]
    for one in seen:
        sites += [one["attention_input"], one["mlp_input"]]
    for kind, own in (("heads", 1), ("neurons", 2)):
        having = found.layers(kind, cfg.num_layers)
        without = {0.0: 0, 0.5: kind == "heads", 1.0: 1, None: 0}[lookahead]
        assert having == list(range(without, cfg.num_layers))
        for layer in having:
            place = 0 if lookahead is None else 2 * layer + own - round(2 * lookahead)
            assert place == place_of(kind, layer, lookahead)
            wanted = sites[place].astype(np.float16)
            np.testing.assert_array_equal(found.inputs(kind, layer), wanted)
    assert not list(tmp_path.glob("hidden-*")) and found.rows == sum(LENGTHS)


def test_of_a_relu_the_neurons_needed_are_those_that_are_not_zero(tmp_path):
    """dejavu.md 2.3, and trap 3.5: rows are exactly the tokens."""
    params, tokens = toy_params(), TOKENS[:3]
    lengths = [64, 9, 30]
    found = collect(CFG, params, tokens, DejavuRecipe(), tmp_path, lengths=lengths)
    walk = LayerReader(CFG, 64, everything)
    hidden = walk.embed(params, tokens)
    for index, layer in enumerate(params["layers"]):
        inner = walk.read(index, layer, hidden, lengths)["hidden"]
        needed = labels(found, "neurons", index)
        np.testing.assert_array_equal(needed, inner > 0)
        assert len(needed) == 103 and 0.1 < needed.mean() < 0.3


@pytest.mark.parametrize(("size", "share"), [(1, 0.25), (4, 0.25), (16, 0.5)])
def test_else_they_are_those_that_add_most_to_the_output(tmp_path, size, share):
    cfg, params, found, _, seen = gathered(tmp_path, block_size=size, density=share)
    for index, one in enumerate(seen):
        down = np.asarray(params["layers"][index]["mlp"]["down"]["weight"])
        each = (one["hidden"] * np.linalg.norm(down, axis=0)) ** 2
        amounts = each.reshape(len(each), -1, size).sum(axis=2)
        count = round(share * amounts.shape[1])
        least = np.sort(amounts, axis=1)[:, -count][:, None]
        np.testing.assert_array_equal(labels(found, "neurons", index), amounts >= least)


def test_groups_of_heads_are_needed_by_the_norm_of_their_outputs(tmp_path):
    cfg, _, found, _, seen = gathered(tmp_path, heads=0.5)
    for index, one in enumerate(seen):
        amounts = (one["heads"] ** 2).reshape(sum(LENGTHS), cfg.num_kv_heads, -1).sum(axis=2)
        np.testing.assert_array_equal(labels(found, "heads", index).argmax(1), amounts.argmax(1))
        assert (labels(found, "heads", index).sum(axis=1) == 1).all()


def test_nothing_is_needed_where_nothing_is_given():
    heads = jnp.zeros((3, 4, 8)).at[0, 2].set(1.0)
    assert needed_groups(heads, 2, 1.0).tolist() == [[False, True], [False] * 2, [False] * 2]


def test_collecting_goes_on_where_it_was_killed(tmp_path):
    cfg, params, tokens = CONFIGS["llama"], params_of("llama"), random_tokens(3, 20)
    recipe = DejavuRecipe(heads=0.5)
    whole = collect(cfg, params, tokens, recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    def until(layer: int):
        seen = []

        def report(what, done, total, note=""):
            seen.append(what)
            if seen.count("layers") == layer and what == "reading" and done == 2:
                raise Killed

        return report

    for layer in (0, 1):
        with pytest.raises(Killed):
            collect(cfg, params, tokens, recipe, tmp_path / "cut", report=until(layer))
    (tmp_path / "cut" / "hidden-01.npy").unlink()  # may be missing: it can be computed again
    reads = []
    cut = collect(
        cfg, params, tokens, recipe, tmp_path / "cut",
        report=lambda what, *rest, **more: reads.append(what),
    )  # fmt: skip
    assert reads.count("layers") == 1
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in cut.folder.iterdir())
    for name in names:
        assert (whole.folder / name).read_bytes() == (cut.folder / name).read_bytes()


def with_first(change):
    """The toy with another first layer."""
    first, *rest = toy_params()["layers"]
    return toy_params() | {"layers": (change(first), *rest)}


def test_activations_that_teach_nothing_are_refused(tmp_path):
    def dead(layer):
        up = layer["mlp"]["up"]
        return layer | {"mlp": layer["mlp"] | {"up": up | {"bias": up["bias"] - 1e3}}}

    def loud(layer):
        return layer | {"mlp_norm": layer["mlp_norm"] | {"scale": jnp.full((64,), 1e6)}}

    def broken(layer):
        bias = layer["attn"]["v"]["bias"].at[0].set(jnp.nan)
        return layer | {"attn": layer["attn"] | {"v": layer["attn"]["v"] | {"bias": bias}}}

    messages = {
        dead: "layer 0: no token needs any of the neurons, as all activations are zero",
        loud: "layer 0's mlp inputs exceed 65504",
        broken: "layer 0 gives numbers that are not finite",
    }
    for change, message in messages.items():
        with pytest.raises(ValueError, match=message):
            collect(CFG, with_first(change), TOKENS[:2], DejavuRecipe(), tmp_path / message[:9])
        assert not list((tmp_path / message[:9]).glob("neurons-*"))
    few = quantize_weights(params_of("llama"), "int8")["layers"][0]["mlp"]
    assert isinstance(few["down"]["weight"], StoredWeight)
    with pytest.raises(ValueError, match="load it without weights"):
        contributions(few, jnp.ones((2, 48)))


def test_too_few_texts_for_a_test_are_refused():
    """dejavu.md trap 3.5."""
    assert split([64] * 48, 0.1) == 43 and split([64, 64], 0.05) == 1
    with pytest.raises(ValueError, match="1 sequences are too few to train and to test on"):
        split([500], 0.05)
    with pytest.raises(ValueError, match="held out of 3: 63 tokens are too few, at least 64"):
        split([500, 500, 63], 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 0.7}, "lookahead must be 0, 0.5 or 1 layers"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
        ({"recall": float("nan")}, r"recall must lie in \(0, 1\], got nan"),
        ({"heads": -0.5}, r"heads must lie in \(0, 1\]"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"validation": 1.0}, r"validation must lie in \(0, 1\)"),
        ({"block_size": 7}, "blocks of 7 neurons do not divide the 48 of a layer"),
    ],
)
def test_impossible_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DejavuRecipe(**options).check(CONFIGS["llama"])


def test_recipes_that_leave_nothing_to_select_are_refused():
    with pytest.raises(ValueError, match="share one key head"):
        DejavuRecipe(heads=0.5).check(CONFIGS["parallel"])
    one = replace(CONFIGS["llama"], num_layers=1)
    for options in ({"lookahead": 1.0}, {"lookahead": 0.5, "heads": 0.5}):
        with pytest.raises(ValueError, match="leaves the only layer dense"):
            DejavuRecipe(**options).check(one)
    DejavuRecipe(lookahead=0.5).check(one)


def test_the_loss_by_hand():
    """dejavu.md 2.3: w is the batch's density (and 0.005 for neurons), of the needed it is 1."""
    logits, needed = np.array([[2.0, -1.0], [0.5, 3.0]]), np.array([[1, 0], [0, 0]], bool)
    w = 0.25 + 0.005
    p = 1 / (1 + np.exp(-logits))
    wanted = (-np.log(p[0, 0]) - w * np.log(1 - p).ravel()[1:].sum()) / 4
    found = weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(needed), 0.005)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_layers_and_kinds_add_up_and_do_not_meet():
    from jaxinfer.sparsity.predictors import Predictor, stacked

    units = {"neurons": 11, "heads": 3}
    rng = np.random.default_rng(0)
    needed = {kind: rng.random((2, 5, count)) < 0.4 for kind, count in units.items()}
    x = {kind: rng.normal(size=(2, 5, 8)).astype(np.float16) for kind in units}
    modules = {kind: stacked(count, 4) for kind, count in units.items()}
    params = {
        kind: module.init(jax.random.key(1), jnp.ones((2, 1, 8)))["params"]
        for kind, module in modules.items()
    }
    batch = {
        kind: {"x": jnp.asarray(x[kind]), "bits": jnp.asarray(np.packbits(needed[kind], axis=-1))}
        for kind in units
    }
    loss = loss_of(modules, units)
    found, parts = loss(params, batch, jax.random.key(0))
    wanted = {}
    for kind, floor in (("neurons", 0.005), ("heads", 0.0)):
        total = 0.0
        for layer in range(2):
            own = jax.tree.map(lambda leaf: leaf[layer], params[kind])  # noqa: B023
            logits = Predictor(units[kind], 4).apply(
                {"params": own}, jnp.asarray(x[kind][layer], jnp.float32)
            )
            total += weighted_cross_entropy(logits, jnp.asarray(needed[kind][layer]), floor)
        wanted[kind] = total
    np.testing.assert_allclose(found, sum(wanted.values()), rtol=1e-5)
    for kind in units:
        np.testing.assert_allclose(parts[kind], wanted[kind], rtol=1e-5)


def test_a_plain_relu_needs_no_share_and_blocks_of_it_do():
    hidden = jnp.asarray([[0.0, 2.0, 0.0, 0.5]])
    block = {"down": {"weight": jnp.ones((3, 4))}}
    cfg = replace(CFG, intermediate_size=4)
    assert needed_neurons(cfg, block, hidden, 1, 0.25).tolist() == [[False, True, False, True]]
    assert needed_neurons(cfg, block, hidden, 2, 0.5).tolist() == [[True, False]]
