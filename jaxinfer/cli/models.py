"""Loading the model that a verb works with: the one asked for, or the default one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.cli.interrupts import finishing
from jaxinfer.cli.notices import note

if TYPE_CHECKING:
    from jaxinfer.lm import LM
    from jaxinfer.models.recurrent import RecurrentDraft
    from jaxinfer.runtime.backend import Implementation
    from jaxinfer.sparsity.method import Sparsity


def open_model(
    source: str | None,
    dtype: str | None = None,
    weights: str | None = None,
    implementation: "Implementation | None" = None,
    sparsity: "Sparsity | None" = None,
) -> "LM":
    """The model `source`, made sparse if asked; None is the default model, else the committed one.

    Which default was taken is said on standard error. Compiled programs are kept from here on.
    """
    from jaxinfer.io.model_index import DEFAULT, FALLBACK, ModelUnavailable
    from jaxinfer.runtime.compilation_cache import enable_persistent_cache

    enable_persistent_cache()
    load = partial(
        _load, dtype=dtype, weights=weights, implementation=implementation, sparsity=sparsity
    )
    if source is not None:
        return load(source)
    try:
        lm = load(DEFAULT)
        note(f"model: {DEFAULT}")
    except ModelUnavailable as error:
        lm = load(FALLBACK)
        note(f"note: {error}")
        note(f"model: {FALLBACK}, a very small one for trying things out")
    return lm


def open_draft(
    target: "LM", draft: str, dtype: str | None = None, weights: str | None = None
) -> "LM | RecurrentDraft | str":
    """What `--draft` names, see `load_draft`."""
    from jaxinfer.loading import load_draft
    from jaxinfer.progress import progress

    with progress(f"loading {Path(draft).name}") as report:
        return load_draft(target, draft, dtype=dtype, weights=weights, progress=report)


@finishing()  # a model that is being fetched is written to the cache folder
def _load(
    source: str,
    *,
    dtype: str | None,
    weights: str | None,
    implementation: "Implementation | None",
    sparsity: "Sparsity | None",
) -> "LM":
    from jaxinfer.loading import load
    from jaxinfer.progress import progress

    with progress(f"loading {Path(source).name}") as report:
        return load(
            source, dtype=dtype, weights=weights, implementation=implementation,
            sparsity=sparsity, progress=report,
        )  # fmt: skip
