"""What a `Kivi` tier refuses, with the numbers that fit."""

from typing import Any

from jaxinfer.arguments import shown
from jaxinfer.cache.base import Geometry
from jaxinfer.ops.quantize import BITS, SCALE_DTYPES

MOST_TOKENS = 2**24
"""Of a residual or a group: no cache has as many tokens, and divisors are looked for below it."""

CHOICES = {
    "key_bits": (*BITS, 16),
    "value_bits": (*BITS, 16),
    "value_flush": ("sliding", "block"),
    "key_grouping": ("channel", "token"),
    "value_grouping": ("token", "channel"),
    "scale_dtype": SCALE_DTYPES,
    "residual_dtype": (None, *SCALE_DTYPES),
}


def check_settings(tier: Any) -> None:
    """Refuses settings that contradict each other."""
    for name, allowed in CHOICES.items():
        value = getattr(tier, name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            known = ", ".join(map(str, allowed))
            raise ValueError(f"{name} must be one of {known}; got {shown(value)}")
    for name, least in (("residual", 1), ("key_group", 1), ("value_group", 1), ("start", 0)):
        value = getattr(tier, name)
        if type(value) is not int or value < least or value > MOST_TOKENS:
            raise ValueError(
                f"{name} must be a whole number of at least {least} and at most {MOST_TOKENS}, got "
                f"{shown(value)}"
            )
    if tier.groups_tokens("value") and tier.value_flush == "sliding":
        raise ValueError(
            "value_grouping 'channel' needs value_flush 'block': with 'sliding' values leave the "
            "tail one by one, and a group holds several tokens"
        )
    if tier.key_bits < 16 and tier.residual % (32 // tier.key_bits):
        word = 32 // tier.key_bits
        raise ValueError(
            f"residual {tier.residual} is not a multiple of {word}, the tokens in one word of "
            f"{tier.key_bits}-bit keys; take {max(round(tier.residual / word), 1) * word}"
        )
    for half in ("key", "value"):
        group, word = getattr(tier, f"{half}_group"), word_of(tier, half)
        if tier.groups_tokens(half) and tier.residual % group:
            fit = divisors(tier.residual, word)
            raise ValueError(
                f"residual {tier.residual} is not a multiple of {half}_group {group}, so that a "
                f"group would span two flushes; groups that fit: {fit}"
            )
        if group % word:
            raise ValueError(
                f"{half}_group {group} is not a multiple of {word}, the {half}s in one word, which "
                f"would belong to two groups; take {-(-group // word) * word}"
            )
    if tier.window is not None:
        if tier.value_flush == "sliding":
            raise ValueError("window needs value_flush 'block', got 'sliding'")
        if tier.window < 1 or tier.window % tier.residual:
            raise ValueError(
                f"window {tier.window} is not a positive multiple of residual {tier.residual}"
            )


def check_heads(tier: Any, geometry: Geometry) -> None:
    """Refuses heads whose channels do not split into whole words and groups."""
    size = geometry.head_dim
    if tier.value_bits < 16 and size % (32 // tier.value_bits):
        fit = [bits for bits in BITS if size % (32 // bits) == 0]
        raise ValueError(
            f"head size {size} is not a multiple of {32 // tier.value_bits}, the channels in one "
            f"word of {tier.value_bits}-bit values; value_bits that fit: {[*fit, 16]}"
        )
    for half in ("key", "value"):
        bits, group = getattr(tier, f"{half}_bits"), getattr(tier, f"{half}_group")
        if bits < 16 and not tier.groups_tokens(half) and size % group:
            raise ValueError(
                f"head size {size} is not a multiple of {half}_group {group}; groups that fit: "
                f"{divisors(size, word_of(tier, half))}"
            )


def word_of(tier: Any, half: str) -> int:
    """Codes of one word where words and groups run along the same axis, else 1."""
    bits = getattr(tier, f"{half}_bits")
    along_words = tier.groups_tokens(half) == (half == "key")
    return 32 // bits if bits < 16 and along_words else 1


def divisors(number: int, word: int) -> list[int]:
    """Divisors that hold whole words, from 8 on (all of them if there is none): the sizes that a
    group may sensibly have."""
    every = [i for i in range(word, number + 1, word) if number % i == 0]
    return [i for i in every if i >= 8] or every
