"""Where learned positions end, every entry point says so; behind them, indices are clamped."""

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.eval.reader import Reader
from jaxinfer.eval.recompute import recompute_perplexity
from jaxinfer.lm import LM
from tests.factories import lm_of, random_tokens

MOST = 64
LONG = random_tokens(1, MOST + 1)[0].tolist()
NEAR = LONG[: MOST - 4]


@pytest.fixture(scope="module")
def lm() -> LM:
    return lm_of("learned")


def behind(lm: LM, **other):
    """A speculator of four guesses, with the model as its target or its draft."""
    parts = {"target": lm, "draft": lm} | other
    return ji.speculate(parts["target"], parts["draft"], ji.Topology.chain(4))


def prefix(lm: LM):
    session = lm.session()
    session.append(NEAR)
    return session


CALLS = {
    "generate": lambda lm: lm.generate([LONG], max_new_tokens=1),
    "generate across the end": lambda lm: lm.generate([NEAR], max_new_tokens=5),
    "one row of a batch": lambda lm: lm.generate([[1], NEAR], max_new_tokens=[1, 5]),
    "stream": lambda lm: list(lm.stream(NEAR, max_new_tokens=5)),
    "kivi": lambda lm: lm.generate([NEAR], max_new_tokens=5, policy="kivi4"),
    "h2o": lambda lm: lm.generate([NEAR], max_new_tokens=5, policy=ji.h2o(8, 8)),
    "streaming": lambda lm: lm.generate([NEAR], max_new_tokens=5, policy="streaming"),
    "score": lambda lm: lm.score([LONG]),
    "score under h2o": lambda lm: lm.score([LONG], policy=ji.h2o(8, 8)),
    "logits": lambda lm: lm.logits([LONG]),
    "session": lambda lm: lm.session().append(LONG),
    "session across the end": lambda lm: lm.session().generate(NEAR, max_new_tokens=5),
    "a prefix": lambda lm: lm.generate([LONG[:4]], max_new_tokens=1, prefix=prefix(lm)),
    "evaluation": lambda lm: Reader(lm, ji.full(), 128).read([[*LONG, 1]]),
    "evaluation by h2o": lambda lm: Reader(lm, ji.h2o(8, 8).sized(128), 128).read([[*LONG, 1]]),
    "recomputation": lambda lm: recompute_perplexity(lm, [np.array(LONG)], window=MOST + 1),
    "target of a draft": lambda lm: behind(lm).generate([NEAR], max_new_tokens=5),
    "draft of a longer target": lambda lm: behind(lm, target=lm_of("llama")).generate(
        [NEAR], max_new_tokens=5
    ),
    "prompt lookup": lambda lm: behind(lm, draft="prompt-lookup").generate(
        [NEAR], max_new_tokens=5
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_text_past_the_table_is_refused(lm, call):
    with pytest.raises(ValueError, match="positions"):
        CALLS[call](lm)
