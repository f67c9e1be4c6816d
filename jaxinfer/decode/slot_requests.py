"""What a row of a batch that changes may ask for: arrays of fixed width, so that another request
compiles nothing.

Three programs serve all requests, by what the most demanding row asks; the others of its batch are
not changed by it.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import flag, shown, whole
from jaxinfer.decode.engine import bucket, make_requests
from jaxinfer.decode.model import Model
from jaxinfer.decode.rows import Rows
from jaxinfer.decode.sampling import Features
from jaxinfer.decode.state import LISTED, Requests
from jaxinfer.decode.token_mask import mask_of, word_count

BIASES = 300
"""Tokens that a request's `logit_bias` may name."""

STOPS = 8
"""Special tokens that may end a request's text beside the model's own."""


class Kind(IntEnum):
    """What a compiled step can do; each can all that those before it can."""

    GREEDY = 0
    SAMPLED = 1
    EVERYTHING = 2


_NOTHING = Features(False, False, False, False, False, False)
FEATURES = {
    Kind.GREEDY: _NOTHING,
    Kind.SAMPLED: _NOTHING._replace(sample=True, top_k=True, top_p=True, min_p=True, varies=True),
    Kind.EVERYTHING: Features(True, True, True, True, True, True, True, True),
}


@runtime_checkable
class Constraint(Protocol):
    """What a text must follow, such as a grammar; one object per request."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: int32 or uint32 [ceil(V / 32)], token t is bit t % 32 of
        word t // 32. At least one; where the text may end, its stop tokens too."""
        ...

    def accept(self, token: int) -> None:
        """Goes on behind a token that the mask allowed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What `jaxinfer.decode.batcher.Batcher.submit` takes beside the options of `LM.generate`."""

    min_tokens: int = 0
    top_logprobs: int = 0
    prompt_log_probs: bool = False
    sample: int = 0
    constraint: Constraint | None = None
    prefix_scope: str | None = ""

    def __post_init__(self):
        given = {
            "min_tokens": whole("min_tokens", self.min_tokens, least=0),
            "top_logprobs": whole("top_logprobs", self.top_logprobs, least=0, most=LISTED),
            "prompt_log_probs": flag("prompt_log_probs", self.prompt_log_probs),
            "sample": whole("sample", self.sample, least=0),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.prefix_scope, str | None):
            raise ValueError(f"prefix_scope must be a text or None, got {shown(self.prefix_scope)}")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ValueError(
                "constraint must have the methods mask and accept of jaxinfer.decode.Constraint, "
                f"got {shown(self.constraint)}"
            )
        if self.constraint is not None and self.min_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} and a constraint may leave no token to draw; let "
                "the constraint say how long the text must be"
            )

    @property
    def everything(self) -> bool:
        return bool(self.min_tokens or self.top_logprobs) or self.constraint is not None


def kind_of(rows: Rows, extras: Extras) -> Kind:
    """The least kind that serves a request."""
    (asked,) = rows.asked
    if extras.everything or asked.sampler.penalises or asked.sampler.biases:
        return Kind.EVERYTHING
    return Kind.SAMPLED if asked.sampler.temperature > 0 else Kind.GREEDY


def of_kind(requests: Requests, kind: Kind) -> Requests:
    """The same requests for the program of a kind."""
    return replace(requests, sampler=replace(requests.sampler, features=FEATURES[kind]))


def check_request(model: Model, rows: Rows, extras: Extras) -> None:
    """Refuses what the fixed widths do not hold.

    Raises:
      ValueError: too many biased or stop tokens, or a text that may end only behind its limit.
    """
    (asked,), (stops,) = rows.asked, rows.stop_tokens
    if len(asked.sampler.biases) > BIASES:
        raise ValueError(
            f"logit_bias names {len(asked.sampler.biases)} tokens; a batcher takes {BIASES} at "
            "most, lm.generate any number"
        )
    if len(stops) > STOPS:
        raise ValueError(f"stop names {len(stops)} special tokens; a batcher takes {STOPS} at most")
    if extras.min_tokens > asked.max_new_tokens:
        raise ValueError(
            f"min_tokens={extras.min_tokens} exceeds max_new_tokens={asked.max_new_tokens}"
        )


def row_requests(model: Model, rows: Rows, extras: Extras) -> Requests:
    """What one row asks for, for the program of its own kind."""
    vocab, own = model.config.vocab_size, len(model.config.eos_token_ids)
    (asked,), (stops,), (eos,) = rows.asked, rows.stop_tokens, rows.eos_tokens
    width = bucket(own + STOPS, 1)
    stops = [*eos, *stops]
    requests = make_requests(
        [asked.sampler], [asked.seed], [asked.max_new_tokens],
        [stops + [-1] * (width - len(stops))], vocab, [extras.sample], biases=BIASES,
    )  # fmt: skip
    words = np.full(word_count(vocab), -1, np.int32)
    if extras.constraint is not None:
        words = mask_of(extras.constraint.mask(), vocab)
    sampler = replace(requests.sampler, allowed=jnp.asarray(words[None]))
    requests = replace(
        requests,
        sampler=sampler,
        min_tokens=jnp.asarray([extras.min_tokens], jnp.int32),
        listed=jnp.asarray([extras.top_logprobs], jnp.int32),
        one_by_one=jnp.asarray([extras.constraint is not None]),
    )
    return of_kind(requests, kind_of(rows, extras))
