"""What a `ModelConfig` says of its Hyena layers."""

import reprlib
from dataclasses import dataclass, replace
from typing import Literal

from jaxinfer.fields import check_types, require

FilterKind = Literal["implicit", "explicit", "modal", "real", "undelayed"]
Prefill = Literal["chunked", "scan", "recurrence", "vandermonde", "fft"]
PromptForm = Literal["modal", "exact"]
ExactForm = Literal["cached", "tiled", "epoched"]
FilterInit = Literal["normal", "uniform", "xavier"]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What the long filters of Hyena layers are functions of (`jaxinfer.nn.filters`).

    An "implicit" filter is a small network of the position under a decaying window (arXiv
    2302.10866, section 3.3): `features` (odd) of the position, `inner_layers` hidden layers of
    `width` behind the first, sines of `frequency`. The window of channel c is `exp(-tau |delta_c|)
    + shift` with tau from 0 to 1 over the model's positions and delta such that channels decay to
    `floor` at a share of `slow` to `fast` of them. `normalized` divides by the L1 norm over the
    channels. `trained_positions` makes the table of features a parameter. `init` is "normal" (N(0,
    0.02^2) as in a language model), "uniform" (+-1 / sqrt(inputs)) or "xavier" (the same, but its
    last layer Xavier-normal).

    An "explicit" filter is an array. The others are sums of `modes` (`jaxinfer.nn.modal`): "modal",
    "real" (real poles) and "undelayed" (Cartesian poles, the state updated before it is read).
    """

    kind: FilterKind = "implicit"
    features: int = 33
    width: int = 64
    inner_layers: int = 2
    frequency: float = 14.0
    window: bool = True
    fast: float = 0.3
    slow: float = 1.5
    floor: float = 0.01
    shift: float = 0.0
    normalized: bool = False
    trained_positions: bool = True
    init: FilterInit = "normal"
    modes: int = 0

    def __post_init__(self):
        check_types(self)
        for name, largest in {"features": 65535, "width": 65536, "inner_layers": 64}.items():
            value = getattr(self, name)
            require(0 < value <= largest, f"filter {name} must be from 1 to {largest}, got {value}")
        require(
            self.features % 2 == 1 and self.features >= 3,
            f"filter features must be odd and at least 3, got {self.features}",
        )
        require(
            self.fast > 1e-6 and self.slow > 1e-6 and 0 < self.floor < 1,
            "a filter's window needs fast and slow above 0 and floor from 0 to 1, got "
            f"{self.fast}, {self.slow} and {self.floor}",
        )
        is_modal = self.kind in ("modal", "real", "undelayed")
        require(
            (0 < self.modes <= 4096) if is_modal else self.modes == 0,
            f"filter kind {self.kind!r} and modes={self.modes} disagree: modes are of modal kinds",
        )


@dataclass(frozen=True, kw_only=True)
class HyenaConfig:
    """Hyena layers: long convolutions between gates (arXiv 2302.10866, section 3).

    `order` gates a channel with `order - 1` long filters between them. With `head_size` N above 1
    it is MultiHyena (arXiv 2310.18780, section 4): a head of N channels is the outer product of
    keys and values under one filter, so there are hidden_size / N filters. `short_taps` is the
    width of the filter in front of the gates, which has a bias with `short_bias`. A StripedHyena
    checkpoint stores the rows of its projections in `heads_split` runs; ours never are.

    `modes[i]` or `taps[i]` above 0: layer i also has its filters as so many modes behind so many
    taps, by which it then computes: it was distilled. `exact` says how the others decode, all to
    the same numbers: "cached" sums over all stored inputs for each token, "tiled" and "epoched" do
    so ahead and in blocks (`jaxinfer.models.hyena_ahead`).

    `prefill` is how a prompt becomes the state of modes (`jaxinfer.models.hyena_prefill`). With
    `prompt` "exact" the outputs of a prompt's tokens come from the filters that modes were made
    from, for each chunk that is read at once, and only the text behind it is the modes'.
    """

    order: int = 2
    head_size: int = 1
    short_taps: int = 3
    short_bias: bool = True
    heads_split: int = 1
    filter: FilterConfig = FilterConfig()
    modes: tuple[int, ...] | None = None
    taps: tuple[int, ...] | None = None
    exact: ExactForm = "cached"
    prefill: Prefill = "chunked"
    prompt: PromptForm = "modal"

    def __post_init__(self):
        check_types(self)
        limits = {
            "order": (2, 16), "head_size": (1, 1024), "short_taps": (1, 64),
            "heads_split": (1, 65536),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            require(
                least <= value <= most, f"hyena {name} must be from {least} to {most}, got {value}"
            )
        require(
            self.head_size == 1 or self.order == 2,
            f"hyena heads of size {self.head_size} need order 2, got {self.order}",
        )
        for name in ("modes", "taps"):
            value = getattr(self, name) or ()
            require(
                all(0 <= n <= 4096 for n in value),
                f"hyena {name} must be from 0 to 4096, got {reprlib.repr(value)}",
            )

    def part(self, layers: range) -> "HyenaConfig":
        """That of a run of layers of a model."""
        some = slice(layers.start, layers.stop)
        kept = {name: (getattr(self, name) or ())[some] or None for name in ("modes", "taps")}
        return replace(self, **kept)

    def ends(self, layer: int) -> bool:
        """Whether a layer's filters end with the model's positions, as those of no mode do."""
        own = self.filter.kind in ("implicit", "explicit")
        return own and not any(each and each[layer] for each in (self.modes, self.taps))

    def filters(self, hidden_size: int) -> int:
        """F, long filters of a layer; of higher orders channel c has c * (order - 1) + o."""
        return hidden_size // self.head_size * (self.order - 1)
