"""What a whole decode step compiles to for a GPU, by model, cache policy and form of the weights.

XLA's GPU compiler runs on the CPU (`jaxinfer.inspection.gpu_target`). Layers are unrolled and
alike: launches per layer are the difference between models of three layers and of two. A launch is
whatever a GPU is started for: a fusion, a call of a kernel or a library, a copy.

    python tools/kernels/inspect_steps.py --save bench/results/steps.jsonl
    python tools/kernels/inspect_steps.py --model llama-2-7b --policy kivi

The exit status is 1 where a step copies a cache that grows; recurrences copy their small states.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.files import write_text
from jaxinfer.hyena_config import FilterConfig, HyenaConfig

CAPACITY = 32768
SPARSE = "sparse"  # a quarter of the blocks of neurons, by a router in every layer
BLOCK_SIZE, ROUTER_RANK, DENSITY = 32, 64, 0.25
LESS_HIDDEN, LESS_RANK = 64, 8
SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, max_positions=8192, rope=RopeConfig(rotary_dim=64),
    tie_embeddings=True,
)  # fmt: skip
LLAMA_2_7B = ModelConfig(
    family="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, max_positions=4096,
    rope=RopeConfig(rotary_dim=128),
)  # fmt: skip
HYENA_1_3B = ModelConfig(
    family="hyena", vocab_size=50264, hidden_size=2048, intermediate_size=4096, num_layers=36,
    num_heads=32, num_kv_heads=32, head_dim=64, max_positions=CAPACITY, norm="layer",
    norm_bias=True, activation="gelu_tanh", gated_mlp=False, mlp_bias=True, positions="none",
    tie_embeddings=True, hyena=HyenaConfig(filter=FilterConfig(kind="modal", modes=16)),
    mixers=("hyena",) * 36,
)  # fmt: skip
SHAPES = {"smollm2-135m": SMOLLM2, "llama-2-7b": LLAMA_2_7B, "hyena-1.3b": HYENA_1_3B}


def policies(cfg: ModelConfig) -> dict[str, Any]:
    import jaxinfer as ji

    h2o = ji.h2o(heavy=256, recent=256)
    return {
        "full": ji.full(),
        "kivi": ji.kivi(bits=2, group=32, residual=128),
        "streaming": ji.streaming(4, 1020),
        "h2o": h2o,
        "less": ji.less(h2o, less_feature_maps(cfg)),
    }


def less_feature_maps(cfg: ModelConfig) -> Any:
    """The shapes of LESS's feature maps, which fit any weights."""
    import jax

    from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps

    class Shapes(LessFeatureMaps):
        def check(self, cfg, fingerprint=None):
            pass

    config = LessConfig(
        model="", fingerprint="", num_layers=cfg.num_layers, num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim, hidden_size=cfg.hidden_size,
        vocab_size=cfg.vocab_size, hidden=LESS_HIDDEN, rank=LESS_RANK,
    )  # fmt: skip
    layer = {
        "feature_map": {
            name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in config.shapes().items()
        }
    }
    return Shapes(config, (layer,) * cfg.num_layers)


def params_of(cfg: ModelConfig, weights: str) -> Any:
    """The parameters' shapes, in the form that GPU kernels read."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.models.params import abstract_params
    from jaxinfer.models.quantize import quantize_weights
    from jaxinfer.runtime.backend import Backend

    params = abstract_params(cfg, jnp.bfloat16)
    if weights == "bfloat16":
        return params
    if weights == SPARSE:
        layers = tuple(layer | {"mlp": sparse_block(layer["mlp"])} for layer in params["layers"])
        return params | {"layers": layers}
    return jax.eval_shape(
        lambda tree: quantize_weights(tree, weights, Backend.of("triton")), params
    )


def sparse_block(dense: Any) -> Any:
    """A block of which a token uses a quarter, with a router."""
    import jax

    from jaxinfer.sparsity.base import Router, Rule
    from jaxinfer.sparsity.mlp import SparseMlp

    neurons, width = dense["up"]["weight"].shape
    blocks = neurons // BLOCK_SIZE
    router = Router(
        inner=jax.ShapeDtypeStruct((ROUTER_RANK, width), "bfloat16"),
        outer=jax.ShapeDtypeStruct((blocks, ROUTER_RANK), "bfloat16"),
        rule=Rule(most=round(DENSITY * blocks)),
    )
    return jax.eval_shape(SparseMlp.of, dense, router)


def row_of(name: str, policy: str, weights: str, batch: int, target: str) -> dict[str, Any]:
    """Facts of the decode step of a model, read from its first two layers and its first three."""
    from jaxinfer.inspection.decode_step import inspect_decode

    found = []
    for layers in (2, 3):
        cfg = SHAPES[name].first(layers)
        params = params_of(cfg, weights)
        facts = inspect_decode(cfg, params, policies(cfg)[policy], CAPACITY, batch, target)
        found.append(facts["decode"])
    two, three = found
    per_layer = three["launches"] - two["launches"]
    return {
        "model": name, "policy": policy, "weights": weights, "batch": batch, "target": target,
        "capacity": CAPACITY,
        "launches_per_layer": per_layer, "launches_beside": two["launches"] - 2 * per_layer,
        "cache_copies": three["cache_copies"], "unaliased_leaves": three["unaliased_leaves"],
    }  # fmt: skip


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these shapes.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only these policies.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="bfloat16, int8, int4 or sparse feed-forward blocks.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    target: Annotated[str, typer.Option(help="GPU that is compiled for.")] = "h200",
    save: Annotated[Path | None, typer.Option(help="JSON Lines file to write.")] = None,
) -> None:
    """Launches per layer and cache copies of whole decode steps."""
    rows = []
    for name in model or SHAPES:
        has_policies = SHAPES[name].hyena is None  # which concern attention
        for kind in policy or (policies(SHAPES[name]) if has_policies else ["full"]):
            for kept in weights or ["bfloat16", *(["int4", SPARSE] if kind == "full" else [])]:
                row = row_of(name, kind, kept, batch, target)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if save is not None:
        import jax

        for row in rows:
            row |= {"jax": jax.__version__, "command": "python tools/kernels/inspect_steps.py"}
        write_text(save, "".join(json.dumps(row) + "\n" for row in rows))
    growing = [row for row in rows if SHAPES[row["model"]].hyena is None]
    raise typer.Exit(int(any(row["cache_copies"] for row in growing)))


if __name__ == "__main__":
    typer.run(main)
