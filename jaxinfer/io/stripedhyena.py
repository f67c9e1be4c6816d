"""Models as folders in StripedHyena's layout: `config.json` and `model.safetensors`.

The inverse of `jaxinfer.models.stripedhyena`: tensors that were read from such a folder come back
bit for bit. Layers that were distilled write their modes in the undelayed form, whose residues are
divided by the poles.
"""

from pathlib import Path

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.files import check_destination, read_json, replacing_folder, write_json
from jaxinfer.models.stripedhyena import NAMES, PARTS, split_heads
from jaxinfer.nn.hyena import modal_part
from jaxinfer.nn.modal import undelayed
from jaxinfer.typing import Json, Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WHAT = "a StripedHyena folder"


def is_stripedhyena(folder: str | Path) -> bool:
    """Whether a folder holds such a model."""
    try:
        return read_json(Path(folder) / CONFIG).get("model_type") == "stripedhyena"
    except (ValueError, OSError):
        return False


def save_stripedhyena(
    folder: str | Path, cfg: ModelConfig, params: Params, *, overwrite: bool = False
) -> None:
    """Writes the folder, whole or not at all.

    Raises:
      ValueError: the layout cannot hold the model, or the folder is taken.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    check_destination(folder, is_stripedhyena, WHAT, overwrite=overwrite)
    config, tensors = config_of(cfg, params), tensors_of(cfg, params)
    with replacing_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(temporary / CONFIG, config)


def tensors_of(cfg: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The tensors of the layout, each contiguous."""
    params = jax.tree.map(np.asarray, params)
    found = {
        "embedding_layer.weight": params["embed"]["tokens"],
        "norm.scale": params["final_norm"]["scale"],
    }
    if not cfg.tie_embeddings:
        found["unembed.weight"] = params["head"]["weight"]
    for i, layer in enumerate(params["layers"]):
        name = f"blocks.{i}"
        found[f"{name}.pre_norm.scale"] = layer["attn_norm"]["scale"]
        found[f"{name}.post_norm.scale"] = layer["mlp_norm"]["scale"]
        for ours, theirs in (("gate", "l1"), ("up", "l2"), ("down", "l3")):
            found[f"{name}.mlp.{theirs}.weight"] = layer["mlp"][ours]["weight"]
        if "attn" in layer:
            found |= _attention(f"{name}.inner_mha_cls", layer["attn"])
        else:
            found |= _hyena(cfg, name, layer["hyena"])
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def _attention(name: str, own: Params) -> dict[str, np.ndarray]:
    found = {}
    for leaf in ("weight", "bias"):
        if leaf in own["q"]:
            found[f"{name}.Wqkv.{leaf}"] = np.concatenate([own[x][leaf] for x in "qkv"])
        if leaf in own["out"]:
            found[f"{name}.out_proj.{leaf}"] = own["out"][leaf]
    return found


def _hyena(cfg: ModelConfig, name: str, own: Params) -> dict[str, np.ndarray]:
    assert cfg.hyena is not None

    def by_heads(x: np.ndarray) -> np.ndarray:
        return split_heads(x, heads=cfg.hyena.heads_split) if cfg.hyena else x

    found = {
        f"{name}.projections.weight": by_heads(own["in"]["weight"]),
        f"{name}.projections.bias": by_heads(own["in"]["bias"]),
        f"{name}.out_filter_dense.weight": own["out"]["weight"],
        f"{name}.out_filter_dense.bias": own["out"]["bias"],
        f"{name}.filter.short_filter_weight": by_heads(own["short"]["taps"])[:, None],
    }
    if "bias" in own["short"]:
        found[f"{name}.filter.short_filter_bias"] = by_heads(own["short"]["bias"])
    if "modal" not in own and "pole_re" in own["filter"]:
        skip, pairs = own["filter"]["skip"], [[own["filter"][x] for x in pair] for pair in PARTS]
    else:
        modal = modal_part(own)
        assert modal is not None
        poles, residues, skip = undelayed(modal)
        pairs = [[np.real(x), np.imag(x)] for x in (poles, residues)]
    found[f"{name}.filter.D"] = np.asarray(skip, np.float32)
    for tensor, pair in zip(NAMES, pairs, strict=True):
        stacked = np.stack(pair, axis=-1).astype(np.float32)
        found[f"{name}.filter.{tensor}"] = stacked[:, :, None]
    return found


def config_of(cfg: ModelConfig, params: Params) -> Json:
    """The config.json that `jaxinfer.models.stripedhyena.config_from_hf` reads.

    Raises:
      ValueError: the layout cannot hold the model.
    """
    modes = _checked(cfg, params)
    own, rope = cfg.hyena, cfg.rope
    assert own is not None and rope is not None
    layers = {
        name: [i for i in range(cfg.num_layers) if cfg.mixer(i) == mixer]
        for name, mixer in (("attn_layer_idxs", "attn"), ("hyena_layer_idxs", "hyena"))
    }
    interpolated = {"use_interpolated_rotary_pos_emb": True} if rope.scaling == "linear" else {}
    return interpolated | layers | {
        "model_type": "stripedhyena", "vocab_size": cfg.vocab_size, "num_layers": cfg.num_layers,
        "hidden_size": cfg.hidden_size, "num_filters": cfg.hidden_size,
        "inner_mlp_size": cfg.intermediate_size, "num_attention_heads": cfg.num_heads,
        "proj_groups": cfg.group_size, "max_seqlen": cfg.max_positions, "eps": cfg.norm_eps,
        "mlp_activation": cfg.activation, "rotary_emb_base": rope.theta,
        "rotary_emb_scaling_factor": rope.factor, "qkv_proj_bias": cfg.qkv_bias,
        "mha_out_proj_bias": cfg.out_bias, "tie_embeddings": cfg.tie_embeddings,
        "short_filter_length": own.short_taps, "short_filter_bias": own.short_bias,
        "state_size": modes, "hyena_filter_groups": 1, "column_split_hyena": own.heads_split > 1,
        "final_norm": True,
    }  # fmt: skip


def _checked(cfg: ModelConfig, params: Params) -> int:
    """The modes of every filter; refuses what the layout has no place for."""
    own = cfg.hyena
    other = cfg.parallel_block or cfg.mlp_bias or cfg.norm_bias or not cfg.gated_mlp
    if own is None or cfg.norm != "rms_outside" or cfg.positions != "rope" or other:
        raise ValueError(
            f"StripedHyena's layout holds models of its own form alone, not family {cfg.family!r}"
        )
    if own.order != 2 or own.head_size != 1:
        raise ValueError("StripedHyena's layout holds Hyena layers of order 2 without heads")
    if own.heads_split not in (1, cfg.num_heads):
        raise ValueError(
            f"heads_split {own.heads_split} is neither 1 nor {cfg.num_heads}, the heads"
        )
    found = set()
    for i, layer in enumerate(params["layers"]):
        if "hyena" in layer:
            modal = modal_part(layer["hyena"])
            if modal is None or not modal.modes:
                raise ValueError(f"layer {i} has no modes; distil the model with all_modal=True")
            found.add(modal.modes)
    if len(found) != 1:
        raise ValueError(
            f"StripedHyena's layout has one number of modes for all layers, got {sorted(found)}; "
            "distil with a given order"
        )
    return found.pop()
