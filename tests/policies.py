"""The policies that the cache tests run over. A new policy adds one line to `MATRIX`.

The promises themselves are checked by `jaxinfer.testing`, here as in other packages.

`easy` is a setting that loses nothing within 64 tokens: it must equal the plain forward pass.
`hard` is one that evicts, packs or approximates within 20 tokens: it is compared with itself in
other chunkings, batches and trees. `bytes_per_row` is the documented formula of the allocated bytes
of one row and layer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry
from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full, h2o, kivi, streaming
from jaxinfer.config import ModelConfig
from tests.factories import CONFIGS, MODELS


@dataclass(frozen=True)
class Case:
    easy: Callable[[], Policy]
    hard: Callable[[], Policy]
    bytes_per_row: Callable[[Policy, Geometry], int]
    refuses: tuple[str, ...] = ()  # models of tests/factories.py that it does not serve
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.easy().name


def full_bytes(policy: Policy, geometry: Geometry) -> int:
    item = jnp.dtype(geometry.dtype).itemsize
    return 2 * geometry.num_kv_heads * geometry.head_dim * geometry.capacity * item


def slots_bytes(geometry: Geometry, slots: int, extra: int = 0) -> int:
    """`slots` tokens in full precision, and `extra` bytes for each of their heads."""
    item = jnp.dtype(geometry.dtype).itemsize
    return geometry.num_kv_heads * slots * (2 * geometry.head_dim * item + extra)


def streaming_bytes(policy: Policy, geometry: Geometry) -> int:
    return slots_bytes(geometry, policy.sinks + policy.window)


def h2o_bytes(policy: Policy, geometry: Geometry) -> int:
    ring, heavy = policy.tiers[:2]
    return slots_bytes(geometry, ring.size, 4) + slots_bytes(geometry, heavy.size, 8)


def kivi_bytes(policy: Policy, geometry: Geometry) -> int:
    """Keys and values of 4 bits in groups of 8 with 2-byte scales, behind a tail of R."""
    (tier,) = policy.tiers
    c, r = geometry.capacity, tier.residual
    keys = c // r * r
    values = keys if tier.value_flush == "block" else 8 * -(-max(c - r, 0) // 8)  # whole words
    packed = keys + values
    item = jnp.dtype(geometry.dtype).itemsize
    numbers = geometry.num_kv_heads * geometry.head_dim
    return numbers * packed * 4 // 8 + numbers * packed // 8 * 4 + numbers * 2 * r * item


def streaming_kivi_bytes(policy: Policy, geometry: Geometry) -> int:
    """Sinks and a tail of R in full precision, and W tokens of 4 bits in groups of 8."""
    sinks, tier = policy.tiers[:2]
    codes = geometry.num_kv_heads * geometry.head_dim * 2 * tier.window * (4 + 4) // 8
    return slots_bytes(geometry, sinks.size + tier.residual) + codes


RANK = 3


def over(base: Policy) -> Policy:
    """`base` with a low-rank tier; `with_random_feature_maps` makes it whole for a model."""
    return replace(
        base,
        name=f"less-{base.name}",
        tiers=(*base.tiers, LowRank(rank=RANK)),
        prompt="whole",
        chunk_invariant=False,
        lossless_under_tree=False,
    )


class ForAnyModel(LessFeatureMaps):
    """Feature maps that fit whatever weights a test has."""

    def check(self, cfg, fingerprint=None) -> None:
        pass


@functools.cache
def random_feature_maps(cfg: ModelConfig) -> LessFeatureMaps:
    config = LessConfig.of(cfg, "any", model="any", hidden=8, rank=RANK)
    shapes, rng = config.shapes(), np.random.default_rng(0)
    layers = []
    for _ in range(cfg.num_layers):
        made = {name: rng.normal(0, shape[-1] ** -0.5, shape) for name, shape in shapes.items()}
        made |= {name: np.full(shapes[name], 0.3) for name in ("scale", "mix_scale")}
        layers.append({"feature_map": {name: jnp.float32(x) for name, x in made.items()}})
    return ForAnyModel(config, tuple(layers))


def with_random_feature_maps(policy: Policy, cfg: ModelConfig) -> Policy:
    """The policy, with random feature maps for this model where it needs some."""
    if any(isinstance(tier, LowRank) for tier in policy.tiers):
        return replace(policy, feature_maps=random_feature_maps(cfg))
    return policy


def less_bytes(base: Callable[[Policy, Geometry], int]) -> Callable[[Policy, Geometry], int]:
    def formula(policy: Policy, geometry: Geometry) -> int:
        state = 4 * geometry.num_kv_heads * policy.tiers[-1].rank * (geometry.head_dim + 1)
        return base(policy, geometry) + state

    return formula


MATRIX = (
    Case(easy=full, hard=full, bytes_per_row=full_bytes),
    Case(
        easy=lambda: streaming(sinks=4, window=64),
        hard=lambda: streaming(sinks=2, window=5),
        bytes_per_row=streaming_bytes,
        refuses=("learned",),
    ),
    Case(
        easy=lambda: kivi(bits=4, group=8, residual=64),
        hard=lambda: kivi(bits=4, group=8, residual=8),
        bytes_per_row=kivi_bytes,
    ),
    Case(
        label="kivi-block",
        easy=lambda: kivi(bits=4, group=8, residual=64, value_flush="block"),
        hard=lambda: kivi(bits=4, group=8, residual=8, value_flush="block"),
        bytes_per_row=kivi_bytes,
    ),
    Case(
        easy=lambda: streaming(4, 128, bits=4, group=8, residual=64),
        hard=lambda: streaming(2, 16, bits=4, group=8, residual=8),
        bytes_per_row=streaming_kivi_bytes,
        refuses=("learned",),
    ),
    Case(
        easy=lambda: h2o(heavy=48, recent=16),
        hard=lambda: h2o(heavy=4, recent=3),
        bytes_per_row=h2o_bytes,
    ),
    Case(
        easy=lambda: over(h2o(heavy=48, recent=16)),
        hard=lambda: over(h2o(heavy=4, recent=3)),
        bytes_per_row=less_bytes(h2o_bytes),
        refuses=("mpt", "sliding"),
    ),
    Case(
        easy=lambda: over(streaming(sinks=4, window=64)),
        hard=lambda: over(streaming(sinks=2, window=5)),
        bytes_per_row=less_bytes(streaming_bytes),
        refuses=("mpt", "learned", "sliding"),
    ),
    Case(
        easy=lambda: over(streaming(4, 128, bits=4, group=8, residual=64)),
        hard=lambda: over(streaming(2, 16, bits=4, group=8, residual=8)),
        bytes_per_row=less_bytes(streaming_kivi_bytes),
        refuses=("mpt", "learned", "sliding"),
    ),
)

# Full on these two models, on the others slow but for one smoke test of a policy of each kind of
# tier, and of all of them in one.
MAIN_MODELS = ("llama", "mpt")
SMOKE = ("full", "streaming", "kivi", "h2o", "less-streaming-kivi4")


def settings(which: tuple[str, ...] = ("easy", "hard"), smoke: bool = False) -> list:
    """pytest parameters (model, policy); a policy with one setting has it as its hard one.

    With `smoke` all models run some of them by default.
    """
    out = []
    for case in MATRIX:
        made = {"easy": case.easy(), "hard": case.hard()}
        if made["easy"] == made["hard"] and "hard" in which:
            del made["easy"]
        for model in MODELS:
            if model in case.refuses:
                continue
            by_default = SMOKE if smoke else ("full",)
            is_slow = model not in MAIN_MODELS and case.name not in by_default
            marks = [pytest.mark.slow] if is_slow else []
            out += [
                pytest.param(
                    model,
                    with_random_feature_maps(policy, CONFIGS[model]),
                    id=f"{model}-{case.name}-{name}",
                    marks=marks,
                )
                for name, policy in made.items()
                if name in which
            ]
    return out
