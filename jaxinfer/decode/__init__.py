"""Sampling, the compiled decode loop, generation and sessions."""
