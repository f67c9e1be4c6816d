"""What a method of sparsity learned for one model, and applying it to the model.

`jaxinfer.sparsity.learned` is one layer of it; `jaxinfer.io.sparsity` keeps artefacts in files.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfer.config import ModelConfig
from jaxinfer.files import quoted
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.sparsity.form import check_layer
from jaxinfer.sparsity.identity import SparsityConfig, sizes
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.typing import Params


@dataclass(frozen=True, eq=False)
class SparsityArtefact:
    """`layers[i]` is what was learned for layer i, None where it stays dense."""

    config: SparsityConfig
    layers: tuple[LayerSparsity | None, ...]

    def __post_init__(self):
        if len(self.layers) != self.config.num_layers:
            raise ValueError(
                f"{len(self.layers)} layers are given for a model of {self.config.num_layers}"
            )
        for index, layer in enumerate(self.layers):
            if layer is not None:
                with _at(index):
                    check_layer(layer, self.config)

    def check(self, cfg: ModelConfig, fingerprint: str | None = None) -> None:
        """Refuses a model that the artefact was not learned for."""
        theirs = sizes(cfg)
        wrong = [
            f"{name} {getattr(self.config, name)}, not {value}"
            for name, value in theirs.items()
            if getattr(self.config, name) != value
        ]
        if not wrong and fingerprint not in (None, self.config.fingerprint):
            wrong = ["other weights"]
        if wrong:
            raise ValueError(
                f"this {self.config.method} artefact belongs to {quoted(self.config.model, 60)} "
                f"({'; '.join(wrong)}); train one for this "
                f"model with `jaxinfer train {self.config.method.replace('_', '')}`"
            )

    def apply(self, cfg: ModelConfig, params: Params, *, keys: str = "always") -> Params:
        """The parameters of the sparse model; what is not replaced is shared. `keys` is that of
        `jaxinfer.sparsity.heads.SparseHeads`.

        Raises:
          ValueError: it is another model, or a block cannot be made sparse as it is stored.
        """
        self.check(cfg, fingerprint(params))
        layers = list(params["layers"])
        for index, layer in enumerate(self.layers):
            if layer is not None:
                with _at(index):
                    layers[index] = layer.applied(cfg, layers[index], keys=keys)
        return params | {"layers": tuple(layers)}


@contextlib.contextmanager
def _at(layer: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
