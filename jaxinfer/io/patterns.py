"""What a regular expression of a tokenizer may cost, read off its text before it is compiled.

Oniguruma, which runs these expressions, backtracks, and a few characters can make it take years.
An expression is therefore read by a small grammar (classes, groups, look-around, quantifiers) and
refused if a start position could cost more than a few passes over the text. Counted are the ways
in which a part can match, a constant times a power of the text's length; what follows the last part
that can fail is never retried and costs nothing. What the grammar does not know (back references,
recursion, conditions) is refused as well.
"""

from dataclasses import dataclass

MOST_CHARACTERS = 4096
MOST_DEPTH = 16
MOST_REPEATS = 4096
MOST_WAYS = {0: 4096, 1: 16}
"""Ways to try at one start position, by the power of the text's length they are multiplied with."""


@dataclass(frozen=True)
class Ways:
    """`count * length ** power` ways to match."""

    count: int = 1
    power: int = 0

    def __mul__(self, other: "Ways") -> "Ways":
        return Ways(min(self.count * other.count, 10**6), self.power + other.power)

    def __add__(self, other: "Ways") -> "Ways":
        return Ways(min(self.count + other.count, 10**6), max(self.power, other.power))


@dataclass(frozen=True)
class Part:
    """Part of an expression: in how many ways it matches, how many it tries before it fails.

    `fails` is None for what always matches, such as `x*`. `least` is its fewest characters.
    """

    matches: Ways = Ways()
    fails: Ways | None = Ways()
    least: int = 1
    repeats: int = 1


def fewest_characters(pattern: str) -> int:
    """The shortest match of a regular expression; ValueError if the expression is too costly."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(pattern)} characters, at most {MOST_CHARACTERS} are read")
    part = _Reader(pattern).whole()
    cost = part.fails or Ways(1)
    if cost.count > MOST_WAYS.get(cost.power, 0):
        raise ValueError("its backtracking may take too long; repeat only single characters")
    return part.least


class _Reader:
    """A recursive reader of one expression."""

    def __init__(self, pattern: str):
        self.text = pattern
        self.at = 0
        self.depth = 0

    def whole(self) -> Part:
        part = self.alternatives()
        if self.at < len(self.text):
            raise ValueError("a parenthesis closes that was not opened")
        return part

    def alternatives(self) -> Part:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ValueError(f"groups are nested more than {MOST_DEPTH} deep")
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        self.depth -= 1
        matches, fails = parts[0].matches, parts[0].fails
        for part in parts[1:]:
            matches = matches + part.matches
            fails = None if fails is None or part.fails is None else fails + part.fails
        least = min(part.least for part in parts)
        return Part(matches, fails, least, max(part.repeats for part in parts))

    def sequence(self) -> Part:
        parts = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.quantified(self.atom()))
        matches, before, fails = Ways(), Ways(), None
        for part in parts:
            if part.fails is not None:
                fails = before * part.fails
            matches = before = before * part.matches
        least = sum(part.least for part in parts)
        return Part(matches, fails, least, max((part.repeats for part in parts), default=1))

    def quantified(self, part: Part) -> Part:
        least, most = self.quantifier()
        while (least, most) != (1, 1):
            part = _repeated(part, least, most)
            least, most = self.quantifier()
        return part

    def quantifier(self) -> tuple[int, int | None]:
        """The bounds of the quantifier that follows, (1, 1) if there is none."""
        for sign, bounds in (("?", (0, 1)), ("*", (0, None)), ("+", (1, None))):
            if self.take(sign):
                _ = self.take("?") or self.take("+")  # lazy and possessive forms try no more
                return bounds
        if not self.take("{"):
            return 1, 1
        numbers = self.until("}").split(",")
        if len(numbers) > 2 or not all(n.isascii() and (n.isdigit() or not n) for n in numbers):
            raise ValueError("a brace is neither escaped nor a count")
        if len(max(numbers, key=len)) > 6 or not any(numbers):
            raise ValueError("a count in braces is not a small number")
        least = int(numbers[0] or 0)
        most = int(numbers[-1]) if numbers[-1] else None
        if self.take("?") and len(numbers) == 1:
            least = 0  # Oniguruma reads `x{3}?` as an optional `x{3}`
        return least, most

    def atom(self) -> Part:
        character = self.next()
        if character == "(":
            return self.group()
        if character == "[":
            self.character_class()
        elif character == "\\":
            return self.escape()
        elif character in "^$":
            return Part(least=0)
        elif character in "?*+{":
            raise ValueError("a quantifier has nothing to repeat")
        return Part()

    def group(self) -> Part:
        around = next((x for x in ("?=", "?!", "?<=", "?<!") if self.take(x)), "")
        if not around and not self.take("?:") and not self.take("?i:") and not self.take("?>"):
            self.refuse("?", "*")
        part = self.alternatives()
        if not self.take(")"):
            raise ValueError("a parenthesis is not closed")
        if not around:
            return part
        # what a look-around matched is not retried, but its attempts are made
        return Part(Ways(), part.fails or Ways(), 0, part.repeats)

    def refuse(self, *signs: str) -> None:
        if any(self.text.startswith(sign, self.at) for sign in signs):
            raise ValueError(f"the group ({self.text[self.at : self.at + 3]}... is not read here")

    def character_class(self) -> None:
        """Skip the rest of a class; classes inside it nest, as Oniguruma reads them."""
        depth = 1
        self.take("^")
        if self.text.startswith("]", self.at):
            raise ValueError("a class starts with a closing bracket that is not escaped")
        while depth:
            character = self.next()
            if character == "\\":
                self.next()
            depth += (character == "[") - (character == "]")

    def escape(self) -> Part:
        character = self.next()
        if character in "pP":
            if not self.take("{"):
                raise ValueError(f"\\{character} names no property in braces")
            self.until("}")
        elif character in "bBAzZG":
            return Part(least=0)
        elif character == "x" and self.take("{"):
            self.until("}")
        elif character.isdigit() or character in "gkKRXQEyYOcCMN":
            raise ValueError(f"the escape \\{character} is not read here")
        return Part()

    def next(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def take(self, sign: str) -> bool:
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) * found
        return found

    def until(self, sign: str) -> str:
        end = self.text.find(sign, self.at)
        if end < 0:
            raise ValueError(f"{sign!r} is missing")
        inside, self.at = self.text[self.at : end], end + 1
        return inside


def _repeated(part: Part, least: int, most: int | None) -> Part:
    """`part` repeated `least` to `most` times, without end if `most` is None."""
    if most is None and (part.matches != Ways() or part.least == 0):
        raise ValueError("a repeated group can match one text in several ways")
    if most is not None and most < least:
        raise ValueError(f"a count goes from {least} down to {most}")
    repeats = part.repeats * max(least, most or 1, 1)
    if repeats > MOST_REPEATS:
        raise ValueError(f"counts multiply to {repeats}, at most {MOST_REPEATS} are read")
    once = part.matches
    if most is None:
        matches = Ways(1, 1)
    elif once == Ways():
        matches = Ways(most - least + 1)
    else:
        matches = Ways(0)
        power = Ways()
        for count in range(most + 1):
            matches = matches + power if count >= least else matches
            power = power * once
    fails = None
    if least and part.fails is not None:
        fails = part.fails
        for _ in range(least - 1):
            fails = fails * once
    return Part(matches, fails, least * part.least, repeats)
