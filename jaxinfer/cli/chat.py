"""`jaxinfer chat`: a conversation on a live cache.

Only the new turn's text is read; what came before is in the cache. How a template goes from one
turn to the next is found by rendering it around a marker in place of the reply, so nothing needs to
know the template, and a restored session needs no list of its messages.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.decoding import Decoding, Keywords, with_decoding
from jaxinfer.cli.interrupts import finishing

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.lm import LM
    from jaxinfer.session import Session

REPLY = "\ue000reply\ue000"  # private-use characters: no text has them
HELP = "/reset starts again, /save FILE, /restore FILE, /exit"


@with_decoding
@finishing()
def chat(
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    restore: Annotated[
        str | None, typer.Option("--restore", help="Go on with a conversation from /save.")
    ] = None,
    *,
    decoding: Decoding,
    max_new_tokens: o.TokensOption = 512,
    as_json: o.JsonOption = False,
) -> None:
    """Talk with a model; each line of standard input is one message.

    Commands: /reset starts again, /save FILE, /restore FILE, /exit. Ctrl-C ends a reply early.
    """
    from jaxinfer.cli.models import note

    policy, sampler = decoding.checked()
    lm = decoding.open()
    keywords = decoding.keywords(lm, sampler, max_new_tokens)
    talk = Conversation(lm, policy, system, keywords, as_json)
    if restore is not None:
        talk.command("/restore", restore)
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing for input())
    for line in _lines(interactive):
        try:
            if not talk.say(line):
                return
        except (ValueError, OSError) as error:
            if not interactive:  # a script wants to know
                raise
            note(f"error: {' '.join(str(error).split())}")


class Conversation:
    """The session, and what a line of input does to it."""

    def __init__(
        self,
        lm: "LM",
        policy: "Policy",
        system: str | None,
        keywords: Keywords,
        as_json: bool,
    ):
        self.lm, self.policy, self.keywords, self.as_json = lm, policy, keywords, as_json
        self.system = [] if system is None else [{"role": "system", "content": system}]
        lm.chat_prompt([*self.system, {"role": "user", "content": "?"}])  # refuses early
        self.session = lm.session(policy)

    def say(self, line: str) -> bool:
        """Runs a command or answers a message; False ends the conversation."""
        line = line.strip()
        if line == "/exit":
            return False
        if line.startswith("/"):
            self.command(*line.split(maxsplit=1))
        elif line:
            self.answer(line)
        return True

    def command(self, name: str, argument: str = "") -> None:
        if name == "/reset":
            self.session = self.lm.session(self.policy)
        elif name in ("/save", "/restore") and not argument:
            raise ValueError(f"{name} needs a file name")
        elif name == "/save":
            self.session.save(argument)
        elif name == "/restore":
            self.session = self.lm.restore(argument, self.policy)
        else:
            raise ValueError(f"unknown command {name}; {HELP}")

    def answer(self, message: str) -> None:
        tokens = self.lm.encode(self.turn(message), continues=True)
        if self.as_json:
            reply = self.session.generate(tokens, **self.keywords)
            o.print_json(
                {
                    "text": reply.text,
                    "tokens": reply.tokens,
                    "finish_reason": reply.finish_reason,
                    "stats": dict(reply.stats),
                }
            )
            return
        stream = self.session.stream(tokens, **self.keywords)
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream:
                print(piece, end="", flush=True)
        stream.close()  # the session keeps what was generated so far
        print(flush=True)

    def turn(self, message: str) -> str:
        """The text to read for a further message: all of it at first, later only what is new."""
        user = {"role": "user", "content": message}
        if not (self.session.tokens or self.session.pending):
            return self.lm.chat_prompt([*self.system, user])
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        _, found, rest = self.lm.chat_prompt([*self.system, *before, user]).partition(REPLY)
        if not found:
            raise ValueError("this model's chat template does not show earlier replies; use /reset")
        return rest.removeprefix(_end_of(self.session))


def _end_of(session: "Session") -> str:
    """The text of the end-of-turn token, if the reply ended with one."""
    last, tokenizer = session.pending[-1:], session.lm.tokenizer
    if tokenizer is None or not last or last[0] not in session.lm.config.eos_token_ids:
        return ""
    return tokenizer.decode(last, skip_special=False)


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
