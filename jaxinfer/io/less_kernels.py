"""LESS's trained kernels on disk: small folders that know which model they belong to.

    config.json           format, version, model identity, recipe, results
    kernels.safetensors   per layer `layers.N.NAME` int8 with `layers.N.NAME.scale` float32 (one
                          scale per head and output channel), the two diagonals as float32

Trained kernels are rounded to what the file can hold (`rounded`), so a file gives them back bit for
bit. Bytes: about one per parameter.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.files import check_destination, one_line, read_json, replacing_folder, write_json
from jaxinfer.io.int8 import dequantize_rows, quantize_rows
from jaxinfer.io.model_index import FolderModel, ModelUnavailable, committed_folder
from jaxinfer.io.safetensors_reader import read_header
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.typing import Params

FORMAT, VERSION = "jaxinfer-less", 1
WHAT = "a folder of LESS kernels"
KERNELS, CONFIG = "kernels.safetensors", "config.json"
NAMED = {"smollm2-135m": "checkpoints/less-smollm2-135m"}
"""Kernels that come with the library, by model name."""


@dataclass(frozen=True, kw_only=True)
class LessConfig:
    """Sizes of the kernels and the identity of their model."""

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
    def of(cls, cfg: ModelConfig, params: Params, **rest: Any) -> "LessConfig":
        """The config of kernels for the model `cfg, params`."""
        return cls(**_identity(cfg), fingerprint=fingerprint(params), **rest)

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
class LessKernels:
    """Kernels of every layer; `layers[i]` is what layer i's attention gets as its "cache"."""

    config: LessConfig
    layers: tuple[Params, ...]

    def check(self, cfg: ModelConfig, params: Params | None = None) -> None:
        """Refuses a model that the kernels were not trained for."""
        ours, theirs = asdict(self.config), _identity(cfg)
        wrong = [f"{name} {ours[name]}, not {value}" for name, value in theirs.items()
                 if ours[name] != value]  # fmt: skip
        if not wrong and params is not None and fingerprint(params) != self.config.fingerprint:
            wrong = ["other weights"]
        if wrong:
            raise ValueError(
                f"these LESS kernels belong to {self.config.model or 'another model'} "
                f"({'; '.join(wrong)}); train some for this model with `jaxinfer train less`"
            )


def rounded(kernels: Params) -> dict[str, np.ndarray]:
    """A layer's kernels rounded to what the file holds; doing it again changes nothing."""
    return {name: _decode(*_encode(np.asarray(x, np.float32))) for name, x in kernels.items()}


def save_kernels(folder: str | Path, kernels: LessKernels) -> None:
    """Writes a folder, whole or not at all; an older one is replaced, any other refused."""
    from safetensors.numpy import save

    folder = Path(folder)
    check_destination(folder, is_less, WHAT)
    tensors: dict[str, np.ndarray] = {}
    for index, layer in enumerate(kernels.layers):
        for name, value in layer["feature_map"].items():
            codes, scale = _encode(np.asarray(value, np.float32))
            tensors[f"layers.{index}.{name}"] = codes
            if scale is not None:
                tensors[f"layers.{index}.{name}.scale"] = scale
    with replacing_folder(folder) as temporary:
        (temporary / KERNELS).write_bytes(save(tensors))
        record = {"format": FORMAT, "format_version": VERSION} | asdict(kernels.config)
        write_json(temporary / CONFIG, record)


def load_kernels(source: str | Path, cfg: ModelConfig | None = None) -> LessKernels:
    """The kernels in a folder, or those that come with the library for a named model.

    With `cfg` kernels of another model are refused.
    """
    folder = _folder(source)
    data = read_json(folder / CONFIG)
    if data.pop("format", None) != FORMAT or data.pop("format_version", None) != VERSION:
        raise ValueError(f"{folder} holds no LESS kernels of version {VERSION}; train them again")
    wanted = {one.name for one in fields(LessConfig)}
    if set(data) != wanted:
        raise ValueError(
            f"{folder / CONFIG} is damaged: fields {sorted(set(data) ^ wanted)} are missing or "
            "unknown"
        )
    kinds: dict[str, type] = dict.fromkeys(_SIZES, int) | {"recipe": dict, "results": dict}
    for name, value in data.items():
        kind = kinds.get(name, str)
        if type(value) is not kind or (kind is int and value < 1):
            expected = {int: "a positive integer", dict: "an object", str: "a text"}[kind]
            raise ValueError(f"{folder / CONFIG} is damaged: {name} must be {expected}")
    config = LessConfig(**data)
    kernels = LessKernels(config, ())
    if cfg is not None:
        kernels.check(cfg)
    return LessKernels(config, _read(folder / KERNELS, config))


def _read(path: Path, config: LessConfig) -> tuple[Params, ...]:
    entries = read_header(path)
    data = np.memmap(path, np.uint8, mode="r")

    def array(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        entry = entries.get(name)
        if entry is None or entry.shape != shape or entry.dtype != kind:
            raise ValueError(f"{path}: expected tensor {name!r} of shape {shape} in {kind}")
        value = data[entry.start : entry.stop].view(_DTYPES[kind]).reshape(shape)
        if kind == "F32" and not np.isfinite(value).all():
            raise ValueError(f"{path}: tensor {name!r} holds numbers that are not finite")
        return np.array(value)

    layers = []
    for index in range(config.num_layers):
        layer = {}
        for name, shape in config.shapes().items():
            full = f"layers.{index}.{name}"
            if len(shape) == 2:
                layer[name] = array(full, shape, "F32")
            else:
                scale = array(f"{full}.scale", (shape[0], 1, shape[2]), "F32")
                layer[name] = _decode(array(full, shape, "I8"), scale)
        layers.append({"feature_map": layer})
    return tuple(layers)


_DTYPES = {"F32": np.dtype("<f4"), "I8": np.dtype(np.int8)}
_SIZES = (
    *("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"),
    *("hidden", "rank"),
)


def _encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """int8 codes and the scale f32[heads, 1, outputs]; vectors stay as they are."""
    return (x, None) if x.ndim < 3 else quantize_rows(x)


def _decode(codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    return codes if scale is None else dequantize_rows(codes, scale)


def _identity(cfg: ModelConfig) -> dict[str, int]:
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")
    return {name: getattr(cfg, name) for name in names}


def is_less(folder: Path) -> bool:
    """Whether a folder holds trained kernels."""
    try:
        return read_json(folder / CONFIG).get("format") == FORMAT
    except ValueError:
        return False


def _folder(source: str | Path) -> Path:
    if str(source) in NAMED:
        try:
            return committed_folder(FolderModel(NAMED[str(source)]))
        except ModelUnavailable as error:
            raise ValueError(f"the LESS kernels of {source} are not installed: {error}") from error
    folder = Path(os.path.expanduser(source))
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"no LESS kernels at {one_line(source, 120)!r}: not one of {', '.join(NAMED)} and no "
            "folder of kernels; train some with `jaxinfer train less`"
        )
    return folder
