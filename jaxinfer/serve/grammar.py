"""Structured output: what an answer must look like, as masks of the tokens that may come next.

JSON schemas, regular expressions, lists of choices and Lark grammars are followed by llguidance,
which needs no backtracking: an expression that would be catastrophic elsewhere is not. Blanks
between the parts of JSON are bounded, or a model that likes them would never come to an end.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from jaxinfer.decode.token_mask import word_count
from jaxinfer.files import one_line
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.schema import Drawing, ObjectFormat, ResponseFormat, Sampling, SchemaFormat
from jaxinfer.serve.vocabulary import Vocabulary

BLANKS = r"( |\n {0,12})?"
"""Between two parts of JSON: a space, or a new line and its indentation."""

LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of llguidance: a grammar is refused, or its request fails, before it stops others for long."""


class GrammarError(ValueError):
    """A grammar that is wrong, or too large to be followed."""


class Grammar:
    """A compiled grammar; every answer follows a copy of it.

    Raises:
      GrammarError: it cannot be followed.
    """

    def __init__(self, vocabulary: Vocabulary, text: str):
        self._words = word_count(vocabulary.size)
        try:
            tokenizer = vocabulary.grammar_tokenizer
            self._matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))
        except ValueError as error:
            raise GrammarError(str(error)) from error
        self.follow().mask()  # some grammars are found to be empty or too large only here

    def follow(self) -> "Follower":
        """What one answer follows."""
        return Follower(self._matcher.deep_copy(), self._words)


class Follower:
    """A `jaxinfer.decode.Constraint`: where in its grammar one answer is."""

    def __init__(self, matcher: LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def mask(self) -> np.ndarray:
        """The tokens that may come next; where the answer may end, its end too."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        _check(self._matcher)
        return found[: self._words]

    def accept(self, token: int) -> None:
        """Goes on behind a token."""
        self._matcher.consume_token(token)
        _check(self._matcher)


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        why = matcher.get_error().replace("<non-verbose/>", "").strip()
        why = "no text matches it" if why.startswith("NoExtension") else one_line(why, 300)
        raise GrammarError(f"the grammar cannot be followed: {why}")


def of_schema(schema: dict[str, object]) -> str:
    """The grammar of a JSON schema."""
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": BLANKS})


def of_choices(choices: Sequence[str]) -> str:
    """The grammar of one of some texts."""
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))


def grammar_of(vocabulary: Vocabulary, body: Drawing) -> Grammar | None:
    """What the fields `response_format`, `regex`, `choice` and `grammar` ask for together: at most
    one of them may be there.

    Raises:
      ApiError: 400, there are several, or they contradict another field; 422, the grammar cannot
        be followed.
    """
    forms: dict[str, Callable[[], str]] = {}
    if isinstance(body, Sampling) and (schema := schema_of(body.response_format)) is not None:
        forms["response_format"] = lambda: of_schema(schema)
    if (regex := body.regex) is not None:
        forms["regex"] = lambda: LLMatcher.grammar_from_regex(regex)
    if (choices := body.choice) is not None:
        forms["choice"] = lambda: of_choices(choices)
    if (lark := body.grammar) is not None:
        forms["grammar"] = lambda: LLMatcher.grammar_from_lark(lark)
    if not forms:
        return None
    if len(forms) > 1:
        names = " and ".join(forms)
        raise ApiError(400, f"{names} cannot be combined; give one of them", param=[*forms][1])
    ((name, text),) = forms.items()
    check_fields(body, name)
    return compiled(vocabulary, text, name)


def compiled(vocabulary: Vocabulary, text: Callable[[], str], param: str) -> Grammar:
    """A grammar that a field asks for.

    Raises:
      ApiError: 422, it cannot be followed.
    """
    try:
        return Grammar(vocabulary, text())
    except (ValueError, RecursionError) as error:
        raise ApiError(422, f"{param}: {error}", param=param, code="invalid_grammar") from error


def check_fields(body: Drawing, name: str) -> None:
    """Refuses fields that a grammar leaves no room for."""
    for other, given in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens)):
        if given:
            raise ApiError(
                400, f"{other} cannot be combined with {name}, which says where the answer ends",
                param=other,
            )  # fmt: skip


def schema_of(form: ResponseFormat | None) -> dict[str, object] | None:
    """The JSON schema that a response format asks for; None where any text will do."""
    if isinstance(form, ObjectFormat):
        return {"type": "object"}
    if isinstance(form, SchemaFormat):
        return form.json_schema.schema_ or {}
    return None
