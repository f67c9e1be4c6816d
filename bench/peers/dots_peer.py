"""The dots-only program as a worker: what one decode step multiplies, and nothing else.

The model's own weights in their own layout through `jaxinfer.inspection.roofline.products`: the
floor that a decode step can reach on this machine with these threads.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.harness import timed
from bench.models import load_model
from bench.worker import serve
from jaxinfer.inspection.roofline import products


class Peer:
    """Handlers by name."""

    lm: Any = None

    def __init__(self):
        self._chain = jax.jit(products, static_argnames="cfg")

    def load(self, model: str) -> None:
        self.lm = load_model(model)

    def steps(self, batch: int, steps: int) -> dict[str, Any]:
        cfg, params = self.lm.config, self.lm.params
        x = jnp.ones((batch, 1, cfg.hidden_size), jnp.float32)
        seconds, _ = timed(lambda: self._chain(cfg, params, x, jnp.int32(steps)))
        return {
            "seconds": seconds,
            "tokens_per_s": batch * steps / seconds,
            "ms_per_step": 1e3 * seconds / steps,
        }


if __name__ == "__main__":
    peer = Peer()
    serve({"load": peer.load, "steps": peer.steps})
