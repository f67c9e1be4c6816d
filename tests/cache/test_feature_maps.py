"""LESS feature maps on disk: exact, small, and only for their own model."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from jaxinfer.cache.feature_maps import (
    CONFIG,
    WEIGHTS,
    LessConfig,
    LessFeatureMaps,
    load_feature_maps,
    rounded,
    save_feature_maps,
)
from jaxinfer.models.fingerprint import fingerprint
from tests.factories import BASE, CONFIGS, params_of


def make(seed: int = 0) -> LessFeatureMaps:
    config = LessConfig.of(
        BASE, fingerprint(params_of("llama")), model="toy", hidden=6, rank=3, recipe={"steps": 1}
    )
    generator = np.random.default_rng(seed)
    layers = []
    for _ in range(BASE.num_layers):
        values = {
            name: (generator.standard_normal(shape) * 10.0 ** generator.integers(-6, 4)).astype(
                "f4"
            )
            for name, shape in config.shapes().items()
        }
        values["mix"][0] = 0
        layers.append({"feature_map": rounded(values)})
    return LessFeatureMaps(config, tuple(layers))


@pytest.fixture
def folder(tmp_path):
    save_feature_maps(tmp_path / "maps", make())
    return tmp_path / "maps"


def test_feature_maps_come_back_bit_for_bit(folder):
    maps, found = make(), load_feature_maps(folder, BASE)
    assert found.config == maps.config
    for ours, theirs in zip(maps.layers, found.layers, strict=True):
        assert ours["feature_map"].keys() == theirs["feature_map"].keys()
        for name, value in ours["feature_map"].items():
            assert theirs["feature_map"][name].dtype == np.float32
            np.testing.assert_array_equal(theirs["feature_map"][name], value)


def test_rounding_is_close_and_final():
    x = {"key_inner": np.random.default_rng(1).standard_normal((2, 50, 40)).astype("f4")}
    once = rounded(x)
    np.testing.assert_array_equal(rounded(once)["key_inner"], once["key_inner"])
    step = np.abs(x["key_inner"]).max(axis=1, keepdims=True) / 127
    assert (np.abs(once["key_inner"] - x["key_inner"]) <= 0.501 * step).all()


def test_saving_twice_gives_the_same_bytes_and_about_one_per_parameter(folder, tmp_path):
    save_feature_maps(tmp_path / "again", load_feature_maps(folder))
    first, second = ((path / WEIGHTS).read_bytes() for path in (folder, tmp_path / "again"))
    assert first == second
    config = LessConfig.of(
        replace(BASE, num_heads=9, num_kv_heads=3, head_dim=64, num_layers=30),
        fingerprint(params_of("llama")), model="smollm2-135m", hidden=64, rank=8,
    )  # fmt: skip
    shapes = config.shapes().values()
    codes = sum(int(np.prod(shape)) for shape in shapes)
    scales = sum(4 * shape[0] * shape[2] for shape in shapes if len(shape) == 3)
    assert 30 * (codes + scales) < 2 * 2**20


def test_feature_maps_of_another_model_are_refused(folder):
    with pytest.raises(ValueError, match="belong to toy.*num_kv_heads 2, not 4"):
        load_feature_maps(folder, CONFIGS["mpt"])
    maps = load_feature_maps(folder)
    maps.check(BASE, fingerprint(params_of("llama")))
    maps.check(BASE, fingerprint(params_of("llama", "bfloat16")))
    other = params_of("llama") | {"embed": {"tokens": -params_of("llama")["embed"]["tokens"]}}
    with pytest.raises(ValueError, match="other weights"):
        maps.check(BASE, fingerprint(other))


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no LESS feature maps at 'nowhere'.*jaxinfer train less"):
        load_feature_maps("nowhere")
    with pytest.raises(ValueError, match="no LESS feature maps"):
        load_feature_maps(tmp_path)


def test_only_feature_maps_are_replaced(folder, tmp_path):
    with pytest.raises(ValueError, match="holds .* already"):
        save_feature_maps(folder, make(1))
    save_feature_maps(folder, make(1), overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="choose another destination"):
        save_feature_maps(mine, make(), overwrite=True)
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def damage(folder, **changes):
    data = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "no LESS feature maps of version"),
        ({"format_version": 99}, "no LESS feature maps of version"),
        ({"colour": "red"}, "colour"),
        ({"rank": 4}, r"is F32\[.*expected F32\["),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": "3"}, "rank must be a positive integer"),
        ({"recipe": 3}, "recipe must be an object"),
        ({"model": None}, "model must be a text"),
        ({"num_layers": 3}, "array 'layers.2.query_inner"),
    ],
)
def test_wrong_configs_are_refused(folder, changes, message):
    damage(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_feature_maps(folder)


def test_damaged_files_are_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        load_feature_maps(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_feature_maps(folder)


def test_numbers_that_are_not_finite_are_refused(folder, tmp_path):
    maps = make()
    maps.layers[1]["feature_map"]["scale"][0, 0] = np.nan
    save_feature_maps(folder, maps, overwrite=True)
    with pytest.raises(ValueError, match=r"layers.1.scale.*not finite"):
        load_feature_maps(folder)


def test_a_config_is_plain_data():
    assert json.loads(json.dumps(asdict(make().config))) == asdict(make().config)
