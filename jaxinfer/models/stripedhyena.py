"""StripedHyena (Together, 2023): Hyena layers with distilled filters beside attention; Evo 1 too.

A long filter is `h_t = D [t = 0] + Re sum_k R_k p_k^t`: the undelayed form, whose state is updated
before it is read. Poles and residues are complex numbers in Cartesian coordinates. Projections come
in the order x2, x1, v (output gate, input gate, values), all channels of each side by side or, with
`column_split_hyena`, those of one attention head after the other. Norms add eps to the root of the
mean square, outside of it. Evo's rotary positions are divided by a factor.
"""

from functools import partial

import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.models.family import (
    Family,
    Path,
    Source,
    Sources,
    Transform,
    fused_rows,
    linear,
    unchanged,
)
from jaxinfer.models.hf_config import Fields
from jaxinfer.nn.modal import check_stable

PARTS = ("pole_re", "pole_im"), ("residue_re", "residue_im")
NAMES = "poles", "residues"


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("stripedhyena", hf)
    hidden, layers = fields.size("hidden_size"), fields.size("num_layers", kind="layers")
    heads = fields.size("num_attention_heads", kind="heads")
    groups, vocab = fields.size("proj_groups", default=1, kind="heads"), fields.size("vocab_size")
    head_dim = fields.head_dim(hidden, heads)
    fields.require(heads % groups == 0, f"'proj_groups' {groups} must divide the {heads} heads")
    _refuse_other_forms(fields, hidden)
    mixers = _mixers(fields, layers)
    theta = fields.positive("rotary_emb_base", default=10000.0)
    factor = 1.0
    if fields.flag("use_interpolated_rotary_pos_emb", default=False):
        factor = fields.positive("rotary_emb_scaling_factor", default=1.0)
    rope = RopeConfig(
        theta=theta, rotary_dim=head_dim, factor=factor, scaling="none" if factor == 1 else "linear"
    )
    own = HyenaConfig(
        short_taps=fields.size("short_filter_length", default=3),
        short_bias=fields.flag("short_filter_bias", default=True),
        filter=FilterConfig(kind="undelayed", modes=fields.size("state_size")),
        heads_split=heads if fields.flag("column_split_hyena", default=True) else 1,
    )
    return ModelConfig(
        family="stripedhyena",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.size("inner_mlp_size", default=_inner_size(fields, hidden)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // groups,
        head_dim=head_dim,
        max_positions=fields.size("max_seqlen", "max_position_embeddings", default=8192),
        norm="rms_outside",
        norm_eps=fields.positive("eps", default=1e-5),
        activation=fields.activation("mlp_activation", default="silu"),
        rope=rope,
        qkv_bias=fields.flag("qkv_proj_bias", default=True),
        out_bias=fields.flag("mha_out_proj_bias", default=True),
        tie_embeddings=fields.flag("tie_embeddings", "tie_word_embeddings", default=False),
        mixers=mixers,
        hyena=own if "hyena" in mixers else None,
        **fields.special_tokens(vocab, None, None),
    )


def _refuse_other_forms(fields: Fields, hidden: int) -> None:
    groups = fields.size("hyena_filter_groups", default=1)
    fields.require(groups == 1, f"'hyena_filter_groups' {groups} is not implemented; only 1 is")
    filters = fields.size("num_filters", default=hidden)
    fields.require(filters == hidden, f"'num_filters' {filters} is not the width {hidden}")
    for name, wanted in {"final_norm": True, "smeared_gqa": False}.items():
        found = fields.flag(name, default=wanted)
        fields.require(found == wanted, f"{name!r} {found} is not implemented")


def _mixers(fields: Fields, layers: int) -> tuple[str, ...]:
    """By layer; the list of Hyena layers may name more of them than there are."""
    listed = [fields.raw(f"{name}_layer_idxs") for name in ("attn", "hyena")]
    for one in listed:
        if not isinstance(one, list) or any(type(index) is not int for index in one):
            fields.refuse("'attn_layer_idxs' and 'hyena_layer_idxs' must list layers")
    attention, hyena = (set(one) & set(range(layers)) for one in listed)
    fields.require(
        not attention & hyena and len(attention | hyena) == layers,
        f"'attn_layer_idxs' and 'hyena_layer_idxs' must name each of the {layers} layers once",
    )
    return tuple("attn" if index in attention else "hyena" for index in range(layers))


def _inner_size(fields: Fields, hidden: int) -> int:
    """Two thirds of four times the width, rounded up."""
    multiple = fields.size("inner_size_multiple_of", default=64)
    return -(-(8 * hidden // 3) // multiple) * multiple


def sources(cfg: ModelConfig) -> Sources:
    found: Sources = {
        ("embed", "tokens"): Source("embedding_layer.weight"),
        ("final_norm", "scale"): Source("norm.scale"),
    }
    if not cfg.tie_embeddings:
        found["head", "weight"] = Source("unembed.weight")
    for i in range(cfg.num_layers):
        at, name = ("layers", i), f"blocks.{i}"
        for ours, theirs in (("attn_norm", "pre_norm"), ("mlp_norm", "post_norm")):
            found[*at, ours, "scale"] = Source(f"{name}.{theirs}.scale")
        for ours, theirs in (("gate", "l1"), ("up", "l2"), ("down", "l3")):
            found |= linear((*at, "mlp", ours), f"{name}.mlp.{theirs}", False)
        if cfg.mixer(i) == "attn":
            inner = f"{name}.inner_mha_cls"
            found |= fused_rows((*at, "attn"), f"{inner}.Wqkv", cfg, groups=1)
            found |= linear((*at, "attn", "out"), f"{inner}.out_proj", cfg.out_bias)
        else:
            found |= _hyena(cfg, (*at, "hyena"), name)
    return found


def _hyena(cfg: ModelConfig, at: Path, name: str) -> Sources:
    own = cfg.hyena
    assert own is not None
    by_part: Transform = unchanged
    if own.heads_split > 1:
        by_part = partial(joined_heads, heads=own.heads_split)
    taps = partial(_taps, by_part=by_part)
    found = linear((*at, "in"), f"{name}.projections", True, by_part)
    found[*at, "in", "bias"] = Source(f"{name}.projections.bias", by_part)
    found |= linear((*at, "out"), f"{name}.out_filter_dense", True)
    found[*at, "short", "taps"] = Source(f"{name}.filter.short_filter_weight", taps)
    if own.short_bias:
        found[*at, "short", "bias"] = Source(f"{name}.filter.short_filter_bias", by_part)
    for parts, tensor in zip(PARTS, NAMES, strict=True):
        for index, part in enumerate(parts):
            take = partial(_part, index=index, what=tensor)
            found[*at, "filter", part] = Source(f"{name}.filter.{tensor}", take)
    found[*at, "filter", "skip"] = Source(f"{name}.filter.D")
    return found


def joined_heads(array: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows [head][x2 | x1 | v] as [x2 | x1 | v][head]."""
    if array.shape[0] % (3 * heads):
        raise ValueError(f"{array.shape[0]} rows do not split into 3 parts of {heads} heads")
    split = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1)
    return split.reshape(array.shape)


def split_heads(array: np.ndarray, *, heads: int) -> np.ndarray:
    """The inverse of `joined_heads`."""
    split = array.reshape(3, heads, -1, *array.shape[1:]).swapaxes(0, 1)
    return split.reshape(array.shape)


def _taps(array: np.ndarray, *, by_part: Transform) -> np.ndarray:
    if array.ndim != 3 or array.shape[1] != 1:
        raise ValueError(f"a depthwise filter has shape [channels, 1, taps], got {array.shape}")
    return by_part(array[:, 0])


def _part(array: np.ndarray, *, index: int, what: str) -> np.ndarray:
    """Real or imaginary parts of poles or residues [D, K, 1, 2], which are float32 and stable."""
    if array.ndim != 4 or array.shape[2:] != (1, 2):
        raise ValueError(f"{what} have the shape [channels, modes, 1, 2], got {array.shape}")
    if array.dtype != np.float32:
        raise ValueError(
            f"{what} are {array.dtype}, and only float32 holds them: rounded poles leave the unit "
            "circle; convert the original checkpoint again"
        )
    if what == "poles":
        wide = array[:, :, 0].astype(np.float64)
        check_stable(np.hypot(wide[..., 0], wide[..., 1]), "poles")
    return array[:, :, 0, index]


FAMILY = Family(
    name="stripedhyena",
    model_types=("stripedhyena",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("backbone.", ""),
    ignored=(r"rotary_emb\.inv_freq$", r"filter\.t$"),
)
