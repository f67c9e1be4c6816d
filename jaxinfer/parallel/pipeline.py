"""`Pipeline`: a model that the stages of a ring serve, behind the scheduler and batcher of those in
this process.

This process has no weights and no caches. It keeps what is drawn: the sampler of each row, its
random key, its tokens. The last stage sends logits, 4 bytes a word of the vocabulary and row.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxinfer.arguments import of_kind, whole
from jaxinfer.cache.policy import Cache
from jaxinfer.cache.presets import resolve
from jaxinfer.decode.capacity import ENDLESS_BUFFER, LONGEST, capacity_for, check_room, is_endless
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket
from jaxinfer.decode.model import Model
from jaxinfer.decode.options import Options
from jaxinfer.decode.prompt_reader import piece_size
from jaxinfer.decode.request import Request
from jaxinfer.decode.scheduler import Scheduler
from jaxinfer.decode.serving import MOST_SLOTS
from jaxinfer.decode.slot_requests import Extras, Kind
from jaxinfer.decode.slot_warmup import SAMPLERS, lengths
from jaxinfer.decode.slots import Row, slot_programs
from jaxinfer.decode.stream import STREAM_STEPS
from jaxinfer.io.dtypes import DType, resolve_dtype
from jaxinfer.io.load import load_checkpoint, source_text
from jaxinfer.models.params import abstract_params
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, check_cache
from jaxinfer.parallel.journal import Journal
from jaxinfer.parallel.pipeline_batch import PipelineBatch
from jaxinfer.parallel.pipeline_reader import PipelineReader
from jaxinfer.parallel.processes import Launcher
from jaxinfer.parallel.ring import Ring
from jaxinfer.parallel.transport import Delay


class StageShape(NamedTuple):
    """The layers of a stage, and the devices that divide them."""

    layers: range
    degree: int = 1


class Pipeline:
    """A model that a ring of stages serves; what `jaxinfer.decode.Batcher` takes.

    Args:
      source: the model, as `ji.load` takes it; every stage must be able to read it.
      stages: whose layers follow each other and are all of the model's.
      policy: how caches keep tokens: a name, or a mapping with "name" and arguments.
      slots: rows at once; they run in as many groups as there are stages.
      context: tokens of a row, prompt and answer together.
      chunk: tokens of a prompt that are read between two rounds of decoding.
      dtype: of the parameters, as in `ji.load`.
      launcher: where the stages are started; None is this machine.
      delay: of the links between stages, to try out slower ones.
      silence_s: seconds after which a stage that does not answer counts as lost.

    Raises:
      ValueError: the stages are not the model's, or an option is out of range.
      RuntimeError: the stages could not be started.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        stages: Sequence[StageShape],
        *,
        policy: str | Mapping[str, object] = "full",
        slots: int = 8,
        context: int = 2048,
        chunk: int = 64,
        dtype: DType = None,
        launcher: Launcher | None = None,
        delay: Delay | None = None,
        silence_s: float = 30.0,
    ):
        of_kind("policy", policy, (str, Mapping), "a name, or a mapping with 'name' and arguments")
        source, kind = source_text(source), resolve_dtype(dtype)
        found = load_checkpoint(source, kind, layers=range(0))
        config = found.config
        check_stages(stages, config.num_layers)
        if config.hyena is not None:
            raise ValueError(
                "a pipeline serves models of attention; this one has long convolutions, use "
                "lm.batcher()"
            )
        params = abstract_params(config, kind)
        self.model = Model(config, params, found.tokenizer, os.path.basename(source), "reference")
        self.slots = whole("slots", slots, most=MOST_SLOTS)
        self.context = whole("context", context, least=2, most=LONGEST)
        self.chunk = bucket(whole("chunk", chunk, most=LONGEST), 1)
        self.policy = resolve(policy).sized(bucket(self.context, SMALLEST_CAPACITY))
        if not is_endless(self.model, self.policy):
            self.context = min(self.context, config.max_positions)
            self.policy = resolve(policy).sized(bucket(self.context, SMALLEST_CAPACITY))
        self.capacity = capacity_for(self.model, self.policy, self.context, 0)
        geometry = cache_geometry(config, self.capacity, str(kind))
        check_cache(config, self.policy, geometry, params)
        self.row_bytes = cache_bytes_per_row(config, self.policy, geometry, params)
        self.groups = len(stages)
        self.rows = math.ceil(self.slots / self.groups)
        self.buffer, self.steps = ENDLESS_BUFFER, STREAM_STEPS
        self.engine, self.journal = self.model.engine, Journal()
        self.draws = 0  # of groups, so far
        self._programs = slot_programs(self.engine)
        shared = {
            "source": os.path.abspath(source) if os.path.exists(source) else source,
            "dtype": kind.name, "policy": policy if isinstance(policy, str) else dict(policy),
            "capacity": self.capacity, "sized": bucket(self.context, SMALLEST_CAPACITY),
            "groups": self.groups, "rows": self.rows,
        }  # fmt: skip
        told = [
            shared | {"layers": [one.layers.start, one.layers.stop], "degree": one.degree}
            for one in stages
        ]
        self.ring = Ring(told, launcher=launcher, delay=delay, silence_s=silence_s)

    @property
    def piece(self) -> int:
        """Tokens of a prompt that are read at once, at most."""
        return piece_size(self.policy.layer_policies(self.model.config.num_layers), self.chunk)

    @property
    def programs(self) -> dict[str, int]:
        """Compiled programs of this process by name; stages have their own."""
        return {name: len(one) for name, one in self.engine.programs.items() if len(one)}

    @property
    def prefix_bytes(self) -> int:
        """0: nothing stays of texts."""
        return 0

    @property
    def fingerprint(self) -> str:
        """A short hash of the model's configuration, its weights, and how stages divide them."""
        text = f"{self.model.config!r} {self.ring.weights} {self.ring.stages}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def batch(self) -> PipelineBatch:
        """Slots without rows."""
        return PipelineBatch(self)

    def reader(self, request: Request) -> PipelineReader:
        """What reads the prompt of a request."""
        entry = self.journal.open(request, request.tokens)
        return PipelineReader(self, request, entry)

    def row(self, request: Request, reader: object) -> Row:
        """The row of a request whose prompt is read, with its first token drawn."""
        assert isinstance(reader, PipelineReader)
        requests, request.cache_bytes = request.arrays(), self.row_bytes
        cache = Cache(length=jnp.asarray([len(request.tokens)], jnp.int32), layers=())
        state = self.engine.init_state(cache, reader.logits, requests, request.seen(), self.buffer)
        return Row(state, requests)

    def leaves(self, request: Request, batch: object) -> None:
        """Nothing is noted of a row that leaves."""

    def check_room(self, request: Request) -> None:
        """Refuses a request that a slot cannot hold, or that stages cannot serve.

        Raises:
          ValueError: prompt and answer are longer than the context, or log-probabilities of the
            prompt are asked for.
        """
        prompt, new = len(request.tokens), request.limit
        if request.extras.prompt_log_probs:
            raise ValueError(
                "a pipeline does not give log-probabilities of a prompt; leave them out, or serve "
                "the model in one process"
            )
        if prompt + new > self.context:
            raise ValueError(
                f"{prompt} prompt + {new} new tokens exceed the {self.context} of a slot; shorten "
                "the prompt, lower max_new_tokens, or serve with a larger context"
            )
        check_room(self.model, self.policy, self.capacity, prompt, new)

    def warm(self) -> None:
        """Compiles whatever requests may need, by serving some of each kind."""
        scheduler = Scheduler(self)
        for length in lengths(self.context - 2, self.piece):
            scheduler.waiting.append(self._example(length, Kind.GREEDY))
        for kind in Kind:
            scheduler.waiting += [self._example(1, kind) for _ in range(self.groups + 1)]
        while not scheduler.idle:
            scheduler.turn()
        self.ring.forget()  # rows of others may have been overwritten

    def close(self) -> None:
        """Ends the stages."""
        self.ring.close()

    def _example(self, length: int, kind: Kind) -> Request:
        opts = Options(sampler=SAMPLERS[kind], max_new_tokens=2, ignore_eos=True)
        return Request(self.model, [0] * length, opts, Extras())


def check_stages(stages: Sequence[StageShape], layers: int) -> None:
    """Refuses stages whose layers are not all of the model's, in order.

    Raises:
      ValueError: they are not.
    """
    expected = 0
    for number, one in enumerate(stages):
        whole(f"devices of stage {number}", one.degree, most=1024)
        if one.layers.start != expected or one.layers.step != 1 or not one.layers:
            raise ValueError(
                f"stage {number} has layers {one.layers.start} to {one.layers.stop}; expected one "
                f"or more from {expected} on"
            )
        expected = one.layers.stop
    if expected != layers:
        raise ValueError(f"the stages have {expected} layers, the model {layers}")
