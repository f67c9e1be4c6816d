"""Windows of a text, spread over it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def spread_windows(tokens: Sequence[int], window: int, windows: int) -> Int[np.ndarray, "Q T"]:
    """At most `windows` of the text's windows of `window` tokens, as far apart as there are.

    Raises:
      ValueError: the text is shorter than a window.
    """
    count = len(tokens) // window
    if count < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens, less than a window of {window}; give a longer "
            "text or a shorter window"
        )
    chosen = np.unique(np.linspace(0, count - 1, min(windows, count)).round().astype(int))
    return np.asarray(tokens[: count * window], np.int32).reshape(count, window)[chosen]
