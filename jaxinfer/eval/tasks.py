"""The evaluations by name, with the options of each, as the command line runs them.

A task turns a model and settings into the text length that memory refers to and a function that
measures one policy.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

from jaxinfer.arguments import shown
from jaxinfer.cache.policy import Policy
from jaxinfer.eval.documents import held_out_texts, token_stream
from jaxinfer.eval.line_retrieval import LINE, line_metrics, line_retrieval
from jaxinfer.eval.passkey import passkey, passkey_metrics
from jaxinfer.eval.perplexity import perplexity
from jaxinfer.eval.recall import recall, recall_metrics
from jaxinfer.eval.recompute import recompute_perplexity
from jaxinfer.eval.rouge import continuation_rouge
from jaxinfer.eval.stream import stream_perplexity
from jaxinfer.eval.tables import Row
from jaxinfer.lm import LM
from jaxinfer.plugins import meant
from jaxinfer.typing import Json

Report = Callable[[int, int], None]
Measure = Callable[[Policy, Report], Json]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of all tasks; None takes the task's default. Lists are as long as one likes."""

    texts: Sequence[str] = ()
    seed: int = 0
    chunk: int | None = None
    context: int | None = None
    tokens: int | None = None
    every: int | None = None
    repeat: bool | None = None
    recompute: int | None = None
    stride: int | None = None
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    samples: int | None = None
    scoring: str | None = None
    lines: int | None = None
    distances: tuple[int, ...] | None = None
    kind: str | None = None
    reference: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None

    def given(self, *names: str) -> Json:
        """Those of the named options that were given, as keyword arguments."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Task:
    """`prepare(lm, settings)` returns the length in tokens and the measure; `baseline` is the kind
    of the table's last row."""

    options: tuple[str, ...]
    prepare: Callable[[LM, Settings], tuple[int, Measure]]
    reads_texts: bool = False
    baseline: str = "streaming"


def prepare(name: str, lm: LM, settings: Settings) -> tuple[int, Measure]:
    """The length in tokens that the task's memory refers to, and its measure."""
    check_settings(name, settings)
    return TASKS[name].prepare(lm, settings)


def check_settings(name: str, settings: Settings) -> None:
    """Refuses an unknown task, and options that the task would ignore."""
    if name not in TASKS:
        known = [*TASKS, "sparsity"]  # which compares methods instead of policies
        raise ValueError(
            f"unknown evaluation {shown(name)}{meant(name, known)} known are {', '.join(known)}"
        )
    ignored = {f.name for f in fields(Settings)} - {"texts", "seed", *TASKS[name].options}
    for option in sorted(settings.given(*ignored)):
        users = [other for other, task in TASKS.items() if option in task.options]
        flag = "--" + option.replace("_", "-")
        raise ValueError(f"{flag} is an option of {', '.join(users)}, not of {name}; leave it out")
    if settings.stride is not None and settings.recompute is None:
        raise ValueError("--stride is a step of --recompute; give both or none")
    for option in ("lengths", "depths", "distances"):
        if getattr(settings, option) == ():
            raise ValueError(f"--{option} is empty; give numbers such as 1,2,3")


def with_texts(
    name: str, settings: Settings, texts: Sequence[str], source: str, documents: int | None
) -> Settings:
    """The settings with the texts given, else a source's held-out ones, where the task reads
    any."""
    if not TASKS[name].reads_texts:
        if texts:
            raise ValueError(f"{name} makes its own text; leave --text out")
        return settings
    if not texts:
        texts = held_out_texts(source, documents)
    if not any(text.strip() for text in texts):
        raise ValueError("the texts are empty; give some text")
    return replace(settings, texts=tuple(texts))


def given(settings: Settings) -> Json:
    """The options that were given, for a record; texts only as their number."""
    names = [f.name for f in fields(Settings) if f.name not in ("texts", "seed")]
    texts = {"texts": len(settings.texts)} if settings.texts else {}
    return settings.given(*names) | texts


def recompute_row(lm: LM, settings: Settings, report: Report) -> Row:
    """The row of sliding-window re-computation, which keeps no cache."""
    assert settings.recompute is not None
    tokens = settings.tokens or STREAM_TOKENS
    found = recompute_perplexity(
        lm,
        token_stream(lm, settings.texts, tokens, repeat=bool(settings.repeat)),
        window=settings.recompute,
        report=lambda done: report(done, tokens),
        **settings.given("stride", "every"),
    )
    points = [asdict(point) for point in found.points]
    return Row("recompute", found.method, 0.0, 0.0, found.metrics(), points)


def _perplexity(lm: LM, settings: Settings) -> tuple[int, Measure]:
    rows = [lm.encode(text)[: settings.tokens] for text in settings.texts]
    longest = max(map(len, rows))
    context = settings.context or min(longest, lm.config.max_positions)

    def measure(policy: Policy, report: Report) -> Json:
        options = settings.given("chunk", "seed")
        return perplexity(lm, rows, policy, context=context, report=report, **options).metrics()

    return min(context, longest), measure


STREAM_TOKENS = 8192


def _stream(lm: LM, settings: Settings) -> tuple[int, Measure]:
    wanted = settings.tokens or STREAM_TOKENS
    pieces = list(token_stream(lm, itertools.islice(settings.texts, 1)))
    if not settings.repeat and len(settings.texts) == 1:
        wanted = min(wanted, sum(map(len, pieces)))

    def measure(policy: Policy, report: Report) -> Json:
        tokens = token_stream(lm, settings.texts, wanted, repeat=bool(settings.repeat))
        options = settings.given("every", "chunk")
        found = stream_perplexity(
            lm, tokens, policy, report=lambda done: report(done, wanted), **options
        )
        details = [asdict(point) for point in found.points]
        return found.metrics() | {"cache_bytes": found.cache_bytes, "details": details}

    return wanted, measure


def _passkey(lm: LM, settings: Settings) -> tuple[int, Measure]:
    lengths = settings.lengths or (256, 512, 1024)

    def measure(policy: Policy, report: Report) -> Json:
        options = settings.given("depths", "samples", "scoring", "seed")
        cells = passkey(lm, policy, lengths=lengths, report=report, **options)
        return passkey_metrics(cells) | {"details": [asdict(cell) for cell in cells]}

    return max(lengths), measure


def _lines(lm: LM, settings: Settings) -> tuple[int, Measure]:
    count = settings.lines or 100
    per_line = len(lm.encode(LINE.format(line=count, number=1234), continues=True))

    def measure(policy: Policy, report: Report) -> Json:
        options = settings.given("distances", "every", "scoring", "seed")
        found = line_retrieval(lm, policy, lines=count, report=report, **options)
        return line_metrics(found) | {"details": [asdict(one) for one in found]}

    return count * per_line, measure


def _recall(lm: LM, settings: Settings) -> tuple[int, Measure]:
    sizes = settings.lengths or (16, 64, 256)
    per_size = 4 if settings.kind == "associative" else 2

    def measure(policy: Policy, report: Report) -> Json:
        options = settings.given("kind", "seed", "chunk")
        options |= {"rows": settings.samples} if settings.samples else {}
        found = recall(lm, policy, sizes=sizes, report=report, **options)
        return recall_metrics(found) | {"details": [asdict(one) for one in found]}

    return per_size * max(sizes), measure


def _rouge(lm: LM, settings: Settings) -> tuple[int, Measure]:
    def measure(policy: Policy, report: Report) -> Json:
        options = settings.given("reference", "prompt_tokens", "new_tokens")
        return continuation_rouge(lm, settings.texts, policy, report=report, **options)

    return (settings.prompt_tokens or 256) + (settings.new_tokens or 64), measure


TASKS = {
    "perplexity": Task(("context", "tokens", "chunk"), _perplexity, reads_texts=True),
    "stream": Task(
        ("tokens", "every", "chunk", "repeat", "recompute", "stride"),
        _stream,
        reads_texts=True,
        baseline="window",
    ),
    "passkey": Task(("lengths", "depths", "samples", "scoring"), _passkey),
    "lines": Task(("lines", "distances", "every", "scoring"), _lines),
    "recall": Task(("lengths", "kind", "samples", "chunk"), _recall),
    "rouge": Task(("reference", "prompt_tokens", "new_tokens"), _rouge, reads_texts=True),
}
