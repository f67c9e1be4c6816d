"""What a built library is: a digest of its file, and one of the sources that it was built from.

Run by the build as a script, it imports nothing but the standard library.
"""

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY, MANIFEST = "jaxinfer_cpu.so", "jaxinfer_cpu.json"


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of_sources() -> str:
    """One digest of all C++ sources and of what says how they are compiled."""
    found = [*HERE.glob("*/*.cpp"), *HERE.glob("*/*.h"), HERE / "library" / "CMakeLists.txt"]
    lines = [f"{path.relative_to(HERE).as_posix()} {digest_of(path)}\n" for path in sorted(found)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write(folder: Path) -> None:
    """Writes the manifest of the library that was built in `folder`."""
    facts = {"library": digest_of(folder / LIBRARY), "sources": digest_of_sources()}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
