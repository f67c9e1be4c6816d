"""The example packages beside this file, as `pip install` would make them visible."""

import contextlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("key_norm", "snapkv")


def write_metadata(folder: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    """The metadata of an installed package with these entry points."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Modules and metadata in these folders are found."""
    before = list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def installed(site: Path) -> Iterator[None]:
    """The example packages, with their metadata in the folder `site`."""
    for package in PACKAGES:
        project = tomllib.loads((HERE / package / "pyproject.toml").read_text())["project"]
        write_metadata(site, project["name"], project["entry-points"])
    with importable(site, *(HERE / package for package in PACKAGES)):
        yield
