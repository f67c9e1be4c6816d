"""GGUF files as checkpoints: configuration, tensors and tokenizer of a llama.cpp model.

Metadata is translated to the Hugging Face config of the same family, GGUF tensor names to Hugging
Face names (through the tables of the `gguf` package), and each family's own mapping does the rest.
What llama.cpp's converter changed is undone here: Llama's rotary rows are interleaved, GPT-2's
kernels transposed, the fused rows of GPT-NeoX and Falcon sorted into all q, all k, all v.
"""

import math
import mmap
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.files import one_line, quoted
from jaxinfer.io.gguf_config import hf_config
from jaxinfer.io.gguf_header import TensorInfo
from jaxinfer.io.gguf_parts import read_model
from jaxinfer.io.weights import close_quietly, drop_pages
from jaxinfer.models.registry import config_from_hf
from jaxinfer.typing import Json

CHUNK_BYTES = 4 * 2**20
ROPE_FREQS = "rope_freqs.weight"
"""The one tensor that is configuration and not a parameter."""


class GGUFFile:
    """An open GGUF model: a `TensorStore` that answers to Hugging Face tensor names."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.where = str(self.path)
        header = read_model(self.path)
        self.metadata, self.tensors = header.metadata, header.tensors
        self.architecture = str(self.metadata.get("general.architecture"))
        self._maps: dict[Path, mmap.mmap] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def close(self) -> None:
        self._last = None
        for mapping in self._maps.values():
            close_quietly(mapping)
        self._maps.clear()

    @cached_property
    def hf_config(self) -> Json:
        """The Hugging Face config.json that describes the same model."""
        factors = self.raw(ROPE_FREQS) if ROPE_FREQS in self.tensors else None
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return hf_config(self.metadata, shapes, factors, self.where)

    @cached_property
    def config(self) -> ModelConfig:
        translated = self.hf_config
        try:
            return config_from_hf(translated)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    @cached_property
    def _name_map(self) -> Any:
        from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.architecture]
        return get_tensor_name_map(MODEL_ARCH(arch), self.config.num_layers)

    def _gguf_name(self, name: str) -> str | None:
        return self._name_map.get_name(name, try_suffixes=(".weight", ".bias"))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._gguf_name(name) in self.tensors

    def unused(self, used: Collection[str]) -> Iterable[str]:
        read = {self._gguf_name(name) for name in used} | {ROPE_FREQS}
        return [name for name in self.tensors if name not in read]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of a Hugging Face name; GPT-2's kernels are turned."""
        gguf_name = self._stored(name)
        shape = self.tensors[gguf_name].shape
        return shape[::-1] if self._is_kernel(gguf_name) else shape

    def read(self, name: str) -> np.ndarray:
        """The tensor of a Hugging Face name, float32, laid out as Hugging Face stores it."""
        gguf_name = self._stored(name)
        if self._last is None or self._last[0] != gguf_name:
            self._last = None
            self._last = (gguf_name, self._as_hugging_face(gguf_name, self.raw(gguf_name)))
        return self._last[1]

    def _stored(self, name: str) -> str:
        gguf_name = self._gguf_name(name)
        if gguf_name is None or gguf_name not in self.tensors:
            raise ValueError(f"{self.where}: tensor {quoted(name)} is missing")
        return gguf_name

    def _is_kernel(self, gguf_name: str) -> bool:
        """Whether Hugging Face stores the weight as GPT-2's Conv1D does, [inputs, outputs]."""
        is_matrix = len(self.tensors[gguf_name].shape) == 2
        return self.architecture == "gpt2" and is_matrix and gguf_name.startswith("blk.")

    def release(self, name: str) -> None:
        self._last = None

    def raw(self, gguf_name: str) -> np.ndarray:
        """The dequantized tensor as the file has it, float32."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        info: TensorInfo = self.tensors[gguf_name]
        kind = GGMLQuantizationType(info.type_id)
        data = np.frombuffer(self._map(info.path), np.uint8, info.num_bytes, info.offset)
        rows = data.reshape(math.prod(info.shape[:-1]), -1)
        result = np.empty((rows.shape[0], info.shape[-1]), np.float32)
        step = max(1, CHUNK_BYTES // result.shape[1] // 4)
        try:
            for start in range(0, len(rows), step):
                if kind == GGMLQuantizationType.F64:
                    block = rows[start : start + step].view(np.float64)
                else:
                    # a quantized weight may decode to NaN; the caller checks for it by name
                    with np.errstate(all="ignore"):
                        block = dequantize(rows[start : start + step], kind)
                result[start : start + step] = block
        except NotImplementedError as error:
            raise ValueError(
                f"{self.where}: tensor {quoted(gguf_name)} has type {kind.name}, which cannot be "
                f"dequantized ({one_line(error)}); convert the model to another GGUF type"
            ) from error
        finally:
            drop_pages(self._map(info.path), info.offset, info.num_bytes)
        return result.reshape(info.shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def _as_hugging_face(self, gguf_name: str, array: np.ndarray) -> np.ndarray:
        cfg, part = self.config, gguf_name.split(".", 2)[-1]
        if self.architecture == "llama" and part in ("attn_q.weight", "attn_q.bias"):
            return deinterleave(array, cfg.num_heads)
        if self.architecture == "llama" and part in ("attn_k.weight", "attn_k.bias"):
            return deinterleave(array, cfg.num_kv_heads)
        if self._is_kernel(gguf_name):
            return array.T
        if self.architecture == "gptneox" and part.startswith("attn_qkv"):
            return regroup(array, cfg, cfg.num_heads)
        if self.architecture == "falcon" and part.startswith("attn_qkv"):
            return regroup(array, cfg, cfg.num_kv_heads)
        return array


def deinterleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Each head's rows, rotary pairs (0, 1), (2, 3), ..., in half-split order: evens, then odds."""
    if array.shape[0] % (2 * num_heads):
        raise ValueError(f"{array.shape[0]} rows do not split into {num_heads} heads of pairs")
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(array.shape)


def regroup(array: np.ndarray, cfg: ModelConfig, groups: int) -> np.ndarray:
    """Rows of all q, all k, all v in `groups` runs of (queries, key, value), as trained."""
    counts = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    if array.shape[0] != sum(counts) * cfg.head_dim:
        raise ValueError(f"{array.shape[0]} fused rows; expected {sum(counts)} heads")
    parts = np.split(array, np.cumsum(counts)[:2] * cfg.head_dim)
    runs = [part.reshape(groups, -1, *array.shape[1:]) for part in parts]
    return np.concatenate(runs, axis=1).reshape(array.shape)
