"""transformers on torch as a worker: the same float32 weights, a plain greedy loop with a cache.

The loop is leaner than `model.generate` (no logits processors, no stopping criteria), so it is the
faster of the two ways to run this peer. Logits are made for the last position only.
"""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bench.worker import serve


class Peer:
    """Handlers by name."""

    model: Any = None

    def load(self, folder: str) -> dict[str, Any]:
        logging.disable_progress_bar()
        torch.set_num_interop_threads(1)
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()
        return {"load_s": time.perf_counter() - start, "torch": torch.__version__}

    def threads(self, count: int) -> None:
        torch.set_num_threads(count)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        start = time.perf_counter()
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        found = [token]
        for _ in range(new - 1):
            out = self.model(
                token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
            )
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(token)
        seconds = time.perf_counter() - prefilled
        return {
            "seconds": seconds,
            "tokens_per_s": len(prompts) * (new - 1) / seconds,
            "ms_per_step": 1e3 * seconds / (new - 1),
            "wall_s": time.perf_counter() - start,
            "tokens": torch.cat(found, dim=1).tolist(),
        }

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens_per_s": len(prompt) / seconds,
            "tokens": out.logits[:, -1].argmax(-1, keepdim=True).tolist(),
        }


if __name__ == "__main__":
    peer = Peer()
    serve({name: getattr(peer, name) for name in ("load", "threads", "generate", "prefill")})
