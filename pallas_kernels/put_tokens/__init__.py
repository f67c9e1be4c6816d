"""Writes tokens into the slots of a cache, in place, and takes out what lay there."""

from pallas_kernels.put_tokens.api import put_tokens, swap_tokens

__all__ = ["put_tokens", "swap_tokens"]
