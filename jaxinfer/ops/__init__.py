"""Array operations that dispatch to XLA or to kernels."""
