"""`jaxinfer generate`: continue or answer prompts."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import options as o

if TYPE_CHECKING:
    from jaxinfer.decode.results import Completion
    from jaxinfer.lm import LM


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Prompts; - reads one from standard input."),
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option("--prompt-file", help="A UTF-8 file that is one prompt; repeatable."),
    ] = None,
    model: o.ModelOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    temperature: o.TemperatureOption = 0.0,
    top_k: o.TopKOption = 0,
    top_p: o.TopPOption = 1.0,
    min_p: o.MinPOption = 0.0,
    repetition_penalty: o.PenaltyOption = 1.0,
    logit_bias: o.BiasOption = [],  # noqa: B006 (typer copies it)
    seed: o.SeedOption = 0,
    max_new_tokens: o.TokensOption = 256,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=4096, help="Completions per prompt.")
    ] = 1,
    stop: o.StopOption = [],  # noqa: B006
    dtype: o.DtypeOption = None,
    weights: o.WeightsOption = None,
    draft: o.DraftOption = None,
    tree: o.TreeOption = None,
    sparsity: o.SparsityOption = None,
    as_json: o.JsonOption = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="With --json: each token's log-probability.")
    ] = False,
) -> None:
    """Continue a text, or answer it when the model has a chat template.

    One prompt streams; several run as one batch. With --json: one object per completion.
    """
    o.refuse_planned(sparsity)
    settings: dict[str, Any] = {
        "policy": o.make_policy(policy, policy_args),
        "sampler": o.make_sampler(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "samples": samples,
        "stop": tuple(stop),
    }
    if log_probs and not as_json:
        raise ValueError("--log-probs are printed with --json only; add --json")
    texts = _texts(prompts or [], prompt_file or [])

    from jaxinfer.cli.models import open_model

    lm = open_model(model, dtype, weights)
    settings |= o.speculation(lm, draft, tree, dtype, weights)
    inputs = [_input(lm, text, raw) for text in texts]
    if len(inputs) == 1 and samples == 1 and not as_json and lm.tokenizer is not None:
        return _stream(lm, inputs[0], settings)
    completions = lm.generate(inputs, **settings)
    for index, completion in enumerate(completions):
        place = divmod(index, samples)
        if as_json:
            o.print_json(_record(completion, place, log_probs))
        else:
            title = f"prompt {place[0] + 1}" + (f", sample {place[1] + 1}" if samples > 1 else "")
            print(f"--- {title} ({completion.finish_reason})")
            print(completion.text if lm.tokenizer is not None else completion.tokens)


def _texts(prompts: list[str], files: list[str]) -> list[str]:
    texts = [o.read_text("-") if prompt == "-" else prompt for prompt in prompts]
    texts += [o.read_text(path) for path in files]
    if not texts and not sys.stdin.isatty():
        texts = [o.read_text("-")]
    if not texts:
        raise ValueError("no prompt; give a text, --prompt-file FILE, or pipe one in")
    return texts


def _input(lm: "LM", text: str, raw: bool) -> str | list[int]:
    """What the model reads: a chat turn in its template, or the text itself."""
    if raw or lm.tokenizer is None or lm.tokenizer.chat_template is None:
        if lm.tokenizer is None:
            return _token_ids(text)
        return text
    if not text.strip():
        raise ValueError("the prompt is empty; give some text, or --raw to start from nothing")
    return lm.chat_tokens([{"role": "user", "content": text}])


def _token_ids(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            "this model has no tokenizer; give a prompt as token ids such as '1 5 42'"
        ) from None


def _stream(lm: "LM", prompt: str | list[int], settings: dict[str, Any]) -> None:
    from jaxinfer.cli.models import note

    stream = lm.stream(prompt, **settings)
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


def _record(completion: "Completion", place: tuple[int, int], log_probs: bool) -> dict[str, Any]:
    record = {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stats": dict(completion.stats),
        "prompt": place[0],
        "sample": place[1],
    }
    return record | ({"log_probs": completion.log_probs} if log_probs else {})
