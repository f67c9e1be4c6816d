"""Runs `tools/kernels/inspect_kernels.py`, with the same arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.kernels.inspect_kernels import main

if __name__ == "__main__":
    sys.exit(main())
