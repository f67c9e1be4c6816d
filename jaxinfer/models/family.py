"""What a model family is: how to read its configuration and where its parameters come from.

A `Source` names one checkpoint tensor and the transform that turns it into one parameter leaf, so a
loader can read, transform and place tensors one by one. Tensor names leave out the body's prefix
("model.", "transformer."); checkpoints come with and without it, and `Family.locate` tries both.
The functions below build the `{path: Source}` entries that the families share. Transforms are NumPy
views where possible: they run on memory-mapped and on bfloat16 arrays alike.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxinfer.config import ModelConfig

Path = tuple[str | int, ...]
"""Where a leaf sits in the parameter tree, such as ("layers", 3, "attn", "q", "weight")."""

Transform = Callable[[np.ndarray], np.ndarray]


def unchanged(array: np.ndarray) -> np.ndarray:
    """A tensor that is the leaf as it is."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """A Conv1D weight [in, out] as a weight [out, in]."""
    return array.T


@dataclass(frozen=True)
class Source:
    """The checkpoint tensor `name` (or an older spelling of it) and what makes it a leaf."""

    name: str
    transform: Transform = unchanged
    aliases: tuple[str, ...] = ()


Sources = dict[Path, Source]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. `name` is also `ModelConfig.family`.

    `config_from_hf` reads a parsed config.json and raises only ValueError; `sources` covers every
    leaf of `abstract_params`. `ignored` are regular expressions of checkpoint tensors that carry no
    parameters (buffers such as causal masks).
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict], ModelConfig]
    sources: Callable[[ModelConfig], Sources]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()

    def find(self, source: Source, available: Container[str]) -> str | None:
        """The first spelling of `source` among the checkpoint's tensor names, if there is one."""
        return next((name for name in self._spellings(source) if name in available), None)

    def locate(self, source: Source, available: Container[str]) -> str:
        """The first spelling of `source` among the checkpoint's tensor names."""
        found = self.find(source, available)
        if found is not None:
            return found
        names = self._spellings(source)
        raise ValueError(
            f"the checkpoint lacks tensor {names[0]!r} (also tried {names[1:]}); "
            f"is it a complete {self.name} checkpoint?"
        )

    def _spellings(self, source: Source) -> list[str]:
        return [
            prefix + name for name in (source.name, *source.aliases) for prefix in self.prefixes
        ]


def from_table(
    cfg: ModelConfig, layer: str, modules: Mapping[Path, str], weight: Transform = unchanged
) -> Sources:
    """The sources of a decoder from a table of its modules, but for q, k, v of a fused layer.

    Args:
        cfg: whose biases, norms and tied head say which of a module's leaves there are.
        layer: the name of layer i, such as "h.{}".
        modules: where a module sits and its name: ("embed", "tokens"), ("final_norm",), ("head",),
            or in a layer ("attn", "out"), ("mlp", "up"), ("attn_norm",) and so on.
        weight: from the weight of a layer's linear module to ours.

    Returns:
        What covers `abstract_params(cfg)`, with what the table leaves out.
    """
    sources: Sources = {}
    for path, name in modules.items():
        if path[0] == "embed":
            sources[path] = Source(f"{name}.weight")
        elif path == ("final_norm",):
            sources |= norm(path, name, cfg.norm_bias)
        elif path == ("head",):
            if not cfg.tie_embeddings:
                sources["head", "weight"] = Source(f"{name}.weight")
        elif path != ("mlp_norm",) or not cfg.shared_norm:
            for i in range(cfg.num_layers):
                inside: Path = ("layers", i, *path)
                name_inside = f"{layer.format(i)}.{name}"
                if str(path[-1]).endswith("norm"):
                    sources |= norm(inside, name_inside, cfg.norm_bias and len(path) == 1)
                else:
                    sources |= linear(inside, name_inside, _has_bias(cfg, path), weight)
    return sources


def _has_bias(cfg: ModelConfig, path: Path) -> bool:
    if path[0] == "mlp":
        return cfg.mlp_bias
    return cfg.out_bias if path == ("attn", "out") else cfg.qkv_bias


def linear(path: Path, name: str, bias: bool, weight: Transform = unchanged) -> Sources:
    """Weight and bias of the linear layer `name`."""
    sources: Sources = {(*path, "weight"): Source(f"{name}.weight", weight)}
    if bias:
        sources[*path, "bias"] = Source(f"{name}.bias")
    return sources


def norm(path: Path, name: str, bias: bool) -> Sources:
    """Scale and bias of the norm `name`."""
    sources: Sources = {(*path, "scale"): Source(f"{name}.weight")}
    if bias:
        sources[*path, "bias"] = Source(f"{name}.bias")
    return sources


def fused_rows(path: Path, name: str, cfg: ModelConfig, *, groups: int) -> Sources:
    """q, k, v from one linear layer whose output rows are `groups` runs of query, key, value heads.

    `groups` = 1 is all queries, all keys, all values (MPT); `num_kv_heads` is one key and one value
    head behind the queries that share them (Falcon, GPT-NeoX).
    """
    queries, keys = cfg.num_heads // groups, cfg.num_kv_heads // groups
    spans = {
        "q": (0, queries),
        "k": (queries, queries + keys),
        "v": (queries + keys, queries + 2 * keys),
    }
    sources: Sources = {}
    for part, span in spans.items():
        take = partial(_head_rows, groups=groups, head_dim=cfg.head_dim, span=span)
        sources[*path, part, "weight"] = Source(f"{name}.weight", take)
        if cfg.qkv_bias:
            sources[*path, part, "bias"] = Source(f"{name}.bias", take)
    return sources


def fused_columns(path: Path, name: str, cfg: ModelConfig) -> Sources:
    """q, k, v from one [in, 3 * out] weight with the three side by side (GPT-2's Conv1D)."""
    width = cfg.num_heads * cfg.head_dim
    sources: Sources = {}
    for index, part in enumerate("qkv"):
        take = partial(_columns, start=index * width, stop=(index + 1) * width)
        sources[*path, part, "weight"] = Source(f"{name}.weight", take)
        if cfg.qkv_bias:
            sources[*path, part, "bias"] = Source(f"{name}.bias", take)
    return sources


def _head_rows(
    array: np.ndarray, *, groups: int, head_dim: int, span: tuple[int, int]
) -> np.ndarray:
    """Heads `span` of every group of the rows, [out, in] for a weight and [out] for a bias."""
    if array.ndim not in (1, 2) or array.shape[0] % (groups * head_dim):
        raise ValueError(
            f"a fused query-key-value tensor of shape {array.shape} does not split into "
            f"{groups} groups of heads of size {head_dim}; config and checkpoint disagree"
        )
    heads = array.reshape(groups, -1, head_dim, *array.shape[1:])[:, slice(*span)]
    return heads.reshape(-1, *array.shape[1:])


def _columns(array: np.ndarray, *, start: int, stop: int) -> np.ndarray:
    return array[..., start:stop].T
