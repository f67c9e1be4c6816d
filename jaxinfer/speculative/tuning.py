"""`tune`: measures this machine, model pair and policy, and chooses the tree that pays.

What was found is kept as a small JSON file in the user's cache folder, so that a second run starts
at once. Delete the folder `trees` there, or pass `fresh=True`, to measure again.
"""

import functools
import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.arguments import real, shown, whole
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full
from jaxinfer.config import ModelConfig
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.speculation import Planned
from jaxinfer.files import cache_folder, one_line, read_json, write_json
from jaxinfer.models.fingerprint import identity
from jaxinfer.models.offload import PCIE4
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.nn.quantized import size_of
from jaxinfer.plugins import meant
from jaxinfer.progress import Report, silent
from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.acceptance_rates import measure_acceptance, online_acceptance
from jaxinfer.speculative.optimizer import Choice, choose
from jaxinfer.speculative.prompts import PROMPTS
from jaxinfer.speculative.step_times import SIZES, measure_step, measure_times
from jaxinfer.speculative.topology import MOST_NODES, Topology
from jaxinfer.typing import Json

MOST_LEVELS = 10
LOOKUP_LEVELS = 8
VERSION = 3
TRIALS = 2
WORTH = 1.15  # times as fast as plain decoding: what promises less has been slower in the end

# Of devices that are not here: bytes/s of the target's weights, those of the draft's, and dense
# bf16 operations/s. Offloaded weights cross PCIe 4.0.
DEVICES = {
    "h200": (4.3e12, 4.3e12, 989e12),
    "h100": (3.0e12, 3.0e12, 989e12),
    "a100": (1.8e12, 1.8e12, 312e12),
    "l40-offload": (PCIE4, 0.78e12, 181e12),
}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A choice and the measurements it follows from; milliseconds."""

    acceptance: Acceptance
    verify_ms: Mapping[int, float]  # of a step by its nodes; 1 is plain decoding
    draft_ms: float  # one draft pass

    def __post_init__(self):
        if 1 not in self.verify_ms:
            raise ValueError("verify_ms has no time of 1 node, which is plain decoding")
        for nodes, ms in self.verify_ms.items():
            whole("nodes of verify_ms", nodes, most=MOST_NODES)
            real(f"verify_ms of {nodes} nodes", ms, least=1e-9, most=1e9)
        real("draft_ms", self.draft_ms, least=0, most=1e9)

    def to_dict(self) -> Json:
        """The content of the file."""
        return {
            "acceptance": self.acceptance.to_dict(),
            "verify_ms": dict(self.verify_ms),
            "draft_ms": self.draft_ms,
        }

    @classmethod
    def from_dict(cls, data: Json, what: object) -> "Tuned":
        """From `to_dict`; `what` names the source in errors."""
        times, acceptance = data.get("verify_ms"), data.get("acceptance")
        if set(data) != {"acceptance", "verify_ms", "draft_ms"}:
            raise ValueError(f"{what} must have acceptance, verify_ms and draft_ms, no more")
        if not isinstance(times, dict) or not isinstance(acceptance, dict):
            raise ValueError(f"{what}: acceptance and verify_ms must be objects")
        if not all(nodes.isdecimal() and len(nodes) < 6 for nodes in times):
            raise ValueError(f"{what}: the names in verify_ms must be numbers of nodes")
        return cls(
            acceptance=Acceptance.from_dict(acceptance, what),
            verify_ms={int(nodes): ms for nodes, ms in times.items()},
            draft_ms=real(f"draft_ms of {what}", data["draft_ms"], least=0, most=1e9),
        )

    def choice(self, max_levels: int = MOST_LEVELS) -> Choice:
        """One node means: do not speculate, as nothing promises at least `WORTH`."""
        levels, plain = max_levels, self.verify_ms[1]
        if isinstance(self.acceptance.p[0], tuple):
            levels = min(levels, len(self.acceptance.p) + 1)
        trees = {n: ms for n, ms in self.verify_ms.items() if n > 1}
        best = choose(self.acceptance, trees, self.draft_ms, levels, plain_time=plain)
        if best.speedup >= WORTH:
            return best
        return replace(best, topology=Topology((-1,)), expected=1.0, step_cost=plain, speedup=1.0)


def tune(
    target: Model,
    draft: Model | RecurrentDraft | None,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    *,
    policy: Policy | None = None,
    draft_policy: Policy | None = None,
    sizes: Sequence[int] = SIZES,
    prompts: Sequence[Prompt] | None = None,
    new_tokens: int = 64,
    fresh: bool = False,
    report: Report = silent,
) -> Tuned:
    """Acceptance on the target's own text after `prompts` (default: a dozen of our own), and the
    times of steps and draft passes; `draft` None is prompt lookup.

    Takes minutes the first time, most of it compilation; `report` hears how far it is.
    """
    policy = full() if policy is None else policy
    settings: list[Any] = [
        repr(x) for x in (sampler, policy, draft_policy, tuple(sizes), new_tokens)
    ]
    settings.append(identity(target.config, target.params))
    settings.append("prompt-lookup" if draft is None else identity(draft.config, draft.params))
    settings.append(prompts)
    path = cache_folder() / "trees" / f"{_hash([_machine(), VERSION, *settings])}.json"
    if not fresh:
        found = _read(path)
        if found is not None:
            return found
    if prompts is None:
        prompts = PROMPTS if target.tokenizer is not None else _random_prompts(target.config)
    if draft is None:
        acceptance = online_acceptance(
            target, prompts, sampler, Topology.chain(LOOKUP_LEVELS), new_tokens=new_tokens,
            report=report,
        )  # fmt: skip
    else:
        acceptance = measure_acceptance(
            target, draft, prompts, sampler, new_tokens=new_tokens, report=report
        )
    times, passes = measure_times(
        target, draft, sampler, policy=policy, draft_policy=draft_policy, sizes=sizes,
        report=report,
    )  # fmt: skip
    tuned = Tuned(acceptance=acceptance, verify_ms=times, draft_ms=passes)
    if draft is not None:
        step = functools.partial(
            measure_step, target, draft, sampler, policy=policy, draft_policy=draft_policy
        )
        tuned = tried(tuned, step)
    try:
        write_json(path, tuned.to_dict())
    except OSError as error:
        warnings.warn(
            f"cannot keep what was measured in {path.parent} ({one_line(error)}); the next run "
            "will measure again",
            stacklevel=2,
        )
    return tuned


@dataclass(frozen=True)
class FastestTree:
    """Chooses the tree of a run by what `tune` has measured for its sampler and policy."""

    target: Model
    draft: Model | RecurrentDraft | None
    draft_policy: Policy | None = None
    report: Report = silent

    def __call__(self, run: Planned) -> Topology:
        tuned = tune(
            self.target, self.draft, run.samplers[0], policy=run.policy,
            draft_policy=self.draft_policy, report=self.report,
        )  # fmt: skip
        return tuned.choice().topology


def tried(tuned: Tuned, step: Callable[[Topology], float]) -> Tuned:
    """With the draft passes of the tree that is chosen: they draw more than those of a chain.

    `step` gives the time of a step with a tree in plain steps. What it costs beyond the forecast is
    put down to the passes, and the choice made again, which may be not to speculate.
    """
    for _ in range(TRIALS):
        choice = tuned.choice()
        passes = choice.topology.levels - 1
        if passes == 0:
            break
        beyond = step(choice.topology) * tuned.verify_ms[1] - choice.step_cost
        tuned = replace(tuned, draft_ms=max(tuned.draft_ms + beyond / passes, 1e-3))
    return tuned


def roofline(
    tuned: Tuned, target: Model, draft: Model | RecurrentDraft | None, device: str
) -> Tuned:
    """The same pair on a device that is not here: bf16 weights are read once per step, and n nodes
    cost the operations of n tokens (arXiv 2402.12374, section 4.1)."""
    check_device(device)
    target_rate, draft_rate, operations = DEVICES[device]

    def milliseconds(lm: Model | RecurrentDraft, nodes: int, bandwidth: float) -> float:
        params, embed = dict(lm.params), lm.params["embed"]
        params["embed"] = () if "head" in params else embed["tokens"]  # else a few rows are read
        size = size_of(params)
        return 1e3 * max(2 * size / bandwidth, 2 * size * nodes / operations)

    sizes = [2**i for i in range(10)]
    return replace(
        tuned,
        verify_ms={n: milliseconds(target, n, target_rate) for n in sizes},
        draft_ms=0.0 if draft is None else milliseconds(draft, 1, draft_rate),
    )


def check_device(device: str) -> None:
    """Refuses a device that `roofline` does not know."""
    if device not in DEVICES:
        raise ValueError(
            f"unknown device {shown(device)}{meant(device, DEVICES)} described are "
            f"{', '.join(DEVICES)}"
        )


def _machine() -> str:
    device = jax.devices()[0]
    return f"{platform.machine()} {platform.processor()} {device.device_kind} {jax.__version__}"


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _read(path: Path) -> Tuned | None:
    """What an earlier run wrote, or None; a file that makes no sense is measured again."""
    try:
        return Tuned.from_dict(read_json(path), path)
    except ValueError:
        return None


def _random_prompts(cfg: ModelConfig) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, cfg.vocab_size, (8, 8)).tolist()
