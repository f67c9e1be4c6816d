"""What tells the weights of one model from those of another."""

import hashlib

import jax
import numpy as np

from jaxinfer.models.mixers import mixer_of
from jaxinfer.nn.heads import Heads
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.typing import Params

SHARED = ("embed", "final_norm", "head", "layers")
"""The entries of every stack's parameters; a recurrent draft has others beside them."""


def fingerprint(params: Params) -> str:
    """A short hash of the signs of some weights of every layer, the same in whatever dtype they are
    loaded; of stored weights, that of the parameters that they were made from."""
    layers = params["layers"]
    samples = [params["embed"]["tokens"]]
    for layer in layers:
        name, mixer = mixer_of(layer)
        samples += mixer.signature(layer[name])
    digest = hashlib.sha256()
    for sample in samples:
        if isinstance(sample, StoredWeight):
            return sample.origin
        digest.update(np.packbits(np.asarray(sample[:8], np.float32) > 0).tobytes())
    return digest.hexdigest()[:16]


def identity(config: object, params: Params) -> str:
    """A short hash of a model's configuration and of some of its weights (or of a part's) as they
    are stored.

    Unlike `fingerprint` it differs between dtypes, between stored forms and between sparse forms of
    one model: what was computed or measured with the one does not hold for the other.
    """
    apart = {name: x for name, x in params.items() if name not in SHARED}
    some = [
        params.get("final_norm"), params.get("embed", {}).get("tokens"),
        params.get("layers", ())[-1:], apart
    ]  # fmt: skip
    digest = hashlib.sha256(repr(config).encode())
    for leaf in jax.tree.leaves(some):
        digest.update(np.asarray(leaf[:4] if leaf.ndim else leaf).tobytes())
    for part in jax.tree.leaves(params.get("layers", ()), is_leaf=_selects):
        if _selects(part):  # how much it selects stands in fields that are no leaves
            digest.update(repr(jax.tree.structure(part)).encode())
    return digest.hexdigest()[:16]


def _selects(part: object) -> bool:
    return isinstance(part, FeedForward | Heads)
