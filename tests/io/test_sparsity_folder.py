"""Sparsity artefacts on disk: exact, small, whole or absent, and as untrusted as weights."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.io import sparsity as module
from jaxinfer.io.sparsity import CONFIG, WEIGHTS, load_sparsity, save_sparsity
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from tests.factories import CONFIGS as MODELS
from tests.sparsity.artefacts import artefact_of

KINDS = {
    "routers": {"forms": ("router", None), "method": "deja_vu", "results": {"recall": [0.9, None]}},
    "look-ahead": {"forms": (None, "router"), "lookahead": 1.0},
    "of the embedding": {"forms": ("router",), "lookahead": None},
    "heads": {"forms": ("heads", "router")},
    "adapters": {"forms": ("adapters", "router")},
    "new weights": {"forms": ("new weights", None)},
    "plain": {"name": "learned", "forms": ("adapters", "new weights")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_comes_back_bit_for_bit_and_is_saved_again_to_the_same_bytes(tmp_path, kind):
    artefact = artefact_of(**KINDS[kind])
    save_sparsity(tmp_path / "a", artefact)
    found = load_sparsity(tmp_path / "a")
    assert found.config == artefact.config
    assert jax.tree.structure(found.layers) == jax.tree.structure(artefact.layers)
    jax.tree.map(np.testing.assert_array_equal, found.layers, artefact.layers)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.layers)} <= {"float32", "int32"}
    save_sparsity(tmp_path / "b", found)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_matrix_takes_about_a_byte_per_number(tmp_path):
    artefact = artefact_of(forms=("new weights",))
    save_sparsity(tmp_path / "a", artefact)
    count = sum(leaf.size for leaf in jax.tree.leaves(artefact.layers))
    assert (tmp_path / "a" / WEIGHTS).stat().st_size < 1.2 * count + 5000


def test_only_artefacts_are_replaced_and_only_when_asked_for(tmp_path, monkeypatch):
    place = tmp_path / "a"
    save_sparsity(place, artefact_of())
    before = (place / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="holds a sparsity artefact already"):
        save_sparsity(place, artefact_of(forms=("heads",)))

    def full(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(module, "write_json", full)
        save_sparsity(place, artefact_of(forms=("heads",)), overwrite=True)
    assert (place / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    save_sparsity(place, artefact_of(forms=("heads",)), overwrite=True)
    assert (place / WEIGHTS).read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a sparsity artefact"):
        save_sparsity(tmp_path / "mine", artefact_of(), overwrite=True)


def test_routers_are_refused_for_another_look_ahead_than_they_were_trained_for(tmp_path):
    save_sparsity(tmp_path / "a", artefact_of(forms=(None, "router"), lookahead=0.5))
    assert load_sparsity(tmp_path / "a", lookahead=0.5).config.lookahead == 0.5
    for other in (0, 1.0, None):
        with pytest.raises(ValueError, match=f"trained for look-ahead 0.5, not {other}; .*train"):
            load_sparsity(tmp_path / "a", lookahead=other)


def test_names_that_are_unknown_or_not_installed_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no sparsity artefact at 'nowhere'.*jaxinfer train lte"):
        load_sparsity("nowhere")
    monkeypatch.setitem(module.NAMED, "lte-toy", "checkpoints/lte-toy")
    with pytest.raises(ValueError, match="lte-toy is not installed; run from the source tree"):
        load_sparsity("lte-toy")
    save_sparsity(tmp_path / "lte-toy", artefact_of())
    monkeypatch.setattr(module, "shipped_folder", lambda name: tmp_path / name.split("/")[1])
    assert load_sparsity("lte-toy").config.model == "llama"


@pytest.fixture
def folder(tmp_path):
    save_sparsity(tmp_path / "a", artefact_of(forms=("adapters", "router")))
    return tmp_path / "a"


def first(change):
    """A change of the first layer's description."""
    return lambda data: change(data["layers"][0])


def router(**changes):
    return first(lambda layer: layer["router"].update(changes))


CONFIGS = {
    "another format": (lambda d: d.update(format="other"), "no sparsity artefact of version"),
    "another version": (lambda d: d.update(format_version=99), "no sparsity artefact of version"),
    "an unknown field": (lambda d: d.update(colour=1), "unknown config fields ['colour']"),
    "no fingerprint": (lambda d: d.pop("fingerprint"), "fields ['fingerprint'] are missing"),
    "an unknown method": (lambda d: d.update(method="magic"), "method must be one of"),
    "a recipe that is a list": (lambda d: d.update(recipe=[1]), "recipe must be an object"),
    "a size that is a truth value": (lambda d: d.update(hidden_size=True), "a 32-bit integer"),
    "no width": (lambda d: d.update(hidden_size=0), "hidden_size must be from 1"),
    "another width": (lambda d: d.update(hidden_size=2**31 - 1), "expected I8[12, 2147483647]"),
    "more neurons": (lambda d: d.update(intermediate_size=96), "expected I8[24"),
    "a block size of none": (lambda d: d.update(block_size=0), "block_size must be from 1"),
    "blocks that do not divide": (lambda d: d.update(block_size=7), "do not divide 48"),
    "a million layers": (lambda d: d.update(num_layers=10**6), "from 1 to 1024"),
    "more layers": (lambda d: d.update(num_layers=3), "must describe 3 layers"),
    "layers that are a number": (lambda d: d.update(layers=2), "must describe 2 layers"),
    "a layer that is a list": (lambda d: d.update(layers=[[], []]), "must be an object"),
    "a layer less": (lambda d: d.update(layers=[d["layers"][0], None]), "is not known"),
    "an impossible look-ahead": (lambda d: d.update(lookahead=0.25), "must be 0, 0.5 or 1"),
    "a look-ahead that is a text": (lambda d: d.update(lookahead="0"), "lookahead must be"),
    "another look-ahead than the layers'": (router(lookahead=1.0), "where the config says 0.0"),
    "a look-ahead of NaN": (router(lookahead=float("nan")), "lookahead must be"),
    "no rank": (router(rank=0), "rank of a router must be positive"),
    "a huge rank": (router(rank=2**31 - 1), "expected I8[12, 2147483647]"),
    "more units than there are": (router(most=13), "13 of 12 units"),
    "no unit": (router(most=0), "at least 1 unit"),
    "no rule": (router(most=None, threshold=None), "needs a number of units, a threshold"),
    "a threshold of infinity": (router(threshold=float("inf")), "threshold must be"),
    "no bias": (router(bias=False), "'layers.0.router.bias' is not known"),
    "no permutation": (first(lambda x: x.update(permuted=False)), "permutation' is not known"),
    "a huge adapter": (first(lambda x: x.update(adapters=2**31 - 1)), "expected I8["),
    "a truth value for a rank": (first(lambda x: x.update(adapters=True)), "adapters must be"),
    "new weights beside": (first(lambda x: x.update(new_weights=True)), "either them, or a"),
    "unions above one": (first(lambda x: x.update(unions=[0.5, 2])), "shares from 0 to 1"),
    "unions without end": (first(lambda x: x.update(unions=[0.5] * 99)), "at most 16 shares"),
    "unions of texts": (first(lambda x: x.update(unions=["a"])), "unions must be a list"),
    "recalls that fall": (first(lambda x: x.update(recalls=[1.0] * 127 + [0.5])), "do not fall"),
    "too few recalls": (first(lambda x: x.update(recalls=[0.5])), "recalls are 128 shares"),
    "recalls of texts": (first(lambda x: x.update(recalls=["a"])), "recalls must be a list"),
    "no router": (first(lambda x: x.update(router=None)), "dense: give None in its place"),
    "a router that is a text": (first(lambda x: x.update(router="a")), "RouterForm must be an"),
}
WEIGHTS_OF = {
    "a neuron twice": (lambda t: t["layers.0.permutation"].fill(3), "a permutation that is none"),
    "a neuron below": (
        lambda t: t.update({"layers.0.permutation": t["layers.0.permutation"] - 1}),
        "a permutation that is none",
    ),
    "an order as fractions": (
        lambda t: t.update({"layers.0.permutation": t["layers.0.permutation"].astype("f4")}),
        "expected I32[48]",
    ),
    "a scale of infinity": (
        lambda t: t["layers.0.router.outer#scale"].fill(np.inf), "not finite"
    ),
    "a bias of NaN": (lambda t: t["layers.0.router.bias"].fill(np.nan), "not finite"),
    "no scale": (lambda t: t.pop("layers.1.router.outer#scale"), "is missing"),
    "an array more": (lambda t: t.update(more=np.zeros(3, np.int8)), "'more' is not known"),
    "scales per column": (
        lambda t: t.update({"layers.1.router.inner#scale": np.ones((1, 32), "f4")}),
        "expected F32[6, 1]",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change, words", CONFIGS.values(), ids=CONFIGS)
def test_a_forged_description_is_refused_in_one_line(folder, change, words):
    data = json.loads((folder / CONFIG).read_text())
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))
    check_refused(folder, words)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change, words", WEIGHTS_OF.values(), ids=WEIGHTS_OF)
def test_forged_arrays_are_refused_in_one_line(folder, change, words):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    check_refused(folder, words)


def test_arrays_beyond_the_memory_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setattr("jaxinfer.io.weights.available_bytes", lambda: 1000)
    check_refused(folder, "there are 1000")


def check_refused(folder, words):
    with pytest.raises(ValueError) as refused:
        load_sparsity(folder)
    line = str(refused.value)
    assert str(folder) in line and words in line, line
    assert line.isprintable() and len(line) < 1000


def test_a_name_from_a_file_reaches_messages_escaped(tmp_path):
    artefact = artefact_of()
    hostile = replace(artefact.config, model="\x1b[2J" + "y" * 5000)
    save_sparsity(tmp_path / "a", replace(artefact, config=hostile))
    found = load_sparsity(tmp_path / "a")
    with pytest.raises(ValueError) as refused:
        found.check(MODELS["mpt"])
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_routers_and_adapters_of_smollm2_fit_into_3_megabytes(tmp_path):
    """LTE of rank 8 with blocks of 32 for a model of 30 layers, 576 wide with 1536 neurons."""
    rng = np.random.default_rng(0)
    cfg = replace(
        MODELS["llama"], num_layers=30, hidden_size=576, intermediate_size=1536, num_heads=9,
        num_kv_heads=3, head_dim=64,
    )  # fmt: skip
    config = SparsityConfig.of(cfg, "0" * 16, method="lte", model="smollm2-135m", block_size=32)
    layer = LayerSparsity(
        router=Router(outer=rng.normal(size=(48, 576)).astype("f4"), rule=Rule(threshold=0.0)),
        permutation=rng.permutation(1536).astype(np.int32),
        adapters={
            name: {
                "left": rng.normal(size=(8, outputs)).astype("f4"),
                "right": rng.normal(size=(8, inputs)).astype("f4"),
            }
            for name, (outputs, inputs) in config.matrices().items()
        },
        unions=(0.5, 0.6, 0.7, 0.8),
    )
    save_sparsity(tmp_path / "a", SparsityArtefact(config, (layer,) * 30))
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert size < 3_000_000
