"""Conversations that nobody has saved yet: a small file each in the cache folder, written after
every turn, so that none is lost however `jaxinfer chat` ends.

A file holds the tokens that the model has read and the texts of the turns, not the cache, which is
made anew from the tokens. The newest few files are kept.
"""

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.files import cache_folder, one_line, read_json, replacing
from jaxinfer.typing import Message

KEPT = 10


@dataclass(frozen=True)
class Turn:
    """A message and the model's reply to it."""

    message: str
    reply: str


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A conversation: `source` names its model, `tokens` is all that the model has read, `turns`
    the texts in it, behind `restored` tokens of a session file."""

    source: str
    system: str | None = None
    tokens: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    restored: int = 0


def as_messages(turns: list[Turn]) -> list[Message]:
    """What a chat template takes."""
    pairs = [(("user", turn.message), ("assistant", turn.reply)) for turn in turns]
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def short(text: str) -> str:
    """Enough of a text to know it by."""
    return one_line(text, 60)


def new_place() -> Path:
    """A file for a conversation that begins now."""
    return (
        _folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.time_ns() % 10**6}.json"
    )


def keep(talk: Talk, place: Path) -> None:
    """Puts the conversation into the file `place`, for its user's eyes only."""
    with replacing(place) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(asdict(talk)), encoding="utf-8")
    for old in _files()[KEPT:]:
        forget(old)


def forget(place: Path) -> None:
    """Removes a kept conversation."""
    with contextlib.suppress(OSError):
        place.unlink()


def newest() -> Path:
    """The file of the conversation that was kept last.

    Raises:
      ValueError: there is none.
    """
    files = _files()
    if not files:
        raise ValueError("no conversation is kept; start one without --resume")
    return files[0]


def read(place: Path) -> Talk:
    """What `keep` wrote.

    Raises:
      ValueError: the file is damaged.
    """
    record = read_json(place)
    try:
        fields: dict[str, Any] = {**record, "turns": [Turn(**turn) for turn in record["turns"]]}
        talk = Talk(**fields)
    except (TypeError, KeyError):
        talk = None
    if talk is None or not _is_whole(talk):
        raise ValueError(f"{place} is not a kept conversation; delete it")
    return talk


def _is_whole(talk: Talk) -> bool:
    """Whether all fields have their types."""
    texts = [talk.source, talk.system or "", *(x for t in talk.turns for x in (t.message, t.reply))]
    numbers = [*talk.tokens, talk.restored] if isinstance(talk.tokens, list) else [None]
    return all(isinstance(text, str) for text in texts) and all(type(n) is int for n in numbers)


def _folder() -> Path:
    return cache_folder() / "chats"


def _files() -> list[Path]:
    """The kept conversations, the newest first."""
    found = []
    for path in _folder().glob("[!.]*.json"):
        with contextlib.suppress(OSError):  # another process has just removed it
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]
