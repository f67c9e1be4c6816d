"""Sets of tokens as bits: what a grammar allows next, one bit a token.

Letters: V tokens of the vocabulary; W words of 32 bits that hold them. Token t is bit t % 32 of
word t // 32, the layout that grammar engines fill.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxinfer.arguments import shown


def word_count(vocab: int) -> int:
    """Words that hold one bit a token."""
    return -(-vocab // 32)


def allowed_by(words: Int[Array, "B W"], vocab: int) -> Bool[Array, "B V"]:
    """Whether each token's bit is set."""
    token = jnp.arange(vocab, dtype=jnp.int32)
    return (jnp.repeat(words, 32, axis=1)[:, :vocab] >> (token & 31)) & 1 == 1


def mask_of(words: object, vocab: int) -> np.ndarray:
    """The words of a mask, checked.

    Args:
      words: int32 or uint32 [W].
      vocab: tokens of the vocabulary; bits behind them count for nothing.

    Returns:
      i32[W].

    Raises:
      ValueError: it is no such array, or allows no token.
    """
    given = np.asarray(words)
    if given.dtype not in (np.int32, np.uint32) or given.shape != (word_count(vocab),):
        raise ValueError(
            f"a mask of tokens must be int32[{word_count(vocab)}], one bit for each of {vocab} "
            f"tokens, got {shown(words)}"
        )
    found = given.view(np.int32).copy()
    if not allows_any(found, vocab):
        raise ValueError("a mask of tokens allows none; at least one must be allowed")
    return found


def allows(words: np.ndarray, token: int) -> bool:
    """Whether the bit of one token is set."""
    return bool(int(words[token // 32]) >> (token % 32) & 1)


def allows_any(words: np.ndarray, vocab: int) -> bool:
    """Whether any token is allowed."""
    last = np.uint32((1 << (vocab % 32 or 32)) - 1)
    return bool(words[:-1].any()) or bool(words[-1:].view(np.uint32)[0] & last)
