"""Our worker: generation, prefill, single decode steps at a given context, and read bandwidth.

`generate` is what a user calls; its own statistics exclude compilation and synchronise with the
device. `context` runs the compiled decode loop on a cache that is said to hold `live` tokens: the
contents are zeros, which costs the same time as real ones and saves the prefill.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from bench.harness import timed
from bench.models import export_llama, load_model
from bench.worker import serve
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.presets import resolve
from jaxinfer.decode.engine import make_requests, seen_tokens
from jaxinfer.decode.sampling import Sampler
from jaxinfer.inspection.decode_step import step_bytes
from jaxinfer.inspection.roofline import read_bandwidth


class Peer:
    """Handlers by name; `lm` is the loaded model."""

    lm: Any = None

    def load(self, model: str) -> dict[str, Any]:
        seconds, self.lm = timed(lambda: load_model(model))
        cfg, device = self.lm.config, jax.devices()[0]
        return {
            "load_s": seconds,
            "vocab": cfg.vocab_size,
            "max_positions": cfg.max_positions,
            "parameter_bytes": bytes_of(self.lm.params),
            "read_bytes": step_bytes(cfg, self.lm.params),
            "cache_bytes_per_token": 2 * 4 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim,
            "device": f"{device.platform}: {device.device_kind}",
        }

    def export(self, folder: str) -> None:
        export_llama(self.lm, folder)

    def export_with_tokenizer(self, folder: str) -> None:
        self.export(folder)
        self.lm.tokenizer.save(folder)

    def save(self, folder: str) -> None:
        """The converted checkpoint from which the start-up routine loads."""
        from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint

        lm = self.lm
        save_checkpoint(folder, Checkpoint(lm.config, lm.params, lm.tokenizer, {"source": lm.name}))

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        seconds, done = timed(
            lambda: self.lm.generate(prompts, max_new_tokens=new, ignore_eos=True)
        )
        stats = done[0].stats
        return {
            "seconds": stats["decode_s"],
            "tokens_per_s": stats["tokens_per_s"],
            "ms_per_step": 1e3 * stats["decode_s"] / (new - 1),
            "wall_s": seconds,
            "compile_s": stats["compile_s"],
            "tokens": [row.tokens for row in done],
        }

    def batch(self, prompts: list[str], new: int, rows: int) -> dict[str, Any]:
        """The prompts in batches of `rows`, with reading them."""
        seconds, _ = timed(
            lambda: [
                self.lm.generate(prompts[first : first + rows], max_new_tokens=new, ignore_eos=True)
                for first in range(0, len(prompts), rows)
            ]
        )
        return {"seconds": seconds}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        seconds, done = timed(lambda: self.lm.generate([prompt], max_new_tokens=1, ignore_eos=True))
        stats = done[0].stats
        return {
            "seconds": stats["prefill_s"],
            "tokens_per_s": len(prompt) / stats["prefill_s"],
            "wall_s": seconds,
            "compile_s": stats["compile_s"],
            "tokens": [done[0].tokens],
        }

    def context(self, live: int, capacity: int, steps: int) -> dict[str, Any]:
        """The last `steps` steps before a row holds `live` tokens."""
        engine, cfg = self.lm.engine, self.lm.config
        if live > capacity or live < steps:
            raise ValueError(f"live {live} must lie between {steps} steps and capacity {capacity}")
        cache = engine.new_cache(resolve(None), 1, capacity)
        cache = replace(cache, length=jnp.full((1,), live - steps, jnp.int32))
        requests = make_requests([Sampler()], [0], [steps + 1], (), cfg.vocab_size)
        logits = jnp.zeros((1, cfg.vocab_size), jnp.float32)
        seen = seen_tokens(requests, [[0]], cfg.vocab_size)
        state = jax.block_until_ready(engine.init_state(cache, logits, requests, seen, steps + 1))
        del cache
        compiled = engine.compile_s
        seconds, state = timed(lambda: engine.decode(requests, state, steps))
        assert int(state.steps) == steps
        seconds -= engine.compile_s - compiled
        return {
            "seconds": seconds,
            "ms_per_token": 1e3 * seconds / steps,
            "compile_s": engine.compile_s - compiled,
        }

    def bandwidth(self, megabytes: int) -> float:
        """Bytes per second that a program reads here."""
        return read_bandwidth(megabytes)


if __name__ == "__main__":
    peer = Peer()
    names = ("load", "export", "export_with_tokenizer", "save", "generate", "batch", "prefill")
    serve({name: getattr(peer, name) for name in (*names, "context", "bandwidth")})
