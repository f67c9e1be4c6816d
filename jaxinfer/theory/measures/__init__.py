"""Numbers that say how sparse attention is, how low a rank weights have, and how alike two things
are.

Arrays are those of NumPy or JAX; the result is of the same library, in the precision of the input.
"""
