"""Options that several verbs share, and the objects that their texts mean."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli.notices import note
from jaxinfer.files import quoted

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.sparsity.method import Sparsity

LARGEST = 2**31 - 1  # what an int32 counts
ESCAPE = re.compile(r"\\(n|t|r|\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
NAMED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

# Names as `--help` shows them; that they are all of the library's is tested, as reading them from
# there would make `--help` wait for it.
MODELS = (
    "smollm2-135m (fetched once), tiny-llama, tiny-draft, tiny-opt, a Hugging Face folder, a GGUF "
    "file or a converted folder."
)
DEFAULT_MODEL = f"{MODELS} Left out: smollm2-135m."
POLICIES = (
    "Cache policy: full, kivi or kivi2 (2 bits), kivi4, streaming (a window), h2o (heavy hitters), "
    "less (h2o with a low-rank state), one that an installed package offers, or a file of one per "
    "layer (jaxinfer diagnose --save POLICY.json)."
)
POLICY_ARGUMENTS = (
    "Arguments of the policy. kivi, kivi2, kivi4: bits, group, residual, key_bits, value_bits, "
    "value_flush, flush_order, key_grouping, value_grouping, scale_dtype, residual_dtype, "
    "rotation. streaming: sinks, window, positions, bits, group, residual. h2o: heavy, recent "
    "(tokens, or a share of the prompt below 1). less: base, feature_maps, and those of the base."
)
DRAFTS = (
    "prompt-lookup, exit:N (the first N layers), draft-smollm2-135m, draft-tiny-llama, a folder of "
    "`jaxinfer train draft`, or a smaller model of the same tokenizer."
)
SPARSITIES = (
    "Sparsity of the blocks: deja_vu, lte, the folder of what one of them has learned; to compare "
    "with: oracle, contribution-oracle, random, griffin, moefication-oracle (static, cats, teal, "
    "wina, moefication learn from a text: jaxinfer eval sparsity); or one of an installed package."
)
SPARSITY_ARGUMENTS = (
    "Arguments of the sparsity. deja_vu: source, density, heads (shares up to 1), keys (always or "
    "deferred). lte: source. "
    "Those to compare with: density, block_size (neurons)."
)
SOURCES = "anarchism, brown, devil, essays, jargon, kjv or pydoc"

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help=DEFAULT_MODEL),
]
PolicyOption = Annotated[str, typer.Option("--policy", help=POLICIES)]
PolicyArgsOption = Annotated[
    str, typer.Option("--policy-args", metavar="KEY=VALUE,...", help=POLICY_ARGUMENTS)
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
    list[str],
    typer.Option(
        "--stop", help="End the text before this string, in which \\n is a line's end; repeatable."
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option("--draft", help=f"What guesses ahead: {DRAFTS}"),
]
TreeOption = Annotated[
    str | None,
    typer.Option("--tree", help="Tree file of `jaxinfer tree --save`; default: measure."),
]
SparsityOption = Annotated[str | None, typer.Option("--sparsity", help=SPARSITIES)]
SparsityArgsOption = Annotated[
    str, typer.Option("--sparsity-args", metavar="KEY=VALUE,...", help=SPARSITY_ARGUMENTS)
]


def make_policy(name: str, arguments: str) -> "Policy":
    """The policy that `--policy NAME --policy-args key=value,...` mean."""
    from jaxinfer.cache.presets import resolve

    return resolve({**key_values(arguments, "--policy-args"), "name": name})


def make_sparsity(name: str | None, arguments: str, model: str | None) -> "Sparsity | None":
    """The method that `--sparsity NAME --sparsity-args key=value,...` mean for a model."""
    from jaxinfer.io.model_index import DEFAULT
    from jaxinfer.names import sparsity_of

    if name is None:
        if arguments:
            raise ValueError("--sparsity-args are those of --sparsity; add --sparsity")
        return None
    model = DEFAULT if model is None else Path(model).name
    return sparsity_of({**key_values(arguments, "--sparsity-args"), "name": name}, model)


def note_if_whole(policy: "Policy", length: int) -> None:
    """Says so when a policy has nothing to drop or to round in a text of `length` tokens."""
    from jaxinfer.eval.memory import kept_in_full

    kept = kept_in_full(policy, length)
    if kept is not None and length <= kept:
        note(
            f"note: policy {policy.name} keeps {kept} tokens in full, more than the {length} that "
            "are read: its figures are those of the full cache; take a longer text, or a smaller "
            "window or residual"
        )


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


def stop_strings(texts: list[str]) -> tuple[str, ...]:
    r"""What `--stop` means: \n, \t, \r, \xHH and \uHHHH are characters, \\ is a backslash, and
    any other backslash stands for itself."""
    if "" in texts:
        raise ValueError("--stop is empty; give a text, or leave it out")
    return tuple(ESCAPE.sub(_unescaped, text) for text in texts)


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if code[0] in "xu" else NAMED[code]


def print_json(record: Mapping[str, object], indent: int | None = None) -> None:
    """One JSON value on standard output; numbers that JSON lacks become null."""
    print(json.dumps(_finite(record), indent=indent, allow_nan=False), flush=True)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
