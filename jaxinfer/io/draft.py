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

from jaxinfer.arrays import ArrayFile, opened
from jaxinfer.config import ModelConfig
from jaxinfer.fields import known_fields
from jaxinfer.files import (
    check_destination,
    one_line,
    quoted,
    read_json,
    replacing_folder,
    write_json,
)
from jaxinfer.io.int8 import decoded, encoded
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import abstract_params, named_leaves
from jaxinfer.models.recurrent import RecurrentConfig, init_cell
from jaxinfer.nn.linear import rows
from jaxinfer.typing import Params

FORMAT, VERSION = "jaxinfer-draft", 1
WEIGHTS, CONFIG = "draft.safetensors", "config.json"
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
    tensors = encoded(
        named_leaves(jax.tree.map(lambda x: np.asarray(x, np.float32), draft.params))
        | {"vocabulary": np.asarray(draft.vocabulary, np.int32)}
    )
    record = {
        "format": FORMAT, "format_version": VERSION, "target": draft.target,
        "fingerprint": draft.fingerprint, **_described(draft.config), "record": draft.record,
    }  # fmt: skip
    with replacing_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        write_json(temporary / CONFIG, record)


def read_draft(folder: str | Path, target: Params) -> BorrowingDraft:
    """The draft in a folder; refused for another target than its own.

    Raises:
        ValueError: naming the folder and what is wrong in it. Sizes are held against the target and
            the file before anything is made of them.
    """
    folder = Path(folder)
    data = read_json(folder / CONFIG)
    if data.get("format") != FORMAT or data.get("format_version") != VERSION:
        raise ValueError(f"{folder} holds no draft of version {VERSION}; train it again")
    if data.get("fingerprint") != fingerprint(target):
        raise ValueError(
            f"the draft in {folder} belongs to other weights, those of "
            f"{quoted(data.get('target'), 60)}; train one for this model with `jaxinfer train "
            "draft`"
        )
    try:
        _check_record(data)
        cfg = _config(data)
        with opened(folder / WEIGHTS) as file:
            vocabulary = _vocabulary(file, cfg, target)
            params = _params(file, cfg, target)
    except ValueError as error:
        raise ValueError(f"the draft in {folder} is damaged: {one_line(error)}") from error
    return BorrowingDraft(
        cfg, params, vocabulary, data["target"], data["fingerprint"], data["record"]
    )


def _described(cfg: ModelConfig | RecurrentConfig) -> dict[str, Any]:
    if isinstance(cfg, RecurrentConfig):
        return {"recurrent": asdict(cfg)}
    return {"model": cfg.to_dict()}


def _check_record(data: dict[str, Any]) -> None:
    """The fields that say where it came from, and that there are no others."""
    for name, kind in {"target": str, "record": dict}.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{CONFIG} has no {name}, or one of another kind")
    if ("recurrent" in data) == ("model" in data):
        raise ValueError(f"{CONFIG} must have either 'recurrent' or 'model'")
    known = {"format", "format_version", "target", "fingerprint", "record", "recurrent", "model"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{CONFIG} has the unknown field {quoted(unknown[0])}")


def _config(data: dict[str, Any]) -> ModelConfig | RecurrentConfig:
    if "recurrent" in data:
        return RecurrentConfig(**known_fields(RecurrentConfig, data["recurrent"]))
    return ModelConfig.from_dict(data["model"])


def _vocabulary(
    file: ArrayFile, cfg: ModelConfig | RecurrentConfig, target: Params
) -> Int[np.ndarray, " V"]:
    """The tokens that it can propose: different ones of the target's."""
    count, most = file.size("vocabulary"), target["embed"]["tokens"].shape[0]
    if not 1 <= count <= most:
        raise ValueError(f"it proposes {count} tokens of a target that has {most}")
    if isinstance(cfg, RecurrentConfig) and cfg.vocab_size != count:
        raise ValueError(f"vocab_size is {cfg.vocab_size}, but its vocabulary has {count} tokens")
    tokens = file.read("vocabulary", (count,), np.int32)
    if tokens.min() < 0 or tokens.max() >= most:
        raise ValueError(f"its vocabulary has tokens outside the target's, 0 to {most - 1}")
    if len(np.unique(tokens)) < count:
        raise ValueError("its vocabulary has a token twice")
    return tokens


def _params(file: ArrayFile, cfg: ModelConfig | RecurrentConfig, target: Params) -> Params:
    """The parameters, whose shapes follow from `cfg` and have to be those of the file."""
    width = target["embed"]["tokens"].shape[1]
    if cfg.hidden_size != width:
        raise ValueError(f"hidden_size is {cfg.hidden_size}, the target's {width}")
    if isinstance(cfg, ModelConfig):
        stored = {name.split(".")[1] for name in file.names if name.startswith("layers.")}
        if cfg.num_layers != len(stored):  # before so many are made
            raise ValueError(f"num_layers is {cfg.num_layers}, the file has {len(stored)}")
    shapes = _abstract(cfg, target)
    found = decoded(file, named_leaves(shapes), ("vocabulary",))
    return jax.tree.unflatten(jax.tree.structure(shapes), found.values())


def _abstract(cfg: ModelConfig | RecurrentConfig, target: Params) -> Params:
    """The shapes of what a draft has of its own; what it borrows has to be the target's shape."""
    if isinstance(cfg, RecurrentConfig):
        return jax.eval_shape(lambda: init_cell(cfg, jax.random.key(0)))
    params = abstract_params(cfg)
    ours, theirs = ({n: x.shape for n, x in p["embed"].items()} for p in (params, target))
    if ours != theirs:
        raise ValueError(f"its embedding has shapes {ours}, the target's {theirs}")
    return {"layers": params["layers"], "final_norm": params["final_norm"]}
