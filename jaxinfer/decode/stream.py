"""`Stream`: the text of one continuation while it is made."""

from collections.abc import Callable, Generator, Iterator

from jaxinfer.decode.results import Completion
from jaxinfer.decode.run import Run

STREAM_STEPS = 4  # model steps between two looks at the text; one host round trip each


class Stream(Iterator[str]):
    """The text of one continuation, piece by piece as it is made.

    `close` cancels it, as does dropping it. `at_end` is called when it ends, in whatever way.
    """

    def __init__(self, run: Run, at_end: Callable[[Run], None] = lambda run: None):
        if run.model.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer; use generate with token lists")
        self._run = run
        self._pieces = _pieces(run, at_end)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the stream; what was made so far is in `completion`."""
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """What was made so far."""
        return self._run.completions()[0]


def _pieces(run: Run, at_end: Callable[[Run], None]) -> Generator[str]:
    try:
        for (piece,) in run.pieces(STREAM_STEPS):
            if piece:
                yield piece
    finally:
        at_end(run)
        run.state = None  # frees the cache
