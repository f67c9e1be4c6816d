"""What a cache policy costs in quality: perplexity, streams, retrieval, recall and ROUGE.

Every measure reads through the cache and takes any policy; `compare` puts the full cache, a policy
and a baseline of the same bytes side by side.
"""

from jaxinfer.eval.choices import best_candidate, candidate_log_probs, greedy_match
from jaxinfer.eval.documents import held_out_texts, token_stream
from jaxinfer.eval.line_retrieval import line_retrieval, make_queries
from jaxinfer.eval.memory import bytes_per_token, equal_memory, policy_bytes
from jaxinfer.eval.passkey import make_passkey, passkey
from jaxinfer.eval.perplexity import perplexity
from jaxinfer.eval.reader import Reader
from jaxinfer.eval.recall import make_recall, recall
from jaxinfer.eval.recompute import recompute_perplexity
from jaxinfer.eval.rouge import continuation_rouge, rouge
from jaxinfer.eval.stream import stream_perplexity
from jaxinfer.eval.tables import compare, contenders, markdown, save

__all__ = [
    "Reader",
    "best_candidate",
    "bytes_per_token",
    "candidate_log_probs",
    "compare",
    "contenders",
    "continuation_rouge",
    "equal_memory",
    "greedy_match",
    "held_out_texts",
    "line_retrieval",
    "make_passkey",
    "make_queries",
    "make_recall",
    "markdown",
    "passkey",
    "perplexity",
    "policy_bytes",
    "recall",
    "recompute_perplexity",
    "rouge",
    "save",
    "stream_perplexity",
    "token_stream",
]
