"""A draft before its first step: what is trained, and what it has from its target."""

from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.model import Model
from jaxinfer.io.draft import BorrowingDraft
from jaxinfer.models.params import init_params
from jaxinfer.models.recurrent import RecurrentConfig, init_cell
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.train.draft.recipe import DraftRecipe
from jaxinfer.typing import Params

HEAD_SIZE = 32


@dataclass(frozen=True, eq=False)
class Student:
    """A draft in training: `fixed` and `trained` together are its parameters."""

    config: ModelConfig | RecurrentConfig
    fixed: Params
    trained: Params

    def params(self, trained: Params) -> Params:
        return {**self.fixed, **trained}


def new_student(target: Model, tokens: Int[np.ndarray, "Q T"], recipe: DraftRecipe) -> Student:
    """The draft before its first step; `tokens` say which ones are frequent."""
    if recipe.width is not None:
        return _narrow(target.config, recipe.width, recipe)
    size = min(recipe.vocabulary, target.config.vocab_size)
    counts = np.bincount(tokens.ravel(), minlength=target.config.vocab_size)
    kept = np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
    return (_recurrent if recipe.recurrent else _some_layers)(target, kept, recipe)


def _narrow(cfg: ModelConfig, width: int, recipe: DraftRecipe) -> Student:
    """A model of its own."""
    heads = max(width // HEAD_SIZE, 1)
    if width != heads * HEAD_SIZE:
        raise ValueError(f"width must be a multiple of {HEAD_SIZE}, got {width}")
    small = replace(
        cfg,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 32) * 32,
        num_layers=recipe.layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD_SIZE,
        rope=None if cfg.rope is None else replace(cfg.rope, rotary_dim=HEAD_SIZE),
        sliding_windows=None,
        attention_scale=None,
        tie_embeddings=True,
    )
    return Student(small, {}, init_params(small, jax.random.key(recipe.seed)))


def _recurrent(target: Model, kept: Int[np.ndarray, " V"], recipe: DraftRecipe) -> Student:
    """A cell that goes on from the target's last state."""
    width = target.config.hidden_size
    cell = RecurrentConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        blocks=recipe.layers,
        vocab_size=len(kept),
    )
    draft = BorrowingDraft(cell, {}, kept, target.name, "")
    trained = init_cell(cell, jax.random.key(recipe.seed))
    return Student(cell, draft.full_params(target.params), trained)


def _some_layers(target: Model, kept: Int[np.ndarray, " V"], recipe: DraftRecipe) -> Student:
    """The target's first layers and its last."""
    cfg = target.config
    if isinstance(target.params["layers"][0]["attn"]["q"]["weight"], StoredWeight):
        raise ValueError(
            "a draft of the target's own layers trains them further, but they are stored in fewer "
            "bits; load the target without `weights`, or train a recurrent draft"
        )
    if not 1 <= recipe.layers < cfg.num_layers:
        raise ValueError(f"layers must be 1 to {cfg.num_layers - 1}, got {recipe.layers}")
    chosen = [*range(recipe.layers - 1), cfg.num_layers - 1]
    student = replace(cfg, num_layers=recipe.layers, tie_embeddings=False, sliding_windows=None)
    trained = {
        "layers": tuple(target.params["layers"][i] for i in chosen),
        "final_norm": target.params["final_norm"],
    }
    draft = BorrowingDraft(student, {}, kept, target.name, "")
    return Student(student, draft.full_params(target.params), trained)
