"""The template of a tokenizer.json: special tokens around one text, such as BOS before it."""

from jaxinfer.files import one_line
from jaxinfer.typing import Json

MOST_STEPS = 32
MOST_TEXT = 256


def is_text(value: object) -> bool:
    """Whether a value of a file is a text of the length that an option may have."""
    return isinstance(value, str) and len(value) <= MOST_TEXT


def is_id(value: object) -> bool:
    """Whether a value of a file can be a token's id."""
    return type(value) is int and 0 <= value < 2**24


def read_template(step: Json) -> Json:
    """A template of special tokens around one text; ValueError if it is anything else."""
    pieces, tokens = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(tokens, dict) or len(pieces) > MOST_STEPS:
        raise ValueError(f"its post_processor is not a template of at most {MOST_STEPS} pieces")
    read: list[Json] = []
    for piece in pieces:
        ((kind, body),) = (
            piece.items() if isinstance(piece, dict) and len(piece) == 1 else ((0, 0),)
        )
        name = body.get("id") if isinstance(body, dict) else None
        if kind == "Sequence" and name == "A":
            read.append({"Sequence": {"id": "A", "type_id": 0}})
        elif kind == "SpecialToken" and isinstance(name, str) and name in tokens:
            read.append({"SpecialToken": {"id": name, "type_id": 0}})
        else:
            raise ValueError(f"its post_processor has a piece {one_line(repr(piece), 60)}")
    if sum("Sequence" in piece for piece in read) != 1:
        raise ValueError("its post_processor does not hold the text exactly once")
    names = {piece["SpecialToken"]["id"] for piece in read if "SpecialToken" in piece}
    kept = {name: _read_special(name, tokens[name]) for name in sorted(names)}
    pair = [*read, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": read, "pair": pair, "special_tokens": kept}


def _read_special(name: str, token: object) -> Json:
    ids = token.get("ids") if isinstance(token, dict) else None
    texts = token.get("tokens") if isinstance(token, dict) else None
    if (
        not isinstance(ids, list)
        or not isinstance(texts, list)
        or not len(ids) == len(texts) <= MOST_STEPS
        or not all(map(is_id, ids))
        or not all(map(is_text, [name, *texts]))
    ):
        raise ValueError(
            f"its post_processor's token {one_line(repr(name), 60)} has no list of ids"
        )
    return {"id": name, "ids": ids, "tokens": texts}


def template_ids(steps: list[Json]) -> list[tuple[str, int]]:
    """The (text, id) pairs that post-processing may add to a text."""
    pairs: list[tuple[str, int]] = []
    for step in steps:
        for token in step.get("special_tokens", {}).values():
            pairs += zip(token["tokens"], token["ids"], strict=True)
        pairs += [tuple(step[name]) for name in ("sep", "cls") if name in step]
    return pairs
