"""A server whose rows have a draft each."""

import jaxinfer as ji
from tests.serve.serving import serving

NAME = "tiny-llama"


def test_a_draft_changes_no_answer_and_follows_forms(lm, batcher):
    plain = batcher.submit("Once upon a time", max_new_tokens=16).result()
    fast = ji.speculate(lm, ji.load("tiny-draft"), ji.Topology.chain(3))
    with lm.batcher(slots=1, context=448, chunk=32, draft=fast) as own, serving(own) as server:
        client = server.client()
        found = client.completions.create(
            model=NAME, prompt="Once upon a time", max_tokens=16, temperature=0, logprobs=0
        )
        assert found.choices[0].text == plain.text
        assert found.choices[0].logprobs.top_logprobs is None
        form = {"regex": "[a-z]{5}-[0-9]{3}"}
        text = client.completions.create(
            model=NAME, prompt="The number is ", max_tokens=30, extra_body=form
        ).choices[0].text  # fmt: skip
        assert text[5] == "-" and text[6:].isdigit() and len(text) == 9
        assert own._tickets[0].result().stats.tokens_per_step >= 1
