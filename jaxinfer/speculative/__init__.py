"""Speculative decoding: token trees, their shapes, and the chance that a drafted token is kept."""
