"""What the compiled decode loop promises for a policy: one trace, no copies, equal speculation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.engine import Engine, make_requests
from jaxinfer.decode.sampling import Sampler
from jaxinfer.inspection import hlo
from jaxinfer.inspection.decode_step import TOKEN_BUFFER, decode_case
from jaxinfer.lm import LM
from jaxinfer.models.params import abstract_params
from jaxinfer.speculative.speculate import speculate
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.models import CONFIGS, tiny_model

TREE = Topology.from_children([[[[]], []], [[]], []])  # 8 nodes, 4 levels


def _model(model: str | LM) -> LM:
    return tiny_model(model) if isinstance(model, str) else model


def check_equal_policies(make: Callable[[], Policy]) -> None:
    """Two policies made alike are equal and hash alike, so that a program is compiled once."""
    one, other = make(), make()
    assert one == other, f"two policies {one.name!r} with the same settings are not equal"
    assert hash(one) == hash(other), f"two equal policies {one.name!r} have several hashes"


def check_one_trace(policy: Policy, model: str | LM = "llama") -> None:
    """One trace of the decode loop serves all steps, lengths and requests."""
    lm = _model(model)
    engine = Engine(lm.config, lm.params).serving(policy)
    vocab = lm.config.vocab_size
    for seed, lengths, steps in ((0, (3, 9), 1), (1, (15, 2), 5), (2, (16, 16), 3)):
        prompts = [[token % vocab for token in range(n)] for n in lengths]
        requests = make_requests([Sampler()] * 2, [seed] * 2, [steps, 60], (), vocab)
        cache = engine.new_cache(policy, 2, 128)
        cache, logits = engine.prefill(cache, None, prompts, empty=True)
        state = engine.init_state(
            cache, logits, requests, jnp.zeros((2, 1), jnp.int32), TOKEN_BUFFER
        )
        for _ in range(6):
            state = engine.decode(requests, state, steps)
    for name in ("decode", "init_state"):
        traces = engine.programs[name].traces
        assert traces == 1, f"{policy.name}: {name} was traced {traces} times, expected once"


def check_no_copies(policy: Policy, capacity: int = 16384, batch: int = 2) -> None:
    """The compiled decode step copies no array of the cache and updates all of them in place.

    The policy must be large, at least some thousand tokens: of small arrays a copy is no matter.
    """
    cfg = replace(CONFIGS["llama"], num_layers=1, max_positions=4 * capacity)
    case = decode_case(cfg, abstract_params(cfg), policy, capacity, batch, "cpu")
    executable = case.program.prepare(*case.arguments).executable
    assert_in_place(executable, case.cache_leaves, policy.name)


def assert_in_place(executable: Any, leaves: list[Any], name: str) -> None:
    """A compiled decode loop copies none of these leaves of the cache and updates all in place."""
    copies = hlo.cache_sized_copies(executable, leaves)
    assert not copies, f"{name} copies its cache in every decode step: {copies}"
    moved = hlo.unaliased_leaves(executable, leaves)
    assert not moved, f"{name} does not update its cache in place: {moved}"


def check_speculation(policy: Policy, model: str | LM = "llama", new: int = 24) -> None:
    """Where `lossless_under_tree` is declared, greedy speculative decoding gives the tokens of
    plain decoding."""
    if not policy.lossless_under_tree:
        return
    lm = _model(model)
    prompt = [token % lm.config.vocab_size for token in range(3, 30)]
    plain = lm.generate([prompt], policy=policy, max_new_tokens=new, ignore_eos=True)[0].tokens
    ahead = speculate(target=lm, draft=LM(lm.config, lm.params, name="draft"), topology=TREE)
    found = ahead.generate([prompt], policy=policy, max_new_tokens=new, ignore_eos=True)[0].tokens
    assert found == plain, (
        f"{policy.name} declares lossless_under_tree, but speculation gives {found} and plain "
        f"decoding {plain}"
    )
