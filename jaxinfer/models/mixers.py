"""The mixers by the name under which a layer keeps their parameters."""

from jaxinfer.config import ModelConfig
from jaxinfer.files import quoted
from jaxinfer.models.attention import Attention
from jaxinfer.models.hyena import Hyena
from jaxinfer.models.mixer import Mixer
from jaxinfer.typing import Params

_MIXERS: dict[str, Mixer] = {"attn": Attention(), "hyena": Hyena()}


def register_mixer(name: str, mixer: Mixer) -> None:
    """Lets `ModelConfig.mixers` name `mixer`; a layer keeps its parameters under the same name."""
    if _MIXERS.setdefault(name, mixer) is not mixer:
        raise ValueError(f"there is a mixer {name!r} already; choose another name")


def mixer_named(name: str) -> Mixer:
    """The mixer that was registered under `name`."""
    if name not in _MIXERS:
        raise ValueError(f"unknown mixer {quoted(name, 40)}; known are {sorted(_MIXERS)}")
    return _MIXERS[name]


def mixers_of(cfg: ModelConfig) -> tuple[Mixer, ...]:
    """The mixer of each layer."""
    return tuple(mixer_named(cfg.mixer(layer)) for layer in range(cfg.num_layers))


def mixer_of(params_of_layer: Params) -> tuple[str, Mixer]:
    """The mixer of a layer: the one whose name its parameters carry."""
    for name, mixer in _MIXERS.items():
        if name in params_of_layer:
            return name, mixer
    raise ValueError(f"no mixer among the layer's parameters {sorted(params_of_layer)}")


def with_aux(params_of_layer: Params, aux: Params | None) -> Params:
    """The layer with `aux`, learned parameters of its cache policy, beside those of its mixer."""
    if aux is None:
        return params_of_layer
    name, _ = mixer_of(params_of_layer)
    return params_of_layer | {name: params_of_layer[name] | {"cache": aux}}
