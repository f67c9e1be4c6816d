"""What a method of sparsity costs in quality, for what it reads and multiplies: perplexity, and as
that hides what sparsity does to longer answers (Sirius, arXiv 2409.03856), two tasks: copying what
was read, and the dense model's own greedy continuation.

Every token is sparse, those of prompts too; only GRIFFIN's prompt, a text's first half, is not, and
its numbers are of the second half. Texts have equally many tokens, and intervals are 95 %
bootstraps over texts; what is relative to the dense model is of the same tokens.

Axis letters: N texts, T tokens of each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.eval.perplexity import bootstrap_interval
from jaxinfer.eval.recall import recall, recall_metrics
from jaxinfer.eval.rouge import rouge
from jaxinfer.eval.selection import judged
from jaxinfer.lm import LM
from jaxinfer.sparsity.accounting import measure, shares
from jaxinfer.sparsity.baseline import BY_PROMPT, Baseline
from jaxinfer.sparsity.baselines import of_prompt
from jaxinfer.sparsity.masked import ChosenByPrompt
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.train.language_model import token_losses
from jaxinfer.typing import Json, Params

Report = Callable[[int, int], None]
BATCH = 4  # texts that are read at once


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The sizes of the generation tasks; 0 leaves one out."""

    recall_tokens: int = 32  # that are read, then copied
    recall_rows: int = 8
    prompts: int = 8  # texts that are continued
    prompt_tokens: int = 64
    new_tokens: int = 64


class SparsityEvaluation:
    """A dense model and held-out texts, on which methods are judged one after another.

    Args:
      lm: the dense model.
      rows: i32[N, T], the texts.
      tasks: the sizes of what is generated.
    """

    def __init__(self, lm: LM, rows: Int[np.ndarray, "N T"], tasks: Tasks = Tasks()):
        if rows.ndim != 2 or rows.shape[1] < 2:
            raise ValueError(f"evaluation needs rows of 2 tokens or more, got {list(rows.shape)}")
        if tasks.prompts and tasks.prompt_tokens > rows.shape[1]:
            raise ValueError(
                f"prompts of {tasks.prompt_tokens} tokens are longer than the texts of "
                f"{rows.shape[1]}; take longer texts or shorter prompts"
            )
        self.lm, self.rows, self.tasks = lm, np.asarray(rows, np.int32), tasks

    @functools.cached_property
    def dense_losses(self) -> np.ndarray:
        """f64[N, T - 1], nats."""
        return text_losses(self.lm.config, self.lm.params, self.rows)

    @functools.cached_property
    def dense_tokens(self) -> list[list[int]]:
        """The greedy continuations of the dense model."""
        return continuations(self.lm, self.prompts, self.tasks.new_tokens)

    @property
    def prompts(self) -> list[list[int]]:
        return self.rows[: self.tasks.prompts, : self.tasks.prompt_tokens].tolist()

    def judge(self, method: Sparsity | None = None, label: str | None = None) -> Json:
        """A row of the table: the method (None is the dense model) under its name or a label, what
        it uses, and its quality."""
        lm = self.lm.sparsified(method)
        losses = (
            self.dense_losses if method is None else text_losses(lm.config, lm.params, self.rows)
        )
        first = first_judged(lm.params, losses.shape[1])
        described = {"name": "dense"} if method is None else dict(method.describe())
        name = described.pop("name")
        row = {"method": label or name, **described}
        some = self.rows[:BATCH, :-1]
        densities = measure(lm.config, lm.params, jnp.asarray(some))
        if not densities.inputs:  # else all neurons are used, with some of their inputs
            row["used"] = float(np.mean(densities.blocks))
            row["used_per_layer"] = list(densities.blocks)
        if min(densities.heads) < 1:
            row["heads_per_layer"] = list(densities.heads)
        row |= asdict(shares(self.lm.params, lm.params, densities))
        row |= paired(self.dense_losses[:, first:], losses[:, first:])
        found = [one for one in judged(lm.config, lm.params, some) if one is not None]
        if found:
            row |= {"recall_per_layer": [one["recall"] for one in found]}
            row |= {"mass_per_layer": [one["mass"] for one in found]}
        return row | self._tasks(lm, method)

    def _tasks(self, lm: LM, method: Sparsity | None) -> Json:
        row, tasks = {}, self.tasks
        if tasks.recall_rows:
            found = recall(lm, sizes=(tasks.recall_tokens,), rows=tasks.recall_rows)
            row["copied"] = recall_metrics(found)["accuracy"]
        if not tasks.prompts:
            return row
        if isinstance(method, Baseline) and method.name == BY_PROMPT:
            found = [
                continued_by_prompt(self.lm, prompt, method, tasks.new_tokens)
                for prompt in self.prompts
            ]
        else:
            found = continuations(lm, self.prompts, tasks.new_tokens)
        row["agreement"] = agreement(self.dense_tokens, found)
        if lm.tokenizer is not None:
            theirs, ours = (
                [lm.tokenizer.decode(tokens) for tokens in texts]
                for texts in (self.dense_tokens, found)
            )
            row["rougeL"] = rouge(ours, theirs)["rougeL"]
        return row


def evaluate(
    lm: LM,
    methods: Sequence[tuple[str, Sparsity]],
    rows: Int[np.ndarray, "N T"],
    *,
    tasks: Tasks = Tasks(),
    report: Report = lambda done, total: None,
) -> list[Json]:
    """A row for the dense model and one for every method (label, method), in their order."""
    evaluation = SparsityEvaluation(lm, rows, tasks)
    found = [evaluation.judge()]
    for index, (label, method) in enumerate(methods):
        report(index, len(methods))
        found.append(evaluation.judge(method, label))
    report(len(methods), len(methods))
    return found


def text_losses(
    cfg: ModelConfig, params: Params, rows: Int[np.ndarray, "N T"]
) -> Float[np.ndarray, "N _"]:
    """f64[N, T - 1], nats per token, each text read in one piece."""
    found = []
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        padded = np.pad(some, ((0, BATCH - len(some)), (0, 0)))
        found.append(np.asarray(_losses(cfg, params, padded), np.float64)[: len(some)])
    return np.concatenate(found)


_losses = functools.partial(jax.jit, static_argnums=0)(token_losses)


def first_judged(params: Params, tokens: int) -> int:
    """The first of a text's predicted tokens that sparse blocks have a part in: behind GRIFFIN's
    prompt, else 0."""
    criteria = [getattr(layer["mlp"], "criterion", None) for layer in params["layers"]]
    return max(
        (one.prompt(tokens) for one in criteria if isinstance(one, ChosenByPrompt)), default=0
    )


def paired(
    dense: Float[np.ndarray, "N T"], sparse: Float[np.ndarray, "N T"], seed: int = 0
) -> Json:
    """The perplexity with its interval, and how many times the dense one it is on the same
    tokens."""
    counts = [sparse.shape[1]] * len(sparse)
    own = bootstrap_interval(sparse.sum(axis=1).tolist(), counts, seed=seed)
    ratio = bootstrap_interval((sparse - dense).sum(axis=1).tolist(), counts, seed=seed)
    return {
        "tokens": int(sparse.size),
        "perplexity": _exp(sparse.mean()),
        "low": _exp(own[0]),
        "high": _exp(own[1]),
        "relative": _exp((sparse - dense).mean()),
        "relative_low": _exp(ratio[0]),
        "relative_high": _exp(ratio[1]),
    }


def continuations(lm: LM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy continuation of every prompt."""
    found = lm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
    return [one.tokens for one in found]


def continued_by_prompt(lm: LM, prompt: list[int], method: Baseline, new_tokens: int) -> list[int]:
    """The greedy continuation by GRIFFIN: the dense model reads the prompt, and the neurons that it
    chose there go on."""
    dense = lm.session()
    dense.append(prompt)
    sparse = lm.sparsified(_OfPrompt(name=method.name, prompt=tuple(prompt), method=method))
    chat = sparse.session()
    chat.capacity = dense.capacity
    chat.put_back(dense.take_cache(), dense.tokens, dense.pending)
    return chat.generate(max_new_tokens=new_tokens, ignore_eos=True).tokens


def agreement(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """The share of the wanted tokens in front of each text's first difference."""
    pairs = zip(wanted, found, strict=True)
    equal = [np.asarray(a) == np.asarray(b[: len(a)]) for a, b in pairs]
    return float(np.mean([np.cumprod(one).mean() for one in equal]))


@dataclass(frozen=True, kw_only=True)
class _OfPrompt(Sparsity):
    """GRIFFIN's choice of one prompt."""

    prompt: tuple[int, ...]
    method: Baseline

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        return of_prompt(cfg, params, self.prompt, self.method.density, self.method.block_size)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
