"""The JSON object of a completion."""

from typing import TYPE_CHECKING

from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.decode.results import Completion


def completion_record(completion: "Completion") -> Json:
    """What `--json` prints of a completion that was made alone."""
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stats": dict(completion.stats),
    }
