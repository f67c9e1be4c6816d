"""A file with one policy per layer gives those policies, or one line that says what is wrong."""

import json

import pytest

import jaxinfer as ji
from jaxinfer.cache.policy import PerLayer
from jaxinfer.cache.policy_file import read_policy_file, write_policy_file
from jaxinfer.cache.presets import resolve
from tests.factories import lm_of

LAYERS = [
    {"name": "kivi", "bits": 4, "group": 8, "residual": 8},
    {"name": "streaming", "window": 6},
]


def test_a_file_means_the_list_that_it_holds(tmp_path):
    path = tmp_path / "policy.json"
    write_policy_file(path, LAYERS, {"model": "x", "version": 7})
    assert read_policy_file(path) == LAYERS
    expected = ji.per_layer(LAYERS)
    for found in (resolve(str(path)), resolve({"name": str(path)}), ji.per_layer(path)):
        assert isinstance(found, PerLayer) and found == expected
    lm, prompt = lm_of("llama"), [list(range(3, 30))]
    one, other = (
        lm.generate(prompt, policy=policy, max_new_tokens=4)[0].tokens
        for policy in (str(path), LAYERS)
    )
    assert one == other


def test_equal_layers_are_read_once(tmp_path, monkeypatch):
    from jaxinfer.cache import presets

    made = []
    monkeypatch.setattr(presets, "resolve", lambda one: made.append(one) or resolve(one))
    write_policy_file(tmp_path / "p.json", [LAYERS[0]] * 30, {})
    found = ji.per_layer(str(tmp_path / "p.json"))
    assert isinstance(found, PerLayer) and len(found.layers) == 30
    assert made.count(LAYERS[0]) == 1


GOOD = {"format": "jaxinfer-policies", "version": 1, "layers": LAYERS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ({}, "is no file of policies"),
        (GOOD | {"version": 2}, "is no file of policies"),
        (GOOD | {"layers": []}, "layers must be a list of 1 to 1000 policies"),
        (GOOD | {"layers": [LAYERS[0]] * 1001}, "layers must be a list of 1 to 1000 policies"),
        (GOOD | {"layers": [3]}, "layer 0 must be an object with the"),
        (GOOD | {"layers": [{"name": "self.json"}]}, "layer 0 must be an object with the"),
        (GOOD | {"layers": [{"name": "kivi", "bits": [2]}]}, "arguments of layer 0 must be"),
        (GOOD | {"layers": [{"name": "kivi", "bits": float("inf")}]}, "arguments of layer 0"),
        (GOOD | {"layers": [{"name": "kivi", "bits": "x" * 5000}]}, "arguments of layer 0"),
        (GOOD | {"layers": [{"name": "kivi3"}]}, "unknown cache policy 'kivi3'"),
        (GOOD | {"layers": [{"name": "kivi", "bits": 3}]}, "3"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "self.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        resolve(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_are_whole_policies(tmp_path):
    path = str(tmp_path / "policy.json")
    with pytest.raises(ValueError, match="cannot read .*policy.json: No such file"):
        resolve(path)
    write_policy_file(path, LAYERS, {})
    with pytest.raises(ValueError, match="has the arguments of its policies in it"):
        resolve({"name": path, "bits": 2})
    with pytest.raises(ValueError, match="a layer has one policy"):
        ji.per_layer([path, "full"])
    with pytest.raises(ValueError, match="got 2 policies for 6 layers"):
        ji.load("tiny-llama").generate("x", policy=path, max_new_tokens=1)
