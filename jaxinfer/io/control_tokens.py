"""Control tokens that somebody's text spells stay text.

`<|im_start|>` in a message would become the token that begins a turn, and the message could forge
one. So what a caller passes to a chat template is marked where it spells a control token, with two
characters that no text has, around the spelling: a template that trims, splits or compares sees
what it would see without. What comes out of the template is cut at the marks; between a pair of
them no control token is read, and across one neither. Texts without such spellings are not
touched, so their tokens are those of the plain pipeline, as in transformers. (A template that takes
characters out of the middle of a message could still make a spelling that nobody typed.)

A control token is an added token that the tokenizer calls special. Those that it does not call so
(`<think>`, `<tool_call>`) are text that has one id, whoever writes it: llama.cpp (`parse_special`)
and transformers (`split_special_tokens`) draw the line at the same place.
"""

import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import tokenizers

from jaxinfer.io.tokenizer_json import one_error

NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode keeps these for use inside a program; a text hardly has one, and never all."""

LONGEST = 256
"""Characters of a control token whose halves are looked for at the end of a text."""


class Marks(NamedTuple):
    """The characters around a spelling."""

    start: str
    end: str


class Match(NamedTuple):
    """A control token in a text: its place, without the spaces that it takes along, and its id."""

    start: int
    end: int
    id: int


class ControlTokens:
    """What a `tokenizers` pipeline reads as control tokens, and how to keep it from that."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._tokens = {i: token for i, token in added.items() if token.special}
        texts = {token.content: i for i, token in self._tokens.items()}
        # these find them just as the pipeline does, and however they are spelled, since a template
        # may change the case
        self._finder = _finder(self._tokens.values(), backend.normalizer)
        self._spellings = _finder(
            [tokenizers.AddedToken(text, normalized=True) for text in texts],
            tokenizers.normalizers.Lowercase(),
        )
        self._found = {self._finder.token_to_id(text): i for text, i in texts.items()}
        short = [text for text in texts if 1 < len(text) <= LONGEST]
        self._forwards = sorted(short)
        self._backwards = sorted(text[::-1] for text in short)
        self._literal: _Literal | None = None

    def find(self, text: str) -> list[Match]:
        """The control tokens that the pipeline reads in `text`."""
        return self._matches(text, self._finder) if self._tokens else []

    def _matches(self, text: str, finder: tokenizers.Tokenizer) -> list[Match]:
        with one_error("the tokenizer cannot read the text"):
            encoding = finder.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [_trimmed(text, *span, self._found.get(i, -1)) for i, span in found if i]

    def marker(
        self, texts: Iterable[str], others: Iterable[str] = ()
    ) -> tuple[Callable[[str], str], Marks | None]:
        """What marks each of `texts`, and with which marks; None where no text needs any. None of
        `others` has these marks either."""
        texts = set(texts)
        places = {text: at for text in texts if (at := self._places(text))}
        if not places:
            return lambda text: text, None
        texts.update(others)
        free = (c for c in NONCHARACTERS if not any(c in text for text in texts))
        try:
            marks = Marks(next(free), next(free))
        except StopIteration:
            raise ValueError(
                "a message spells a control token and has every noncharacter of U+FDD0..U+FDEF; "
                "leave those out"
            ) from None
        return lambda text: _with_marks(text, places.get(text, []), marks), marks

    def encode(self, text: str, marks: Marks | None, add_special: bool = False) -> list[int]:
        """Token ids of a text with marks, which are in none of them."""
        pieces = list(_pieces(text, marks))
        plain = "".join(piece for piece, _ in pieces)
        read = self.find(plain) if marks is not None else []
        own = _own(pieces, read)
        if len(own) == len(read):
            with one_error("the tokenizer cannot encode the text"):
                return self._backend.encode(plain, add_special_tokens=add_special).ids
        if self._literal is None:
            self._literal = _Literal(self._backend, self._tokens)
        with one_error("the tokenizer cannot encode the text"):
            return self._literal.encode(pieces, own, add_special)

    def encode_literally(self, text: str, add_special: bool) -> list[int]:
        """Token ids of a text in which no control token is read."""
        mark, marks = self.marker([text])
        return self.encode(mark(text), marks, add_special)

    def _places(self, text: str) -> list[tuple[int, bool]]:
        """Where marks go: (place, whether a spelling begins there), in order.

        A text that ends like a control token begins, or the other way round, is closed there: the
        next text could bring the rest.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a message holds a lone surrogate at {error.start}; pass valid Unicode"
            ) from error
        places = []
        for start, end in _merged([*self.find(text), *self._matches(text, self._spellings)]):
            places += [(start, True), (end, False)]
        tail, head = text.rstrip(), text.lstrip()
        if _ends_like_a_beginning(tail, self._forwards):
            places.append((len(tail), False))
        if _ends_like_a_beginning(head[::-1], self._backwards):
            places.insert(0, (len(text) - len(head), False))
        return places


def _finder(
    tokens: Iterable[tokenizers.AddedToken], normalizer: tokenizers.normalizers.Normalizer | None
) -> tokenizers.Tokenizer:
    """A pipeline that finds these tokens and leaves all else in one piece."""
    finder = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={"": 0}, unk_token=""))
    if normalizer is not None:  # first, as it is applied to tokens when they are added
        finder.normalizer = normalizer
    finder.add_special_tokens(list(tokens))
    return finder


class _Literal:
    """A pipeline that reads no control token, but other names for them that nobody can guess.

    The names behave as the tokens do (the spaces that they take along, the pieces that they
    separate), so a text has the ids that it would have if only its own tokens were spelled in it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokens: dict[int, tokenizers.AddedToken]):
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        secret = secrets.token_hex(12)
        self._names = {i: f"{secret}{i:x}x" for i in tokens}
        self._break = f"{secret}x"
        self._backend.add_tokens([_named(tokens[i], name) for i, name in self._names.items()])
        self._backend.add_tokens([tokenizers.AddedToken(self._break, normalized=False)])
        number = self._backend.token_to_id
        self._ids = {number(name): i for i, name in self._names.items()}
        # the token for what a vocabulary does not have may be special, and stands for any text
        unknown = self._backend.encode("\U0010fffd", add_special_tokens=False).ids
        self._never = set(tokens).difference(unknown)

    def encode(
        self, pieces: list[tuple[str, bool]], own: list[Match], add_special: bool
    ) -> list[int]:
        ids, good = self._encoded(pieces, own, "", add_special)
        if not good:
            # a vocabulary may have the spelling as one word; in halves it is none
            ids, good = self._encoded(pieces, own, self._break, add_special)
        if not good:
            raise ValueError("a message spells a control token, which this tokenizer cannot split")
        return ids

    def _encoded(
        self, pieces: list[tuple[str, bool]], own: list[Match], cut: str, add_special: bool
    ) -> tuple[list[int], bool]:
        """The ids, and whether its control tokens are the template's."""
        parts, place, rest = [], 0, iter([*own, None])
        match = next(rest)
        for piece, spelled in pieces:
            end = place + len(piece)
            at = 0
            while match is not None and match.start < end:
                parts += [piece[at : match.start - place], self._names[match.id]]
                at, match = match.end - place, next(rest)
            left = piece[at:]
            parts.append(left[:1] + cut + left[1:] + cut if spelled else left + cut)
            place = end
        text = "".join(parts)
        bare = self._backend.encode(text, add_special_tokens=False).ids
        named = [self._ids[i] for i in bare if i in self._ids]
        good = named == [match.id for match in own] and self._never.isdisjoint(bare)
        whole = self._backend.encode(text, add_special_tokens=True).ids if add_special else bare
        broken = self._backend.token_to_id(self._break)
        return [self._ids.get(i, i) for i in whole if i != broken], good


def _named(token: tokenizers.AddedToken, name: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        name,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=False,
    )


def _trimmed(text: str, start: int, end: int, number: int) -> Match:
    inner = text[start:end]
    if inner.isspace():
        return Match(start, end, number)
    return Match(
        start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip()), number
    )


def _ends_like_a_beginning(text: str, tokens: list[str]) -> bool:
    """Whether an end of `text` begins one of the sorted `tokens` without being it."""
    for length in range(1, min(len(text), LONGEST) + 1):
        end = text[-length:]
        at = bisect_left(tokens, end)
        if any(t.startswith(end) and len(t) > length for t in tokens[at : at + 2]):
            return True
    return False


def _with_marks(text: str, places: list[tuple[int, bool]], marks: Marks) -> str:
    parts, last = [], 0
    for place, starts in places:
        parts += [text[last:place], marks.start if starts else marks.end]
        last = place
    return "".join([*parts, text[last:]])


def _pieces(text: str, marks: Marks | None) -> Iterator[tuple[str, bool]]:
    """The text between marks, and whether both marks of a spelling are around it."""
    if marks is None:
        yield text, False
        return
    for index, part in enumerate(text.split(marks.start)):
        first, *others = part.split(marks.end)
        yield first, bool(index and others)
        yield from ((other, False) for other in others)


def _own(pieces: list[tuple[str, bool]], read: list[Match]) -> list[Match]:
    """Those of the control tokens in a text that no mark is in or around: the template's."""
    marked, place = [], 0
    for piece, spelled in pieces:
        marked += [(place, place)] * (place > 0) + [(place, place + len(piece))] * spelled
        place += len(piece)
    own, rest = [], iter(marked)
    at = next(rest, None)
    for match in read:
        while at is not None and at[1] <= match.start:
            at = next(rest, None)
        if at is None or at[0] >= match.end:
            own.append(match)
    return own


def _merged(matches: list[Match]) -> list[tuple[int, int]]:
    """Their places; those that overlap are one."""
    spans: list[tuple[int, int]] = []
    for start, end, _ in sorted(matches):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans
