"""Axis letters, array aliases and the protocols of what comes from outside.

B batch row, T fresh tokens, S stored slots, L layers, N query heads, K key/value heads, G = N / K,
H head size, D model width, F mlp width, V vocabulary, P positions or pages, R rank, M tree nodes,
A accepted tokens. Layouts: activations [B, T, D]; queries [B, N, T, H]; keys, values [B, K, T, H].

State pytrees (dataclasses that hold arrays) annotate their fields as `Leaf`, with the shape in a
comment: a pytree is also built with shapes, shardings or `None` in place of arrays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

Leaf: TypeAlias = Any
"""An array, or whatever a tree transformation puts in its place."""

Json: TypeAlias = dict[str, Any]
"""A parsed JSON object; what it holds is checked where it is read."""

Params: TypeAlias = dict[str, Any]
"""Nested dictionaries of arrays; see `jaxinfer.models.params.abstract_params` for the layout."""

Message: TypeAlias = Mapping[str, object]
"""One turn of a conversation, {"role": ..., "content": ...}; or a tool, a document, variables of a
chat template."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a model needs of a tokenizer; `jaxinfer.io.tokenizer.Tokenizer` is ours."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, where there is one."""
        ...

    def encode(
        self, text: str, add_special: bool = True, control_tokens: bool = True
    ) -> Sequence[int]:
        """Token ids of `text`; with `add_special` also what the model expects around it (BOS). With
        `control_tokens=False`, one that the text spells stays text."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        variables: Message | None = None,
    ) -> str:
        """The prompt of a conversation."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        variables: Message | None = None,
        after: Sequence[str] = (),
    ) -> Sequence[int]:
        """Token ids of that prompt, of which only the template's own control tokens are read as
        such; with `after`, of what follows the first of these texts that is there."""
        ...
