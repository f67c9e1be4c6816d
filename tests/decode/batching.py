"""A tiny model with text, and random requests that it is asked alone and among others."""

from dataclasses import dataclass, replace

import numpy as np

from jaxinfer.decode.options import Options
from jaxinfer.decode.request import Request
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.scheduler import Scheduler
from jaxinfer.decode.serving import Serving
from jaxinfer.decode.slot_requests import Extras
from jaxinfer.decode.ticket import Ticket
from jaxinfer.decode.token_mask import word_count
from jaxinfer.lm import LM
from tests.factories import BASE, PieceTokenizer, params_of

VOCAB = BASE.vocab_size
CFG = replace(BASE, bos_token_id=VOCAB - 2, eos_token_ids=(VOCAB - 1, 7))
PIECES = [bytes([48 + i]) for i in range(VOCAB - 2)]
SAMPLERS = (
    Sampler(),
    Sampler(temperature=1.5, top_k=40, top_p=0.95),
    Sampler(
        temperature=1.2,
        repetition_penalty=1.2,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        logit_bias={3: 2.0, 7: -1.0},
    ),
)


def model() -> LM:
    return LM(CFG, params_of("llama"), PieceTokenizer(PIECES), name="tiny")


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    sampler: Sampler
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def options(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "prompt"}


def random_requests(count: int, seed: int = 0, longest: int = 40, new: int = 16) -> list[Asked]:
    """Of which lm.generate needs few programs."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        stop = ("A", "mn", "5") if rng.random() < 0.3 else ()
        found.append(
            Asked(
                prompt=rng.integers(0, VOCAB - 2, rng.integers(1, longest)).tolist(),
                sampler=SAMPLERS[rng.integers(len(SAMPLERS))],
                max_new_tokens=int(rng.integers(1, new + 1)),
                seed=number,
                stop=stop,
                ignore_eos=bool(rng.random() < 0.3),
            )
        )
    return found


def assert_alike(answer, expected) -> None:
    assert answer.tokens == expected.tokens
    np.testing.assert_allclose(answer.log_probs, expected.log_probs, atol=2e-4)
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)


def serve(serving: Serving, asked: list[Asked], arrivals: list[int], **extras) -> list[Ticket]:
    """The tickets of requests of which number i comes before turn `arrivals[i]`."""
    scheduler = Scheduler(serving)
    requests = [
        Request(
            serving.model,
            one.prompt,
            Options(**one.options),
            Extras(**extras),
        )
        for one in asked
    ]
    turn, left = 0, sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
    while left or not scheduler.idle:
        while left and left[0][0] <= turn:
            scheduler.waiting.append(left.pop(0)[1])
        scheduler.turn()
        turn += 1
    return [request.ticket for request in requests]


class Every:
    """A constraint that allows some tokens, and calls `at(count)` behind each."""

    def __init__(self, allowed=lambda token: True, at=lambda count: None):
        bits = np.zeros(32 * word_count(VOCAB), np.uint32)
        bits[[token for token in range(VOCAB) if allowed(token)]] = 1
        self.words = (bits.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(1, np.uint32)
        self.count, self.at = 0, at

    def mask(self) -> np.ndarray:
        return self.words

    def accept(self, token: int) -> None:
        self.count += 1
        self.at(self.count)
