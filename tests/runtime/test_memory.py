"""Memory is checked before compiling, from whatever the machine tells about itself."""

import jax
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.runtime.memory import (
    available_bytes,
    check_available,
    estimate,
    host_available_bytes,
    readable,
)

GIB = 1 << 30


def machine(root, **files):
    for path, text in files.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_this_machine_has_some_memory():
    assert 0 < available_bytes() < 1 << 50


def test_free_memory_is_read_from_meminfo(tmp_path):
    meminfo = "MemTotal: 99 kB\nMemAvailable:   2048 kB\n"
    assert host_available_bytes(machine(tmp_path, proc__meminfo=meminfo)) == 2048 * 1024


def test_a_control_group_limit_narrows_it_and_page_cache_is_free(tmp_path):
    root = machine(tmp_path, proc__meminfo=f"MemAvailable: {64 << 20} kB\n")
    group = root / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group / "memory.current").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert host_available_bytes(root) == 2 * GIB


def test_an_unlimited_control_group_is_ignored(tmp_path):
    root = machine(tmp_path, proc__meminfo="MemAvailable: 7 kB\n", sys__fs__cgroup__x="")
    (root / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_available_bytes(root) == 7 * 1024


def test_an_old_control_group_limit_is_read(tmp_path):
    folder = tmp_path / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(3 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(GIB))
    assert host_available_bytes(tmp_path) == 2 * GIB


def test_without_any_file_the_physical_memory_is_the_answer(tmp_path):
    assert host_available_bytes(tmp_path) > 0


def test_a_device_with_its_own_statistics_is_believed():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 10 * GIB, "bytes_in_use": 4 * GIB}

    assert available_bytes(Device()) == 6 * GIB


def test_what_does_not_fit_is_refused_in_one_line_with_parts_sum_and_remedy():
    with pytest.raises(ValueError) as error:
        check_available({"parameters": GIB, "cache": 3 * GIB}, available=2 * GIB)
    message = str(error.value)
    for part in ("parameters 1.0 GiB", "cache 3.0 GiB", "= 4.0 GiB", "2.0 GiB", "lower the batch"):
        assert part in message
    assert "\n" not in message


def test_what_fits_passes():
    check_available({"cache": GIB}, available=GIB)
    check_available({"cache": 1}, device=jax.devices("cpu")[0])


def test_the_estimate_grows_with_batch_tokens_and_vocabulary():
    cfg = ModelConfig(
        family="llama", vocab_size=100, hidden_size=8, intermediate_size=16, num_layers=1,
        num_heads=2, num_kv_heads=1, head_dim=4, max_positions=64, positions="none",
    )  # fmt: skip
    one = estimate(cfg, cache_bytes=64)
    many = estimate(cfg, cache_bytes=64, batch=4, tokens=8, parameter_bytes=10)
    assert set(one) == {"cache", "logits", "temporaries"}
    assert many["logits"] == 4 * one["logits"] and many["parameters"] == 10
    assert many["temporaries"] > 8 * one["temporaries"]


def test_sizes_are_printed_with_binary_units():
    assert readable(10**400).endswith("TiB")
    assert [readable(n) for n in (5, 2048, 3 * GIB, 1 << 41)] == [
        "5 B",
        "2.0 KiB",
        "3.0 GiB",
        "2.0 TiB",
    ]
