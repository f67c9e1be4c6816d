"""Uses of the write of tokens into slots."""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
)
from pallas_kernels.put_tokens import put_tokens, swap_tokens
from pallas_kernels.put_tokens.configs import candidates


def cases() -> Iterator[Case]:
    for name, b, k, h, slots, tokens in (
        ("llama-2 7B, 1 row", 1, 32, 128, 32768, 1),
        ("smollm2, a prompt of 4096", 1, 3, 64, 32768, 4096),
    ):
        index = array(b, tokens, dtype="int32")
        stored, fresh = ({half: array(b, k, n, h) for half in "kv"} for n in (slots, tokens))
        size = 4 * b * k * tokens * h
        yield Case(
            config=name,
            operations=0,
            function=put_tokens,
            args=(stored, fresh, index),
            bytes=2 * size,
        )
    one = b, k, 1
    heavy, new = (
        {"attn_weight": array(*shape, dtype="float32"), "pos": array(*shape, dtype="int32")}
        | {half: array(*shape, h) for half in "kv"}
        for shape in ((b, k, 256), one)
    )
    yield Case(
        launch="swap_tokens", config="smollm2, heavy hitters", operations=0, function=swap_tokens,
        args=(heavy, new, array(*one, dtype="int32")), bytes=4 * b * k * (4 * h + 8),
    )  # fmt: skip


def problem(rng: Rng, quick: bool, swaps: bool = False) -> Problem:
    """Tokens with attention weights and positions, of which some go nowhere; exact."""
    b, k, h = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 80, 128]))
    a, slots = [1, int(rng.integers(2, 70 if quick else 3000))][rng.integers(2)], 3000
    dtypes = [str(x) for x in rng.choice(["float32", "bfloat16", "float16"], 2)]

    def arrays(dtype: str, tokens: int, heads: int) -> dict[str, Any]:
        pos = jnp.asarray(rng.integers(0, 99, (b, heads, tokens)), jnp.int32)
        found = {name: some(rng, dtype, b, k, tokens, h) for name in "kv"}
        return found | {"attn_weight": some(rng, "float32", b, k, tokens), "pos": pos}

    places = [rng.permutation(slots + a)[:a] for _ in range(b * k)]
    index = jnp.asarray(np.reshape(places, (b, k, a)), jnp.int32)
    args = arrays(dtypes[0], slots, k), arrays(dtypes[1], a, 1), index
    facts = {"shape": [b, k, a, h], "dtypes": dtypes}
    run = swap_tokens if swaps else put_tokens
    return Problem(run=run, args=args, tolerance=0.0, widens=False, facts=facts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    for tokens in (1, 64, 2048):
        yield TunedUse(
            kernel="put_tokens", sizes={"tokens": tokens}, candidates=candidates, tolerance=0.0
        )


CASES = {"put_tokens": cases}
PROBLEMS = {"put_tokens": problem, "swap_tokens": functools.partial(problem, swaps=True)}
TUNED = {"put_tokens": tuned}
