"""LESS's trained feature maps: what they are for a whole model, and folders of them on disk.

    config.json           format, version, model identity, recipe, results
    kernels.safetensors   per layer `layers.N.NAME` int8 with `layers.N.NAME.scale` float32 (one
                          scale per head and output channel), the two diagonals as float32

Feature maps (`jaxinfer.nn.feature_map`) are those of arXiv 2402.09398, which calls them kernels; so
does the file's name. Trained ones are rounded to what the file can hold (`rounded`), so a file
gives them back bit for bit. Bytes: about one per parameter.
"""

import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.arrays import ArrayFile, check_finite, opened
from jaxinfer.config import ModelConfig
from jaxinfer.files import (
    check_destination,
    one_line,
    quoted,
    read_json,
    replacing_folder,
    shipped_folder,
    write_json,
)
from jaxinfer.nn.int8 import dequantize_rows, quantize_rows
from jaxinfer.typing import Params

FORMAT, VERSION = "jaxinfer-less", 1
WHAT = "a folder of LESS feature maps"
WEIGHTS, CONFIG = "kernels.safetensors", "config.json"
NAMED = {"smollm2-135m": "checkpoints/less-smollm2-135m"}
"""Feature maps that come with the library, by model name."""


@dataclass(frozen=True, kw_only=True)
class LessConfig:
    """Sizes of the feature maps and the identity of their model."""

    model: str
    fingerprint: str  # of some weights, in bfloat16
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    hidden: int
    rank: int
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: ModelConfig, fingerprint: str, **rest: Any) -> "LessConfig":
        """The config of feature maps for a model, of which `fingerprint` tells the weights
        (`jaxinfer.models.fingerprint`)."""
        return cls(**_sizes(cfg), fingerprint=fingerprint, **rest)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of a layer, as `jaxinfer.nn.feature_map` has them."""
        n, k, h, e, r = (
            *(self.num_heads, self.num_kv_heads, self.head_dim, self.hidden, self.rank),
        )
        return {
            "query_inner": (n, h, e),
            "query_outer": (n, e, r),
            "key_inner": (k, h, e),
            "key_outer": (k, e, r),
            "mix": (k, r, r),
            "scale": (k, r),
            "mix_scale": (k, r),
        }


@dataclass(frozen=True, eq=False)
class LessFeatureMaps:
    """Feature maps of every layer; `layers[i]` is what layer i's attention gets as its "cache"."""

    config: LessConfig
    layers: tuple[Params, ...]

    def check(self, cfg: ModelConfig, fingerprint: str | None = None) -> None:
        """Refuses a model that the feature maps were not trained for."""
        ours, theirs = asdict(self.config), _sizes(cfg)
        wrong = [f"{name} {ours[name]}, not {value}" for name, value in theirs.items()
                 if ours[name] != value]  # fmt: skip
        if not wrong and fingerprint not in (None, self.config.fingerprint):
            wrong = ["other weights"]
        if wrong:
            raise ValueError(
                f"these LESS feature maps belong to {self.config.model or 'another model'} "
                f"({'; '.join(wrong)}); train some for this model with `jaxinfer train less`"
            )

    def part(self, layers: range) -> "LessFeatureMaps":
        """Those of a run of layers."""
        return replace(self, layers=self.layers[layers.start : layers.stop])


def rounded(maps: Params) -> dict[str, np.ndarray]:
    """A layer's feature maps rounded to what the file holds; doing it again changes nothing."""
    return {name: _decode(*_encode(np.asarray(x, np.float32))) for name, x in maps.items()}


def save_feature_maps(
    folder: str | Path, maps: LessFeatureMaps, *, overwrite: bool = False
) -> None:
    """Writes a folder, whole or not at all; older feature maps there are replaced only with
    `overwrite`, and nothing else ever is."""
    from safetensors.numpy import save

    folder = Path(folder)
    check_destination(folder, is_less, WHAT, overwrite=overwrite)
    tensors: dict[str, np.ndarray] = {}
    for index, layer in enumerate(maps.layers):
        for name, value in layer["feature_map"].items():
            codes, scale = _encode(np.asarray(value, np.float32))
            tensors[f"layers.{index}.{name}"] = codes
            if scale is not None:
                tensors[f"layers.{index}.{name}.scale"] = scale
    with replacing_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        record = {"format": FORMAT, "format_version": VERSION} | asdict(maps.config)
        write_json(temporary / CONFIG, record)


def load_feature_maps(source: str | Path, cfg: ModelConfig | None = None) -> LessFeatureMaps:
    """The feature maps in a folder, or those that come with the library for a named model.

    With `cfg` those of another model are refused.
    """
    folder = _folder(source)
    data = read_json(folder / CONFIG)
    if data.pop("format", None) != FORMAT or data.pop("format_version", None) != VERSION:
        raise ValueError(
            f"{folder} holds no LESS feature maps of version {VERSION}; train them again"
        )
    wanted = {one.name for one in fields(LessConfig)}
    if set(data) != wanted:
        wrong = ", ".join(quoted(name, 40) for name in sorted(set(data) ^ wanted)[:5])
        raise ValueError(f"{folder / CONFIG} is damaged: {wrong} missing or unknown")
    kinds: dict[str, type] = dict.fromkeys(_COUNTS, int) | {"recipe": dict, "results": dict}
    for name, value in data.items():
        kind = kinds.get(name, str)
        if type(value) is not kind or (kind is int and value < 1):
            expected = {int: "a positive integer", dict: "an object", str: "a text"}[kind]
            raise ValueError(f"{folder / CONFIG} is damaged: {name} must be {expected}")
    config = LessConfig(**data)
    maps = LessFeatureMaps(config, ())
    if cfg is not None:
        maps.check(cfg)
    return LessFeatureMaps(config, _read(folder / WEIGHTS, config))


def _read(path: Path, config: LessConfig) -> tuple[Params, ...]:
    layers, known = [], set()
    with opened(path) as file:
        for index in range(config.num_layers):  # the first that the file lacks ends it
            layer = {}
            for name, shape in config.shapes().items():
                full = f"layers.{index}.{name}"
                known |= {full, f"{full}.scale"}
                layer[name] = value = _stored(file, full, shape)
                check_finite(value, f"{path}: tensor {full!r}")
            layers.append({"feature_map": layer})
        file.check_names(known)
    return tuple(layers)


def _stored(file: ArrayFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 2:
        return file.read(name, shape, np.float32)
    scale = file.read(f"{name}.scale", (shape[0], 1, shape[2]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _decode(file.read(name, shape, np.int8), scale)


_COUNTS = (
    *("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"),
    *("hidden", "rank"),
)


def _encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """int8 codes and the scale f32[heads, 1, outputs]; vectors stay as they are."""
    return (x, None) if x.ndim < 3 else quantize_rows(x)


def _decode(codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    return codes if scale is None else dequantize_rows(codes, scale)


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")
    return {name: getattr(cfg, name) for name in names}


def is_less(folder: Path) -> bool:
    """Whether a folder holds trained feature maps."""
    try:
        return read_json(folder / CONFIG).get("format") == FORMAT
    except ValueError:
        return False


def _folder(source: str | Path) -> Path:
    if str(source) in NAMED:
        folder = shipped_folder(NAMED[str(source)])
        if folder is None:
            raise ValueError(
                f"the LESS feature maps of {source} are not installed; run from the source tree, "
                "or give a folder of feature maps"
            )
        return folder
    folder = Path(os.path.expanduser(source))
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"no LESS feature maps at {one_line(source, 120)!r}: not one of {', '.join(NAMED)} and "
            "no folder of feature maps; train some with `jaxinfer train less`"
        )
    return folder
