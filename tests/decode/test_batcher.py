"""Requests that come and go among others get what `LM.generate` gives each of them alone."""

import asyncio
import gc
import threading
from dataclasses import replace

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

import jaxinfer as ji
from jaxinfer.decode.slot_batch import SlotBatch
from tests.decode.batching import (
    SAMPLERS,
    Every,
    assert_alike,
    model,
    random_requests,
    serve,
)

GREEDY, WARM, PENALISED = SAMPLERS
PROMPT = [5, 3, 11, 2]


@pytest.fixture(scope="module")
def lm():
    return model()


@pytest.fixture(scope="module")
def batcher(lm):
    with lm.batcher(slots=2, context=64, chunk=16) as made:
        made.warmup()
        yield made


def traces(lm) -> dict[str, int]:
    return {name: program.traces for name, program in lm.engine.programs.items()}


def settled(batcher) -> None:
    """Waits for the end of the batcher's turn."""
    with batcher._device:
        gc.collect()


def check_random_requests(lm, batcher, asked, rng) -> None:
    expected = [lm.generate(one.prompt, **one.options)[0] for one in asked]
    settled(batcher)
    before, arrays = traces(lm), len(jax.live_arrays())
    tickets = {i: batcher.submit(asked[i].prompt, **asked[i].options) for i in rng.permutation(24)}
    for i in range(24, len(asked)):  # the queue has room for so many
        tickets[i] = batcher.submit(asked[i].prompt, **asked[i].options)
        tickets[i - 16].result()
    for i, one in enumerate(expected):
        assert_alike(tickets[i].result(), one)
    assert traces(lm) == before
    settled(batcher)
    assert (batcher.running, batcher.waiting, len(jax.live_arrays())) == (0, 0, arrays)


def test_random_requests_are_answered_as_alone_and_trace_and_leave_nothing(lm, batcher):
    check_random_requests(lm, batcher, random_requests(24), np.random.default_rng(0))


ORDER = random_requests(6, seed=3)


@given(arrivals=st.lists(st.integers(0, 12), min_size=len(ORDER), max_size=len(ORDER)))
@settings(max_examples=6, deadline=None)
def test_the_order_of_arrivals_changes_no_text(lm, batcher, arrivals):
    with batcher._device:
        tickets = serve(batcher._serving, ORDER, arrivals)
    for one, ticket in zip(ORDER, tickets, strict=True):
        assert_alike(ticket.result(0), lm.generate(one.prompt, **one.options)[0])


def test_slots_that_do_not_fit_into_the_memory_are_refused(lm, monkeypatch):
    monkeypatch.setattr("jaxinfer.runtime.memory.available_bytes", lambda device=None: 1 << 20)
    with pytest.raises(ValueError, match="cache .* exceeds the 1.0 MiB of memory available"):
        lm.batcher(slots=64, context=1024)


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, 1000])
def test_many_random_requests_are_answered_as_alone(lm, batcher, count):
    check_random_requests(lm, batcher, random_requests(count, seed=1), np.random.default_rng(1))


def test_pieces_join_to_the_completion_for_threads_and_coroutines(lm, batcher):
    expected = lm.generate(PROMPT, sampler=WARM, max_new_tokens=16, seed=3)[0]

    async def collected(ticket):
        return [piece async for piece in ticket]

    def ask():
        return batcher.submit(PROMPT, sampler=WARM, max_new_tokens=16, seed=3)

    async def both():
        return await asyncio.gather(collected(ask()), collected(ask()))

    for pieces in (*asyncio.run(both()), list(ask())):
        assert [token for piece in pieces for token in piece.tokens] == expected.tokens
        assert "".join(piece.text for piece in pieces) == expected.text


@pytest.mark.slow
def test_samples_are_numbered_as_by_generate(lm, batcher):
    options = {"sampler": WARM, "max_new_tokens": 12, "seed": 5}
    expected = lm.generate(PROMPT, samples=2, **options)
    for sample, one in enumerate(expected):
        assert_alike(batcher.submit(PROMPT, sample=sample, **options).result(), one)


def test_no_stop_token_is_drawn_before_min_tokens(lm, batcher):
    sampler = replace(PENALISED, logit_bias={7: 6.0})  # ends soon
    barred = replace(PENALISED, logit_bias=dict.fromkeys(lm.config.eos_token_ids, -np.inf))
    options = {"max_new_tokens": 16, "seed": 2}
    assert batcher.submit(PROMPT, sampler=sampler, **options).result().finish_reason == "eos"
    found = batcher.submit(PROMPT, sampler=sampler, min_tokens=9, **options).result()
    expected = lm.generate(PROMPT, sampler=barred, **options)[0]
    assert len(found.tokens) >= 9 and found.tokens[:9] == expected.tokens[:9]


def test_the_likeliest_tokens_and_the_log_probabilities_of_the_prompt(lm, batcher):
    ticket = batcher.submit(PROMPT, max_new_tokens=8, top_logprobs=5, prompt_log_probs=True)
    found = ticket.result()
    text = PROMPT + found.tokens
    log_probs = np.asarray(jax.nn.log_softmax(lm.logits([text])[0]))
    for place, listed in enumerate(found.likeliest, len(PROMPT) - 1):
        best = np.argsort(-log_probs[place], kind="stable")[:5]
        assert [token for token, _ in listed] == best.tolist()
        np.testing.assert_allclose([x for _, x in listed], log_probs[place, best], atol=2e-4)
    expected = log_probs[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(found.prompt_log_probs, expected, atol=2e-4)
    assert len(found.likeliest) == 8 and found.log_probs[0] == found.likeliest[0][0][1]


def test_a_constrained_text_stays_inside_its_mask_and_changes_no_neighbour(lm, batcher):
    expected = lm.generate(PROMPT, sampler=WARM, max_new_tokens=16, seed=4)[0]
    even = Every(lambda token: token % 2 == 0)
    bound = batcher.submit(PROMPT, sampler=WARM, max_new_tokens=16, constraint=even)
    free = batcher.submit(PROMPT, sampler=WARM, max_new_tokens=16, seed=4)
    assert_alike(free.result(), expected)
    tokens = bound.result().tokens
    assert tokens and all(token % 2 == 0 for token in tokens)


def test_a_constraint_that_fails_ends_its_own_request(lm, batcher):
    def refuse(count):
        if count == 3:
            raise RuntimeError("the grammar is wrong")

    ticket = batcher.submit(PROMPT, max_new_tokens=16, constraint=Every(at=refuse))
    other = batcher.submit(PROMPT, max_new_tokens=16)
    with pytest.raises(RuntimeError, match="the grammar is wrong"):
        ticket.result()
    with pytest.raises(RuntimeError, match="the grammar is wrong"):
        list(ticket)
    assert ticket.completion.finish_reason == "error" and len(ticket.completion.tokens) == 3
    assert_alike(other.result(), lm.generate(PROMPT, max_new_tokens=16)[0])


def test_cancelling_frees_the_slot_and_keeps_what_was_made(lm, batcher):
    expected = lm.generate(PROMPT, max_new_tokens=16, ignore_eos=True)[0]
    made = threading.Event()
    holder = []

    def cancel(count):
        made.wait()
        if count == 4:
            holder[0].cancel()

    holder.append(
        batcher.submit(PROMPT, max_new_tokens=16, ignore_eos=True, constraint=Every(at=cancel))
    )
    made.set()
    answer = holder[0].result()
    assert answer.finish_reason == "cancelled"
    assert answer.tokens == expected.tokens[:4]
    settled(batcher)
    assert batcher.running == 0


def test_a_fault_in_a_step_ends_the_requests_in_it_and_not_the_batcher(lm, batcher, monkeypatch):
    def broken(self, steps, kind):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(SlotBatch, "run", broken)
        tickets = [batcher.submit(PROMPT, max_new_tokens=16) for _ in range(2)]
        for ticket in tickets:
            with pytest.raises(RuntimeError, match="the device is gone"):
                ticket.result()
    expected = lm.generate(PROMPT, max_new_tokens=16)[0]
    assert_alike(batcher.submit(PROMPT, max_new_tokens=16).result(), expected)


def test_a_full_queue_and_a_closed_batcher_say_so(lm, batcher):
    go = threading.Event()
    small = lm.batcher(slots=1, context=64, queue=1)
    held = small.submit(PROMPT, max_new_tokens=8, constraint=Every(at=lambda count: go.wait()))
    waiting = small.submit(PROMPT, max_new_tokens=8)
    with pytest.raises(ji.QueueFull, match="1 requests run and 1 wait; try again later"):
        small.submit(PROMPT, max_new_tokens=8)
    waiting.cancel()
    go.set()
    small.close()
    assert held.done and waiting.completion.finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="this batcher is closed"):
        small.submit(PROMPT, max_new_tokens=8)


def test_prompts_that_begin_alike_read_only_the_rest(lm):
    system = list(range(10, 31))
    row = 2 * 2 * 2 * 8 * 64 * 4  # layers, keys and values, heads, channels, slots, bytes
    with lm.batcher(slots=2, context=64, chunk=16, prefix_bytes=3 * row) as batcher:
        texts, cached = [[*system, 3], [*system, 4, 5], [*system, 6], [50]], [0, 21, 21, 0]
        for prompt, tokens in zip(texts, cached, strict=True):
            answer = batcher.submit(prompt, max_new_tokens=8, ignore_eos=True).result()
            assert_alike(answer, lm.generate(prompt, max_new_tokens=8, ignore_eos=True)[0])
            assert answer.stats.cached_tokens == tokens
        again = [*texts[2], *lm.generate(texts[2], max_new_tokens=8, ignore_eos=True)[0].tokens, 1]
        settled(batcher)
        answers = {
            scope: batcher.submit(again, max_new_tokens=4, prefix_scope=scope).result()
            for scope in ("", "another", None)
        }
        # All but the new token and the last one made, which no step has read.
        expected = {"": len(again) - 2, "another": 0, None: 0}
        assert {s: one.stats.cached_tokens for s, one in answers.items()} == expected
        for answer in answers.values():
            assert_alike(answer, lm.generate(again, max_new_tokens=4)[0])
        assert batcher._serving.prefixes.bytes <= 3 * row


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 61}, "4 prompt . 61 new tokens exceed the 64 of a slot"),
        ({"max_new_tokens": None}, "max_new_tokens=None never ends"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({"top_logprobs": 21}, "top_logprobs must be a whole number from 0 to 20, got 21"),
        ({"min_tokens": 65}, "min_tokens=65 exceeds max_new_tokens=16"),
        ({"min_tokens": 3, "constraint": Every()}, "min_tokens=3 and a constraint"),
        ({"constraint": "json"}, "constraint must have the methods mask and accept"),
        ({"sampler": "greedy"}, "sampler must be a Sampler"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_wrong_options_are_refused_at_once(batcher, options, message):
    with pytest.raises(ValueError, match=message):
        batcher.submit(PROMPT, **{"max_new_tokens": 16, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 3}, "slots must be a power of two, got 3"),
        ({"slots": 0}, "slots must be a whole number from 1"),
        ({"context": 1}, "context must be a whole number from 2"),
        ({"queue": -1}, "queue must be a whole number from 0"),
        ({"prefix_bytes": 1, "policy": "kivi4"}, "policy 'kivi' reads a prompt at once"),
        ({"chunk": 0}, "chunk must be a whole number from 1"),
        ({"policy": "h2o", "prefix_bytes": 1}, "policy 'h2o' reads a prompt at once"),
    ],
)
def test_wrong_batchers_are_refused(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.batcher(**{"slots": 2, "context": 64, **options})


def test_policies_that_read_prompts_whole_say_so(lm, batcher):
    assert not batcher.reads_whole
    with lm.batcher(slots=1, context=64, policy=ji.h2o(heavy=4, recent=4)) as other:
        assert other.reads_whole
