"""`distill_filters`: impulse responses in, recurrences and a report out (arXiv 2310.18780).

Axis letters: F filters, L lags with lag 0, K modes, P taps.
"""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxinfer.arguments import one_of, real, shown, whole
from jaxinfer.distill.filters.methods import METHODS, Fit, Settings
from jaxinfer.distill.filters.order import (
    Size,
    choose_taps,
    grown_modes,
    spectral_modes,
)
from jaxinfer.distill.filters.rational import MOST_MODES as MOST_RATIONAL
from jaxinfer.distill.filters.report import DistillReport, report_on
from jaxinfer.nn.modal import ModalFilter, modal_filter
from jaxinfer.progress import Report, silent

LEAST_LAGS = 4
DEFAULT = "hankel+adam"
NAMES = (*METHODS, "fir")
"""Method "fir" copies 2 K samples, whose inputs take the bytes of K modes' states."""


def distill_filters(
    h: Float[np.ndarray, "F L"] | Float[Array, "F L"],
    order: int | Literal["auto"] = 16,
    *,
    method: str = DEFAULT,
    tolerance: float = 0.01,
    taps: int | Literal["auto"] = "auto",
    steps: int | None = None,
    seed: int = 0,
    report: Report = silent,
) -> tuple[ModalFilter, DistillReport]:
    """Filters as sums of decaying modes, which a recurrence applies at constant cost per token.

    Lag 0 is copied, and so are lags 1 to P where there are taps; the lags behind are fitted.

    Args:
      h: impulse responses, skips of the layer added to lag 0; of any real dtype.
      order: K, complex modes of each filter (2 K real states), or "auto": as many as the tolerance
        needs, for all filters the same.
      method: a name of `jaxinfer.distill.filters.methods.METHODS`, or "fir".
      tolerance: relative l2 error behind lag 0 above which exact decoding is advised.
      taps: P, or "auto": as many, at most 32, as filters need that have no modal form, such as
        delays. Other methods than the default take 0 for "auto".
      steps: of gradient descent; None: the method's own number.
      seed: of the ring start of method "paper".
      report: told how far gradient descent is.

    Raises:
      ValueError: h is no [F, L] of finite real numbers, or an argument is out of range, such as
        more states than samples.

    Example:
      >>> import numpy as np
      >>> lags = np.arange(64)
      >>> h = np.stack([0.9**lags, 0.8**lags * np.cos(lags)])
      >>> filters, report = distill_filters(h, order=1, method="balanced", taps=0)
      >>> filters.nu.shape, report.filters[0].order, report.worst < 1e-3
      ((2, 1), 1, True)
    """
    h = _checked(h)
    check_options(
        h.shape[1] - 1, order=order, method=method, tolerance=tolerance, taps=taps, steps=steps,
        seed=seed,
    )  # fmt: skip
    settings = Settings(steps, seed, report)
    size = _size(h[:, 1:], order, taps, method, tolerance)
    behind = h[:, 1 + size.taps :]
    if method == "fir":
        nothing = np.zeros((len(h), 0), complex)
        fit = Fit(modal_filter(nothing, nothing, h[:, 0]), ("fir",) * len(h))
    else:
        fit = METHODS[method](behind, size.modes, settings)
    copied = jnp.asarray(h[:, 1 : 1 + size.taps], jnp.float32) if size.taps else None
    filters = replace(fit.filters, h0=jnp.asarray(h[:, 0], jnp.float32), taps=copied)
    filters.check("distilled filters")
    live = np.any(behind != 0, axis=1).tolist()
    won = [name if there else "copied" for name, there in zip(fit.won, live, strict=True)]
    return filters, report_on(h, filters, method=method, won=won, tolerance=tolerance)


def check_options(
    samples: int,
    *,
    order: object,
    method: object,
    tolerance: object,
    taps: object,
    steps: object,
    seed: object,
) -> None:
    """Refuses what `distill_filters` cannot do with filters of so many samples behind lag 0.

    Raises:
      ValueError: an argument is out of range.
    """
    name = one_of("method", method, NAMES)
    real("tolerance", tolerance, least=1e-9, most=1)
    if steps is not None:
        whole("steps", steps)
    whole("seed", seed, least=0)
    modes = 0 if _is_automatic(order) else _modes(order, samples, name)
    if not _is_automatic(taps):
        whole("taps", taps, least=0, most=samples - 2 * modes)


def _is_automatic(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def _size(g, order: object, taps: object, method: str, tolerance: float) -> Size:
    """How many modes and taps; those of method "fir" take the bytes of K modes."""
    samples = g.shape[1]
    most = MOST_RATIONAL if method == "rational" else samples // 2
    automatic = _is_automatic(order)
    modes = min(most, spectral_modes(g, tolerance)) if automatic else _modes(order, samples, method)
    if _is_automatic(taps):
        direct = choose_taps(g, modes, tolerance) if method == DEFAULT else 0
    else:
        direct = whole("taps", taps, least=0, most=samples - 2 * modes)
    if method == "fir":
        return Size(0, direct + 2 * modes)
    if automatic and method != "rational":
        modes = grown_modes(g[:, direct:], modes, tolerance)
    return Size(modes, direct)


def _modes(order: object, samples: int, method: str) -> int:
    try:
        modes = whole("order", order)
    except ValueError:
        raise ValueError(
            f"order must be a number of modes from 1 or 'auto', got {shown(order)}"
        ) from None
    if 2 * modes > samples:
        raise ValueError(
            f"order {modes} means {2 * modes} states, but the filters have {samples} samples "
            f"behind lag 0; take at most {samples // 2}"
        )
    if method == "rational" and modes > MOST_RATIONAL:
        raise ValueError(
            f"order {modes} means {2 * modes} coefficients, and beyond {2 * MOST_RATIONAL} a "
            f"rational form is lost in float32; take at most {MOST_RATIONAL}, or another method"
        )
    return modes


def _checked(h: Any) -> Float64[np.ndarray, "F L"]:
    if np.iscomplexobj(h) or getattr(h, "dtype", np.dtype(float)) == np.dtype(bool):
        raise ValueError(f"filters must be real numbers, got {shown(h)}")
    try:
        found = np.asarray(h, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"filters must be an array [filters, lags], got {shown(h)}") from None
    if found.ndim != 2 or not len(found) or found.shape[1] < LEAST_LAGS:
        raise ValueError(
            f"filters must be an array [filters, lags] of at least one filter and {LEAST_LAGS} "
            f"lags, got shape {list(found.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        lag = int(np.flatnonzero(~np.isfinite(found[bad[0]]))[0])
        raise ValueError(
            f"filter {bad[0]} is not finite at lag {lag} ({len(bad)} of {len(found)} filters are "
            "not); repair the checkpoint or leave those filters out"
        )
    return found
