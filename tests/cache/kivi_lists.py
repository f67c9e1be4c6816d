"""KIVI as lists that grow token by token, in numpy: the oracle of the tier.

Written after section 3.2 and Algorithm 1 of arXiv 2402.02750: keys wait in a list until it holds R,
then all R are quantized; values wait in a list of at most R, whose oldest is quantized when one
more arrives ("sliding"), or go with the keys ("block").
"""

import numpy as np

from jaxinfer.cache.kivi import Kivi


def coarse(x: np.ndarray, bits: int, group: int, axis: int, dtype: str) -> np.ndarray:
    """`x` after quantization and dequantization in groups of `group` along `axis`."""
    if bits == 16:
        return x
    parts = []
    for part in np.split(x, x.shape[axis] // group, axis):
        low, high = part.min(axis, keepdims=True), part.max(axis, keepdims=True)
        step = ((high - low) * np.float32(1 / (2**bits - 1))).astype(dtype).astype(np.float32)
        low = low.astype(dtype).astype(np.float32)
        codes = np.round((part - low) / np.where(step > 0, step, 1))
        codes = np.where(step > 0, np.clip(codes, 0, 2**bits - 1), 0)
        parts.append(codes.astype(np.float32) * step + low)
    return np.concatenate(parts, axis)


class KiviLists:
    """One row; tokens are [K, H] arrays."""

    def __init__(self, tier: Kivi):
        self.tier = tier
        self.packed_k, self.packed_v = [], []
        self.recent_k, self.recent_v = [], []
        self.spilled = []  # (token, key, value)
        self.gone = 0

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        tier = self.tier
        self.recent_k.append(k)
        self.recent_v.append(v)
        is_full = len(self.recent_k) == tier.residual
        if is_full:
            self.packed_k += self._quantized("key", self.recent_k)
            self.recent_k = []
        if tier.value_flush == "sliding" and len(self.recent_v) > tier.residual:
            self.packed_v += self._quantized("value", [self.recent_v.pop(0)])
        if tier.value_flush == "block" and is_full:
            self.packed_v += self._quantized("value", self.recent_v)
            self.recent_v = []
        if tier.window is not None and len(self.packed_k) > tier.window:
            for _ in range(tier.residual):
                token = (self.gone, self.packed_k.pop(0), self.packed_v.pop(0))
                self.spilled.append(token)
                self.gone += 1

    def keys(self) -> np.ndarray:
        """[n, K, H], as attention reads them."""
        return np.array(self.packed_k + self.recent_k)

    def values(self) -> np.ndarray:
        return np.array(self.packed_v + self.recent_v)

    def _quantized(self, half: str, tokens: list) -> list:
        tier = self.tier
        bits, group = getattr(tier, f"{half}_bits"), getattr(tier, f"{half}_group")
        axis = 0 if getattr(tier, f"{half}_grouping") == "channel" else 2
        return list(coarse(np.stack(tokens), bits, group, axis, tier.scale_dtype))


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """q [K, G, H] over keys and values [n, K, H]."""
    scores = scale * np.einsum("kgh,nkh->kgn", q.astype(np.float64), keys)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("kgn,nkh->kgh", weights, values)
