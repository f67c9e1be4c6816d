"""Convert a Hugging Face folder or a GGUF file to a folder that jaxinfer loads fast.

    python tools/convert_hf.py SRC DST --dtype bfloat16

This is `jaxinfer convert` from a source tree that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxinfer.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
