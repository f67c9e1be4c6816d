"""`Model`: what decoding, speculation, evaluation and training need of a loaded model.

`jaxinfer.lm.LM` is the facade above it, with the methods that users call.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import shown
from jaxinfer.config import ModelConfig
from jaxinfer.decode.engine import Engine
from jaxinfer.models.stack import forward
from jaxinfer.runtime.backend import Backend, Implementation
from jaxinfer.runtime.kernel_check import ensure_checked
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.typing import Message, Params, Tokenizer

Prompt: TypeAlias = str | Sequence[int] | np.ndarray | jax.Array
"""A text, or the ids of its tokens."""


@dataclass(eq=False)
class Model:
    """A configuration with its parameters, tokenizer and compiled programs.

    `params` is the tree of `jaxinfer.models.params`. `tokenizer` may be None: prompts are then
    token lists and completions have no text. `implementation` is that of what a decode step
    computes and writes (attention over stored tokens, norms, products of a few rows): None takes
    Pallas kernels on a CUDA device and XLA elsewhere; "reference", "triton" and "interpret" (slow,
    for tests) name one. `sparsity` is the method that made the blocks of `params` sparse, if one
    did.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    name: str = ""
    implementation: Implementation | None = None
    sparsity: Sparsity | None = None
    engine: Engine = field(init=False, repr=False)

    def __post_init__(self):
        if self.implementation is None:
            ensure_checked()
        self.engine = Engine(self.config, self.params, Backend.of(self.implementation))
        self._logits = jax.jit(lambda params, tokens: forward(self.config, params, tokens).logits)

    def encode(
        self, prompt: Prompt, *, continues: bool = False, control_tokens: bool = True
    ) -> list[int]:
        """Tokens of a prompt; token lists are checked and passed through. A prompt that continues a
        text gets no BOS. A control token that the text spells, such as "<|im_start|>", is read as
        one, unless `control_tokens` is false: then it stays text."""
        vocab, bos = self.config.vocab_size, self.config.bos_token_id
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer; give prompts as lists of token ids")
            how = {} if control_tokens else {"control_tokens": False}
            tokens = list(self.tokenizer.encode(prompt, add_special=not continues, **how))
            if not continues and tokens[:2] == [bos, bos]:
                tokens = tokens[1:]  # the text begins with BOS itself, as chat templates do
        else:
            tokens = _token_ids(prompt)
        outside = [token for token in tokens if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"token {shown(outside[0])} is outside the vocabulary of {vocab}")
        if continues:
            return tokens
        if not tokens and bos is not None:
            tokens = [bos]
        if not tokens:
            raise ValueError("the prompt is empty and the model has no BOS token; give some text")
        return tokens

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        variables: Message | None = None,
    ) -> str:
        """The text of a conversation in the model's chat template, to read.

        Args:
          messages: the turns, {"role": "user", "content": ...} and so on. Those of the model and of
            tools may have other keys that the template knows, such as "tool_calls".
          tools: JSON schemas of functions that the model may call.
          documents: texts to cite, {"title": ..., "text": ...}.
          variables: what else the template reads, such as {"enable_thinking": False}.
        """
        chat = self._chatting()
        return chat.apply_chat_template(messages, True, tools, documents, variables)

    def chat_tokens(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        variables: Message | None = None,
        after: Sequence[str] = (),
    ) -> list[int]:
        """The tokens of a conversation, to generate from.

        Whether there is a BOS is for the template to say. A control token that a message spells
        stays text, so `encode(chat_prompt(...))` is not the same.

        Args:
          messages, tools, documents, variables: as in `chat_prompt`.
          after: texts of the prompt; the tokens are of what follows the first that is there.
        """
        chat = self._chatting()
        tokens = chat.encode_chat(messages, True, tools, documents, variables, after)
        return self.encode(tokens, continues=True)

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
        """Plain causal forward without a cache: f32[B, T, V] for tokens i32[B, T]."""
        return self._logits(self.params, token_array(tokens, self.config.vocab_size))

    def _chatting(self) -> Tokenizer:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(
                f"model {self.name or 'without a name'} has no chat template; use generate"
            )
        return self.tokenizer


def rows_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    given = plain(prompts)
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
        raise ValueError(f"prompts must be texts or lists of token ids, got {shown(prompts)}")
    rows = list(given)
    return [rows] if rows and all(isinstance(p, int | np.integer) for p in rows) else rows


def token_array(tokens: object, vocab: int) -> jax.Array:
    """i32[B, T] of rows of token ids; ValueError for anything else."""
    try:
        array = np.asarray(tokens)
    except Exception:  # rows of several lengths, and whatever an object's conversion raises
        array = np.zeros(0)
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"tokens must be rows of token ids, all of one length, got {shown(tokens)}"
        )
    if array.min() < 0 or array.max() >= vocab:
        raise ValueError(
            f"tokens must be from 0 to {vocab - 1}, got {array.min()} to {array.max()}"
        )
    return jnp.asarray(array, jnp.int32)


def _token_ids(prompt: Sequence[int] | np.ndarray | jax.Array) -> list[int]:
    tokens = plain(prompt)
    if isinstance(tokens, Sequence) and not isinstance(tokens, bytes | bytearray | memoryview):
        try:
            return [_token_id(token) for token in tokens]
        except TypeError:
            pass
    raise ValueError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}")


def _token_id(token: object) -> int:
    if isinstance(token, bool | np.bool_):
        raise TypeError("a truth value is no token")
    return operator.index(token)  # type: ignore[arg-type]


def plain(value: object) -> object:
    """Arrays and their scalars as Python's own."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else value
