"""Seconds and bytes of a stage: the cost model (HexGen, arXiv 2311.11514, section 3).

A stage is `layers` layers on `degree` accelerators of one machine. One visit of a request to it
costs, for each layer, the scan of its weights at memory speed, its products at arithmetic speed,
and two all-reduces, each a reduce-scatter and an all-gather: 4 (n - 1) messages. A prompt is one
visit, every later token another; between stages travel the activations.

`formula="published"` is the paper's sum: as many decode steps as there are output tokens, and
neither scores, reads of the cache, ends of the model, broadcast nor the way back of a token.
`"phases"` counts all of these, and the prompt's visit as the one that gives the first token.
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxinfer.arguments import of_kind, one_of, real, whole
from jaxinfer.fields import known_fields
from jaxinfer.parallel.hexgen.inventory import Cluster, Gpu, Link
from jaxinfer.parallel.hexgen.layouts import StageTable
from jaxinfer.parallel.hexgen.sizes import MOST_LAYERS, ModelSizes
from jaxinfer.typing import Json

Formula = Literal["phases", "published"]
Times = NDArray[np.float64]
GIB = 2**30
MOST_DEGREE, MOST_ROWS, MOST_TOKENS = 64, 4096, 2**24


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What planning takes for granted.

    Args:
        formula: see the module.
        degrees: of tensor parallelism that a stage may have.
        headroom: the part of an accelerator's memory that may be planned with.
        reserve_bytes: of every accelerator, for its runtime and compiler.
        rows: requests in flight whose caches every stage has room for.
        batch: requests that pass a stage together; their time is shared.
        visit_s: of every visit to a stage, such as dispatch.
    """

    formula: Formula = "phases"
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    headroom: float = 0.9
    reserve_bytes: float = 0.5 * GIB
    rows: int = 4
    batch: int = 1
    visit_s: float = 0.0

    def __post_init__(self):
        one_of("formula", self.formula, get_args(Formula))
        of_kind("degrees", self.degrees, tuple, "a tuple of rising numbers")
        for degree in self.degrees:
            whole("degrees", degree, 1, MOST_DEGREE)
        if not self.degrees or list(self.degrees) != sorted(set(self.degrees)):
            raise ValueError(f"degrees must be rising numbers such as (1, 2), got {self.degrees}")
        real("headroom", self.headroom, 0.01, 1.0)
        real("reserve_bytes", self.reserve_bytes, 0.0, 1e30)
        whole("rows", self.rows, 1, MOST_ROWS)
        whole("batch", self.batch, 1, MOST_ROWS)
        real("visit_s", self.visit_s, 0.0, 1e6)

    @classmethod
    def published(cls, **given) -> "Assumptions":
        """The paper's: its formula, all of the memory, one request."""
        paper = {"formula": "published", "headroom": 1.0, "reserve_bytes": 0.0, "rows": 1}
        return cls(**(paper | given))

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `Assumptions.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "Assumptions":
        """The assumptions that `to_dict` wrote; ValueError where it holds anything else."""
        return cls(**known_fields(cls, data))


@dataclass(frozen=True)
class Costs:
    """Times and memory of `model` on the machines of `cluster`.

    Tokens may be arrays that broadcast against each other; seconds then are such an array.
    """

    cluster: Cluster
    model: ModelSizes
    assumptions: Assumptions = Assumptions()

    @property
    def is_published(self) -> bool:
        """Whether the paper's formula counts."""
        return self.assumptions.formula == "published"

    def prefill_s(self, machine: int, degree: int, layers: int, prompt: ArrayLike) -> Times:
        """Seconds in which `layers` layers read a prompt of so many tokens."""
        tokens, batch = np.asarray(prompt, float), self.assumptions.batch
        products = batch * tokens * self._token_s(machine, degree)
        if not self.is_published:  # the causal half of the scores
            products = products + batch * tokens**2 / 2 * self._score_s(machine, degree)
        one = self._scan_s(machine, degree) + products
        return layers * (one + self._reduce_s(machine, degree, batch * tokens))

    def decode_s(
        self, machine: int, degree: int, layers: int, context: ArrayLike, rows: ArrayLike = 1
    ) -> Times:
        """Seconds of one step of `layers` layers, in which `rows` rows that have `context` tokens
        each gain one."""
        context, rows = np.asarray(context, float), np.asarray(rows, float)
        one = self._scan_s(machine, degree) + rows * self._token_s(machine, degree)
        if not self.is_published:
            gpu = self._gpu(machine)
            share = self.model.attention_share(degree)
            read = self._cache_bytes(context) * share / (gpu.bytes_per_s * gpu.bandwidth_share)
            one = one + rows * (context * self._score_s(machine, degree) + read)
        return layers * (one + self._reduce_s(machine, degree, rows))

    def ends_s(self, machine: int, degree: int, tokens: ArrayLike, last: bool) -> Times:
        """Seconds of a visit beside its layers: dispatch, the broadcast of `tokens` tokens inside
        the stage, and in the last stage the head for one token of each row."""
        tokens = np.asarray(tokens, float)
        visit = self.assumptions.visit_s + 0.0 * tokens
        if self.is_published:
            return visit
        link, gpu = self._link(machine, machine), self._gpu(machine)
        part = tokens * self._token_bytes / (degree * link.bytes_per_s)
        visit = visit + 2 * (degree - 1) * (link.latency_s + part)  # scatter, then all-gather
        if last:
            read = self.model.head_bytes / (gpu.bytes_per_s * gpu.bandwidth_share)
            batch = self.assumptions.batch
            products = batch * self.model.head_flops / (gpu.flops_per_s * gpu.compute_share)
            visit = visit + (read + products) / degree
        return visit

    def hop_s(self, one: int, other: int, tokens: ArrayLike) -> Times:
        """Seconds in which the activations of `tokens` tokens pass from machine to machine."""
        link = self._link(one, other)
        return link.latency_s + np.asarray(tokens, float) * self._token_bytes / link.bytes_per_s

    def stage_s(
        self,
        machine: int,
        degree: int,
        layers: int,
        last: bool,
        prompt: ArrayLike,
        output: ArrayLike,
    ) -> Times:
        """Seconds of one stage for whole requests."""
        prompt, output = np.asarray(prompt, float), np.asarray(output, float)
        batch, steps = self.assumptions.batch, self._steps(output)
        context = prompt + output / 2  # the mean of what the steps attend to
        total = self.prefill_s(machine, degree, layers, prompt)
        total = total + steps * self.decode_s(machine, degree, layers, context, batch)
        if self.is_published:  # the first token's scan is that of the prompt
            total = total - layers * self._scan_s(machine, degree)
        ends = self.ends_s(machine, degree, batch * prompt, last)
        return total + ends + steps * self.ends_s(machine, degree, batch, last)

    def request_hop_s(self, one: int, other: int, prompt: ArrayLike, output: ArrayLike) -> Times:
        """Seconds of all hops of whole requests from machine `one` to `other`."""
        batch = self.assumptions.batch
        prompt, steps = np.asarray(prompt, float), self._steps(output)
        return self.hop_s(one, other, batch * prompt) + steps * self.hop_s(one, other, batch)

    def back_s(self, last: int, first: int, output: ArrayLike) -> Times:
        """Seconds in which the tokens of whole requests return from the last stage to the first; a
        token is a few bytes, so that only latency counts."""
        steps = self._steps(output)
        return 0.0 * steps if self.is_published else steps * self._link(last, first).latency_s

    def memory_bytes(
        self, degree: int, layers: int, first: bool, last: bool, context: int
    ) -> float:
        """Bytes on each accelerator of a stage with rows of `context` tokens: weights, caches and
        four buffers of activations."""
        fixed, each = self._fixed_bytes(degree, first, last, context), self._layer_bytes
        return fixed + layers * each(degree, context)

    def room_bytes(self, machine: int) -> float:
        """Bytes of an accelerator that may be planned with."""
        assumed = self.assumptions
        return self._gpu(machine).memory_bytes * assumed.headroom - assumed.reserve_bytes

    def most_layers(self, machine: int, degree: int, first: bool, last: bool, context: int) -> int:
        """How many layers fit into a stage."""
        free = self.room_bytes(machine) - self._fixed_bytes(degree, first, last, context)
        most = free / self._layer_bytes(degree, context) * (1 + 1e-12)
        return max(0, math.floor(min(most, MOST_LAYERS)))

    def row_share(
        self, machine: int, degree: int, layers: int, first: bool, last: bool, context: ArrayLike
    ) -> Times:
        """The part of the memory beside a stage's weights that a row of `context` tokens takes."""
        context = np.asarray(context, float)
        row = layers * self._cache_bytes(context) * self.model.attention_share(degree)
        row = row + 4 * context * self._token_bytes
        free = self.room_bytes(machine) - self._weight_bytes(degree, layers, first, last)
        return row / free if free > 0 else np.full(context.shape, np.inf)

    def table(self, prompt: float, output: float, context: int) -> StageTable:
        """What the search for layouts needs, for requests of this length.

        Args:
            prompt, output: tokens, whose times count.
            context: tokens, whose caches must fit.
        """
        machines, degrees = range(len(self.cluster.machines)), self.assumptions.degrees
        steps = output if self.is_published else output - 1
        layer, stage, last = (np.zeros((len(machines), len(degrees))) for _ in range(3))
        caps = np.zeros((len(machines), len(degrees), 2, 2), int)
        hop, back = np.zeros((2, len(machines), len(machines)))
        for m, (t, n) in itertools.product(machines, enumerate(degrees)):
            plain = self.stage_s(m, n, 0, False, prompt, output)
            layer[m, t] = self.stage_s(m, n, 1, False, prompt, output) - plain
            stage[m, t] = plain
            last[m, t] = self.stage_s(m, n, 0, True, prompt, output) - plain
            for first, end in itertools.product((0, 1), (0, 1)):
                caps[m, t, first, end] = self.most_layers(m, n, bool(first), bool(end), context)
        for i, j in itertools.product(machines, machines):
            hop[i, j] = self.request_hop_s(i, j, prompt, output)
            back[i, j] = self.back_s(i, j, output) if steps > 0 else 0.0
        return StageTable(degrees, layer, stage, last, caps, hop, back)

    # one visit, one layer

    def _steps(self, output: ArrayLike) -> Times:
        return np.asarray(output, float) - (0 if self.is_published else 1)

    @functools.cached_property
    def _token_bytes(self) -> float:
        return self.model.hidden * self.model.number_bytes

    def _gpu(self, machine: int) -> Gpu:
        return self.cluster.machines[machine].gpu

    def _link(self, one: int, other: int) -> Link:
        return self.cluster.link(one, other)

    def _scan_s(self, machine: int, degree: int) -> float:
        gpu = self._gpu(machine)
        read = self._weight_bytes(degree, 1, False, False)
        return read / (gpu.bytes_per_s * gpu.bandwidth_share)

    def _token_s(self, machine: int, degree: int) -> float:
        gpu, model = self._gpu(machine), self.model
        products = model.attention_flops * model.attention_share(degree)
        products += model.mlp_flops * model.mlp_share(degree)
        return products / (gpu.flops_per_s * gpu.compute_share)

    def _score_s(self, machine: int, degree: int) -> float:
        gpu, share = self._gpu(machine), self.model.attention_share(degree)
        return self.model.score_flops * share / (gpu.flops_per_s * gpu.compute_share)

    def _reduce_s(self, machine: int, degree: int, tokens: ArrayLike) -> Times:
        link = self._link(machine, machine)
        part = np.asarray(tokens, float) * self._token_bytes / (degree * link.bytes_per_s)
        return 4 * (degree - 1) * (link.latency_s + part)

    # memory

    def _cache_bytes(self, context: ArrayLike) -> Times:
        model = self.model
        return model.cache_bytes_per_row + np.asarray(context, float) * model.cache_bytes_per_token

    def _layer_bytes(self, degree: int, context: int) -> float:
        cache = self.assumptions.rows * float(self._cache_bytes(context))
        cache *= self.model.attention_share(degree)
        return self._weight_bytes(degree, 1, False, False) + cache

    def _weight_bytes(self, degree: int, layers: int, first: bool, last: bool) -> float:
        model = self.model
        layer = model.attention_bytes * model.attention_share(degree)
        layer += model.mlp_bytes * model.mlp_share(degree)
        ends = first * model.embed_bytes
        ends += last * (0.0 if first and model.tied else model.head_bytes)
        return layers * layer + ends / degree

    def _fixed_bytes(self, degree: int, first: bool, last: bool, context: int) -> float:
        buffers = 4 * self.assumptions.rows * context * self._token_bytes
        return self._weight_bytes(degree, 0, first, last) + buffers
