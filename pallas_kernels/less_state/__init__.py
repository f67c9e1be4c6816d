"""LESS's low-rank state: what queries see of it, how it absorbs evicted tokens."""

from pallas_kernels.less_state.api import low_rank_read, low_rank_update

__all__ = ["low_rank_read", "low_rank_update"]
