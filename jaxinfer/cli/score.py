"""`jaxinfer score`: how well a model predicts a text, read through a cache policy."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import options as o

if TYPE_CHECKING:
    from jaxinfer.cache.base import Policy
    from jaxinfer.lm import LM


def score(
    file: Annotated[str, typer.Argument(help="A UTF-8 text file; - is standard input.")],
    model: o.ModelOption = None,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk", min=1, max=o.LARGEST, help="Tokens read at once; the policy has a default."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, max=o.LARGEST, help="Score only the first tokens."),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Past any context length, for policies of fixed memory."),
    ] = False,
    dtype: o.DtypeOption = None,
    as_json: o.JsonOption = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="With --json: each token's log-probability.")
    ] = False,
) -> None:
    """Print the mean negative log-likelihood (nats) and the perplexity of a text."""
    chosen = o.make_policy(policy, policy_args)
    if stream:
        from jaxinfer.eval.stream import check_endless

        check_endless(chosen)
        if log_probs:
            raise ValueError("--log-probs keeps every token; leave out --stream or --log-probs")
    text = o.read_text(file)

    from jaxinfer.cli.models import open_model

    lm = open_model(model, dtype)
    if stream:
        _print(_stream(lm, _tokens(lm, text, max_tokens), chosen, chunk), as_json)
        return
    (found,) = lm.score([_tokens(lm, text, max_tokens)], policy=chosen, chunk=chunk)
    record = {
        "tokens": len(found.tokens),
        "nll": found.nll,
        "perplexity": found.perplexity,
        "cache_bytes": found.cache_bytes,
        "chunk": found.chunk,
        "policy": chosen.name,
        "model": lm.name,
    }
    _print(record | ({"log_probs": found.log_probs} if as_json and log_probs else {}), as_json)


def _stream(lm: "LM", tokens: list[int], policy: "Policy", chunk: int | None) -> dict[str, Any]:
    """The same record, of one pass in constant memory, with the mean nll of every 2048 tokens."""
    import numpy as np

    from jaxinfer.cli.models import progress
    from jaxinfer.eval.stream import stream_perplexity

    with progress("scoring") as report:
        found = stream_perplexity(
            lm,
            [np.asarray(tokens, np.int32)],
            policy,
            chunk=chunk,
            report=lambda done: report(done, len(tokens)),
        )
    return {
        "tokens": len(tokens),
        "nll": found.nll,
        "perplexity": found.perplexity,
        "cache_bytes": found.cache_bytes,
        "chunk": found.chunk,
        "policy": policy.name,
        "model": lm.name,
        "curve": [[point.end, point.nll] for point in found.points],
    }


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        o.print_json(record)
        return
    for name, value in record.items():
        if name == "curve":
            for end, nll in value:
                print(f"  to token {end:<10} nll {nll:.6g}")
        else:
            print(f"{name:12} {value:.6g}" if isinstance(value, float) else f"{name:12} {value}")


def _tokens(lm: "LM", text: str, most: int | None) -> list[int]:
    """The text's tokens, the first `most` of them, without encoding much more than those."""
    if most is None:
        return lm.encode(text)
    head = text[: 32 * most]
    tokens = lm.encode(head)
    # A cut can change the tokens next to it, so be sure to stop well before it.
    if len(head) < len(text) and len(tokens) < most + 16:
        tokens = lm.encode(text)
    return tokens[:most]
