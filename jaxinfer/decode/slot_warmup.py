"""Compiles what the requests of a batcher may need, by serving one of each kind."""

import numpy as np

from jaxinfer.decode.engine import CHUNK, SMALLEST_CHUNK, WHOLE, bucket, chunks
from jaxinfer.decode.options import Options
from jaxinfer.decode.request import Request
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.serving import Serving
from jaxinfer.decode.slot_requests import Extras, Kind
from jaxinfer.decode.slots import Row
from jaxinfer.decode.token_mask import word_count

SAMPLERS = {
    Kind.GREEDY: Sampler(),
    Kind.SAMPLED: Sampler(temperature=1.0),
    Kind.EVERYTHING: Sampler(temperature=1.0, repetition_penalty=1.1),
}


def warm(serving: Serving) -> None:
    """Reads prompts of all sizes, and runs every kind of step with every number of slots."""
    for length in lengths(serving.context - 1, serving.piece):
        for scored in (False, True):
            _read(serving, length, Extras(prompt_log_probs=scored))
    if serving.plan is not None:
        state = _row(serving, Kind.GREEDY).state
        for most in (CHUNK, WHOLE):  # a draft reads all but the last token
            for length in lengths(serving.context - 2, most):
                state = serving.plan.init_state(state, [[0] * (length + 1)])
    batch = serving.batch()
    words = np.full(word_count(serving.model.config.vocab_size), -1, np.int32)
    for kind in Kind:
        _row(serving, kind)
    owners = [_request(serving, 1, Kind.GREEDY, Extras()) for _ in range(serving.slots)]
    for count, owner in enumerate(owners, 1):
        batch.add(owner, _row(serving, Kind.GREEDY))
        if batch.slots == count:
            batch.allow(owner, words)
            batch.cache_of(owner, 1)
            for kind in Kind:
                batch.run(1, kind)
    serving.prefixes.clear()
    for owner in owners:
        batch.remove(owner)
        batch.give_up()


def lengths(longest: int, most: int) -> list[int]:
    """Prompts up to the longest that between them are read in all pieces that any of them needs:
    of every size, first or behind others."""
    sizes = [bucket(1 << i, SMALLEST_CHUNK) for i in range(most.bit_length())]
    candidates = [min(size + before, longest) for before in (0, most) for size in sizes]
    found, needed = set(), []
    for length in filter(None, candidates):
        pieces = {(size, first > 0) for first, size in chunks(length, most)}
        if not pieces <= found:
            found |= pieces
            needed.append(length)
    return needed


def _request(serving: Serving, length: int, kind: Kind, extras: Extras) -> Request:
    opts = Options(sampler=SAMPLERS[kind], max_new_tokens=1)
    return Request(serving.model, [0] * length, opts, extras)


def _read(serving: Serving, length: int, extras: Extras) -> None:
    reader = serving.reader(_request(serving, length, Kind.GREEDY, extras))
    while not reader.finished:
        reader.read()


def _row(serving: Serving, kind: Kind) -> Row:
    request = _request(serving, 1, kind, Extras())
    reader = serving.reader(request)
    reader.read()
    return serving.row(request, reader)
