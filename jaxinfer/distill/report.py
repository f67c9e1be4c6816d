"""What the distillation of a model made of its layers: a `DistillReport` for each, and which of
them compute by modes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jaxinfer.distill.filters.report import DistillReport
from jaxinfer.models.filter_form import FilterForm
from jaxinfer.typing import Json


@dataclass(frozen=True)
class LayerReport:
    """One layer: its filters, and the form that it was given."""

    layer: int
    form: FilterForm  # "exact": a filter is above the tolerance, so it computes as before
    filters: DistillReport

    def to_dict(self) -> Json:
        """JSON-ready."""
        return {"layer": self.layer, "form": self.form} | self.filters.to_dict()


@dataclass(frozen=True)
class ModelReport:
    """The layers with long filters, in order. `str` gives the table."""

    layers: tuple[LayerReport, ...] = ()

    def _of(self, form: FilterForm) -> Sequence[LayerReport]:
        return [one for one in self.layers if one.form == form]

    def to_dict(self) -> Json:
        """JSON-ready."""
        return {
            "modal": [one.layer for one in self._of("modal")],
            "exact": [one.layer for one in self._of("exact")],
            "layers": [one.to_dict() for one in self.layers],
        }

    def summary(self) -> str:
        """One line."""
        modal, exact = self._of("modal"), self._of("exact")
        parts = [f"{len(self.layers)} layers with long filters: {len(modal)} by modes"]
        if modal:
            worst = max(one.filters.worst for one in modal)
            parts.append(f"relative error at most {worst:.3g}")
        if exact:
            named = ", ".join(str(one.layer) for one in exact)
            parts.append(f"layer{'s' * (len(exact) > 1)} {named} exact")
        return "; ".join(parts)

    def table(self) -> str:
        """Markdown, one row per layer; the bound is what no model of as many modes can beat."""
        head = "| layer | form | filters | K | taps | median error | worst | its bound | above |"
        rows = [head, "|" + "---|" * (head.count("|") - 1)]
        for one in self.layers:
            found = one.filters
            worst = max(found.filters, key=lambda filter_: filter_.error)
            middle = median(filter_.error for filter_ in found.filters)
            rows.append(
                f"| {one.layer} | {one.form} | {len(found.filters)} | {found.modes} "
                f"| {found.taps} | {middle:.3g} | {worst.error:.3g} | {worst.bound:.3g} "
                f"| {len(found.fallbacks)} |"
            )
        return "\n".join(rows)

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.table()}"
