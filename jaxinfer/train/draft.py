"""Trains a draft for speculative decoding: a small model that guesses what a target will say.

It is distilled: the loss is the divergence of its next-token distribution from the target's, on
texts and on the target's own text, since that is what it will have to continue. What speculation
gains from is the overlap sum(min(p, q)), the probability that a first guess is accepted (arXiv
2402.12374, section 3.2), which is logged.

Three kinds. A model of its own width has an embedding of its own. Where the vocabulary would
outweigh everything else, the target's own embedding and its head's rows of the most frequent tokens
are kept and what is trained is between them: some of the target's layers, or a recurrent cell that
goes on from the target's last state (`jaxinfer.models.recurrent`).
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.sampling import Sampler
from jaxinfer.files import check_destination, replacing
from jaxinfer.io.draft import BorrowingDraft
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.models.recurrent import RecurrentConfig, guesses, init_cell, read
from jaxinfer.models.stack import forward, unembed
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.progress import Report, silent
from jaxinfer.train import optimizers
from jaxinfer.train.loop import Loss, fit, read_log
from jaxinfer.typing import Params

OWN_PROMPT = 16  # tokens of a text that the target continues
OWN_TEMPERATURES = (0.0, 0.6, 1.0)
HEAD_SIZE = 32
UNROLL, DECAY = 4, 0.7  # tokens that a recurrent draft learns to guess ahead, and their weights
POSITIONS = 64  # of a window that it learns from in one step
NO_STATE = 0.05  # share of them that must do without the target's state
OPTIMIZERS = {"muon": optimizers.muon, "adamw": optimizers.adamw}


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """`width` None takes the target's first layers and its last, or for a `recurrent` draft a cell
    of `layers` blocks; else a Llama of that width.

    `vocabulary`: tokens that a draft with the target's head can propose. `own`: share of the
    windows that the target wrote itself. A step of Muon costs much where weights are large and
    batches small, one of AdamW does not.
    """

    recurrent: bool = False
    layers: int = 2
    width: int | None = 96
    vocabulary: int = 8192
    windows: int = 2048
    context: int = 256
    own: float = 0.5
    steps: int = 2000
    batch: int = 8
    learning_rate: float = 3e-3
    optimizer: str = "muon"
    seed: int = 0

    def __post_init__(self):
        if self.recurrent and self.width is not None:
            raise ValueError(
                f"a recurrent draft has the target's width, got width={self.width}; leave it out"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )


@dataclass(frozen=True, eq=False)
class Student:
    """A draft in training: `fixed` and `trained` together are its parameters."""

    config: ModelConfig | RecurrentConfig
    fixed: Params
    trained: Params

    def params(self, trained: Params) -> Params:
        return {**self.fixed, **trained}


def new_student(target: LM, tokens: Int[np.ndarray, "Q T"], recipe: DraftRecipe) -> Student:
    """The draft before its first step; `tokens` say which ones are frequent."""
    cfg = target.config
    if recipe.width is not None:
        heads = max(recipe.width // HEAD_SIZE, 1)
        if recipe.width != heads * HEAD_SIZE:
            raise ValueError(f"width must be a multiple of {HEAD_SIZE}, got {recipe.width}")
        small = replace(
            cfg,
            hidden_size=recipe.width,
            intermediate_size=-(-recipe.width * 8 // 3 // 32) * 32,
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
    size = min(recipe.vocabulary, cfg.vocab_size)
    counts = np.bincount(tokens.ravel(), minlength=cfg.vocab_size)
    kept = np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
    if recipe.recurrent:
        cell = RecurrentConfig(
            hidden_size=cfg.hidden_size,
            intermediate_size=2 * cfg.hidden_size,
            blocks=recipe.layers,
            vocab_size=size,
        )
        draft = BorrowingDraft(cell, {}, kept, target.name, "")
        return Student(
            cell, draft.full_params(target.params), init_cell(cell, jax.random.key(recipe.seed))
        )
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


def distillation(cfg: ModelConfig, draft: ModelConfig) -> Loss:
    """A loss for `fit` on batches {"tokens": i32[B, T], "hidden": [B, T, D], "head": ..., "fixed":
    ...}: `hidden` are the target's states in front of its head, `head` what `unembed` reads."""

    def loss(trained: Params, batch: Any, key: Array):
        del key
        hidden = batch["hidden"].astype(jnp.float32)
        if "draft_vocabulary" in batch["fixed"]:
            wanted = hidden @ batch["fixed"]["head"]["weight"].T
        else:
            wanted = unembed(cfg, batch["head"], hidden)
        params = {**batch["fixed"], **trained}
        return _divergence(wanted, forward(draft, params, batch["tokens"]).logits)

    return loss


def unrolled() -> Loss:
    """The loss of a recurrent draft: its guesses of the next `UNROLL` tokens behind some positions
    of each window, deeper ones by the share of trees that come so far."""

    def loss(trained: Params, batch: Any, key: Array):
        params, tokens = {**batch["fixed"], **trained}, batch["tokens"]
        hidden = batch["hidden"].astype(jnp.float32)
        place_key, drop_key = jax.random.split(key)
        last = tokens.shape[1] - UNROLL - 1
        count = min(POSITIONS, last)
        place = jax.vmap(lambda k: jax.random.choice(k, last, (count,), replace=False))(
            jax.random.split(place_key, len(tokens))
        )
        state = jnp.take_along_axis(hidden, place[..., None], axis=1)
        # the first step of a text knows no state
        known = jax.random.bernoulli(drop_key, 1 - NO_STATE, (*place.shape, 1))
        state, total, metrics = jnp.where(known, state, 0.0), jnp.zeros(()), {}
        for depth in range(UNROLL):
            place = place + 1
            state = read(params, state, jnp.take_along_axis(tokens, place, axis=1))
            behind = jnp.take_along_axis(hidden, place[..., None], axis=1)
            value, found = _divergence(behind @ params["head"]["weight"].T, guesses(params, state))
            total = total + DECAY**depth * value
            metrics |= {f"{name}_{depth}": one for name, one in found.items()}
        metrics |= {name: metrics[f"{name}_0"] for name in ("overlap", "agreement")}
        return total / sum(DECAY**depth for depth in range(UNROLL)), metrics

    return loss


def _divergence(wanted: Array, given: Array) -> tuple[Array, dict[str, Array]]:
    """KL of softmax(given) from softmax(wanted), their overlap, and how often both choose alike."""
    wanted, given = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (wanted, given))
    p, q = jnp.exp(wanted), jnp.exp(given)
    return (p * (wanted - given)).sum(axis=-1).mean(), {
        "overlap": jnp.minimum(p, q).sum(axis=-1).mean(),
        "agreement": (jnp.argmax(wanted, -1) == jnp.argmax(given, -1)).mean(),
    }


def target_states(
    target: LM,
    windows: Int[np.ndarray, "Q T"],
    folder: Path,
    *,
    batch: int = 8,
    report: Report = silent,
) -> list[Float[np.ndarray, "B T D"]]:
    """The target's states in front of its head, `batch` windows at a time, in float16.

    Each window is read by the target once, however often it is trained on. The parts are files of
    `folder`, read as they are needed and named after their windows: a killed run goes on behind the
    last whole one, and one with other windows reads those anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read = jax.jit(
        lambda params, tokens: forward(target.config, params, tokens, logits="none").hidden
    )
    parts = []
    for first in range(0, len(windows), batch):
        rows = np.ascontiguousarray(windows[first : first + batch])
        path = folder / f"{zlib.crc32(rows.tobytes()):08x}.npy"
        if not path.is_file():
            states = np.asarray(read(target.params, rows), np.float16)
            with replacing(path) as temporary:
                np.save(temporary, states)
            report("target's states", min(first + batch, len(windows)), len(windows))
        parts.append(np.load(path, mmap_mode="r"))
    return parts


def own_text(
    target: LM,
    tokens: Int[np.ndarray, "Q T"],
    path: Path,
    *,
    seed: int,
    batch: int = 32,
    report: Report = silent,
) -> Int[np.ndarray, "Q T"]:
    """Windows of the same shape that the target wrote, behind the first tokens of each; kept in
    `path`, which a killed run goes on with."""
    done = np.load(path) if path.is_file() else tokens[:0]
    length = tokens.shape[1] - OWN_PROMPT
    while len(done) < len(tokens):
        first = len(done)
        prompts = tokens[first : first + batch, :OWN_PROMPT]
        rows = [first + i for i in range(len(prompts))]
        made = target.generate(
            prompts.tolist(),
            max_new_tokens=length,
            sampler=[
                Sampler(temperature=OWN_TEMPERATURES[i % len(OWN_TEMPERATURES)]) for i in rows
            ],
            seed=[seed + i for i in rows],
            ignore_eos=True,
        )
        new = np.concatenate([prompts, np.array([one.tokens for one in made])], axis=1)
        done = np.concatenate([done, new.astype(np.int32)])
        with replacing(path) as temporary:
            np.save(temporary, done)
        report("own text", len(done), len(tokens))
    return done[: len(tokens)]


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

    def batches(step: int) -> dict[str, Any]:
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


def check_out(folder: Path, recipe: DraftRecipe) -> None:
    """Raises unless the draft may be written to `folder`."""
    from jaxinfer.io import checkpoint, draft

    if recipe.width is None:
        check_destination(folder, draft.is_draft, draft.WHAT)
    else:
        check_destination(folder, checkpoint.is_checkpoint, checkpoint.WHAT)


def save_trained(
    folder: Path, target: LM, student: Student, trained: Params, record: dict[str, Any]
) -> None:
    """Writes a model folder in bfloat16, or int8 for a draft that borrows the target's head."""
    from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
    from jaxinfer.io.draft import save_draft
    from jaxinfer.models.fingerprint import fingerprint

    if student.fixed:
        vocabulary = np.asarray(student.fixed["draft_vocabulary"])
        save_draft(
            folder,
            BorrowingDraft(
                student.config, trained, vocabulary, target.name, fingerprint(target.params), record
            ),
        )
        return
    assert isinstance(student.config, ModelConfig)
    assert isinstance(target.tokenizer, Tokenizer | None)  # one that can be saved
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
    save_checkpoint(
        folder,
        Checkpoint(student.config, params, target.tokenizer, record | {"target": target.name}),
    )
