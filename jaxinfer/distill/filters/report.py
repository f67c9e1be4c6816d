"""What distillation made of each filter, as numbers, a table and JSON.

Errors are those of the float32 leaves as they will be deployed, in float64, over the lags behind 0
(lag 0 is copied) and relative to the filter's own l2 norm there. Of one error e these are four
norms, `l2 <= Hankel <= H-infinity <= l1`: the output of the filter is wrong by at most H-infinity
times the l2 norm of its input, and at most l1 times the input's largest value (arXiv 2310.18780,
section 3, states the first two as objectives).

Axis letters: F filters, L lags, lag 0 with them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

import numpy as np
from jaxtyping import Float64

from jaxinfer.distill.filters.certificate import error_bounds
from jaxinfer.distill.filters.modes import order, unstack
from jaxinfer.distill.filters.spectrum import hankel_spectrum, zero_padded
from jaxinfer.files import one_line
from jaxinfer.nn.modal import ModalFilter, exact_response
from jaxinfer.typing import Json

GRID = 8  # frequencies per lag at which H-infinity is looked for


@dataclass(frozen=True)
class FilterReport:
    """One filter; errors and bounds relative to its l2 norm behind lag 0."""

    error: float  # l2
    bound: float  # no model of as many modes and taps has a smaller l2 error
    hankel: float  # Hankel norm of the error
    hankel_bound: float  # no model of as many modes and taps has a smaller one
    h_infinity: float
    l1: float
    order: int  # real states of the live modes
    modes: int  # that are live
    radius: float  # of the slowest live pole
    method: str  # that won
    fallback: bool  # the error is above the tolerance: exact decoding is advised
    note: str = ""


@dataclass(frozen=True)
class DistillReport:
    """All filters of a bank. `str` gives the table."""

    method: str
    lags: int
    modes: int  # K of the bank
    taps: int
    tolerance: float
    filters: tuple[FilterReport, ...]

    @property
    def states(self) -> int:
        """Real numbers of state per channel."""
        return 2 * self.modes + self.taps

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(one.error for one in self.filters)

    @property
    def fallbacks(self) -> tuple[int, ...]:
        """Filters that should be decoded exactly, or with more modes."""
        return tuple(index for index, one in enumerate(self.filters) if one.fallback)

    def to_dict(self) -> Json:
        """JSON-ready."""
        return asdict(self) | {
            "states": self.states, "worst": self.worst, "fallbacks": list(self.fallbacks),
            "filters": [asdict(one) for one in self.filters],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Json) -> "DistillReport":
        """What `to_dict` gave; ValueError for anything else."""
        try:
            own = {field.name: data[field.name] for field in fields(cls)}
            rows = tuple(FilterReport(**row) for row in own.pop("filters"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no report of a distillation: {one_line(error)}") from error
        return cls(**own, filters=rows)

    def summary(self) -> str:
        """One line."""
        errors = [one.error for one in self.filters]
        advice = f"; exact decoding advised for {len(self.fallbacks)}" if self.fallbacks else ""
        return (
            f"{len(errors)} filters of {self.lags} lags by {self.method}: K = {self.modes} modes"
            f"{f' behind {self.taps} taps' if self.taps else ''}, relative error median "
            f"{median(errors):.3g}, worst {self.worst:.3g}, tolerance {self.tolerance:g}{advice}"
        )

    def table(self) -> str:
        """Markdown, one row per filter."""
        head = "| filter | error | bound | Hankel | H-inf | l1 | order | radius | method | note |"
        rows = [head, "|" + "---|" * (head.count("|") - 1)]
        for index, one in enumerate(self.filters):
            note = "; ".join(filter(None, ["fall back" if one.fallback else "", one.note]))
            rows.append(
                f"| {index} | {one.error:.3g} | {one.bound:.3g} | {one.hankel:.3g} "
                f"| {one.h_infinity:.3g} | {one.l1:.3g} | {one.order} | {one.radius:.6f} "
                f"| {one.method} | {note} |"
            )
        return "\n".join(rows)

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.table()}"


def report_on(
    h: Float64[np.ndarray, "F L"],
    filters: ModalFilter,
    *,
    method: str,
    won: Sequence[str],
    tolerance: float,
) -> DistillReport:
    """How near `filters` are to `h`; `won` has a word for each."""
    error = exact_response(filters, h.shape[1])[:, 1:] - h[:, 1:]
    norm = np.linalg.norm(h[:, 1:], axis=1)
    error /= np.where(norm > 0, norm, 1)[:, None]
    behind = h[:, 1 + filters.delay :] / np.where(norm > 0, norm, 1)[:, None]
    bounds = error_bounds(behind, 2 * filters.modes)
    l2 = np.linalg.norm(error, axis=1)
    columns = {
        "error": l2,
        "bound": bounds.l2,
        # Ritz values are a little low; the first column of the matrix is the error itself
        "hankel": np.maximum(
            l2, hankel_spectrum(error, zero_padded(error.shape[1]), 1).values[:, 0]
        ),
        "hankel_bound": bounds.hankel,
        "h_infinity": np.abs(np.fft.rfft(error, GRID * error.shape[1])).max(axis=1),
        "l1": np.abs(error).sum(axis=1),
    }
    rows, fails = [], l2 > tolerance
    lasts = np.where(h != 0, np.arange(h.shape[1]), 0).max(axis=1)
    for index, modes in enumerate(unstack(filters)):
        numbers = {name: float(column[index]) for name, column in columns.items()}
        rows.append(
            FilterReport(
                **numbers,
                order=order(modes),
                modes=len(modes.poles),
                radius=float(np.abs(modes.poles).max(initial=0.0)),
                method=won[index],
                fallback=bool(fails[index]),
                note=_note(int(lasts[index]), h.shape[1], filters.delay, bool(fails[index])),
            )
        )
    return DistillReport(method, h.shape[1], filters.modes, filters.delay, tolerance, tuple(rows))


def _note(last: int, lags: int, taps: int, fails: bool) -> str:
    """What to know of a filter whose last lag that is not zero is `last`: one that ends has a
    nilpotent recurrence, whose poles are all zero."""
    if last == 0:
        return "zero behind lag 0"
    if last >= lags // 2 or not (taps or fails):
        return ""
    end = f"ends at lag {last}: no modal form"
    return f"{end}; take more taps or decode exactly" if fails else f"{end}, the taps hold it"
