"""`Trained`: the sparsity that an artefact was trained for, or another density with its routers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxinfer.arguments import one_of, real
from jaxinfer.config import ModelConfig
from jaxinfer.nn.heads import KEYS
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.sparsity.recall import allotted
from jaxinfer.typing import Json, Params


@dataclass(frozen=True, kw_only=True)
class Trained(Sparsity):
    """An artefact as a method of sparsity.

    With `density` the routers of neurons take that share of the blocks, the best ones, in place of
    their own rules: on average over layers where the artefact has their recalls
    (`jaxinfer.sparsity.recall.allotted`), else in every layer. With `heads` every router of heads
    takes that share of the groups of heads. At least one is taken. `keys` is that of
    `jaxinfer.sparsity.heads.SparseHeads`.

    Raises:
      ValueError: `keys` is another, a share is outside (0, 1], or the artefact has no router to
        which it applies.
    """

    artefact: SparsityArtefact
    density: float | None = None
    heads: float | None = None
    keys: str = "always"

    def __post_init__(self):
        one_of("keys", self.keys, KEYS)
        if self.keys == "deferred" and all(
            getattr(layer, "heads", None) is None for layer in self.artefact.layers
        ):
            raise ValueError(
                "the artefact has no routers of heads whose keys could be deferred; leave keys out"
            )
        for name, router in (("density", "router"), ("heads", "heads")):
            share = getattr(self, name)
            if share is None:
                continue
            number = real(name, share, least=0, most=1)
            if number == 0:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share!r}")
            object.__setattr__(self, name, number)
            if all(getattr(layer, router, None) is None for layer in self.artefact.layers):
                what = {"router": "neurons", "heads": "heads"}[router]
                raise ValueError(
                    f"the artefact has no routers of {what} to which {name} would apply; leave "
                    f"{name} out"
                )

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        densities = iter(self._densities())
        layers = tuple(
            None if layer is None else self._with_shares(layer, densities)
            for layer in self.artefact.layers
        )
        return replace(self.artefact, layers=layers).apply(cfg, params, keys=self.keys)

    def describe(self) -> Json:
        config, digest = self.artefact.config, hashlib.sha256()
        for layer in self.artefact.layers:
            digest.update(repr(jax.tree.structure(layer)).encode())
            for leaf in jax.tree.leaves(layer):
                digest.update(np.asarray(leaf).tobytes())
        return {
            "name": self.name,
            "model": config.model,
            "artefact": digest.hexdigest()[:16],
            "density": self.density,
            "heads": self.heads,
            "keys": self.keys,
        }

    def _densities(self) -> list[float]:
        """Of the layers with a router of neurons."""
        if self.density is None:
            return []
        recalls = [layer.recalls for layer in self.artefact.layers if layer and layer.router]
        if all(recalls):
            return allotted(recalls, self.density)
        return [self.density] * len(recalls)

    def _with_shares(self, layer: LayerSparsity, densities: Iterator[float]) -> LayerSparsity:
        if self.density is not None and layer.router is not None:
            # What tokens use together was measured with the router's own rule.
            layer = replace(layer, router=_taking(layer.router, next(densities)), unions=())
        if self.heads is not None and layer.heads is not None:
            layer = replace(layer, heads=_taking(layer.heads, self.heads))
        return layer


def _taking(router: Router, share: float) -> Router:
    return replace(router, rule=Rule(most=max(round(share * router.units), 1)))
