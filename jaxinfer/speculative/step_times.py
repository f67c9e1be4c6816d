"""The times that the choice of a tree needs: of steps by their nodes, and of draft passes."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.model import Model
from jaxinfer.decode.options import Options
from jaxinfer.decode.run import Run
from jaxinfer.decode.sampling import Sampler
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.nn.quantized import size_of
from jaxinfer.progress import Report, silent
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.speculative.topology import Topology

SIZES = (2, 3, 4, 6, 8, 12, 16)  # of trees whose verification is timed on a CPU
STEPS, LARGE = 32, 30_000_000  # that are timed at once; a quarter of them for larger models
ROUNDS = 15  # of timing; a third of them for larger models
PASSES = 4  # draft passes of the chain whose time, without the verification's, gives one pass


def measure_times(
    target: Model,
    draft: Model | RecurrentDraft | None,
    sampler: Sampler,
    *,
    policy: Policy | None = None,
    draft_policy: Policy | None = None,
    sizes: Sequence[int] = SIZES,
    context: int = 128,
    report: Report = silent,
) -> tuple[dict[int, float], float]:
    """Milliseconds of a step with n nodes for each n of `sizes` (1: plain decoding), and of one
    draft pass, for one row behind `context` tokens.

    The target's part is timed with prompt lookup, whose drafting costs nothing: reading n nodes,
    the verdict, the commit.
    """
    trees = {n: Topology.chain(n) for n in sizes}
    plans: dict[str | int, Speculator | None] = {1: None}
    plans |= {n: Speculator.of(target, None, tree) for n, tree in trees.items()}
    if draft is not None:
        deep = Topology.chain(PASSES + 1)
        plans["drafted"] = Speculator.of(target, draft, deep, draft_policy=draft_policy)
        plans["alone"] = Speculator.of(target, None, deep)
    plain, cost = _in_plain_steps(target, plans, sampler, policy, context, report)
    passes = 0.0
    if draft is not None:
        passes = max(plain * (cost.pop("drafted") - cost.pop("alone")) / PASSES, 1e-3)
    return {n: plain * cost[n] for n in (1, *sizes)}, passes


def measure_step(
    target: Model,
    draft: Model | RecurrentDraft,
    sampler: Sampler,
    topology: Topology,
    *,
    policy: Policy | None = None,
    draft_policy: Policy | None = None,
    context: int = 128,
) -> float:
    """The time of a whole step with this tree in plain steps."""
    drafted = Speculator.of(target, draft, topology, draft_policy=draft_policy)
    plans: dict[str | int, Speculator | None] = {1: None, "tree": drafted}
    return _in_plain_steps(target, plans, sampler, policy, context)[1]["tree"]


def _in_plain_steps(
    target: Model,
    plans: dict[str | int, Speculator | None],
    sampler: Sampler,
    policy: Policy | None,
    context: int,
    report: Report = silent,
) -> tuple[float, dict[str | int, float]]:
    """Milliseconds of plan 1, plain decoding, and the cost of a step of each plan in plain ones.

    Medians over interleaved rounds, of ratios within a round: a machine whose clock changes does
    not keep one speed for as long as all of them take.
    """
    runs = {name: _steps(target, plan, sampler, policy, context) for name, plan in plans.items()}
    for number, step in enumerate(runs.values()):
        report("compiling trees", number, len(runs))
        step()
    rounds = ROUNDS if size_of(target.params) < LARGE else ROUNDS // 3
    times = []
    for number in range(rounds):
        report("timing trees", number, rounds)
        times.append({name: step() for name, step in runs.items()})
    cost = {name: statistics.median(found[name] / found[1] for found in times) for name in plans}
    return statistics.median(found[1] for found in times), cost


def _steps(
    target: Model, plan: Speculator | None, sampler: Sampler, policy: Policy | None, context: int
) -> Callable[[], float]:
    """A function that runs a few steps and returns the milliseconds of one."""
    cfg = target.config
    steps = STEPS if size_of(target.params) < LARGE else STEPS // 4
    context = min(context, cfg.max_positions // 4)
    new = min(256, cfg.max_positions // 2)
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, context).tolist()
    options = Options(
        policy=policy, sampler=sampler, max_new_tokens=new, draft=plan, ignore_eos=True
    )

    def once() -> float:
        run = Run(target, [prompt], options)
        pieces = run.pieces(steps)
        next(pieces)
        before, first = run.times["decode"], run.steps
        next(pieces)  # a text may end before so many steps
        return 1000 * (run.times["decode"] - before) / (run.steps - first)

    return once
