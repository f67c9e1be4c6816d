"""`Vocabulary`: the bytes and the text of single tokens, and the tokenizer as grammars need it."""

import functools
from collections.abc import Sequence

from llguidance import LLTokenizer

from jaxinfer.decode.model import Model
from jaxinfer.files import one_line
from jaxinfer.io.tokenizer import Tokenizer


class Vocabulary:
    """The tokens of a model.

    Raises:
      ValueError: the model has no tokenizer of `jaxinfer.io.tokenizer`.
    """

    def __init__(self, model: Model):
        if not isinstance(model.tokenizer, Tokenizer):
            raise ValueError(
                f"model {model.name or 'without a name'} has no tokenizer of its own; a server "
                "needs one"
            )
        self.tokenizer, self.size = model.tokenizer, model.config.vocab_size
        self._eos = list(model.config.eos_token_ids)
        self.special = frozenset(
            i for i, token in self.tokenizer.backend.get_added_tokens_decoder().items()
            if token.special
        )  # fmt: skip
        self.text = functools.lru_cache(1 << 16)(self._text)

    @functools.cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """What grammars are followed with.

        Raises:
          ValueError: the tokenizer is of another kind than byte-level or byte-fallback BPE.
        """
        # Neither padding nor truncation has anything to do with single tokens.
        backend = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        try:
            return LLTokenizer(backend.to_str(), n_vocab=self.size, eos_token=self._eos or None)
        except Exception as error:  # whatever its Rust side raises
            raise ValueError(
                f"this model's tokenizer cannot follow a grammar: {one_line(error, 200)}"
            ) from error

    def bytes(self, token: int) -> list[int] | None:
        """The bytes of a token; None where they are not known."""
        try:
            return list(self.grammar_tokenizer.decode_bytes([token]))
        except ValueError:
            return None

    def _text(self, token: int) -> str:
        """What a token adds to a text; the bytes of half a character are question marks."""
        found = self.bytes(token)
        if found is None:
            return self.tokenizer.decode([token], skip_special=False)
        return bytes(found).decode("utf-8", "replace")

    def shown(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens without the special one that ended them."""
        return tokens[:-1] if tokens and tokens[-1] in self.special else tokens
