"""A file with one policy per layer: `jaxinfer diagnose --save` writes it, `--policy` reads it.

    {"format": "jaxinfer-policies", "version": 1, "layers": [{"name": "kivi", "bits": 2}, ...]}

A layer's policy is written as users write one: its name and arguments, which are numbers, texts,
true, false or null. Other keys of the object tell people where it comes from. The file is input,
whatever it contains.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxinfer.arguments import shown
from jaxinfer.files import one_line, read_json, write_json
from jaxinfer.typing import Json

FORMAT, VERSION, ENDING = "jaxinfer-policies", 1, ".json"
LIMIT = 2**20  # bytes
MOST_LAYERS, MOST_ARGUMENTS, LONGEST_TEXT = 1000, 32, 4095


def is_policy_file(name: str) -> bool:
    """Whether a policy that is given as a text is a file's name."""
    return name.endswith(ENDING)


def write_policy_file(
    path: str | Path, layers: Sequence[Mapping[str, object]], about: Mapping[str, object]
) -> None:
    """Puts one policy per layer into a file, in one step; `about` says where they come from."""
    own: Json = {"format": FORMAT, "version": VERSION, "layers": [dict(one) for one in layers]}
    write_json(path, own | {key: value for key, value in about.items() if key not in own})


def read_policy_file(path: str | Path) -> list[dict[str, object]]:
    """The policies of the layers, as mappings with "name" and arguments.

    Raises:
      ValueError: the file cannot be read or is none of this; it names the file, and what is wrong.
    """
    data = read_json(Path(path).expanduser(), LIMIT)
    where = one_line(path, 200)
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ValueError(
            f"{where} is no file of policies (format {FORMAT!r}, version {VERSION}); "
            "jaxinfer diagnose --save writes one"
        )
    layers = data.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= MOST_LAYERS:
        raise ValueError(
            f"{where}: layers must be a list of 1 to {MOST_LAYERS} policies, got {shown(layers)}"
        )
    for index, one in enumerate(layers):
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or is_policy_file(name):  # a file could name itself
            raise ValueError(
                f'{where}: layer {index} must be an object with the "name" of a policy and '
                f"arguments, got {shown(one)}"
            )
        if len(one) > MOST_ARGUMENTS or not all(map(_is_plain, [*one, *one.values()])):
            raise ValueError(
                f"{where}: arguments of layer {index} must be finite numbers, short texts, true, "
                f"false or null, got {shown(one)}"
            )
    return layers


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_TEXT
    return value is None or (isinstance(value, int | float) and math.isfinite(value))
