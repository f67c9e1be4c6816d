"""Long convolutions decoded as recurrences, exactly, and beside attention: time of a step and bytes
of a row against the length of the prompt.

A model with Hyena layers is measured itself, in the forms that it has. Beside any other model,
which has a full or a 2-bit cache, stands one of random long convolutions in its shape
(`bench.recurrent_models`). All forms of one prompt take turns in one process. `flat` is the time of
a step by modes behind the longest prompt over that behind the shortest; a crossover is the shortest
measured prompt from which on modes need less than the full cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.harness import Measure, interleave
from bench.models import load_model, prompts
from bench.options import Options
from bench.recurrent_models import hyena_like

FORMS = ("modal", "exact", "tiled", "epoched")
KEYS = ("ms_per_step", "tokens_per_s", "prefill_s")


def run(options: Options) -> list[tuple[dict, dict]]:
    import jax

    sizes, lm = options.settings("recurrence"), load_model(options.model)
    found = []
    for batch, rounds in zip(sizes["batches"], sizes["rounds"], strict=True):
        points = []
        for length in sizes["prompts"]:
            given = prompts(options.seed, batch, length, lm.config.vocab_size)
            say = lambda text, at=(batch, length): options.say(  # noqa: E731
                f"batch {at[0]}, prompt {at[1]}, {text}"
            )
            measures: dict[str, Measure] = {
                label: partial(measure, one, given, sizes["new"], policy)
                for label, (one, policy) in contenders(lm, length + sizes["new"], sizes).items()
            }
            for label, taken in interleave(measures, rounds, say).items():
                point = {"form": label, "prompt": length, "cache_bytes": taken.first["cache_bytes"]}
                points.append(point | taken.summary(*KEYS))
        metrics = {
            "points": points,
            "flat": flat(points),
            "crossover_prompt": crossover(points, lambda p: p["ms_per_step"]["median"]),
            "crossover_bytes": crossover(points, lambda p: p["cache_bytes"]),
            "device": jax.devices()[0].device_kind,
            "missing": {},
        }
        config = {"batch": batch, "rounds": rounds}
        config |= {key: sizes[key] for key in ("prompts", "new", "modes")}
        found.append((options.config(config), metrics))
    return found


def contenders(lm: Any, tokens: int, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Models with their cache policies, by label, that can read so many tokens."""
    import jaxinfer as ji
    from jaxinfer.models.filter_form import with_filters

    found: dict[str, tuple[Any, Any]] = {}
    recurrent = lm
    if lm.config.hyena is None:
        if tokens <= lm.config.max_positions:
            kivi = ji.kivi(bits=2, group=sizes["group"], residual=sizes["residual"])
            found = {"full": (lm, ji.full()), "kivi": (lm, kivi)}
        positions = max(sizes["prompts"]) + sizes["new"]
        recurrent = hyena_like(lm, positions, sizes["modes"])
    has_modes = any(recurrent.config.hyena.modes or ())
    for form in FORMS if has_modes else FORMS[1:]:
        config, params = with_filters(recurrent.config, recurrent.params, form)
        found[form] = (replace(recurrent, config=config, params=params), ji.full())
    return found


def measure(lm: Any, given: list[list[int]], new: int, policy: Any) -> dict[str, float]:
    """A greedy generation: its steps, its prompt, and the bytes of a row's cache."""
    done = lm.generate(given, max_new_tokens=new, ignore_eos=True, policy=policy)[0].stats
    return {
        "ms_per_step": 1e3 * done.decode_s / new,
        "tokens_per_s": len(given) * new / done.decode_s,
        "prefill_s": done.prefill_s,
        "cache_bytes": done.cache_bytes // len(given),
    }


def flat(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Time of a step by modes behind the longest prompt over that behind the shortest."""
    modal = sorted((p for p in points if p["form"] == "modal"), key=lambda p: p["prompt"])
    if len(modal) < 2:
        return None
    return modal[-1]["ms_per_step"]["median"] / modal[0]["ms_per_step"]["median"]


def crossover(points: Sequence[Mapping[str, Any]], of: Any) -> int | None:
    """The shortest prompt from which on, at all that were measured, modes need less than the full
    cache; None where the longest does not, or one of the two is not there."""
    by_form = {
        form: {p["prompt"]: of(p) for p in points if p["form"] == form}
        for form in ("modal", "full")
    }
    found = None
    for prompt in sorted(by_form["modal"].keys() & by_form["full"].keys(), reverse=True):
        if by_form["modal"][prompt] >= by_form["full"][prompt]:
            break
        found = prompt
    return found
