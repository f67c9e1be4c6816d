"""Key-norm eviction (arXiv 2406.11430): tokens whose keys have a small L2 norm are kept.

The paper finds that such keys receive most attention, so that no attention weights are needed. Per
head the `size` tokens of the smallest norm stay beside the last `recent` ones. Bytes per row and
layer: `2 K H (size + recent) * itemsize + 8 K size`.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from jaxinfer.cache import Heavy, Policy, Ring


@dataclass(frozen=True, kw_only=True)
class ShortKeys(Heavy):
    """Keeps the tokens of the shortest keys, of those stored and those that enter."""

    def push(self, state, aux, items, ctx):
        length = jnp.linalg.norm(items.k.astype(jnp.float32), axis=-1)  # rotations keep it
        return super().push(state, aux, replace(items, attn_weight=-length), ctx)


def key_norm(size: int | float = 256, recent: int | float = 64) -> Policy:
    """The last `recent` tokens and, per head, the `size` ones with the shortest keys before them;
    each a number of tokens (int) or a share of the prompt (float)."""
    return Policy(
        name="key-norm",
        tiers=(Ring(size=recent), ShortKeys(size=size)),
        prompt="whole",
        chunk_invariant=False,  # a token sees what is evicted later in its own chunk
        lossless_under_tree=False,
    )
