"""Trained drafts that borrow the embedding and the head of their target, on disk.

    config.json          format, version, the target's name and fingerprint, the draft's config,
                         recipe, results
    draft.safetensors    the layers and the final norm: matrices as int8 with one float32 scale per
                         row, vectors as float32; `vocabulary`, the tokens that it can propose

About one byte per parameter. A draft of its own embedding is an ordinary checkpoint instead.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxinfer.config import ModelConfig
from jaxinfer.files import check_destination, read_json, replacing_folder, write_json
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import init_params, leaf_name
from jaxinfer.models.recurrent import RecurrentConfig, init_cell
from jaxinfer.nn.int8 import dequantize_rows, quantize_rows
from jaxinfer.nn.linear import rows
from jaxinfer.typing import Params

FORMAT, VERSION = "jaxinfer-draft", 1
WEIGHTS, CONFIG = "draft.safetensors", "config.json"
SCALE = "#scale"
WHAT = "a draft"


@dataclass(frozen=True, eq=False)
class BorrowingDraft:
    """`params` has `layers` and `final_norm`, or a recurrent cell; the rest is the target's."""

    config: ModelConfig | RecurrentConfig
    params: Params
    vocabulary: Int[np.ndarray, " V"]
    target: str
    fingerprint: str
    record: dict[str, Any] = field(default_factory=dict)

    def full_params(self, target: Params) -> Params:
        """All parameters, with the target's arrays shared."""
        head = target["head"]["weight"] if "head" in target else target["embed"]["tokens"]
        dtype = target["embed"]["tokens"].dtype
        return {
            "embed": target["embed"],
            "head": {"weight": rows(head, jnp.asarray(self.vocabulary))},
            "draft_vocabulary": jnp.asarray(self.vocabulary),
            **jax.tree.map(lambda x: jnp.asarray(x, dtype), self.params),
        }


def is_draft(folder: str | Path) -> bool:
    """Whether a folder holds such a draft."""
    try:
        return read_json(Path(folder) / CONFIG).get("format") == FORMAT
    except (ValueError, OSError):
        return False


def save_draft(folder: str | Path, draft: BorrowingDraft, *, overwrite: bool = False) -> None:
    """Writes a folder, whole or not at all; an older draft there is replaced only with
    `overwrite`, and nothing else ever is."""
    from safetensors.numpy import save

    folder = Path(folder)
    check_destination(folder, is_draft, WHAT, overwrite=overwrite)
    tensors: dict[str, np.ndarray] = {"vocabulary": np.asarray(draft.vocabulary, np.int32)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(draft.params):
        name, value = leaf_name(path), np.asarray(leaf, np.float32)
        if value.ndim < 2:
            tensors[name] = value
        else:
            tensors[name], tensors[name + SCALE] = quantize_rows(value)
    record = {
        "format": FORMAT, "format_version": VERSION, "target": draft.target,
        "fingerprint": draft.fingerprint, **_described(draft.config), "record": draft.record,
    }  # fmt: skip
    with replacing_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        write_json(temporary / CONFIG, record)


def read_draft(folder: str | Path, target: Params) -> BorrowingDraft:
    """The draft in a folder; refused for another target than its own."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    data = read_json(folder / CONFIG)
    if data.get("format") != FORMAT or data.get("format_version") != VERSION:
        raise ValueError(f"{folder} holds no draft of version {VERSION}; train it again")
    if data.get("fingerprint") != fingerprint(target):
        raise ValueError(
            f"the draft in {folder} belongs to other weights, those of {data.get('target')!r:.60}; "
            "train one for this model with `jaxinfer train draft`"
        )
    try:
        cfg = _config(data)
        tensors = load_file(folder / WEIGHTS)
        vocabulary = tensors.pop("vocabulary").astype(np.int32)
        shapes = jax.eval_shape(lambda: _abstract(cfg))
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _decoded(tensors, leaf_name(path), leaf.shape), shapes
        )
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"the draft in {folder} is damaged: {error}") from None
    return BorrowingDraft(
        cfg, params, vocabulary, str(data.get("target")), data["fingerprint"], data["record"]
    )


def as_stored(params: Params) -> Params:
    """The parameters as a file gives them back; doing it again changes nothing."""

    def one(leaf: Any) -> np.ndarray:
        value = np.asarray(leaf, np.float32)
        return value if value.ndim < 2 else dequantize_rows(*quantize_rows(value))

    return jax.tree.map(one, params)


def _described(cfg: ModelConfig | RecurrentConfig) -> dict[str, Any]:
    if isinstance(cfg, RecurrentConfig):
        return {"recurrent": asdict(cfg)}
    return {"model": cfg.to_dict()}


def _config(data: dict[str, Any]) -> ModelConfig | RecurrentConfig:
    if "recurrent" in data:
        try:
            return RecurrentConfig(**data["recurrent"])
        except TypeError as error:
            raise KeyError(f"config.json: {error}") from None
    return ModelConfig.from_dict(data["model"])


def _abstract(cfg: ModelConfig | RecurrentConfig) -> Params:
    if isinstance(cfg, RecurrentConfig):
        return init_cell(cfg, jax.random.key(0))
    params = init_params(cfg, jax.random.key(0))
    return {"layers": params["layers"], "final_norm": params["final_norm"]}


def _decoded(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = tensors[name]
    if len(shape) > 1:
        value = dequantize_rows(value, tensors[name + SCALE])
    if value.shape != shape or not np.isfinite(value).all():
        raise KeyError(f"tensor {name!r} must be finite and of shape {shape}")
    return value
