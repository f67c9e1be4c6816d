"""`jaxinfer chat`: a conversation on a live cache.

Only the new turn's text is read; what came before is in the cache. How a template goes from one
turn to the next is found by rendering it around a marker in place of the reply, so nothing needs to
know the template, and a restored session needs no list of its messages.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import kept_chats
from jaxinfer.cli import options as o
from jaxinfer.cli.chat_input import messages, piped_lines, typed_lines
from jaxinfer.cli.completions import completion_record
from jaxinfer.cli.decoding import Decoding, Keywords, with_decoding
from jaxinfer.cli.interrupts import finishing
from jaxinfer.cli.kept_chats import Talk, Turn, as_messages, short
from jaxinfer.cli.notices import error_text, note, work_begins
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.lm import LM
    from jaxinfer.session import Session

REPLY = "\ue000reply\ue000"  # private-use characters: no text has them
RESERVED = 4  # a fourth of the context is for the next reply, if it may be so long
HELP = (
    "/reset starts again, /save FILE, /restore FILE, /exit, /help; "
    'a message of several lines stands between """, one that begins with / is written with //'
)
KEPT = "this conversation is kept; jaxinfer chat --resume goes on with it"


@with_decoding
@finishing()
def chat(
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    restore: Annotated[
        str | None, typer.Option("--restore", help="Go on with a conversation from /save.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last conversation, saved or not.")
    ] = False,
    *,
    decoding: Decoding,
    max_new_tokens: o.TokensOption = 512,
    as_json: o.JsonOption = False,
) -> None:
    """Talk with a model; each line of standard input is one message.

    Commands: /reset starts again, /save FILE, /restore FILE, /exit, /help. A message that begins
    with / is written with //, one of several lines stands between lines of triple quotes. Ctrl-C
    ends a reply early. What does not fit into the model's context is forgotten turn by turn, and
    said; `--policy streaming` keeps a window instead.
    """
    talk = place = None
    if resume:
        if restore is not None:
            raise ValueError("--resume and --restore are two conversations; give one of them")
        place = kept_chats.newest()
        talk = kept_chats.read(place)
        decoding = decoding._replace(model=decoding.model or talk.source)
        system = talk.system if system is None else system
    policy, sampler = decoding.checked()
    lm = decoding.open()
    keywords = decoding.keywords(lm, sampler, max_new_tokens)
    conversation = Conversation(lm, policy, system, keywords, as_json, _source(decoding, lm))
    if talk is not None and place is not None:
        conversation.resume(talk, place)
    if restore is not None:
        conversation.command("/restore", restore)
    work_begins()
    _talk(conversation)


def _talk(conversation: "Conversation") -> None:
    """Says line after line until the conversation ends, in whatever way."""
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)
    ended = False
    try:
        for line in messages(typed_lines() if interactive else piped_lines()):
            try:
                if not conversation.say(line):
                    break
            except (ValueError, OSError) as error:
                if not interactive:  # a script wants to know
                    raise
                note(f"error: {error_text(error)}")
        ended = not interactive  # a script says what it wants kept
    finally:
        if ended:
            conversation.forget()
        elif conversation.is_kept:
            note(KEPT)


class Conversation:
    """The session, and what a line of input does to it."""

    def __init__(
        self,
        lm: "LM",
        policy: "Policy",
        system: str | None,
        keywords: Keywords,
        as_json: bool,
        source: str = "",
    ):
        self.lm, self.policy, self.keywords, self.as_json = lm, policy, keywords, as_json
        self.system = [] if system is None else [{"role": "system", "content": system}]
        lm.chat_prompt([*self.system, {"role": "user", "content": "?"}])  # refuses early
        self.talk = Talk(source=source or lm.name, system=system)
        self.is_kept = False  # whether a file holds what is in no file of the user's
        self.reset()

    def reset(self) -> None:
        """A new conversation; the last one stays kept."""
        self.session = self.lm.session(self.policy)
        self.turns: list[Turn] = []  # whose texts are known
        self.restored = 0  # tokens in front of them, of a session file
        self.place = kept_chats.new_place()

    def resume(self, talk: Talk, place: Path) -> None:
        """Goes on with a kept conversation."""
        if Path(talk.source).name != self.lm.name:
            raise ValueError(
                f"the last conversation was with {talk.source!r}, not with {self.lm.name!r}; leave "
                "--model out"
            )
        self.session.append(talk.tokens)
        self.turns, self.place, self.is_kept = list(talk.turns), place, True
        self.restored = talk.restored
        last = f', the last message was "{short(talk.turns[-1].message)}"' if talk.turns else ""
        note(f"the conversation has {len(talk.tokens)} tokens{last}")

    def say(self, line: str) -> bool:
        """Runs a command or answers a message; False ends the conversation."""
        line = line.strip()
        if line.startswith("//"):
            self.answer(line[1:])
        elif line.startswith("/"):
            return self.command(*line.split(maxsplit=1))
        elif line:
            self.answer(line)
        return True

    def command(self, name: str, argument: str = "") -> bool:
        """Runs a command; False ends the conversation."""
        needs_file = name in ("/save", "/restore")
        if name not in ("/reset", "/save", "/restore", "/exit", "/help"):
            raise ValueError(f"unknown command {name}; {HELP}")
        if needs_file and not argument:
            raise ValueError(f"{name} needs a file name")
        if argument and not needs_file:
            raise ValueError(f"{name} takes nothing behind it, got {argument!r}")
        if name == "/reset":
            self.reset()
        elif name == "/save":
            self.session.save(Path(argument).expanduser())
            self.forget()
        elif name == "/restore":
            session = self.lm.restore(Path(argument).expanduser(), self.policy)
            self.reset()
            self.session = session
            self.restored = self._held
        elif name == "/help":
            note(HELP)
        return name != "/exit"

    def answer(self, message: str) -> None:
        """Prints the model's reply, piece by piece or as a JSON object."""
        from jaxinfer.progress import progress

        tokens, room, forgotten = self._fitted(message)
        held, asked = self._held, self.keywords["max_new_tokens"]
        keywords: Keywords = {**self.keywords, "max_new_tokens": min(asked, room)}
        stream = self.session.stream(tokens, **keywords)
        try:
            with progress("reading"):
                first = next(stream, "")
            for piece in itertools.chain([first], stream):
                if not self.as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:  # ends the reply only
            pass
        finally:
            stream.close()  # the session keeps what was generated so far
        reply = stream.completion
        if self._held > held:  # not interrupted before the message was read
            self._keep(Turn(message, reply.text))
        if self.as_json:
            o.print_json(completion_record(reply) | forgotten)
        else:
            print(flush=True)
        if reply.finish_reason == "length" and room < asked:
            note("the reply ended where the model's context does")

    def turn(self, message: str) -> list[int]:
        """The tokens to read for a further message: all at first, later only what is new."""
        user = {"role": "user", "content": message}
        if not self._held:
            return self.lm.chat_tokens([*self.system, *as_messages(self.turns), user])
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        conversation = [*self.system, *before, user]
        if REPLY not in self.lm.chat_prompt(conversation):
            raise ValueError("this model's chat template does not show earlier replies; use /reset")
        ended = REPLY + _end_of(self.session)
        return self.lm.chat_tokens(conversation, after=[ended, REPLY])

    @property
    def _held(self) -> int:
        """Tokens of the conversation so far."""
        return len(self.session.tokens) + len(self.session.pending)

    def _fitted(self, message: str) -> tuple[list[int], int, Json]:
        """The tokens to read, the room for the reply, and what had to be forgotten.

        Where the context has no room for the turn, the oldest turns go, until half of it is free:
        they are not read anew at every further turn then.
        """
        from jaxinfer.decode.capacity import is_endless

        most, asked = self.lm.config.max_positions, self.keywords["max_new_tokens"]
        tokens = self.turn(message)
        if is_endless(self.lm, self.policy):
            return tokens, asked, {}
        room = most - self._held - len(tokens)
        if room >= min(asked, most // RESERVED):
            return tokens, room, {}
        before = self.session, self.turns, self.restored
        self.session = self.lm.session(self.policy)
        while len(tokens := self.turn(message)) > most // 2 and self.turns:
            self.turns = self.turns[1:]
        if len(tokens) >= most:
            self.session, self.turns, self.restored = before
            raise ValueError(
                f"the message has {len(tokens)} tokens in its template, the model's context is "
                f"{most}; shorten it, or start the chat with --policy streaming"
            )
        gone = before[1][: len(before[1]) - len(self.turns)]
        return tokens, most - len(tokens), self._forgotten(gone)

    def _forgotten(self, gone: list[Turn]) -> Json:
        """Says what the context had no room for."""
        parts = [f"{self.restored} tokens that were restored"] if self.restored else []
        parts += [f'"{short(turn.message)}"' for turn in gone]
        self.restored = 0
        if not parts:
            return {}
        note(
            f"the model's context of {self.lm.config.max_positions} tokens is full: forgot "
            f"{', '.join(parts)}; {len(self.turns)} turns remain. --policy streaming keeps a "
            "window of tokens instead"
        )
        return {"forgotten": parts}

    def _keep(self, turn: Turn) -> None:
        """Adds a turn to what is known, and to the file that survives the end of this process."""
        self.turns.append(turn)
        tokens = self.session.tokens + self.session.pending
        try:
            talk = replace(self.talk, tokens=tokens, turns=self.turns, restored=self.restored)
            kept_chats.keep(talk, self.place)
            self.is_kept = True
        except OSError as error:
            if not self.is_kept:
                note(f"warning: this conversation is not kept: {error_text(error)}")

    def forget(self) -> None:
        """Removes the kept conversation: the user has it, or does not want it."""
        kept_chats.forget(self.place)
        self.is_kept = False


def _source(decoding: Decoding, lm: "LM") -> str:
    """How to load the model again, from whatever folder."""
    from jaxinfer.io.model_index import MODELS

    given = decoding.model or lm.name
    return given if given in MODELS else str(Path(given).expanduser().absolute())


def _end_of(session: "Session") -> str:
    """The text of the end-of-turn token, if the reply ended with one."""
    last, tokenizer = session.pending[-1:], session.lm.tokenizer
    if tokenizer is None or not last or last[0] not in session.lm.config.eos_token_ids:
        return ""
    return tokenizer.decode(last, skip_special=False)
