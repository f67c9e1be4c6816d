"""What a generation returns: completions, and what their batch cost."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

Figure: TypeAlias = float | tuple[int, ...] | str | None


@dataclass(frozen=True, kw_only=True)
class Stats(Mapping[str, Figure]):
    """What a batch cost; seconds exclude compilation. Reads as a mapping too.

    `sparsity` is the name of the method that made the model's blocks sparse."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    compile_s: float
    tokens_per_s: float
    tokens_per_step: float
    cache_bytes: int
    step_tokens: tuple[int, ...] = ()  # speculative steps of a row by tokens emitted: 0, 1, 2, ...
    sparsity: str | None = None

    def __getitem__(self, name: str) -> Figure:
        return asdict(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def __len__(self) -> int:
        return len(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`text` is what the tokens add to the decoded prompt, so that both join to the decoded whole.
    `finish_reason`: "eos" (a stop token of the model, which is the last token), "stop" (a stop
    string; the text ends before it), "length", or "cancelled" (a stream before its end).
    `log_probs` are the model's own, before sampler settings. Of an endless stream this is the
    newest part, `jaxinfer.decode.run.ENDLESS_KEPT` tokens."""

    text: str
    tokens: list[int]
    finish_reason: str
    log_probs: list[float]
    stats: Stats
