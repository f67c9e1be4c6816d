"""Log-probabilities as both kinds of completions write them."""

import codecs
from collections.abc import Sequence

from jaxinfer.decode.ticket import Answer, Piece
from jaxinfer.serve.vocabulary import Vocabulary

LEAST = -9999.0
"""What the API writes for the logarithm of 0."""


def for_chat(vocabulary: Vocabulary, piece: Piece | Answer) -> dict[str, object]:
    """`logprobs` of a chat choice: of the tokens of a piece or of all of an answer."""
    return {"content": entries(vocabulary, piece), "refusal": None}


def entries(vocabulary: Vocabulary, piece: Piece | Answer) -> list[dict[str, object]]:
    """Each token with its log-probability, its bytes, and the likeliest tokens in its place."""
    found = []
    for i, token in enumerate(vocabulary.shown(piece.tokens)):
        listed = piece.likeliest[i] if piece.likeliest else []
        top = [_entry(vocabulary, *pair) for pair in listed]
        found.append(_entry(vocabulary, token, piece.log_probs[i]) | {"top_logprobs": top})
    return found


def _entry(vocabulary: Vocabulary, token: int, log_prob: float) -> dict[str, object]:
    return {
        "token": vocabulary.text(token),
        "logprob": max(log_prob, LEAST),
        "bytes": vocabulary.bytes(token),
    }


class TextLogProbs:
    """`logprobs` of text completions, whose offsets go on from piece to piece.

    Args:
      listed: how many of the likeliest tokens to list at each place.
    """

    def __init__(self, vocabulary: Vocabulary, listed: int):
        self._vocabulary, self._listed = vocabulary, listed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, tokens: Sequence[int], log_probs: Sequence[float]) -> dict[str, object]:
        """Of a prompt; nothing comes before its first token."""
        found = self._of(tokens, [None, *log_probs], [])
        return found | {"top_logprobs": None}

    def piece(self, piece: Piece | Answer) -> dict[str, object]:
        """Of the tokens of a piece, or of all of an answer."""
        return self._of(self._vocabulary.shown(piece.tokens), piece.log_probs, piece.likeliest)

    def _of(
        self,
        tokens: Sequence[int],
        log_probs: Sequence[float | None],
        likeliest: Sequence[Sequence[tuple[int, float]]],
    ) -> dict[str, object]:
        text, count = self._vocabulary.text, len(tokens)
        top = [
            {text(token): max(value, LEAST) for token, value in pairs}
            for pairs in likeliest[:count]
        ]
        return {
            "tokens": [text(token) for token in tokens],
            "token_logprobs": [None if x is None else max(x, LEAST) for x in log_probs[:count]],
            "top_logprobs": top if self._listed else None,
            "text_offset": [self._next(token) for token in tokens],
        }

    def _next(self, token: int) -> int:
        """Where a token begins in the text; special ones are not in it."""
        offset = self._offset
        if token not in self._vocabulary.special:
            self._offset += len(self._decoder.decode(bytes(self._vocabulary.bytes(token) or ())))
        return offset
