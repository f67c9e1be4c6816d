"""The JSON objects of completions."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.decode.results import Completion

OF_BATCH = ("prefill_s", "decode_s", "compile_s", "tokens_per_step", "step_tokens")


def completion_record(completion: "Completion") -> Json:
    """What `--json` prints of a completion that was made alone."""
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stats": dict(completion.stats),
    }


def batch_records(
    completions: "Sequence[Completion]", prompt_tokens: Sequence[int]
) -> Iterator[Json]:
    """The same of completions that were made together, with what is each one's own in `stats`.

    Tokens, their rate and the bytes of the cache are the completion's own; what exists for the
    batch alone is named in `stats.of_batch`. `batch` has the totals.

    Args:
      completions: all of one call.
      prompt_tokens: the length of each one's prompt.
    """
    rows = len(completions)
    for completion, length in zip(completions, prompt_tokens, strict=True):
        record, batch = completion_record(completion), dict(completion.stats)
        new, seconds = len(completion.tokens), completion.stats.decode_s
        own = {
            "prompt_tokens": length,
            "new_tokens": new,
            "tokens_per_s": (new - 1) / seconds if new > 1 and seconds > 0 else 0.0,
            "cache_bytes": completion.stats.cache_bytes // rows,
        }
        if rows > 1:
            record["stats"] = batch | own | {"of_batch": list(OF_BATCH)}
        yield record | {"batch": {"completions": rows} | batch}
