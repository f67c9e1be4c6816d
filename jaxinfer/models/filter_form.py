"""Which filters the layers of a model compute by: those that it was trained with, or modes to which
they were distilled (Laughing Hyena, arXiv 2310.18780)."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Literal, TypeAlias

from jaxtyping import Array, Float

from jaxinfer.arguments import one_of, shown
from jaxinfer.config import ModelConfig
from jaxinfer.hyena_config import ExactForm
from jaxinfer.models.hyena_params import MODAL_KINDS, values
from jaxinfer.nn.hyena import sizes
from jaxinfer.nn.modal import ModalFilter
from jaxinfer.typing import Params

FilterForm = Literal["modal", "exact", "tiled", "epoched"]
FilterForms: TypeAlias = FilterForm | Sequence[FilterForm] | None
FORMS: tuple[FilterForm, ...] = ("modal", "exact", "tiled", "epoched")


def with_filters(
    cfg: ModelConfig, params: Params, filters: FilterForms
) -> tuple[ModelConfig, Params]:
    """The model with its long filters in the form asked for, one for all layers or one each; None
    leaves all as they are. "exact" drops a layer's modes: it convolves its stored inputs then; so
    do "tiled" and "epoched", in blocks ahead of the text (`jaxinfer.models.hyena_ahead`).

    Raises:
      ValueError: an unknown form, another number of them than of layers, modes where there are
        none, or layers that would be exact in different forms.
    """
    if filters is None:
        return cfg, params
    if cfg.hyena is None:
        raise ValueError(f"filters={shown(filters)} is for models with long filters; leave it out")
    each = [filters] * cfg.num_layers if isinstance(filters, str) else list(filters)
    forms = [one_of("filters", form, FORMS) for form in each]
    ends = [cfg.hyena.ends(i) for i in range(cfg.num_layers)]
    if len(forms) != cfg.num_layers:
        raise ValueError(f"filters has {len(forms)} entries for {cfg.num_layers} layers")
    exact: dict[str, ExactForm] = {"exact": "cached", "tiled": "tiled", "epoched": "epoched"}
    ways = {exact[form] for form in forms if form != "modal"}
    if len(ways) > 1:
        raise ValueError(
            f"filters names {' and '.join(sorted(set(forms) - {'modal'}))}; all layers that are "
            "not modal take one of them"
        )
    cfg = replace(cfg, hyena=replace(cfg.hyena, exact=next(iter(ways), "cached")))
    layers = []
    for i, (form, layer) in enumerate(zip(forms, params["layers"], strict=True)):
        own = layer.get("hyena")
        if form == "modal" and own is not None and ends[i]:
            raise ValueError(f"layer {i} has no modes; distil the model first, or ask for 'exact'")
        if form != "modal" and own is not None and "modal" in own:
            layer = layer | {"hyena": {name: x for name, x in own.items() if name != "modal"}}
        layers.append(layer)
    return _described(cfg, params | {"layers": tuple(layers)})


def check_drafts(cfg: ModelConfig) -> None:
    """Refuses drafts for a model whose layers sum ahead: a rejected token would be in their sums.

    Raises:
      ValueError: the form is "tiled" or "epoched".
    """
    own = cfg.hyena
    if own is None or own.exact == "cached":
        return
    if any(own.ends(i) for i in range(cfg.num_layers) if cfg.mixer(i) == "hyena"):
        raise ValueError(
            f"{own.exact} filters take one token at a time and no drafts; load the model with "
            "filters='exact' or 'modal'"
        )


def long_filters(cfg: ModelConfig, params: Params) -> tuple[Float[Array, "F L"] | None, ...]:
    """What there is to distil: the impulse responses of each layer's own filters, skip connection
    included, over the model's positions; None for other layers and for filters that are modes."""
    found: list[Array | None] = []
    for layer in params["layers"]:
        own = layer.get("hyena")
        if cfg.hyena is None or own is None or cfg.hyena.filter.kind in MODAL_KINDS:
            found.append(None)
        else:
            bare = {name: own[name] for name in ("filter", "skip")}
            found.append(values(cfg.hyena, bare, cfg.max_positions, cfg.max_positions))
    return tuple(found)


def distilled(
    cfg: ModelConfig, params: Params, filters: Sequence[ModalFilter | None]
) -> tuple[ModelConfig, Params]:
    """The model whose layers compute by these modes, a `ModalFilter` for each layer or None where
    it keeps what it has. The filters that they were made from stay beside them (`with_filters`).

    Raises:
      ValueError: another number of them than of layers, one for a layer without long filters, or of
        another number of filters; or modes that are not float32, finite and stable.
    """
    if len(filters) != cfg.num_layers:
        raise ValueError(f"{len(filters)} modal filters are given for {cfg.num_layers} layers")
    layers = []
    for i, (modal, layer) in enumerate(zip(filters, params["layers"], strict=True)):
        if modal is not None:
            own = layer.get("hyena")
            count = 0 if own is None or cfg.hyena is None else cfg.hyena.filters(cfg.hidden_size)
            if own is None or len(modal.h0) != count:
                raise ValueError(
                    f"layer {i} has {count} long filters, got modes of {len(modal.h0)}"
                )
            modal.check(f"layer {i}")
            leaves = {one.name: getattr(modal, one.name) for one in fields(modal)}
            leaves = {name: x for name, x in leaves.items() if x is not None and x.size}
            layer = layer | {"hyena": own | {"modal": leaves}}
        layers.append(layer)
    return _described(cfg, params | {"layers": tuple(layers)})


def _described(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The configuration of these parameters, as to modes beside a layer's own filters."""
    if cfg.hyena is None:
        return cfg, params
    owns = [layer.get("hyena", {}) for layer in params["layers"]]
    modes, taps = zip(*(sizes(own) if "modal" in own else (0, 0) for own in owns), strict=True)
    hyena = replace(
        cfg.hyena, modes=modes if any(modes) else None, taps=taps if any(taps) else None
    )
    return replace(cfg, hyena=hyena), params
