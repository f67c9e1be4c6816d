"""Whether a generation fits in memory, asked before anything is compiled or allocated.

A machine that runs out of memory kills the process without a word; this says in one line what was
wanted, what there is, and what to change.
"""

import os
from pathlib import Path
from typing import Any

import jax

from jaxinfer.config import ModelConfig

REMEDY = "lower the batch or the context, choose a smaller cache policy, or free memory"
ROW = 4096  # bytes that a row's options and results take on the host, before its first token
TOKEN = 8 + 72  # bytes of a generated token: in the loop's buffers, and in the host's lists
_UNLIMITED = 1 << 60  # what cgroup v1 writes for "no limit" is near 2^63


def available_bytes(device: Any = None) -> int | None:
    """Bytes that can still be allocated on `device` (default: JAX's first); None if unknown."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return max(int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0)), 0)
    return host_available_bytes() if device.platform == "cpu" else None


def host_available_bytes(root: str | os.PathLike[str] = "/") -> int | None:
    """The smaller of free memory and what the control group still allows; `root` is for tests."""
    known = [n for n in (_meminfo(Path(root)), _cgroup(Path(root))) if n is not None]
    return min(known) if known else _sysconf()


def estimate(
    cfg: ModelConfig,
    *,
    cache_bytes: int,
    batch: int = 1,
    tokens: int = 1,
    new: int = 0,
    block: int = 512,
    parameter_bytes: int = 0,
    mixer: int | None = None,
) -> dict[str, int]:
    """Bytes by part for reading `tokens` per row at once, activations in float32, and for `new`
    generated tokens of every row.

    Temporaries: what the widest mixer holds for a token (`mixer` numbers; None is attention), the
    MLP's inner activations, and a few copies of the residual stream. An upper bound of the right
    size, not a measurement.
    """
    if mixer is None:
        mixer = attention_floats(cfg, block + tokens)
    inner = 3 * cfg.intermediate_size + 4 * cfg.hidden_size
    parts = {
        "parameters": parameter_bytes,
        "cache": cache_bytes,
        "logits": 4 * batch * cfg.vocab_size * 3,
        "temporaries": 4 * batch * tokens * (mixer + inner),
        "tokens": batch * (ROW + new * TOKEN) if new else 0,
    }
    return {name: size for name, size in parts.items() if size}


def attention_floats(cfg: ModelConfig, keys: int) -> int:
    """Numbers that attention holds for a token that looks at so many keys: scores with their
    exponentials and masks, queries, keys and values."""
    return 3 * cfg.num_heads * (keys + cfg.head_dim)


def check_available(
    parts: dict[str, int], device: Any = None, *, available: int | None = None
) -> None:
    """Raises ValueError when the parts (bytes by name) together exceed what is available."""
    available = available_bytes(device) if available is None else available
    total = sum(parts.values())
    if available is None or total <= available:
        return
    listed = " + ".join(f"{name} {readable(size)}" for name, size in parts.items())
    raise ValueError(
        f"{listed} = {readable(total)} exceeds the {readable(available)} of memory available; "
        + REMEDY
    )


def readable(size: Any) -> str:
    """A byte count with a binary unit."""
    size = float(min(size, 1 << 100))  # a whole number may be larger than any float
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _meminfo(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _cgroup(root: Path) -> int | None:
    """What the process's control group (v2, else v1) leaves; page cache counts as free."""
    base = root / "sys/fs/cgroup"
    own = [
        line.split("::", 1)[1].strip("/")
        for line in _lines(root / "proc/self/cgroup")
        if "::" in line
    ]
    for folder in [base / path for path in own] + [base]:
        limit = _number(folder / "memory.max")
        if limit is not None:
            return _left(limit, folder / "memory.current", folder / "memory.stat", "inactive_file")
    folder = base / "memory"
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED:
        return None
    usage, stat = folder / "memory.usage_in_bytes", folder / "memory.stat"
    return _left(limit, usage, stat, "total_inactive_file")


def _left(limit: int, usage: Path, stat: Path, reclaimable: str) -> int:
    used = _number(usage) or 0
    for line in _lines(stat):
        name, _, value = line.partition(" ")
        if name == reclaimable:
            used -= int(value)
    return max(limit - max(used, 0), 0)


def _sysconf() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
