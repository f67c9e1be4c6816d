"""The parts of `bench/gpu_suite.py`, a file for each."""
