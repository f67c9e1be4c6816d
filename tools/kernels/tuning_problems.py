"""The timed step of every kernel that `tools/kernels/tune_kernels.py` tries tilings on; which uses
those are stands in each kernel's `cases.py`."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu import attention_part, states_part, weights_part
from pallas_kernels.cases import TunedUse, every

Step = Any  # bench.gpu.timing.Timed
STEPS: dict[str, Callable[..., Step]] = {
    "dense_attention": attention_part.timed,
    "key_weights": attention_part.attn_weight,
    "kivi_attention": attention_part.timed,
    "sparse_heads": attention_part.half_of_heads,
    "quantize_pack": states_part.flush,
    "put_tokens": states_part.put,
    "kivi_push": states_part.push,
    "low_rank_read": states_part.read,
    "low_rank_update": states_part.update,
    "modal_step": states_part.modal,
    "hyena_step": states_part.hyena,
    "add_norm": states_part.norm,
    "sparse_mlp": weights_part.mlp,
    "skinny_matmul": weights_part.product,
    "weight_matmul": weights_part.product,
}


@dataclass(frozen=True, kw_only=True)
class TimedUse(TunedUse):
    """A use whose step is `make(implementation, config)`."""

    run: Any  # bench.gpu.rows.Run

    def make(self, implementation: Any, config: Any) -> Step:
        step = STEPS[self.kernel]
        return step(self.run, **self.sizes, peer=implementation, config=config)


def uses(name: str, run: Any) -> Iterator[TimedUse]:
    """Those of one kernel."""
    for use in every("TUNED")[name](run.quick):
        yield TimedUse(run=run, **vars(use))


KERNELS: dict[str, Callable[[Any], Iterator[TimedUse]]] = {
    name: functools.partial(uses, name) for name in STEPS
}
