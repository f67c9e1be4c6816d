"""`distill`: a model of long convolutions becomes one of recurrences (arXiv 2310.18780).

The filters of every layer become modes (`jaxinfer.distill.filters.distill`), K the same for all
filters of a layer, with taps in front where filters have no modal form otherwise. A layer of which
a filter stays above the tolerance keeps its exact form. What was trained stays in the model beside
the modes, so that it can be asked for again (`ji.load(filters="exact")`).

A run that was killed goes on with the layer that it was at:

    options.json     options and filters that the run was started with
    layers/NN.npz    the modes of layer NN, and its report
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.arguments import flag, of_kind, one_of
from jaxinfer.distill.filters.distill import DEFAULT, NAMES, check_options, distill_filters
from jaxinfer.distill.filters.report import DistillReport
from jaxinfer.distill.report import LayerReport, ModelReport
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.lm import LM
from jaxinfer.models.filter_form import distilled, long_filters
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.nn.modal import ModalFilter
from jaxinfer.progress import Report, silent
from jaxinfer.train import run_folder


@dataclass(eq=False)
class DistilledLM(LM):
    """A model that was distilled, and what was made of its layers."""

    report: ModelReport = ModelReport()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the model to a folder that `ji.load` reads, whole or not at all.

        Args:
          folder: absent or empty; with `overwrite` also an older checkpoint.
          overwrite: replace a checkpoint that is there.

        Raises:
          ValueError: the folder is taken.
        """
        tokenizer = self.tokenizer if isinstance(self.tokenizer, Tokenizer) else None
        record = {"source": self.name, "distilled": self.report.to_dict()}
        checkpoint = Checkpoint(self.config, self.params, tokenizer, record)
        save_checkpoint(folder, checkpoint, overwrite=overwrite)


def distill(
    lm: LM,
    order: int | Literal["auto"] = "auto",
    *,
    method: str = DEFAULT,
    tolerance: float = 0.01,
    taps: int | Literal["auto"] = "auto",
    steps: int | None = None,
    seed: int = 0,
    all_modal: bool = False,
    run: str | Path | None = None,
    report: Report = silent,
) -> DistilledLM:
    """The model with the long filters of its layers as recurrences, of constant cost per token.

    Args:
      lm: a model with Hyena layers (arXiv 2302.10866, 2310.18780), alone or beside attention.
      order: K, complex modes of each filter, or "auto": in each layer as many as its filters need
        for the tolerance.
      method, taps, steps, seed: as in `ji.distill_filters`. Method "fir" copies as many samples
        as have inputs of the bytes of K modes' states, of heads too.
      tolerance: relative l2 error of a filter behind lag 0 above which its layer stays exact.
      all_modal: give also such layers modes; the report says what they lose.
      run: a folder from which a run that was killed goes on.
      report: draws progress: "layers", and what a method tells within one.

    Returns:
      An `LM` that shares all other parameters with `lm`; its `report` has the errors of every
      filter, beside bounds that no model of the order can beat.

    Raises:
      ValueError: the model has no long filters, an option is wrong (such as more states than
        samples), filters are not finite, or `run` was started with other options or another model.

    Example:
      >>> import jaxinfer as ji
      >>> lm = ji.testing.tiny_model()
      >>> ji.distill(lm)
      Traceback (most recent call last):
      ValueError: model 'llama' has no long filters to distil; give one with Hyena layers
    """
    of_kind("lm", lm, LM, "an LM")
    one_of("method", method, NAMES)
    is_forced = flag("all_modal", all_modal)
    responses = _responses(lm)
    options = {
        "order": order, "method": method, "tolerance": tolerance, "taps": taps, "steps": steps,
        "seed": seed,
    }  # fmt: skip
    for h in responses:
        if h is not None:
            check_options(h.shape[1] - 1, **options)
    if method == "fir":
        options["taps"] = _taps_of_equal_bytes(lm, order, taps)
    layers = None if run is None else _started(Path(run), lm, responses, options)
    modes: list[ModalFilter | None] = [None] * len(responses)
    found: list[LayerReport] = []
    wanted = [index for index, h in enumerate(responses) if h is not None]
    for done, index in enumerate(wanted):
        report("layers", done, len(wanted))
        path = None if layers is None else layers / f"{index:02d}.npz"
        if path is not None and path.is_file():
            made, told = _read(path)
        else:
            made, told = _of_layer(index, np.asarray(responses[index]), options, report)
            if path is not None:
                _write(path, made, told)
        stays = bool(told.fallbacks) and not is_forced
        found.append(LayerReport(index, "exact" if stays else "modal", told))
        modes[index] = None if stays else made
    report("layers", len(wanted), len(wanted))
    config, params = distilled(lm.config, lm.params, modes)
    return DistilledLM(
        config, params, lm.tokenizer, lm.name, lm.implementation, lm.sparsity,
        report=ModelReport(tuple(found)),
    )  # fmt: skip


def _responses(lm: LM) -> Sequence[Float[Array, "F L"] | None]:
    found = long_filters(lm.config, lm.params)
    if all(h is None for h in found):
        are_modes = lm.config.hyena is not None
        raise ValueError(
            f"model {lm.name!r} has no long filters to distil; "
            + ("its filters are modes already" if are_modes else "give one with Hyena layers")
        )
    return found


def _taps_of_equal_bytes(lm: LM, order: object, taps: object) -> object:
    """Beside the 2 K samples that `distill_filters` copies: K modes of a head of N channels have
    8 N^2 K bytes, the keys and values of a token 8 N."""
    if lm.config.hyena is None or taps != "auto" or not isinstance(order, int):
        return taps
    size = lm.config.hyena.head_size
    return max(0, min((size - 2) * order, lm.config.max_positions - 1 - 2 * order))


def _of_layer(
    index: int, h: np.ndarray, options: dict, report: Report
) -> tuple[ModalFilter, DistillReport]:
    try:
        return distill_filters(h, **options, report=report)
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error


def _started(run: Path, lm: LM, responses: Sequence[Array | None], options: dict) -> Path:
    """The folder of finished layers in a run with these options."""
    layers = run.absolute() / "layers"
    layers.mkdir(parents=True, exist_ok=True)
    crc = 0
    for h in responses:
        crc = crc if h is None else zlib.crc32(np.asarray(h).tobytes(), crc)
    run_folder.check_options(run, options | {"model": fingerprint(lm.params), "filters": crc})
    return layers


def _write(path: Path, modal: ModalFilter, report: DistillReport) -> None:
    leaves = {one.name: getattr(modal, one.name) for one in fields(modal)}
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf is not None}
    run_folder.write_arrays(path, arrays | {"report": np.asarray(json.dumps(report.to_dict()))})


def _read(path: Path) -> tuple[ModalFilter, DistillReport]:
    arrays = run_folder.read_arrays(path)
    try:
        report = DistillReport.from_dict(json.loads(str(arrays.pop("report"))))
        modal = ModalFilter(**{name: jnp.asarray(x) for name, x in arrays.items()})
        modal.check(str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and the run makes it again"
        ) from error
    return modal, report
