"""Tiny language models: those of `jaxinfer.testing`, and one whose text is scripted."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.testing.models import BASE, CONFIGS, params_of, random_tokens
from jaxinfer.testing.models import tiny_model as lm_of

MODELS = tuple(CONFIGS)

__all__ = [
    "BASE", "CONFIGS", "MODELS", "PieceTokenizer", "lm_of", "params_of", "random_tokens",
    "scripted_lm",
]  # fmt: skip


class PieceTokenizer:
    """Token i stands for the bytes `pieces[i]`; the two ids behind are BOS and EOS, no text."""

    chat_template = None

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = list(pieces)
        self.bos_token_id, eos = len(self.pieces), len(self.pieces) + 1
        self.eos_token_ids = (eos,)
        self.vocab_size = len(self.pieces) + 2

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Longest pieces first."""
        data = text.encode()
        ids = [self.bos_token_id] if add_special else []
        while data:
            best = max((p for p in self.pieces if p and data.startswith(p)), key=len, default=None)
            if best is None:
                raise ValueError(f"no piece begins {data!r}")
            ids.append(self.pieces.index(best))
            data = data[len(best) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        data = b"".join(self.pieces[i] for i in ids if i < len(self.pieces))
        return data.decode("utf-8", errors="replace")

    def apply_chat_template(self, messages, *_) -> str:
        raise NotImplementedError("pieces have no template")

    encode_chat = apply_chat_template


def scripted_lm(pieces: Sequence[bytes]) -> LM:
    """A model that goes on with the piece after the last one, and with EOS behind the last.

    Its layers add nothing; the head scores highest the successor of the token that it reads.
    """
    tokenizer = PieceTokenizer(pieces)
    vocab, eos = tokenizer.vocab_size, tokenizer.eos_token_ids[0]
    cfg = replace(
        BASE,
        vocab_size=vocab,
        num_layers=1,
        hidden_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    params = init_params(cfg, jax.random.key(0))
    for block, name in (("attn", "out"), ("mlp", "down")):
        weight = params["layers"][0][block][name]["weight"]
        params["layers"][0][block][name]["weight"] = jnp.zeros_like(weight)
    embed = np.random.default_rng(0).standard_normal((vocab, 64)).astype(np.float32)
    successor = {i: i + 1 for i in range(len(pieces) - 1)}
    successor |= {len(pieces) - 1: eos, tokenizer.bos_token_id: 0, eos: eos}
    head = np.zeros((vocab, 64), np.float32)
    for token, after in successor.items():
        head[after] = embed[token]
    # EOS follows two tokens: the sum of both embeddings still wins for either
    head[eos] = embed[len(pieces) - 1] + embed[eos]
    params["embed"]["tokens"] = jnp.asarray(embed)
    params["head"]["weight"] = jnp.asarray(head)
    return LM(cfg, params, tokenizer, name="scripted")
