"""Identities hold to 1e-12 where inputs are float64: the algebra is exact, not merely close."""

import os
import subprocess
import sys
from pathlib import Path


def test_identities_hold_to_1e_12_in_float64():
    root = Path(__file__).parents[1]
    # A process of its own: x64 is a setting of the whole process.
    done = subprocess.run(
        [sys.executable, "-m", "tests.float64_checks"],
        cwd=root,
        env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 3
