"""What a draft learns from: the target's states on texts, and the target's own text."""

import zlib
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxinfer.decode.model import Model
from jaxinfer.decode.sampling import Sampler
from jaxinfer.files import replacing
from jaxinfer.lm import LM
from jaxinfer.models.stack import forward
from jaxinfer.progress import Report, silent
from jaxinfer.train.run_folder import read_array

OWN_PROMPT = 16  # tokens of a text that the target continues
OWN_TEMPERATURES = (0.0, 0.6, 1.0)


def target_states(
    target: Model,
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
        parts.append(read_array(path, "r"))
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
    done = read_array(path) if path.is_file() else tokens[:0]
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
