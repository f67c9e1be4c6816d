"""The policy KIVI (arXiv 2402.02750) over its tier, `jaxinfer.cache.kivi.Kivi`."""

from dataclasses import dataclass

from jaxtyping import Array, Int

from jaxinfer.arguments import one_of, shown
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.rotated import Rotated


@dataclass(frozen=True, kw_only=True)
class KiviPolicy(Policy):
    """A policy whose state changes for all tokens at multiples of `residual`."""

    residual: int | None = None  # None: at every token

    def horizon(self, length: Int[Array, " B"]) -> Array | None:
        return None if self.residual is None else self.residual - length % self.residual


def kivi(
    bits: int = 2,
    group: int = 32,
    residual: int = 128,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    value_flush: str = "sliding",
    flush_order: str = "after",
    key_grouping: str = "channel",
    value_grouping: str = "token",
    scale_dtype: str = "float16",
    residual_dtype: str | None = None,
    rotation: str | None = None,
) -> Policy:
    """Codes of `bits` bits behind a tail of `residual` tokens in full precision (KIVI, arXiv
    2402.02750).

    `value_flush="block"` quantizes values with their keys, which keeps speculative decoding
    lossless; "sliding" is the paper's, one value at a time. `flush_order="before"` quantizes before
    the attention of the same decode step, as Algorithm 1 is printed (prompts attend in full
    precision in both): a reference that copies the cache in every step. The authors advise 4 bits
    for models whose query heads share keys.

    `rotation="hadamard"` stores keys and values behind a Hadamard rotation of their channels, so
    that groups along a token's channels hold no outliers; with `key_grouping="token"` that is the
    rotated cache of QuaRot (arXiv 2404.00456), behind KIVI's residual. Its head size must be a
    power of two.
    """
    one_of("flush_order", flush_order, ("after", "before"))
    if rotation is not None and not (isinstance(rotation, str) and rotation == "hadamard"):
        raise ValueError(f"rotation must be None or 'hadamard', got {shown(rotation)}")
    tier = Kivi(
        key_bits=bits if key_bits is None else key_bits,
        value_bits=bits if value_bits is None else value_bits,
        key_group=group,
        value_group=group,
        residual=residual,
        value_flush=value_flush,
        key_grouping=key_grouping,
        value_grouping=value_grouping,
        scale_dtype=scale_dtype,
        residual_dtype=residual_dtype,
    )
    is_lossless = value_flush == "block" and flush_order == "after"
    return KiviPolicy(
        name="kivi" if rotation is None else "kivi-hadamard",
        tiers=(tier if rotation is None else Rotated(inner=tier),),
        commit_first=flush_order == "before",
        prompt="whole",
        chunk_invariant=False,
        lossless_under_tree=is_lossless,
        residual=residual if is_lossless else None,
    )
