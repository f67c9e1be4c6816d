"""`jaxinfer info` for every policy, target and form of the weights.

Compiling takes seconds, so that by default each policy, target and form is tried once at least and
the other combinations are marked slow.
"""

import itertools
import json

import jax
import pytest

import jaxinfer as ji
from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps, save_feature_maps
from jaxinfer.cache.presets import POLICIES, resolve
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.inspection import gpu_target
from jaxinfer.inspection.decode_step import inspect_decode
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import init_params
from tests.policies import random_feature_maps

TARGETS, WEIGHTS = ("cpu", "h200"), (None, "int8", "int4")
NAMES = ("full", "kivi", "kivi2", "kivi4", "streaming", "h2o", "less")
CAPACITY = 1024
FAST = {  # of the two-layer model; on the CPU all policies, on the H200 what other tests leave out
    *(("cpu", name, None) for name in ("h2o", "less", "kivi4", "streaming")),
    *(("cpu", "h2o", "int4"), ("cpu", "kivi2", "int8")),
    *(("h200", "less", None), ("h200", "h2o", "int4")),
}
needs_compiler = pytest.mark.skipif(
    not gpu_target.available(), reason=str(gpu_target.unavailable_reason())
)


def combinations():
    for target, name, weights in itertools.product(TARGETS, NAMES, WEIGHTS):
        marks = [] if (target, name, weights) in FAST else [pytest.mark.slow]
        if target != "cpu":
            marks += [pytest.mark.gpu_compile, needs_compiler]
        yield pytest.param(target, name, weights, marks=marks, id=f"{target}-{name}-{weights}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Two layers with heads of 32, which KIVI's groups divide."""
    config = ModelConfig(
        family="llama", vocab_size=258, hidden_size=64, intermediate_size=96, num_layers=2,
        num_heads=2, num_kv_heads=2, head_dim=32, max_positions=4096,
        rope=RopeConfig(rotary_dim=32),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("info") / "tiny"
    save_checkpoint(folder, Checkpoint(config, init_params(config, jax.random.key(0)), None))
    return str(folder)


@pytest.fixture(scope="module")
def lm(model) -> ji.LM:
    return ji.load(model)


@pytest.fixture(scope="module")
def maps(lm, tmp_path_factory) -> str:
    """Random LESS feature maps of the model."""
    folder = tmp_path_factory.mktemp("less") / "maps"
    config = LessConfig.of(lm.config, fingerprint(lm.params), model="tiny", hidden=8, rank=3)
    save_feature_maps(folder, LessFeatureMaps(config, random_feature_maps(lm.config).layers))
    return str(folder)


def test_every_policy_that_has_a_name_is_tried():
    assert set(NAMES) <= set(POLICIES.names())


@pytest.mark.parametrize("target, name, weights", [*combinations()])
def test_info_of(target, name, weights, run, model, maps):
    arguments = ["info", model, "--policy", name, "--capacity", str(CAPACITY), "--json"]
    if name == "less":
        arguments += ["--policy-args", f"feature_maps={maps}"]
    arguments += [] if target == "cpu" else ["--target", target]
    arguments += [] if weights is None else ["--weights", weights]
    result = run(*arguments)
    assert result.code == 0, result.err
    decode = json.loads(result.out)["decode"]
    assert decode["cache_copies"] == decode["unaliased_leaves"] == 0, decode["copies"]
    assert decode["counted_leaves"] > 0
    assert (decode["step_ms"] is None) == (target != "cpu")


@pytest.mark.parametrize(
    "target",
    [
        "cpu",
        pytest.param("h200", marks=[pytest.mark.gpu_compile, needs_compiler, pytest.mark.slow]),
    ],
)
def test_a_list_of_policies(target, lm, maps):
    policy = resolve([{"name": "less", "feature_maps": maps, "heavy": 0.1, "recent": 0.1}, "kivi2"])
    facts = inspect_decode(
        lm.config, lm.params, policy, CAPACITY, target=None if target == "cpu" else target
    )
    assert facts["decode"]["cache_copies"] == 0 and facts["decode"]["counted_leaves"] >= 8
