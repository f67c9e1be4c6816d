"""`Context`: what all handlers of an app share."""

import hashlib
import time
from dataclasses import dataclass, field

import jaxinfer
from jaxinfer.decode.batcher import Batcher
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.drain import Drain
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.limits import Keys
from jaxinfer.serve.log import Log
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.vocabulary import Vocabulary


@dataclass(eq=False)
class Context:
    """The batcher, the configuration, and what is made of them once."""

    batcher: Batcher
    config: ServeConfig
    warm: bool = False  # whether `/ready` may say so
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        model = self.batcher.model
        self.name = self.config.name or model.name or "model"
        self.vocabulary, self.metrics = Vocabulary(model), Metrics(self.batcher)
        self.keys, self.drain = Keys(self.config.api_keys), Drain(self.config.drain_s)
        self.log = Log(self.config.log)
        self.fingerprint = _fingerprint(self.batcher)

    def check_model(self, name: str | None) -> None:
        """Raises a 404 unless a request means the model that is served."""
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model {name!r}; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def scope(self, owner: str) -> str | None:
        """Whose earlier texts a request may use, as `prefix_scope` of the batcher."""
        return {"off": None, "shared": ""}.get(self.config.prefixes, owner)


def _fingerprint(batcher: Batcher) -> str:
    """What answers depend on beside their seeds: the code, the weights, the cache policy."""
    parts = (jaxinfer.__version__, batcher.fingerprint, repr(batcher.policy))
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
