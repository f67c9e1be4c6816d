"""Norms, linear maps, feed-forward blocks and position encodings: pure functions."""
