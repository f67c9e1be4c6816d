"""Decoding: a `Model` under `Options` makes a `Run`, whose rows end as `Completion`s.

`jaxinfer.lm.LM` is the facade above this room. An extension writes a `Draft`, or drives a `Run`.
"""

from jaxinfer.decode.batcher import Batcher, QueueFull
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.loop import Step
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.options import Options
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.results import Completion, Stats
from jaxinfer.decode.run import Run
from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.decode.scoring import Reading, Score
from jaxinfer.decode.slot_requests import Constraint
from jaxinfer.decode.speculation import Draft, Plan, Planned
from jaxinfer.decode.state import DecodeState, Requests
from jaxinfer.decode.stream import Stream
from jaxinfer.decode.ticket import Answer, Piece, RequestStats, Ticket

__all__ = [
    "Answer",
    "Batcher",
    "Completion",
    "Constraint",
    "DecodeState",
    "Draft",
    "Engine",
    "Model",
    "Options",
    "Piece",
    "Plan",
    "Planned",
    "Prefix",
    "Prompt",
    "QueueFull",
    "Reading",
    "RequestStats",
    "Requests",
    "Run",
    "Sampler",
    "SamplerRows",
    "Score",
    "Stats",
    "Step",
    "Stream",
    "Ticket",
]
