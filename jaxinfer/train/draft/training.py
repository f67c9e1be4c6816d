"""The training of a draft, and its way to a folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.model import Model
from jaxinfer.files import check_destination
from jaxinfer.io import checkpoint, draft
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.draft import BorrowingDraft, save_draft
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.lm import LM
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.recurrent import RecurrentConfig
from jaxinfer.progress import Report, silent
from jaxinfer.train import optimizers
from jaxinfer.train.draft.losses import distillation, unrolled
from jaxinfer.train.draft.recipe import OPTIMIZERS, DraftRecipe
from jaxinfer.train.draft.student import Student, new_student
from jaxinfer.train.draft.target_data import own_text, target_states
from jaxinfer.train.loop import fit, read_log
from jaxinfer.typing import Params


def train_draft(
    target: LM,
    tokens: Int[np.ndarray, "Q T"],
    recipe: DraftRecipe,
    run_dir: Path,
    *,
    report: Report = silent,
) -> tuple[Student, Params, dict[str, float]]:
    """The student, its trained parameters, and the mean metrics of the last tenth of the steps.

    `tokens` are windows of text; a share `recipe.own` of them becomes the target's own. A killed
    run goes on from `run_dir`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    own = round(recipe.own * len(tokens))
    written = own_text(target, tokens[:own], run_dir / "own.npy", seed=recipe.seed, report=report)
    student = new_student(target, np.concatenate([written, tokens]), recipe)
    windows = np.concatenate([written, tokens[own:]])
    parts = target_states(target, windows, run_dir / "states", report=report)
    head = {name: target.params[name] for name in ("embed", "head") if name in target.params}

    def batches(step: int) -> dict[str, object]:
        per_epoch = max(len(windows) // recipe.batch, 1)
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(windows))
        rows = order[place * recipe.batch : (place + 1) * recipe.batch]
        hidden = np.stack([parts[row // len(parts[0])][row % len(parts[0])] for row in rows])
        return {
            "tokens": jnp.asarray(windows[rows]), "hidden": hidden, "head": head,
            "fixed": student.fixed,
        }  # fmt: skip

    rate = optimizers.warmup_cosine(
        recipe.learning_rate, recipe.steps, warmup=min(50, recipe.steps // 10), final=0.0
    )
    if isinstance(student.config, RecurrentConfig):
        loss = unrolled()
    else:
        loss = distillation(target.config, student.config)
    state = fit(
        loss, student.trained, OPTIMIZERS[recipe.optimizer](rate),
        batches, steps=recipe.steps, folder=run_dir / "fit", seed=recipe.seed, save_every=200,
        report=report,
    )  # fmt: skip
    log = read_log(run_dir / "fit")
    tail = log[-max(len(log) // 10, 1) :]
    names = ("loss", "overlap", "agreement")
    return student, state.params, {n: float(np.mean([row[n] for row in tail])) for n in names}


def check_out(folder: Path, recipe: DraftRecipe, *, overwrite: bool = False) -> None:
    """Raises unless the draft may be written to `folder`."""
    if recipe.width is None:
        check_destination(folder, draft.is_draft, draft.WHAT, overwrite=overwrite)
    else:
        check_destination(folder, checkpoint.is_checkpoint, checkpoint.WHAT, overwrite=overwrite)


def save_trained(
    folder: Path,
    target: Model,
    student: Student,
    trained: Params,
    record: dict[str, object],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model folder in bfloat16, or int8 for a draft that borrows the target's head."""
    if student.fixed:
        vocabulary = np.asarray(student.fixed["draft_vocabulary"])
        save_draft(
            folder,
            BorrowingDraft(
                student.config, trained, vocabulary, target.name, fingerprint(target.params), record
            ),
            overwrite=overwrite,
        )
        return
    assert isinstance(student.config, ModelConfig)
    assert isinstance(target.tokenizer, Tokenizer | None)  # one that can be saved
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
    save_checkpoint(
        folder,
        Checkpoint(student.config, params, target.tokenizer, record | {"target": target.name}),
        overwrite=overwrite,
    )
