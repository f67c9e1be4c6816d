"""`jaxinfer score`: how well a model predicts a text, read through a cache policy."""

import os
import sys
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import work_begins
from jaxinfer.cli.text_input import opened, pieces, read_text
from jaxinfer.typing import Json

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.cache.policy import Policy
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
    weights: o.WeightsOption = None,
    sparsity: o.SparsityOption = None,
    sparsity_args: o.SparsityArgsOption = "",
    as_json: o.JsonOption = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="With --json: each token's log-probability.")
    ] = False,
) -> None:
    """Print the perplexity of a text.

    That is exp of the mean negative log-likelihood, which is printed too, in nats. The text is
    read as it is, but for a byte order mark.
    """
    chosen = o.make_policy(policy, policy_args)
    method = o.make_sparsity(sparsity, sparsity_args, model)
    if stream:
        from jaxinfer.eval.stream import check_endless

        check_endless(chosen)
        if log_probs:
            raise ValueError("--log-probs keeps every token; leave out --stream or --log-probs")
        with opened(file) as source:
            from jaxinfer.cli.models import open_model

            lm = open_model(model, dtype, weights, sparsity=method)
            _print(_stream(lm, source, file, max_tokens, chosen, chunk), as_json)
        return
    text = read_text(file)

    from jaxinfer.cli.models import open_model
    from jaxinfer.decode import scoring
    from jaxinfer.progress import progress

    lm = open_model(model, dtype, weights, sparsity=method)
    tokens = _tokens(lm, text, max_tokens)
    with progress("scoring") as report:

        def show(done: int, total: int) -> None:
            work_begins()
            report(done, total)

        found = scoring.score(lm, tokens, chosen, chunk, show)
    o.note_if_whole(chosen, len(tokens))
    record = {
        "tokens": len(found.tokens),
        "nll": found.nll,
        "perplexity": found.perplexity,
        "cache_bytes": found.cache_bytes,
        "chunk": found.chunk,
        "policy": chosen.name,
        "model": lm.name,
        "sparsity": None if lm.sparsity is None else lm.sparsity.name,
    }
    _print(record | ({"log_probs": found.log_probs} if as_json and log_probs else {}), as_json)


def _stream(
    lm: "LM", file: BufferedIOBase, name: str, most: int | None, policy: "Policy", chunk: int | None
) -> Json:
    """The same record, of one pass in constant memory, with the mean nll of every 2048 tokens."""
    from jaxinfer.eval.stream import stream_perplexity
    from jaxinfer.eval.text_pieces import text_tokens
    from jaxinfer.progress import progress

    size = 0 if name == "-" else os.fstat(file.fileno()).st_size
    with progress("scoring") as report:

        def show(tokens: int) -> None:
            if most is not None:
                report(tokens, most)
            elif size:
                report(file.tell(), size)
            elif sys.stderr.isatty():  # of a pipe the end is not known
                print(f"\r{tokens} tokens", end="", file=sys.stderr, flush=True)

        tokens = _first(text_tokens(lm, pieces(file, name)), most)
        found = stream_perplexity(lm, tokens, policy, chunk=chunk, report=show)
    record = {
        "tokens": found.points[-1].end,
        "nll": found.nll,
        "perplexity": found.perplexity,
        "cache_bytes": found.cache_bytes,
        "chunk": found.chunk,
        "policy": policy.name,
        "model": lm.name,
        "sparsity": None if lm.sparsity is None else lm.sparsity.name,
        "curve": [[point.end, point.nll] for point in found.points],
    }
    return record | ({"stopped": found.stopped} if found.stopped else {})


def _first(arrays: "Iterable[np.ndarray]", most: int | None) -> "Iterator[np.ndarray]":
    """The first `most` tokens."""
    for array in arrays:
        yield array[:most]
        if most is not None:
            most -= len(array[:most])
            if most == 0:
                return


def _print(record: Json, as_json: bool) -> None:
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
