"""Some layers of a checkpoint: what they need is read, and nothing else."""

import jax
import numpy as np
import pytest

from jaxinfer.io import orbax
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.safetensors_reader import Safetensors
from jaxinfer.models.part import part_of
from tests.io.tiny_checkpoints import CONFIG, gguf_file, hf_folder

SOURCES = {
    "ours": lambda path: "tiny-llama",
    "huggingface": lambda path: hf_folder(path / "m"),
    "tied": lambda path: hf_folder(path / "m", CONFIG | {"tie_word_embeddings": True}),
    "gguf": lambda path: gguf_file(path / "m.gguf"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_parts_are_those_of_the_whole(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    whole = load_checkpoint(source, "float32")
    count = whole.config.num_layers
    for layers in (range(0), range(1), range(1, count), range(count)):
        part = load_checkpoint(source, "float32", layers=layers)
        assert part.config == whole.config and part.tokenizer is not None
        expected = part_of(whole.config, whole.params, layers)
        assert jax.tree.structure(part.params) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, part.params, expected)


def test_ends_come_with_the_layers_that_touch_them():
    ends = {
        range(0): set(), range(0, 2): {"embed"}, range(2, 4): set(),
        range(2, 6): {"embed", "final_norm"}, range(0, 6): {"embed", "final_norm"},
    }  # fmt: skip
    for layers, expected in ends.items():  # tiny-llama ties its head
        found = load_checkpoint("tiny-llama", "float32", layers=layers).params
        assert set(found) - {"layers"} == expected and len(found["layers"]) == len(layers)


def test_no_other_array_is_read(tmp_path, monkeypatch):
    read = []
    real = Safetensors.read
    monkeypatch.setattr(
        Safetensors, "read", lambda self, name: read.append(name) or real(self, name)
    )
    load_checkpoint(hf_folder(tmp_path / "m"), "float32", layers=range(1, 2))
    assert all("layers.1." in name or "norm" in name or "lm_head" in name for name in read)
    names = []
    load = orbax.load_arrays
    monkeypatch.setattr(
        orbax, "load_arrays", lambda folder, leaves: names.extend(leaves) or load(folder, leaves)
    )
    load_checkpoint("tiny-llama", "float32", layers=range(2, 4))
    assert {name.split(".")[1] for name in names} == {"2", "3"}


@pytest.mark.parametrize("layers", [range(0, 7), range(-1, 2), range(5, 4), range(0, 4, 2)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be a range within the 6 of the model"):
        load_checkpoint("tiny-llama", "float32", layers=layers)


def test_a_stage_does_not_hold_the_rest_of_the_model():
    """Bytes, not counting what two ends share."""
    whole = load_checkpoint("tiny-llama", "float32").params
    part = load_checkpoint("tiny-llama", "float32", layers=range(2, 4)).params
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(part) == size(whole["layers"][2:4]) < size(whole) / 3
