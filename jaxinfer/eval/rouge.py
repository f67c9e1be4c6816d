"""ROUGE of continuations: how much of a reference a policy's text keeps, by the library
`rouge-score` (the extra `eval`).

The reference is the full cache's own greedy continuation, which isolates what the policy changes,
or how the held-out text really goes on.
"""

from collections.abc import Callable, Sequence

from jaxinfer.arguments import shown
from jaxinfer.cache.presets import PolicyLike, full
from jaxinfer.lm import LM

METRICS = ("rouge1", "rouge2", "rougeL")


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = True
) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1.

    Example:
        rouge(["the cat sat"], ["the cat stood"])["rouge1"]    # 2/3
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score; pip install 'jaxinfer[eval]'") from error
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"expected as many predictions as references, 1 or more, got {len(predictions)} and "
            f"{len(references)}"
        )
    scorer = RougeScorer(list(METRICS), use_stemmer=stemmer)
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(reference, prediction) for reference, prediction in pairs]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in METRICS}


def continuation_rouge(
    lm: LM,
    texts: Sequence[str],
    policy: PolicyLike = None,
    *,
    reference: str = "full",
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """ROUGE of greedy continuations of each text's first `prompt_tokens` tokens, against the
    "full" cache's or the "text" itself. Texts that are too short are left out."""
    if reference not in ("full", "text"):
        raise ValueError(f"reference must be 'full' or 'text', got {shown(reference)}")
    if lm.tokenizer is None:
        raise ValueError("ROUGE compares words, but this model has no tokenizer")
    rouge([""], [""])  # is the library there?
    encoded = [lm.encode(text) for text in texts]
    long_enough = [row for row in encoded if len(row) >= prompt_tokens + new_tokens]
    if not long_enough:
        raise ValueError(
            f"no text has {prompt_tokens} + {new_tokens} tokens; take longer texts or fewer tokens"
        )
    predictions, references = [], []
    for index, row in enumerate(long_enough):
        prompt, rest = row[:prompt_tokens], row[prompt_tokens : prompt_tokens + new_tokens]
        predictions.append(_continue(lm, prompt, policy, new_tokens))
        references.append(
            lm.tokenizer.decode(rest)
            if reference == "text"
            else _continue(lm, prompt, full(), new_tokens)
        )
        report(index + 1, len(long_enough))
    return rouge(predictions, references)


def _continue(lm: LM, prompt: Sequence[int], policy: PolicyLike, tokens: int) -> str:
    (completion,) = lm.generate(prompt, policy=policy, max_new_tokens=tokens, ignore_eos=True)
    return completion.text
