"""`Readout`: what the host has read out of the compiled loop's buffers."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxinfer.decode.rows import Rows
from jaxinfer.decode.state import DecodeState
from jaxinfer.decode.text import SpecialNames, TextStream
from jaxinfer.typing import Tokenizer


class Readout:
    """The tokens, log-probabilities and text of every row so far; the newest `kept` of them.

    `contexts` are the tokens that the rows continue; `owed` and `goes_on` as in `TextStream`.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer | None,
        kept: int | None,
        contexts: Sequence[list[int]],
        *,
        owed: int = 0,
        goes_on: bool = False,
    ):
        self._rows = rows
        names = None if tokenizer is None else SpecialNames(tokenizer)
        self.tokens: list[deque[int]] = [deque(maxlen=kept) for _ in rows.prompts]
        self.log_probs: list[deque[float]] = [deque(maxlen=kept) for _ in rows.prompts]
        self.streams = [
            None
            if tokenizer is None
            else TextStream(
                tokenizer, stop, kept, before=context, owed=owed, goes_on=goes_on, names=names
            )
            for stop, context in zip(rows.stop_strings, contexts, strict=True)
        ]
        self.has_stop_strings = any(rows.stop_strings)
        self.read = np.zeros(len(rows), np.int64)  # tokens of each row that were
        self.dropped = np.zeros(len(rows), np.int64)  # of these, behind a stop string

    @property
    def owed(self) -> int:
        """`TextStream.owed` of the first row."""
        return 0 if self.streams[0] is None else self.streams[0].owed

    @property
    def stopped(self) -> list[bool]:
        """The rows that met a stop string."""
        return [stream is not None and stream.stopped for stream in self.streams]

    def update(self, state: DecodeState, *, finished: bool) -> list[str]:
        """Reads out what the state has that was not read before; each row's text of it."""
        tokens, log_probs, written = map(np.asarray, (state.tokens, state.log_probs, state.written))
        return [
            self.update_row(row, tokens[row], log_probs[row], int(written[row]), finished=finished)
            for row in range(len(self.streams))
        ]

    def update_row(
        self, row: int, tokens: np.ndarray, log_probs: np.ndarray, written: int, *, finished: bool
    ) -> str:
        """The same of one row, from its buffers [M]."""
        new = np.arange(self.read[row], written) % len(tokens)
        ids = tokens[new].tolist()
        piece, kept = self._pushed(self.streams[row], ids, finished)
        self.tokens[row] += ids[:kept]
        self.log_probs[row] += log_probs[new].tolist()[:kept]
        self.read[row] = written
        self.dropped[row] += len(ids) - kept
        return piece

    def _pushed(self, stream: TextStream | None, ids: list[int], finished: bool) -> tuple[str, int]:
        """The text that `ids` add, and how many of them there are up to a stop string's end."""
        if stream is None:
            return "", len(ids)
        if not self.has_stop_strings:
            return stream.push(ids, last=finished), len(ids)
        piece = ""
        for number, token in enumerate(ids):
            if stream.stopped:
                return piece, number
            piece += stream.push([token], last=finished and number == len(ids) - 1)
        return piece + (stream.push([], last=True) if finished and not ids else ""), len(ids)

    def finish_reason(self, row: int, *, finished: bool) -> str:
        """Why the row ended; see `Completion`."""
        stream, ids = self.streams[row], self.tokens[row]
        last = ids[-1] if ids else None
        if (stream is not None and stream.stopped) or last in self._rows.stop_tokens[row]:
            return "stop"
        if last in self._rows.eos_tokens[row]:
            return "eos"
        return "length" if finished else "cancelled"
