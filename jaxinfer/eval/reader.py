"""`Reader`: known text read through a cache that stays, piece after piece.

It owns a live cache of B rows and reads their next tokens into it by `jaxinfer.decode.scoring`, as
`LM.score` does. Adds no shape letters.
"""

import numpy as np

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Policy
from jaxinfer.decode.capacity import check_fits, check_room, is_fixed_size
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket
from jaxinfer.decode.model import Model
from jaxinfer.decode.scoring import Reading, chunk_of, read
from jaxinfer.models.reach import check_positions
from jaxinfer.models.stack import grow_cache


class Reader:
    """B rows read side by side through one policy's cache.

    `context` is the length that shares of a budget refer to. The cache starts small and doubles
    where the policy keeps every token; the text's last token waits outside it.

    Example:
        reader = Reader(lm, ji.streaming(4, 252), context=256)
        reader.read([[1, 2, 3]]).log_probs     # f32[1, 2]: the first token of all has none
        reader.read([[4, 5]]).log_probs        # f32[1, 2]
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        context: int,
        *,
        rows: int = 1,
        chunk: int | None = None,
    ):
        self.model = model
        self.policy = policy.sized(bucket(context, 1))
        self.policy.warn_beyond(model.config.max_positions)
        self.chunk = chunk_of(self.policy, chunk)
        self.engine = model.engine.serving(self.policy)
        self.rows, self.length, self.capacity = rows, 0, SMALLEST_CAPACITY
        check_fits(model, self.policy, rows, self.capacity, self.chunk)
        self.cache = self.engine.new_cache(
            self.policy, rows, self.capacity, contexts=[context] * rows
        )
        self._last: np.ndarray | None = None  # i32[B, 1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all rows, as allocated now."""
        return bytes_of(self.cache.layers)

    def read(self, tokens: np.ndarray | list[list[int]]) -> Reading:
        """Reads i32[B, T], T tokens of every row; the first token of a row is not judged."""
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 2 or len(tokens) != self.rows:
            raise ValueError(
                f"expected {self.rows} rows of equally many tokens, got {tokens.shape}"
            )
        if self._last is not None:
            tokens = np.concatenate([self._last, tokens], axis=1)
        self._last = tokens[:, -1:]
        length = self.length + tokens[:, :-1].shape[1]
        self._reserve(length)
        self.cache, found = read(self.engine, self.cache, tokens, self.chunk)
        self.length = length
        return found

    def _reserve(self, length: int) -> None:
        check_positions(self.model.config, length)
        stays = is_fixed_size(self.model, self.policy) or length <= self.capacity
        capacity = self.capacity if stays else bucket(length, SMALLEST_CAPACITY)
        check_room(self.model, self.policy, capacity, 0, length)
        if stays:
            return
        check_fits(self.model, self.policy, self.rows, capacity, self.chunk)
        self.cache, self.capacity = grow_cache(self.model.config, self.cache, capacity), capacity
