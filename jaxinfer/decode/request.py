"""`Request`: one request of a batcher, seen from inside."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.model import Model
from jaxinfer.decode.options import Options
from jaxinfer.decode.readout import Readout
from jaxinfer.decode.rows import Rows
from jaxinfer.decode.sampling import IN_PROMPT
from jaxinfer.decode.slot_batch import Emitted
from jaxinfer.decode.slot_requests import Extras, check_request, kind_of, row_requests
from jaxinfer.decode.state import Requests
from jaxinfer.decode.ticket import Piece, RequestStats, Ticket
from jaxinfer.decode.token_mask import allows, mask_of
from jaxinfer.typing import Leaf


@dataclass
class Clock:
    """When things happened to a request, in seconds of `time.perf_counter`."""

    submitted: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    read_s: float = 0.0  # spent on its prompt

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Adds the seconds of the block to those of its prompt."""
        start = time.perf_counter()
        yield
        self.read_s += time.perf_counter() - start


class Request:
    """What one ticket asks for, and what it has got so far.

    Raises:
      ValueError: an option is wrong, or beyond the widths of `jaxinfer.decode.slot_requests`.
    """

    def __init__(self, model: Model, tokens: list[int], opts: Options, extras: Extras):
        self.model, self.tokens, self.extras = model, tokens, extras
        self.rows = Rows.of(model, [tokens], opts)
        check_request(model, self.rows, extras)
        self.kind = kind_of(self.rows, extras)
        self.ticket, self.clock = Ticket(), Clock()
        self._compiled = model.engine.compile_s
        self.prompt_log_probs: list[float] | None = None
        self.cache_bytes = self.cached_tokens = 0
        self.step_tokens: tuple[int, ...] = ()
        self._out = Readout(self.rows, model.tokenizer, None, [tokens])
        self._mask: np.ndarray | None = None

    @property
    def read_by_row(self) -> list[int]:
        """What is known of the tokens that its row's cache has read: all but the last one that was
        kept. Behind a stop string there may be more."""
        return self.tokens + list(self._out.tokens[0])[:-1]

    @property
    def is_whole(self) -> bool:
        """Whether nothing was made that is not kept."""
        return not self._out.dropped[0]

    @property
    def limit(self) -> int:
        return self.rows.limit

    @property
    def one_by_one(self) -> bool:
        """Whether the loop must stop behind each token."""
        return self.extras.constraint is not None

    def arrays(self) -> Requests:
        """What the row asks for, on the device."""
        requests = row_requests(self.model, self.rows, self.extras)
        if self.one_by_one:
            self._mask = np.asarray(requests.sampler.allowed)[0]
        return requests

    def seen(self) -> Leaf:
        """i32[1, V] of the prompt, as `DecodeState.seen`."""
        seen = np.zeros((1, self.model.config.vocab_size), np.int32)
        seen[0, self.tokens] = IN_PROMPT
        return jnp.asarray(seen)

    def take(self, emitted: Emitted, row: int) -> bool:
        """Reads out what the row has that was not read before; whether the request has ended.

        Raises:
          ValueError: the constraint allows nothing, or did not allow what was drawn.
        """
        out, finished = self._out, bool(emitted.done[row])
        read, had = int(out.read[0]), len(out.tokens[0])
        text = out.update_row(
            0, emitted.tokens[row], emitted.log_probs[row], int(emitted.written[row]),
            finished=finished,
        )  # fmt: skip
        tokens = list(itertools.islice(out.tokens[0], had, None))
        log_probs = list(itertools.islice(out.log_probs[0], had, None))
        ended = finished or out.stopped[0]
        if tokens and self.clock.first_token is None:
            self.clock.first_token = time.perf_counter()
        piece = Piece(text, tokens, log_probs, self._listed(emitted, row, read, len(tokens)))
        self.ticket.push(piece, self.stats(), self.prompt_log_probs)
        if self.one_by_one and not ended:
            self._follow(tokens)
        return ended

    @property
    def mask(self) -> np.ndarray:
        """The tokens that its constraint allows next."""
        assert self._mask is not None
        return self._mask

    def end(self, reason: str | None = None, error: Exception | None = None) -> None:
        """Tells the ticket that it is over: for a reason or an error, or by itself."""
        if error is not None:
            reason = "error"
        elif reason is None:
            reason = self._out.finish_reason(0, finished=True)
        self.ticket.end(reason, self.stats(), error)

    def _follow(self, tokens: list[int]) -> None:
        constraint = self.extras.constraint
        assert constraint is not None
        for token in tokens:
            if not allows(self.mask, token):
                raise ValueError(
                    f"token {token} was drawn, which the constraint does not allow: logit_bias "
                    "forbids all that it does"
                )
            constraint.accept(token)
        self._mask = mask_of(constraint.mask(), self.model.config.vocab_size)

    def _listed(
        self, emitted: Emitted, row: int, read: int, count: int
    ) -> list[list[tuple[int, float]]]:
        width = self.extras.top_logprobs
        if not width or emitted.likeliest is None:
            return []
        places = np.arange(read, read + count) % emitted.tokens.shape[1]
        tokens, log_probs = (x[row, places, :width].tolist() for x in emitted.likeliest)
        return [list(zip(*pair, strict=True)) for pair in zip(tokens, log_probs, strict=True)]

    def stats(self) -> RequestStats:
        """What it cost so far."""
        now, clock, made = time.perf_counter(), self.clock, len(self._out.tokens[0])
        first, admitted = clock.first_token, clock.admitted
        decode_s = 0.0 if first is None else now - first
        steps = sum(self.step_tokens)
        return RequestStats(
            prompt_tokens=len(self.tokens),
            new_tokens=made,
            prefill_s=clock.read_s,
            decode_s=decode_s,
            compile_s=self.model.engine.compile_s - self._compiled,
            tokens_per_s=(made - 1) / decode_s if made > 1 and decode_s > 0 else 0.0,
            tokens_per_step=(made - 1) / steps if steps else 1.0,
            cache_bytes=self.cache_bytes,
            step_tokens=self.step_tokens,
            sparsity=None if self.model.sparsity is None else self.model.sparsity.name,
            queue_s=(now if admitted is None else admitted) - clock.submitted,
            first_token_s=0.0 if first is None else first - clock.submitted,
            cached_tokens=self.cached_tokens,
        )
