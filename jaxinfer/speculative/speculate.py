"""`speculate`: puts a draft in front of a target.

spec = ji.speculate(target=lm, draft=small, topology=ji.Topology.optimal(p, nodes=16, levels=6))
spec.generate(["The capital of France is"])[0].stats.tokens_per_step
"""

from jaxinfer.arguments import of_kind, one_of, shown, whole
from jaxinfer.cache.presets import PolicyLike, policy_of
from jaxinfer.decode.model import Model
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.drafters import METHODS, Method
from jaxinfer.speculative.drafts import PROMPT_LOOKUP
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.tuning import FastestTree


def speculate(
    target: Model,
    draft: Model | RecurrentDraft | str,
    topology: Topology | str = "auto",
    *,
    method: Method = "sequoia",
    support: int = 64,
    policy: PolicyLike = None,
) -> Speculator:
    """Puts a draft in front of `target`.

    Args:
        target: the model whose text is wanted.
        draft: a smaller model of the same tokenizer; a `RecurrentDraft` that was trained for this
            target; or "prompt-lookup" (arXiv 2304.04487), which continues the text as it went on
            before.
        topology: the tree that is drafted per step. "auto" measures acceptance and times with this
            machine, sampler and policy at the first call, which takes about a minute, keeps them in
            the user's cache folder and takes the fastest tree, or none (see `tuning.tune`).
        method: "sequoia" (arXiv 2402.12374) draws children without replacement; "specinfer" with
            replacement (arXiv 2305.09781), "top-k" and "naive" are there to compare with.
        support: how many of the draft's likeliest tokens a node's children are drawn from; more pay
            at high temperatures only.
        policy: the draft's cache policy; the default keeps everything.

    Returns:
        An object like an `LM`, to generate, stream, chat and score with, which is also what the
        target's own `draft=` takes.

    Raises:
        ValueError: for a draft whose tokens are not the target's, or a tree that it cannot fill.

    Example:
        >>> import jaxinfer as ji
        >>> lm = ji.load("tiny-llama")
        >>> spec = ji.speculate(lm, "prompt-lookup", ji.Topology.chain(4))
        >>> text = "one two three one two three one"
        >>> fast, plain = (x.generate(text, max_new_tokens=8)[0] for x in (spec, lm))
        >>> fast.text == plain.text, fast.stats.tokens_per_step >= 1
        (True, True)
    """
    of_kind("target", target, Model, "an LM")
    one_of("method", method, METHODS)
    support = whole("support", support)
    if isinstance(draft, str):
        if draft != PROMPT_LOOKUP:
            raise ValueError(f'draft must be a model or "{PROMPT_LOOKUP}", got {shown(draft)}')
        model = None
    elif isinstance(draft, Model | RecurrentDraft):
        model = draft
    else:
        raise ValueError(
            f'draft must be an LM, a RecurrentDraft or "{PROMPT_LOOKUP}", got {shown(draft)}'
        )
    draft_policy = policy_of(policy)
    if isinstance(topology, Topology):
        trees = topology
    elif isinstance(topology, str) and topology == "auto":
        trees = FastestTree(target, model, draft_policy)
    else:
        raise ValueError(f'topology must be a Topology or "auto", got {shown(topology)}')
    return Speculator.of(
        target, model, trees, method=method, support=support, draft_policy=draft_policy
    )
