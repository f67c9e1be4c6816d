"""`Rows`: what each row of a batch is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.decode.capacity import ENDLESS
from jaxinfer.decode.engine import make_requests
from jaxinfer.decode.model import Model
from jaxinfer.decode.options import Asked, Options
from jaxinfer.decode.state import Requests
from jaxinfer.decode.text import special_tokens


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What each row is asked for; the samples of a prompt stand next to each other."""

    prompts: list[list[int]]  # what each row reads
    asked: list[Asked]
    stop_tokens: list[list[int]]  # special tokens that a stop string names
    stop_strings: list[list[str]]  # the others
    eos_tokens: list[tuple[int, ...]]
    samples: int

    @classmethod
    def of(cls, model: Model, prompts: Sequence[list[int]], opts: Options) -> "Rows":
        """The rows of prompts under some options.

        Raises:
          ValueError: an option is wrong, or has not one entry per prompt.
        """
        asked = [one for one in opts.per_prompt(len(prompts)) for _ in range(opts.samples)]
        special: dict[str, int] = {}
        if any(any(one.stop) for one in asked):
            if model.tokenizer is None:
                raise ValueError("stop strings need a tokenizer; give token lists without stop=")
            special = special_tokens(model.tokenizer, {s for one in asked for s in one.stop})
        eos = model.config.eos_token_ids
        return cls(
            prompts=[prompt for prompt in prompts for _ in range(opts.samples)],
            asked=asked,
            stop_tokens=[[special[s] for s in one.stop if s in special] for one in asked],
            stop_strings=[[s for s in one.stop if s and s not in special] for one in asked],
            eos_tokens=[() if one.ignore_eos else eos for one in asked],
            samples=opts.samples,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def limit(self) -> int:
        """Most tokens that a row may emit."""
        return max(one.max_new_tokens for one in self.asked)

    @property
    def endless(self) -> bool:
        return self.limit == ENDLESS

    def requests(self, model: Model, limit: int | None = None) -> Requests:
        """The rows as arrays; with `limit` they end earlier than their buffers would hold."""
        most = ENDLESS if limit is None else limit
        width = len(model.config.eos_token_ids)
        return make_requests(
            [one.sampler for one in self.asked],
            [one.seed for one in self.asked],
            [min(one.max_new_tokens, most) for one in self.asked],
            # -1 matches no token; the width stays, so that both need one program
            [
                [*stops, *(eos or [-1] * width)]
                for stops, eos in zip(self.stop_tokens, self.eos_tokens, strict=True)
            ],
            model.config.vocab_size,
            [i % self.samples for i in range(len(self))],
        )
