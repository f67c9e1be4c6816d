"""What each layer of a model loses with each of some cache policies, measured layer by layer.

    options.json         what the run was started with
    measures.npz         attention and ranks of the model (`jaxinfer.theory.measures.model`)
    errors/L.npz         errors of layer L with every candidate
    measured/L.npz       the loss of the model where layer L alone is compressed, if asked for

A run that was killed goes on with the next layer. Axis letters: C candidates.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxinfer.arguments import one_of, real, whole
from jaxinfer.eval.memory import layer_bytes
from jaxinfer.lm import LM
from jaxinfer.models.fingerprint import identity
from jaxinfer.models.onward import Onward
from jaxinfer.models.walk import LayerView, reread, walk
from jaxinfer.progress import Report, silent
from jaxinfer.theory.diagnose.candidates import Candidate
from jaxinfer.theory.diagnose.errors import (
    PER_KV_HEAD,
    Sample,
    errors_of,
    received_mass,
    sample_of,
)
from jaxinfer.theory.measures.model import Measures, measure_model
from jaxinfer.train.run_folder import check_options, read_arrays, write_arrays

SCORES = ("output", "r_rho", "l2", "entropy", "sink", "rank", "measured")
"""What the loss of a layer is predicted by; see `Diagnosis.losses`."""
POINTS, RHO = 512, 1.1


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Errors by name f32[L, C, K] (`PER_KV_HEAD`), `output` f32[L, C, N] and `added` f32[L, C];
    NaN in layers without attention."""

    candidates: tuple[Candidate, ...]
    sizes: Int[np.ndarray, "L C"]
    """Bytes of one row's cache for a text of `length` tokens."""
    length: int
    errors: Measures
    measures: Measures
    """Of the model without compression, see `measure_model`."""
    measured: Float[np.ndarray, "L C"] | None = None
    """Nats per token that are lost where a layer alone is compressed, if that was measured."""

    def losses(self, by: str = "output") -> Float[np.ndarray, "L C"]:
        """What a layer is predicted to lose with a candidate, in a unit of the score's own.

        Losses of small errors are of second order, so that errors count squared. `output`: by how
        much what attention adds to the states changes, over their size. `r_rho` and `l2`: the error
        of keys and of values, means over heads and both. `entropy`, `sink` and `rank`: the
        candidate's mean `l2` over layers, times what the layer's attention is of the mean layer's:
        its relative entropy, what the sinks do not receive, its effective rank. `measured`: nats
        per token.

        Raises:
          ValueError: there is no such score, or `measured` was not.
        """
        by = one_of("by", by, SCORES)
        if by == "measured":
            if self.measured is None:
                raise ValueError("the loss was not measured; diagnose with measured=True")
            return self.measured.astype(np.float64)
        if by == "output":
            return np.square(_known(self.errors["added"]))
        number = by if by in ("r_rho", "l2") else "l2"
        squares = [np.square(_known(self.errors[f"{x}.{number}"])) for x in ("keys", "values")]
        found = np.mean(squares, axis=(0, 3))
        if by == number:
            return found
        of_layer = {
            "entropy": self.measures["relative_entropy"],
            "sink": 1 - self.measures["sink_mass"],
            "rank": self.measures["effective_rank.qk"],
        }[by].mean(axis=1)
        weight = _known(of_layer)
        return found.mean(axis=0) * weight[:, None] / (weight.mean() or 1.0)


def diagnose(
    lm: LM,
    tokens: Int[np.ndarray, "Q T"],
    candidates: Sequence[Candidate],
    run: str | Path,
    *,
    points: int = POINTS,
    rho: float = RHO,
    measured: bool = False,
    report: Report = silent,
) -> Diagnosis:
    """The errors of every candidate in every layer, on texts that the model reads.

    Each layer reads what the uncompressed model gives it, through the candidate's own cache: its
    error alone.

    Args:
      lm: the model.
      tokens: texts of equally many tokens, of `jaxinfer.theory.windows.spread_windows`.
      candidates: of `candidates_for`.
      run: working folder; what is measured there already is taken from it.
      points: tokens between which R_rho is computed.
      rho: its exponent, above 1 and at most 2.
      measured: whether the model's loss is measured too, with one layer compressed at a time.
      report: draws progress.

    Raises:
      ValueError: the model cannot read the texts, or the run was started with other ones.
    """
    points, rho = whole("points", points, 8), real("rho", rho, 1.001, 2)
    run = Path(run)
    given = options_of(lm, tokens, candidates, points, rho)
    run.mkdir(parents=True, exist_ok=True)
    check_options(run, given)
    work = _Work(lm, tokens, tuple(candidates), run, points, rho, measured, report)
    measures, layers = work.measures(), range(lm.config.num_layers)
    if not all(work.is_done(layer) for layer in layers):
        for view in walk(lm, tokens):
            work.layer(view)
            report("layers", view.index + 1, len(layers))
    errors = [read_arrays(work.path("errors", layer)) for layer in layers]
    losses = [read_arrays(work.path("measured", layer))["loss"] for layer in layers if measured]
    return Diagnosis(
        candidates=tuple(candidates),
        sizes=sizes_of(lm, candidates, tokens.shape[1]),
        length=tokens.shape[1],
        errors={name: np.stack([one[name] for one in errors]) for name in errors[0]},
        measures=measures,
        measured=np.stack(losses) if measured else None,
    )


def sizes_of(lm: LM, candidates: Sequence[Candidate], length: int) -> Int[np.ndarray, "L C"]:
    """Bytes of each layer's cache of one text of `length` tokens with each candidate."""
    return np.stack([layer_bytes(lm, one.policy, length) for one in candidates], axis=1)


def options_of(
    lm: LM, tokens: Int[np.ndarray, "Q T"], candidates: Sequence[Candidate], points: int, rho: float
) -> dict[str, object]:
    """What tells one run from another."""
    return {
        "model": identity(lm.config, lm.params), "tokens": list(tokens.shape),
        "crc32": zlib.crc32(tokens.tobytes()), "points": points, "rho": rho,
        "candidates": [dict(one.written) for one in candidates],
    }  # fmt: skip


@dataclass(frozen=True)
class _Work:
    lm: LM
    tokens: np.ndarray
    candidates: tuple[Candidate, ...]
    run: Path
    points: int
    rho: float
    measured: bool
    report: Report

    def path(self, kind: str, layer: int) -> Path:
        return self.run / kind / f"{layer}.npz"

    def is_done(self, layer: int) -> bool:
        kinds = ("errors", "measured") if self.measured else ("errors",)
        return all(self.path(kind, layer).is_file() for kind in kinds)

    def measures(self) -> Measures:
        path = self.run / "measures.npz"
        if not path.is_file():
            made = measure_model(
                self.lm, self.tokens,
                report=lambda done, total: self.report("attention and ranks", done, total),
            )  # fmt: skip
            write_arrays(path, made)
        return read_arrays(path)

    def layer(self, view: LayerView) -> None:
        """Measures what there is not yet of a layer."""
        if self.is_done(view.index):
            return
        sample, mass = Sample(np.zeros(0, int), np.zeros(0)), np.zeros((1, 1))
        if view.q is not None:
            mass = received_mass(view)
            sample = sample_of(mass, self.points)
        onward = Onward(self.lm, self.tokens) if self.measured else None
        plain = onward.loss(view.after, view.index + 1) if onward else 0.0
        errors, losses = [], []
        for number, one in enumerate(self.candidates):
            self.report("candidates", number, len(self.candidates))
            again = reread(self.lm, view, one.policy)
            if view.q is None:
                errors.append(self._nothing())
            else:
                errors.append(errors_of(view, again, mass, sample, self.rho))
            if onward:
                losses.append(onward.loss(again.after, view.index + 1) - plain)
        write_arrays(
            self.path("errors", view.index),
            {name: np.stack([one[name] for one in errors]) for name in errors[0]},
        )
        if onward:
            loss = np.asarray(losses, np.float32)
            write_arrays(self.path("measured", view.index), {"loss": loss})

    def _nothing(self) -> dict[str, np.ndarray]:
        cfg = self.lm.config
        found = {name: np.full(cfg.num_kv_heads, np.nan, np.float32) for name in PER_KV_HEAD}
        found["output"] = np.full(cfg.num_heads, np.nan, np.float32)
        return found | {"added": np.asarray(np.nan, np.float32)}


def _known(x: np.ndarray) -> Float[np.ndarray, "..."]:
    """Layers without attention lose nothing."""
    return np.nan_to_num(x.astype(np.float64), nan=0.0)
