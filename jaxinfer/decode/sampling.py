"""Samplers, defined through the distribution they draw from.

`Sampler.log_probs` is the definition; `sample` draws from it by the Gumbel maximum, so speculative
verifiers and tests use the very same numbers. The order of transformations is that of Hugging Face:
logit bias, repetition penalty, temperature, top-k, top-p, min-p; the penalties of the OpenAI API
follow the repetition penalty.

Truncations keep every token whose logit reaches a threshold (`jaxinfer.decode.truncation`): tied
tokens are treated alike.

All is float32. A setting or logit beyond its range counts as the largest number there, a setting
below its normal range as the smallest: what is extreme saturates, and only what is forbidden or cut
off is -inf.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxinfer.arguments import real, shown, whole
from jaxinfer.decode.settings import LARGEST, float32_of, sorted_pairs
from jaxinfer.decode.token_mask import allowed_by
from jaxinfer.decode.truncation import EXCLUDED, keep_top
from jaxinfer.typing import Leaf

IN_PROMPT = 1 << 30
"""What `seen` holds for a token of the prompt, beside how often it was generated."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is drawn.

    temperature: 0 is greedy. top_k: keep the k likeliest, 0 keeps all. top_p: keep the likeliest
    tokens whose mass first reaches top_p. min_p: keep tokens at least min_p times as likely as the
    best. repetition_penalty: divides positive and multiplies negative logits of tokens already in
    the prompt or the output (arXiv 1909.05858, section 4.1). presence_penalty, frequency_penalty:
    taken from the logits of tokens in the output, once and once per occurrence (the OpenAI API
    reference's formula and range). logit_bias: (token, addend) pairs or a mapping, of which -inf
    forbids the token; kept as sorted pairs, one a token.

    Raises:
      ValueError: a setting is no number, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()

    def __post_init__(self):
        ranges = {
            "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or positive and finite"),
            "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
            "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
            "repetition_penalty": (lambda x: 0 < x < math.inf, "positive and finite"),
            "presence_penalty": (lambda x: -2 <= x <= 2, "from -2 to 2"),
            "frequency_penalty": (lambda x: -2 <= x <= 2, "from -2 to 2"),
        }
        for name, (holds, range_) in ranges.items():
            given = getattr(self, name)
            value = real(name, given)
            if not holds(value):
                raise ValueError(f"{name} must be a number {range_}, got {shown(given)}")
            object.__setattr__(self, name, value)
        top_k = whole("top_k", self.top_k, least=0)  # 0 keeps all
        object.__setattr__(self, "top_k", top_k)
        object.__setattr__(self, "logit_bias", sorted_pairs(self.logit_bias))

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: sorted pairs."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def penalises(self) -> bool:
        """Whether it asks what the text holds."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def log_probs(
        self,
        logits: Float[Array, "... V"],
        counts: Int[Array, "... V"] | None = None,
        prompt: Bool[Array, "... V"] | None = None,
    ) -> Float[Array, "... V"]:
        """Log-probabilities of the next token; excluded tokens get -inf.

        `counts` says how often each token was generated so far, and `prompt` which tokens came
        before: only the repetition penalty asks for these. Greedy is the distribution with all
        mass on the best token, the first of equals.

        >>> import jax.numpy as jnp
        >>> log_probs = Sampler(temperature=1.0, top_k=2).log_probs(jnp.array([0.0, 1.0, 2.0]))
        >>> [round(float(x), 3) for x in log_probs]
        [-inf, -1.313, -0.313]
        """
        shape = logits.shape
        rows = logits.reshape(-1, shape[-1])
        plan = SamplerRows.of([self] * rows.shape[0], shape[-1])
        seen = jnp.zeros(shape, jnp.int32) if counts is None else counts
        seen = seen if prompt is None else seen | jnp.where(prompt, IN_PROMPT, 0)
        seen = seen.reshape(rows.shape)
        return plan.log_probs(rows, seen).reshape(shape)


GREEDY = Sampler()


class Features(NamedTuple):
    """Which transformations any row uses: static, so that unused ones cost nothing."""

    sample: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool
    bias: bool
    mask: bool = False  # of allowed tokens, and of those that would end a text too early
    varies: bool = False  # a step may find no row that truncates; else one certainly does


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplerRows:
    """One sampler per batch row as arrays: other settings of the same kind compile nothing anew."""

    temperature: Leaf  # f32[B]
    top_k: Leaf  # i32[B]
    top_p: Leaf  # f32[B]
    min_p: Leaf  # f32[B]
    penalty: Leaf  # f32[B]
    presence: Leaf  # f32[B]
    frequency: Leaf  # f32[B]
    bias_tokens: Leaf  # i32[B, E], V where unused
    bias_values: Leaf  # f32[B, E]
    allowed: Leaf = None  # i32[B, W], see `jaxinfer.decode.token_mask`
    banned: Leaf = None  # i32[B, E'], tokens that are not allowed either, V where unused
    features: Features = field(metadata={"static": True})

    @classmethod
    def of(
        cls, samplers: list[Sampler], vocab_size: int, biases: int | None = None
    ) -> "SamplerRows":
        """The samplers as rows, with room for `biases` biased tokens (None: for as many as need
        it)."""
        for sampler in samplers:
            _check_biases(sampler, vocab_size)
        width = max(len(s.biases) for s in samplers)
        width = 0 if width == 0 else 1 << (width - 1).bit_length()
        width = width if biases is None else biases
        padded = [list(s.biases) + [(vocab_size, 0.0)] * (width - len(s.biases)) for s in samplers]
        some = lambda test: any(test(s) for s in samplers)  # noqa: E731

        def column(name: str) -> Array:
            return jnp.asarray([float32_of(getattr(s, name)) for s in samplers], jnp.float32)

        return cls(
            temperature=column("temperature"),
            top_k=jnp.asarray([s.top_k for s in samplers], jnp.int32),
            top_p=column("top_p"),
            min_p=column("min_p"),
            penalty=column("repetition_penalty"),
            presence=column("presence_penalty"),
            frequency=column("frequency_penalty"),
            bias_tokens=jnp.asarray([[t for t, _ in row] for row in padded], jnp.int32),
            bias_values=jnp.asarray(
                [[float32_of(v) for _, v in row] for row in padded], jnp.float32
            ),
            features=Features(
                sample=some(lambda s: s.temperature > 0),
                top_k=some(lambda s: s.temperature > 0 and s.top_k > 0),
                top_p=some(lambda s: s.temperature > 0 and s.top_p < 1),
                min_p=some(lambda s: s.temperature > 0 and s.min_p > 0),
                penalty=some(lambda s: s.penalises),
                bias=width > 0,
            ),
        )

    def adjusted(
        self, logits: Float[Array, "B V"], seen: Integer[Array, "B _"]
    ) -> Float[Array, "B V"]:
        """Logits after bias, penalties and mask; greedy takes the best of these."""
        logits = logits.astype(jnp.float32)
        if self.features.bias:
            rows = jnp.arange(logits.shape[0])[:, None]
            logits = logits.at[rows, self.bias_tokens].add(self.bias_values, mode="drop")
            logits = jnp.minimum(logits, LARGEST)
        if self.features.penalty:
            columns = (x[:, None] for x in (self.penalty, self.presence, self.frequency))
            logits = penalised(logits, seen, *columns)
        if self.features.mask:
            rows = jnp.arange(logits.shape[0])[:, None]
            logits = jnp.where(allowed_by(self.allowed, logits.shape[1]), logits, EXCLUDED)
            logits = logits.at[rows, self.banned].set(EXCLUDED, mode="drop")
        return logits

    def log_probs(
        self, logits: Float[Array, "B V"], seen: Integer[Array, "B _"]
    ) -> Float[Array, "B V"]:
        """Per row, what `Sampler.log_probs` promises."""
        logits = self.adjusted(logits, seen)
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        greedy = jnp.where(best, 0.0, EXCLUDED)
        if not self.features.sample:
            return greedy
        temperature = self.temperature[:, None]
        # Divided by what is above 1 before the subtraction and by what is below it behind: neither
        # overflows but to -inf, which is right. A quarter of the numbers has reciprocals, by which
        # XLA multiplies, that are normal.
        x = (0.25 * logits) / (0.25 * jnp.maximum(temperature, 1.0))
        x = x - x.max(axis=-1, keepdims=True)
        x = x / jnp.where(temperature > 0, jnp.minimum(temperature, 1.0), 1.0)
        if self.features.top_k:
            wanted = jnp.where(self.top_k > 0, self.top_k, x.shape[-1]).astype(jnp.float32)
            x = keep_top(x, jnp.ones_like(x), wanted, self._any(self.top_k > 0))
        if self.features.top_p:
            p = jax.nn.softmax(x, axis=-1)
            # A top_p of 1 must keep all, whatever the rounding of the sum.
            kept = keep_top(x, p, self.top_p, self._any(self.top_p < 1))
            x = jnp.where(self.top_p[:, None] < 1, kept, x)
        if self.features.min_p:
            x = jnp.where(x >= jnp.log(self.min_p)[:, None], x, EXCLUDED)
        return jnp.where(temperature > 0, jax.nn.log_softmax(x, axis=-1), greedy)

    def _any(self, asked: Bool[Array, " B"]) -> Bool[Array, ""] | None:
        """Whether any row asks; None if one certainly does."""
        return asked.any() if self.features.varies else None

    def sample(
        self, keys: Array, logits: Float[Array, "B V"], seen: Integer[Array, "B _"]
    ) -> Int[Array, " B"]:
        """One token per row; `keys` [B] are PRNG keys, so a row's draw is its own."""
        if not self.features.sample:
            return jnp.argmax(self.adjusted(logits, seen), axis=-1).astype(jnp.int32)
        log_probs = self.log_probs(logits, seen)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return jnp.argmax(log_probs + noise, axis=-1).astype(jnp.int32)


def penalised(
    logits: Float[Array, "*B V"],
    seen: Integer[Array, "*B V"],
    penalty: Float[Array, "*#B 1"],
    presence: Float[Array, "*#B 1"],
    frequency: Float[Array, "*#B 1"],
) -> Float[Array, "*B V"]:
    """Logits under the penalties; `seen` as `DecodeState` has it."""
    times = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
    punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
    punished = punished - frequency * times - presence * (times > 0)
    # A logit that overflows stays a number: only what is forbidden is -inf.
    changes = (seen != 0) & (logits != EXCLUDED)
    return jnp.where(changes, jnp.clip(punished, -LARGEST, LARGEST), logits)


def _check_biases(sampler: Sampler, vocab_size: int) -> None:
    """Refuses tokens that the vocabulary has not, and a bias that leaves none."""
    for token, _ in sampler.biases:
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
    if sum(value == -math.inf for _, value in sampler.biases) == vocab_size:
        raise ValueError(
            f"logit_bias forbids all {vocab_size} tokens of the vocabulary; leave at least one"
        )
