"""ALiBi slopes (arXiv 2108.12409): the score of key j for query i gets `-slope * (i - j)`.

Two published forms differ when the number of heads is not a power of two: MPT spreads the
exponents over the next larger power, Bloom and Falcon append slopes to those of the next smaller
one. References bias by absolute positions, which softmax cannot tell from distances.
"""

import math

import ml_dtypes
import numpy as np


def mpt_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """MPT's slopes `2 ** (-bias_max * i / n)`, n the power of two at or above `num_heads`.

    With n > num_heads the heads take every second slope first, then the ones between.
    """
    size = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-bias_max * i / size) for i in range(1, size + 1)]
    if size != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return tuple(slopes)


def falcon_slopes(num_heads: int, head_dim: int) -> tuple[float, ...]:
    """Falcon's (and Bloom's) slopes, rounded to bfloat16 and divided by `sqrt(head_dim)`.

    Falcon adds the bias before it scales the scores, and its reference rounds slopes to bfloat16.
    The reference also rounds `slope * position`; we do not, since the rounding depends on absolute
    positions: with powers of two (up to 8 heads) and under 256 positions both agree.
    """
    size = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / size) for i in range(1, size + 1)]
    slopes += [2.0 ** (-4.0 * i / size) for i in range(1, 1 + 2 * (num_heads - size), 2)]
    rounded = np.asarray(slopes, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return tuple(float(slope) for slope in rounded / math.sqrt(head_dim))
