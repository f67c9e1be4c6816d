"""What a model asks of the accelerators: bytes and operations of one layer and of both ends.

`ModelSizes.of` counts the parameters of a `ModelConfig` and the cache bytes of a policy, so that
grouped queries, gated blocks and rounded caches allow other plans. `ModelSizes.published` is the
simplification of HexGen (arXiv 2311.11514, section 3): 12 D^2 parameters in a layer, keys and
values of full width, no embedding and no head.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax

from jaxinfer.arguments import real, whole
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.config import ModelConfig
from jaxinfer.fields import known_fields
from jaxinfer.models.mixers import mixer_named
from jaxinfer.models.params import abstract_params, is_weight
from jaxinfer.models.stack import cache_geometry, layer_policies
from jaxinfer.typing import Json

MOST_LAYERS = 1024
SAMPLED = 8192, 16384  # capacities between which the bytes of a cache are taken as a line


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Bytes and floating-point operations of one replica.

    Layers are alike: where they differ, each number is the largest of any layer. A stage of tensor
    parallelism n keeps whole groups of heads, padded if they do not divide, so that each device has
    `ceil(kv_heads / n) / kv_heads` of the attention and of the cache, and the same with `mlp_width`
    of the rest.
    """

    name: str
    layers: int
    hidden: int  # numbers that one token passes from layer to layer
    number_bytes: float  # of one of them
    kv_heads: int
    mlp_width: int
    attention_bytes: float  # weights of a layer's attention
    mlp_bytes: float  # of its feed-forward block and norms
    attention_flops: float  # of a token: 2 for each weight
    mlp_flops: float
    score_flops: float = 0.0  # of a token for each token it attends to
    cache_bytes_per_token: float  # of a layer
    cache_bytes_per_row: float = 0.0  # what does not grow with the text
    embed_bytes: float = 0.0  # first stage
    head_bytes: float = 0.0  # last stage
    head_flops: float = 0.0  # of a token that is sampled
    tied: bool = False  # embedding and head are one matrix where both are needed

    def __post_init__(self):
        whole("layers", self.layers, 1, MOST_LAYERS)
        for name in ("hidden", "kv_heads", "mlp_width"):
            whole(name, getattr(self, name))
        for field in dataclasses.fields(self):
            if field.type in (float, "float"):
                real(field.name, getattr(self, field.name), 0.0, 1e30)
        if self.number_bytes <= 0 or self.attention_bytes + self.mlp_bytes < 1:
            raise ValueError(
                "number_bytes must be above 0, and the weights of a layer take 1 byte or more"
            )

    @property
    def weight_bytes(self) -> float:
        """Of the whole model."""
        ends = self.embed_bytes + (0.0 if self.tied else self.head_bytes)
        return self.layers * (self.attention_bytes + self.mlp_bytes) + ends

    def attention_share(self, degree: int) -> float:
        """The part of attention and cache that one of `degree` devices has."""
        return math.ceil(self.kv_heads / degree) / self.kv_heads

    def mlp_share(self, degree: int) -> float:
        """The part of the feed-forward block that one of `degree` devices has."""
        return math.ceil(self.mlp_width / degree) / self.mlp_width

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        policy: PolicyLike = "full",
        *,
        dtype: str = "bfloat16",
        weight_bytes: float | None = None,
    ) -> "ModelSizes":
        """The sizes of a model.

        Args:
            config: its architecture.
            policy: of its cache; budgets that are shares are those of the model's longest text.
            dtype: of activations and cache.
            weight_bytes: of one weight; that of `dtype` by default, about 1.03 for int8.
        """
        number = float(jax.numpy.dtype(dtype).itemsize)
        weight = number if weight_bytes is None else real("weight_bytes", weight_bytes, 0.1, 8.0)
        tree = abstract_params(config, dtype)
        parts = [_layer_numbers(config, i, layer) for i, layer in enumerate(tree["layers"])]
        slope, fixed = _cache_line(config, resolve(policy).sized(config.max_positions), dtype)
        embed = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree["embed"]))
        head = config.vocab_size * config.hidden_size
        return cls(
            name=config.family,
            layers=config.num_layers,
            hidden=config.hidden_size,
            number_bytes=number,
            kv_heads=config.num_kv_heads,
            mlp_width=config.intermediate_size,
            attention_bytes=weight * max(part[0] for part in parts),
            mlp_bytes=weight * max(part[1] for part in parts),
            attention_flops=2.0 * max(part[2] for part in parts),
            mlp_flops=2.0 * max(part[3] for part in parts),
            score_flops=max(_score_flops(config, i) for i in range(config.num_layers)),
            cache_bytes_per_token=slope,
            cache_bytes_per_row=fixed,
            embed_bytes=weight * embed,
            head_bytes=weight * head,
            head_flops=2.0 * head,
            tied=config.tie_embeddings,
        )

    @classmethod
    def published(cls, hidden: int, layers: int, number_bytes: float = 2.0) -> "ModelSizes":
        """The paper's model: 12 D^2 weights in a layer, 2 D numbers of cache for each token."""
        square = float(hidden) ** 2
        return cls(
            name="published",
            layers=layers,
            hidden=hidden,
            number_bytes=number_bytes,
            kv_heads=hidden,  # so that every degree which divides the width divides the heads
            mlp_width=4 * hidden,
            attention_bytes=4 * square * number_bytes,
            mlp_bytes=8 * square * number_bytes,
            attention_flops=8 * square,
            mlp_flops=16 * square,
            cache_bytes_per_token=2 * hidden * number_bytes,
        )

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `ModelSizes.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "ModelSizes":
        """The sizes that `to_dict` wrote; ValueError where it holds anything else."""
        found = known_fields(cls, data)
        if not isinstance(found["name"], str) or not isinstance(found.get("tied", False), bool):
            raise ValueError("name of a model must be a text, and tied true or false")
        return cls(**found)


def _layer_numbers(config: ModelConfig, index: int, layer) -> tuple[int, int, int, int]:
    """All numbers of a layer's mixer and of the rest, and of both those in matrices."""
    name = config.mixer(index)
    found = [0, 0, 0, 0]
    for path, leaf in jax.tree_util.tree_flatten_with_path(layer)[0]:
        part = 0 if path[0].key == name else 1
        found[part] += math.prod(leaf.shape)
        found[part + 2] += math.prod(leaf.shape) * is_weight(path)
    return found[0], found[1], found[2], found[3]


def _score_flops(config: ModelConfig, layer: int) -> float:
    """Operations of a token for each one before it."""
    own = config.hyena
    if config.mixer(layer) != "hyena" or own is None:
        return 4.0 * config.num_heads * config.head_dim
    is_convolution = own.ends(layer)
    return 2.0 * own.filters(config.hidden_size) * own.head_size**2 * is_convolution


def _cache_line(config: ModelConfig, policy: Policy, dtype: str) -> tuple[float, float]:
    """Bytes per token and per row of the layer whose cache is largest.

    Caches are allocated for a number of tokens that is a power of two, and are lines there: behind
    its residual KIVI grows by as much for every group, a window does not grow.
    """
    rows = []
    pairs = zip(layer_policies(config, policy), range(config.num_layers), strict=True)
    for one, mixer in dict.fromkeys((one, config.mixer(i)) for one, i in pairs):
        few, many = (
            mixer_named(mixer).bytes_per_row(config, one, cache_geometry(config, n, dtype))
            for n in SAMPLED
        )
        slope = (many - few) / (SAMPLED[1] - SAMPLED[0])
        rows.append((many, slope, max(many - slope * SAMPLED[1], 0.0)))
    _, slope, fixed = max(rows)
    return slope, fixed
