"""All checks of one policy."""

from collections.abc import Callable, Sequence

from jaxinfer.cache.base import Geometry
from jaxinfer.cache.policy import Policy
from jaxinfer.lm import LM
from jaxinfer.testing import chains, decoding, trees


def check_policy(
    easy: Callable[[], Policy],
    hard: Callable[[], Policy],
    large: Callable[[], Policy] | None = None,
    *,
    bytes_per_row: Callable[[Policy, Geometry], int] | None = None,
    models: Sequence[str | LM] = ("llama", "mpt"),
) -> None:
    """Holds a policy to everything that it promises; takes about a minute a model.

    Args:
        easy: makes the policy with a budget that loses nothing within 24 tokens: it must equal
            attention to all tokens.
        hard: makes it with one that evicts, packs or approximates within 20 tokens; it is compared
            with itself in other chunks, batches and trees. It must have room for 64 tokens.
        large: makes it with a budget of thousands, for the check that decoding copies no cache;
            None leaves that out.
        bytes_per_row: the documented bytes of one row and layer; None compares only with what the
            tiers declare.
        models: names of `jaxinfer.testing.CONFIGS`, or models.

    Raises:
        AssertionError: for the first promise that does not hold.
    """
    decoding.check_equal_policies(easy)
    decoding.check_equal_policies(hard)
    for model in models:
        for sizes in chains.SPLITS.values():
            chains.check_full_budget(easy(), model, sizes)
            chains.check_chunks(hard(), model, sizes)
        chains.check_ragged_rows(hard(), model)
        chains.check_idle_rows(hard(), model)
        chains.check_growth(hard(), model)
        trees.check_tree_paths(hard(), model)
        trees.check_tree_commit(hard(), model)
        trees.check_rejected_tree(hard(), model)
    for platform in ("cpu", "gpu"):
        for dtype in ("float32", "bfloat16"):
            for make in (easy, hard):
                chains.check_bytes(make(), bytes_per_row, models[0], dtype=dtype, platform=platform)
            chains.check_full_budget(easy(), models[0], dtype=dtype, platform=platform)
    decoding.check_one_trace(hard(), models[0])
    decoding.check_speculation(hard(), models[0])
    if large is not None:
        decoding.check_no_copies(large())
