"""Loading the model that a verb works with: the one asked for, or the default one."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.lm import LM


def open_model(
    source: str | None, dtype: str | None = None, weights: Any = None, **options: Any
) -> "LM":
    """The model `source`; None is the default model, else the committed one. Options as in `load`.

    Which default was taken is said on standard error. Compiled programs are kept from here on.
    """
    from jaxinfer.compile.cache import enable_persistent_cache
    from jaxinfer.io.model_index import DEFAULT, FALLBACK, ModelUnavailable

    enable_persistent_cache()
    if source is not None:
        return _load(source, dtype=dtype, weights=weights, **options)
    try:
        lm = _load(DEFAULT, dtype=dtype, weights=weights, **options)
        note(f"model: {DEFAULT}")
    except ModelUnavailable as error:
        lm = _load(FALLBACK, dtype=dtype, weights=weights, **options)
        note(f"note: {' '.join(str(error).split())}")
        note(f"model: {FALLBACK}, a very small one for trying things out")
    return lm


def open_draft(
    target: "LM", draft: str, dtype: str | None = None, weights: Any = None
) -> "LM | str":
    """What `--draft` names: a model, "prompt-lookup", or "exit:N", the target's first N layers."""
    from jaxinfer.speculative.speculate import PROMPT_LOOKUP, early_exit

    if draft == PROMPT_LOOKUP:
        return draft
    kind, colon, layers = draft.partition(":")
    if kind == "exit" and colon:
        if not layers.isdigit():
            raise ValueError(f"--draft exit:N expects a number of layers, got {draft!r}")
        return early_exit(target, int(layers))
    from jaxinfer.io.draft import is_draft, load_draft

    if not is_draft(draft):
        return _load(draft, dtype=dtype, weights=weights)
    from jaxinfer.lm import LM
    from jaxinfer.models.quantize import quantize_params

    found = load_draft(draft, target.params)
    params = found.full_params(target.params)
    if weights is not None:
        params = quantize_params(found.config, params, weights, tokenizer=target.tokenizer)
    return LM(found.config, params, target.tokenizer, name=Path(draft).name)


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _load(source: str, **options: Any) -> "LM":
    from jaxinfer.io.load import load

    with progress(f"loading {Path(source).name}") as report:
        return load(source, progress=report, **options)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A `report(done, total)` that draws a bar on a terminal's standard error."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label)

    def report(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
