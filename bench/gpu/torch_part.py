"""torch on the same shapes: SDPA in bfloat16, and codes made numbers before SDPA, in eager mode.

This part runs in a process that leaves the device to torch alone.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu.attention_part import BITS, GROUP, config_of, moved
from bench.gpu.rows import Run, copy_bandwidth
from bench.harness import summarise
from pallas_kernels.cases import MODELS, TINY_MODELS, decode_shapes

ROTATED = 128e6  # as in `timing`
MOST_SETS = 32
REPEATS = 5


@dataclass(kw_only=True)
class TorchStep:
    config: dict[str, Any]
    suite: Run
    bits: int | None

    def prepare(self) -> None:
        pass

    def run(self) -> dict[str, Any]:
        import torch

        heads, groups, width = (MODELS | TINY_MODELS)[self.config["model"]]
        batch, slots = self.config["batch"], self.config["slots"]
        size = moved(heads, width, batch, slots, self.bits)
        device = _device()
        numbers = 4 * batch * heads * slots * width  # bytes of keys and values in bfloat16
        need = max(size, ROTATED) + (0 if self.bits is None else 4 * numbers)
        if device == "cuda" and need > 0.9 * torch.cuda.mem_get_info()[0]:
            return {"skipped": f"{need / 1e9:.0f} GB do not fit"}
        sets = 2 if self.suite.quick else min(max(math.ceil(ROTATED / size), 1), MOST_SETS)
        inputs = [self._inputs(device, batch, heads, groups, slots, width) for _ in range(sets)]
        call = torch.inference_mode()(_attention if self.bits is None else self._packed_attention)
        calls = max(1, min(200, round(0.02 / (size / 2e12 + 2e-5) / sets))) * sets
        if self.suite.quick:
            calls = sets
        times = [_seconds(call, inputs, calls) for _ in range(REPEATS + 1)][1:]
        each = summarise([1e6 * t / calls for t in times])
        copy = copy_bandwidth(self.suite.out)
        rate = size / each["median"] * 1e6
        return {"us": each["median"], "times_us": each, "bytes": size, "gb_per_s": rate / 1e9,
                "share_of_copy": rate / copy if copy else None, "sets": sets, "calls": calls,
                "torch_device": device}  # fmt: skip

    def _inputs(self, device: str, batch: int, heads: int, groups: int, slots: int, width: int):
        import torch

        def some(*shape: int) -> Any:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        q = some(batch, heads * groups, 1, width)
        if self.bits is None:
            return q, some(batch, heads, slots, width), some(batch, heads, slots, width)
        count, lead = 32 // self.bits, (batch, heads)

        def half(words: tuple[int, int], scales: tuple[int, int]) -> Any:
            codes = torch.randint(
                -(2**31), 2**31, (*lead, *words), device=device, dtype=torch.int32
            )
            return codes, some(*lead, *scales), some(*lead, *scales)

        keys = half((slots // count, width), (slots // GROUP, width))
        return q, *keys, *half((slots, width // count), (slots, width // GROUP))

    def _packed_attention(self, q, k_words, k_scale, k_zero, v_words, v_scale, v_zero) -> Any:
        assert self.bits is not None
        k = _numbers(k_words, k_scale, k_zero, self.bits, axis=2)
        return _attention(q, k, _numbers(v_words, v_scale, v_zero, self.bits, axis=3))

    def drop(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def steps(run: Run) -> list[TorchStep]:
    order = [
        (shape, bits)
        for some in ((None, 2), (4, 8))
        for shape in decode_shapes(run.quick)
        for bits in some
    ]
    assert {bits for _, bits in order} == set(BITS)
    made = []
    for shape, bits in order:
        peer = "torch sdpa" if bits is None else "torch dequantize, sdpa"
        made.append(TorchStep(config=config_of("torch", *shape, bits, peer), suite=run, bits=bits))
    return made


def device_name() -> str | None:
    if not importlib.util.find_spec("torch"):
        return None  # every step will say so
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _attention(q: Any, k: Any, v: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _numbers(words: Any, scale: Any, zero: Any, bits: int, axis: int) -> Any:
    import torch

    count = 32 // bits
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shifts = shifts.reshape(-1, *(1,) * (3 - axis))
    codes = (words.unsqueeze(axis + 1) >> shifts) & (2**bits - 1)
    shape = list(words.shape)
    shape[axis] *= count
    grouped = [*shape[:axis], shape[axis] // GROUP, GROUP, *shape[axis + 1 :]]
    codes = codes.to(scale.dtype).reshape(grouped)
    return (codes * scale.unsqueeze(axis + 1) + zero.unsqueeze(axis + 1)).reshape(shape)


def _seconds(call: Callable[..., Any], inputs: list[Any], calls: int) -> float:
    """Of all calls: by the device's events, or by the clock where there are none."""
    import torch

    if not torch.cuda.is_available():
        start = time.perf_counter()
        for i in range(calls):
            call(*inputs[i % len(inputs)])
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(calls):
        call(*inputs[i % len(inputs)])
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
