"""Options that several verbs share, and the objects that their texts mean."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.files import quoted

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy

LARGEST = 2**31 - 1  # what an int32 counts

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Name, Hugging Face folder, GGUF file or converted folder."),
]
PolicyOption = Annotated[str, typer.Option("--policy", help="Cache policy.")]
PolicyArgsOption = Annotated[
    str, typer.Option("--policy-args", metavar="KEY=VALUE,...", help="Arguments of the policy.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16; default float32 on CPU, bfloat16 on GPU."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="int8 (faster on a CPU) or int4 stores weights in fewer bits."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy decoding.")
]
TopKOption = Annotated[
    int, typer.Option("--top-k", max=LARGEST, help="Keep the k likeliest tokens; 0 keeps all.")
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", help="Sample from the likeliest tokens of this total probability."),
]
MinPOption = Annotated[
    float, typer.Option("--min-p", help="Keep tokens at least this likely, as a share of the best.")
]
PenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 avoids tokens already used.")
]
BiasOption = Annotated[
    list[str],
    typer.Option("--logit-bias", metavar="ID=VALUE", help="Add to a token's logit; repeatable."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST, help="Random seed.")]
TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, max=LARGEST, help="Most tokens to generate.")
]
StopOption = Annotated[
    list[str], typer.Option("--stop", help="End the text before this string; repeatable.")
]
DraftOption = Annotated[
    str | None,
    typer.Option("--draft", help="Draft model, prompt-lookup, or exit:N (the first N layers)."),
]
TreeOption = Annotated[
    str | None,
    typer.Option("--tree", help="Tree file of `jaxinfer tree --save`; default: measure."),
]
SparsityOption = Annotated[
    str | None, typer.Option("--sparsity", help="Not available in this version.")
]


def make_policy(name: str, arguments: str) -> "Policy":
    """The policy that `--policy NAME --policy-args key=value,...` mean."""
    from jaxinfer.cache.presets import resolve

    return resolve({**key_values(arguments, "--policy-args"), "name": name})


def key_values(text: str, option: str) -> dict[str, object]:
    """`a=1,b=x` as {"a": 1, "b": "x"}; values are JSON where they read as JSON, else text."""
    out: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier() or key.strip() == "name":
            raise ValueError(f"{option} expects key=value,..., got {quoted(item)}")
        try:
            out[key.strip()] = json.loads(value)
        except ValueError:
            out[key.strip()] = value.strip()
    return out


def logit_biases(texts: list[str]) -> tuple[tuple[int, float], ...]:
    """The pairs that `--logit-bias ID=VALUE ...` mean; the last one of a token counts."""
    return tuple(sorted(dict(map(_bias, texts)).items()))


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        pair = int(token), float(value)
    except ValueError:
        raise ValueError(f"--logit-bias expects ID=VALUE such as 42=-inf, got {text!r}") from None
    if math.isnan(pair[1]) or pair[1] == math.inf:
        raise ValueError(f"--logit-bias must be a number or -inf, got {text!r}")
    return pair


def read_text(path: str) -> str:
    """A text file in UTF-8; `-` is standard input."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def print_json(record: Mapping[str, object], indent: int | None = None) -> None:
    """One JSON value on standard output; numbers that JSON lacks become null."""
    print(json.dumps(_finite(record), indent=indent, allow_nan=False), flush=True)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
