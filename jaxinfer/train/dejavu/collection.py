"""What predictors learn from, in files: the inputs that they read and the labels of what was
needed, of all tokens of all texts, layer by layer.

    site-PP.npy     f16[R, D]          input of block PP as models count them (`place_of`)
    neurons-LL.npy  u8[R, ceil(J/8)]   layer LL's labels, packed bits
    heads-LL.npy    u8[R, ceil(K/8)]   the same of groups of heads
    hidden-LL.npy   f32[Q, T, D]       the states in front of layer LL, while it is the next one

A collection that was killed goes on with the layer that it was at. Files are read through memory
maps. Axis letters: Q sequences, R rows (all valid tokens), J units of neurons, K groups of heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int

from jaxinfer.config import ModelConfig
from jaxinfer.files import replacing
from jaxinfer.models.activations import Activations
from jaxinfer.models.layer_reader import LayerReader, valid_lengths
from jaxinfer.progress import Report, silent
from jaxinfer.train.dejavu.labels import needed_groups, needed_neurons
from jaxinfer.train.dejavu.recipe import DejavuRecipe
from jaxinfer.train.run_folder import read_array
from jaxinfer.typing import Params

Kind: TypeAlias = str
"""Of what predictors are: "neurons" or "heads"."""


def place_of(kind: Kind, layer: int, lookahead: float | None) -> int | None:
    """Where among `jaxinfer.models.stack.blocks`'s sites the predictor of a layer's block reads;
    None where the block is too early in the model for the look-ahead."""
    if lookahead is None:
        return 0
    own = 2 * layer + (1 if kind == "heads" else 2)
    place = own - round(2 * lookahead)
    return place if place > 0 else None


@dataclass(frozen=True)
class Collection:
    """Inputs and labels of a model's layers; `lengths` are the sequences' rows."""

    folder: Path
    recipe: DejavuRecipe
    lengths: list[int]
    units: dict[Kind, int]  # J and K; without heads no K

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def layers(self, kind: Kind, count: int) -> list[int]:
        """Those of `count` layers that have predictors of `kind`."""
        places = [place_of(kind, layer, self.recipe.lookahead) for layer in range(count)]
        return [layer for layer, place in enumerate(places) if place is not None]

    def inputs(self, kind: Kind, layer: int) -> Float16[np.ndarray, "R D"]:
        """What the layer's predictor reads."""
        place = place_of(kind, layer, self.recipe.lookahead)
        return read_array(self.folder / f"site-{place:02d}.npy", mmap_mode="r")

    def packed(self, kind: Kind, layer: int) -> np.ndarray:
        """The labels as bits, u8[R, ceil(units / 8)]."""
        return read_array(self.folder / f"{kind}-{layer:02d}.npy", mmap_mode="r")

    def labels(
        self, kind: Kind, layer: int, rows: slice | Int[np.ndarray, " R"]
    ) -> Bool[np.ndarray, "R J"]:
        """The labels of some rows."""
        bits = np.unpackbits(self.packed(kind, layer)[rows], axis=1, count=self.units[kind])
        return bits.astype(bool)


def collect(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[np.ndarray, "Q T"],
    recipe: DejavuRecipe,
    folder: Path,
    *,
    lengths: Sequence[int] | None = None,
    report: Report = silent,
) -> Collection:
    """Runs the model over `tokens`, of which the first `lengths[q]` of each sequence are text.

    Raises:
      ValueError: the model has no such units, or a layer's activations are all zero, not finite or
        too large for 16 bits.
    """
    recipe.check(cfg)
    counts = valid_lengths(tokens, lengths)
    units: dict[Kind, int] = {"neurons": cfg.intermediate_size // recipe.block_size}
    if recipe.heads is not None:
        units["heads"] = cfg.num_kv_heads
    found = Collection(folder, recipe, counts, units)
    wanted = {
        place_of(kind, layer, recipe.lookahead) for kind in units for layer in range(cfg.num_layers)
    }
    reader = LayerReader(cfg, tokens.shape[1], _taking(cfg, recipe))
    folder.mkdir(parents=True, exist_ok=True)
    hidden = None
    for index in range(cfg.num_layers):
        if (folder / f"neurons-{index:02d}.npy").is_file():
            continue
        if hidden is None:
            hidden = _states(folder, index, reader, params, tokens, counts)
        if index == 0 and 0 in wanted:
            rows = np.concatenate([x[:n] for x, n in zip(hidden, counts, strict=True)])
            _write(folder / "site-00.npy", _half(rows, "the embeddings"))
        taken = reader.read(
            index, params["layers"][index], hidden, counts,
            lambda done: report("reading", done, len(tokens)),
        )  # fmt: skip
        _store(found, index, taken, wanted)
        if index + 1 < cfg.num_layers:
            _write(folder / f"hidden-{index + 1:02d}.npy", hidden)
        # The last of the layer's files: once it is there, all are.
        _write(folder / f"neurons-{index:02d}.npy", taken["neurons"])
        (folder / f"hidden-{index:02d}.npy").unlink(missing_ok=True)
        report("layers", index + 1, cfg.num_layers)
    return found


def _taking(cfg: ModelConfig, recipe: DejavuRecipe):
    """What activations are reduced to, on the device: F bits of a token instead of F numbers."""

    def take(index: int, layer: Params, found: Activations) -> dict[str, Array]:
        needed = needed_neurons(cfg, layer["mlp"], found.hidden, recipe.block_size, recipe.share)
        kept = {
            "attention": found.attention_input.astype(jnp.float16),
            "mlp": found.mlp_input.astype(jnp.float16),
            "neurons": jnp.packbits(needed, axis=1),
        }
        if recipe.heads is not None:
            if found.heads is None:
                raise ValueError(
                    f"layer {index} has no attention whose heads could be selected; leave heads out"
                )
            groups = needed_groups(found.heads, cfg.num_kv_heads, recipe.heads)
            kept["heads"] = jnp.packbits(groups, axis=1)
        return kept

    return take


def _store(
    found: Collection, index: int, taken: dict[str, np.ndarray], wanted: set[int | None]
) -> None:
    for kind in found.units:
        if not taken[kind].any():
            raise ValueError(
                f"layer {index}: no token needs any of the {kind}, as all activations are zero; "
                "the model's weights are damaged, or keep the layer dense"
            )
    for name, place in (("attention", 2 * index + 1), ("mlp", 2 * index + 2)):
        if place in wanted:
            rows = _half(taken[name], f"layer {index}'s {name} inputs")
            _write(found.folder / f"site-{place:02d}.npy", rows)
    if "heads" in found.units:
        _write(found.folder / f"heads-{index:02d}.npy", taken["heads"])


def _half(rows: Float[np.ndarray, "R D"], what: str) -> Float16[np.ndarray, "R D"]:
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float16)
    if not np.isfinite(rows).all():
        raise ValueError(f"{what} exceed 65504, the largest number that 16 bits hold")
    return rows


def _states(
    folder: Path,
    index: int,
    reader: LayerReader,
    params: Params,
    tokens: np.ndarray,
    counts: list[int],
) -> np.ndarray:  # fmt: skip
    """The states in front of layer `index`, saved ones if there are any."""
    path = folder / f"hidden-{index:02d}.npy"
    if path.is_file():
        return read_array(path)
    hidden = reader.embed(params, tokens)
    for earlier, layer in enumerate(params["layers"][:index]):
        reader.read(earlier, layer, hidden, counts)
    return hidden


def _write(path: Path, array: np.ndarray) -> None:
    with replacing(path) as temporary:
        np.save(temporary, array)
