"""Reading the small JSON files of a checkpoint, with errors that name the file.

Every failure is a one-line `ValueError`: a file of a checkpoint is input, whatever it contains.
"""

import json
from pathlib import Path
from typing import Any

LIMIT = 256 * 2**20
"""No tokenizer or index comes near this; a larger file is not what its name says."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error on one line, shortened, for use inside another message."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_text(path: Path) -> str:
    """The UTF-8 text of a file."""
    try:
        size = path.stat().st_size
        if size > LIMIT:
            raise ValueError(f"{path} has {size} bytes; at most {LIMIT} are expected there")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {one_line(error)}") from error


def parse_json(text: str | bytes, what: object) -> Any:
    """Parsed JSON; `what` names the source in errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    data = parse_json(read_text(path), path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data
