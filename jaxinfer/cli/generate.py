"""`jaxinfer generate`: continue or answer prompts."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.completions import batch_records
from jaxinfer.cli.decoding import Decoding, with_decoding
from jaxinfer.cli.notices import note, work_begins
from jaxinfer.cli.text_input import read_prompt

if TYPE_CHECKING:
    from jaxinfer.decode.stream import Stream
    from jaxinfer.lm import LM


@with_decoding
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Prompts; - is one from standard input, without its final newline.",
        ),
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-file",
            help="A UTF-8 file that is one prompt, without its final newline; repeatable.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    *,
    decoding: Decoding,
    max_new_tokens: o.TokensOption = 256,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=4096, help="Completions per prompt.")
    ] = 1,
    as_json: o.JsonOption = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="With --json: each token's log-probability.")
    ] = False,
) -> None:
    """Continue a text, or answer it.

    A model with a chat template answers, unless --raw is given. One prompt streams; several run as
    one batch. With --json: one object per completion.
    """
    policy, sampler = decoding.checked()
    if log_probs and not as_json:
        raise ValueError("--log-probs are printed with --json only; add --json")
    texts = _texts(prompts or [], prompt_file or [])

    from jaxinfer.progress import progress

    lm = decoding.open()
    keywords = decoding.keywords(lm, sampler, max_new_tokens)
    inputs = [_input(lm, text, raw) for text in texts]
    if len(inputs) == 1 and samples == 1 and not as_json and lm.tokenizer is not None:
        return _print_stream(lm.stream(inputs[0], policy=policy, **keywords))
    with progress("generating"):
        completions = lm.generate(inputs, policy=policy, samples=samples, **keywords)
    work_begins()
    if as_json:
        lengths = [len(lm.encode(prompt)) for prompt in inputs for _ in range(samples)]
        for index, record in enumerate(batch_records(completions, lengths)):
            record |= dict(zip(("prompt", "sample"), divmod(index, samples), strict=True))
            own = {"log_probs": completions[index].log_probs} if log_probs else {}
            o.print_json(record | own)
        return
    for index, completion in enumerate(completions):
        place = divmod(index, samples)
        title = f"prompt {place[0] + 1}" + (f", sample {place[1] + 1}" if samples > 1 else "")
        print(f"--- {title} ({completion.finish_reason})")
        print(completion.text if lm.tokenizer is not None else completion.tokens)


def _texts(prompts: list[str], files: list[str]) -> list[str]:
    if [*prompts, *files].count("-") > 1:
        raise ValueError("standard input is one prompt; give - once")
    texts = [read_prompt("-") if prompt == "-" else prompt for prompt in prompts]
    texts += [read_prompt(path) for path in files]
    if not texts and sys.stdin is not None and not sys.stdin.isatty():
        texts = [read_prompt("-")]
    if not texts:
        raise ValueError("no prompt; give a text, --prompt-file FILE, or pipe one in")
    return texts


def _input(lm: "LM", text: str, raw: bool) -> str | list[int]:
    """What the model reads: a chat turn in its template, or the text itself."""
    if raw or lm.tokenizer is None or lm.tokenizer.chat_template is None:
        if lm.tokenizer is None:
            return _token_ids(text)
        _check_given(text, raw)
        return text
    _check_given(text.strip(), raw)
    return lm.chat_tokens([{"role": "user", "content": text}])


def _check_given(text: str, raw: bool) -> None:
    if not text and not raw:
        raise ValueError("the prompt is empty; give some text, or --raw to start from nothing")


def _token_ids(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            "this model has no tokenizer; give a prompt as token ids such as '1 5 42'"
        ) from None


def _print_stream(stream: "Stream") -> None:
    from jaxinfer.progress import progress

    work_begins()
    with progress("compiling and reading"):
        first = next(stream, "")
    print(first, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty():
        completion = stream.completion
        stats = completion.stats
        note(
            f"[{stats.new_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, "
            f"ended by {completion.finish_reason}]"
        )
