"""Policies as users write them: mappings from JSON, and the command line's texts."""

import json
import random
from pathlib import Path

from jaxinfer.cache.policy_file import write_policy_file
from jaxinfer.cache.presets import resolve
from jaxinfer.cli.options import make_policy
from jaxinfer.decode.capacity import capacity_for, check_fits
from tools.fuzz.mutations import damaged_text, odd_json
from tools.fuzz.target import Target
from tools.fuzz.targets.models import random_lm

MAPPINGS = (
    {"name": "kivi", "bits": 2, "group": 32, "residual": 128, "value_flush": "block"},
    {"name": "streaming", "sinks": 4, "window": 60, "positions": "absolute"},
    {"name": "streaming", "sinks": 4, "window": 256, "bits": 4, "group": 32, "residual": 32},
    {"name": "h2o", "heavy": 0.1, "recent": 8},
    {"name": "less", "base": "h2o", "heavy": 8, "recent": 8},
    [{"name": "full"}, {"name": "h2o", "heavy": 4, "recent": 4}],
)
ARGUMENTS = (
    *("bits=4", "group=32", "residual=Infinity", "residual=NaN", "bits=1e999", "heavy=0.1"),
    *("window=2147483648", "sinks=-1", "base=h2o", "=", ",", "name=full", "x=[[1]]", "a={}"),
)
KEYS = ("bits", "group", "residual", "sinks", "window", "heavy", "recent", "base")
NAMES = ("full", "kivi", "kivi2", "kivi4", "streaming", "h2o", "less", "nothing")


def make_mappings(folder: Path) -> None:
    for number, mapping in enumerate(MAPPINGS):
        (folder / f"{number}.json").write_text(json.dumps(mapping))


def parse_mappings(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            mapping = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        use(mapping)


def make_file(folder: Path) -> None:
    write_policy_file(folder / "policy.json", [MAPPINGS[1], MAPPINGS[3]], {"model": "x"})


def parse_file(folder: Path) -> None:
    use(str(folder / "policy.json"))


def use(mapping: object) -> None:
    """The policy, as far as generation checks it before it compiles."""
    lm, policy = random_lm(), resolve(mapping).sized(64)  # type: ignore[arg-type]
    lm.engine.serving(policy)
    check_fits(lm, policy, 1, capacity_for(lm, policy, 20, 20), 20)


def make_arguments(folder: Path) -> None:
    (folder / "arguments.txt").write_text("kivi bits=4,group=32")


def mutate_arguments(rng: random.Random, _: str, data: bytes) -> bytes:
    parts = [rng.choice(ARGUMENTS) for _ in range(rng.choice((1, 2, 3)))]
    if rng.random() < 0.5:
        key = rng.choice(
            ("bits", "group", "residual", "sinks", "window", "heavy", "recent", "base")
        )
        parts.append(f"{key}={json.dumps(odd_json(rng, 1))[:10_000]}")
    text = f"{rng.choice(NAMES)} {','.join(parts)}".encode("utf-8", "surrogatepass")
    return damaged_text(ARGUMENTS)(rng, text) if rng.random() < 0.3 else text


def parse_arguments(folder: Path) -> None:
    text = (folder / "arguments.txt").read_bytes().decode("utf-8", "surrogateescape")
    name, _, arguments = text.partition(" ")
    lm = random_lm()
    policy = make_policy(name, arguments).sized(64)
    check_fits(lm, policy, 1, capacity_for(lm, policy, 20, 20), 20)


TARGETS = (
    Target("policy", make_mappings, parse_mappings, ("*.json",)),
    Target("policy-file", make_file, parse_file, ("policy.json",)),
    Target("policy-args", make_arguments, parse_arguments, mutate=mutate_arguments),
)
