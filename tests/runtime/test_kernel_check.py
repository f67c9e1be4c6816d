"""A wrong kernel is found at the first use of a device and replaced by its reference, loudly.

The device is made up, and its kernels are interpreted.
"""

import functools
import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.inspection.gpu_target import lower_for_cuda
from jaxinfer.runtime import kernel_check
from jaxinfer.runtime.kernel_check import DRAWS, Device
from pallas_kernels import checks, dispatch
from pallas_kernels.add_norm import add_norm, api

KERNEL = "add_norm"
DEVICE = Device(kind="Abacus", driver="cuda 1", jax=jax.__version__, sources="abc")
ONLY = (KERNEL,)  # the others are the same code
ensure = kernel_check.ensure_checked.__wrapped__


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device that interprets one kernel; `calls` counts its checks."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_REPLACED", set())
    monkeypatch.setattr(checks, "FOLDERS", ONLY)
    monkeypatch.setattr(kernel_check, "device_here", lambda: DEVICE)
    calls, check = [], kernel_check.check_kernels

    def counted(**options):
        calls.append(1)
        return check("interpret", draws=[(seed, True) for seed, _ in DRAWS], **options)

    monkeypatch.setattr(kernel_check, "check_kernels", counted)
    return calls


def wrong(how):
    """The kernel, with its second result spoiled: another function, so that nothing is reused."""
    right = api._add_norm

    @functools.wraps(right)
    def spoiled(*args, **options):
        y, normed = right(*args, **options)
        return y, how(normed)

    return spoiled


def kernel_calls() -> int:
    x = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    scale = jax.ShapeDtypeStruct((64,), jnp.float32)
    text = lower_for_cuda(lambda x, s: add_norm(x, x, s, kind="rms", eps=1e-6), x, scale).as_text()
    return text.count("xla.gpu.triton")


def test_right_kernels_stay_and_are_checked_once(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure()
        ensure()
    assert len(device) == 1 and kernel_calls() == 1
    record = json.loads(DEVICE.file.read_text())
    assert record["device"]["kind"] == "Abacus"
    assert [result["passed"] for result in record["results"]] == [True] * len(DRAWS)


def refuse(x):
    raise NotImplementedError("no such instruction")


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x * jnp.asarray(1.1, x.dtype),
        lambda x: x.at[0, 0].set(jnp.nan),
        refuse,
    ],
    ids=["wrong values", "NaN", "does not compile"],
)
def test_a_kernel_that_fails_is_replaced_with_one_warning_now_and_next_time(
    how, device, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(api, "_add_norm", wrong(how))
        with pytest.warns(UserWarning, match=r"add_norm fails .*reference") as said:
            ensure()
    assert len(said) == 1 and str(DEVICE.file) in str(said[0].message)
    assert kernel_calls() == 0
    dispatch._REPLACED.clear()  # another process
    assert kernel_calls() == 1
    with pytest.warns(UserWarning, match="add_norm"):
        ensure()
    assert len(device) == 1 and kernel_calls() == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"device": 3}', "[" * 100_000, '{"device": {}, "results": [{"error": []}]}'],
    ids=range(6),
)
def test_a_damaged_file_is_checked_anew(text, device):
    DEVICE.file.parent.mkdir(parents=True)
    DEVICE.file.write_text(text)
    ensure()
    assert len(device) == 1 and kernel_check.stored_results(DEVICE) is not None


def test_results_of_fewer_kernels_do_not_count(device, monkeypatch):
    ensure()
    monkeypatch.setattr(checks, "FOLDERS", (KERNEL, "modal_step"))
    assert kernel_check.stored_results(DEVICE) is None


def test_every_part_of_what_the_results_hold_for_has_its_own_file():
    changed = [replace(DEVICE, **{name: "other"}) for name in ("kind", "driver", "jax", "sources")]
    assert len({device.file for device in [DEVICE, *changed]}) == 5


def test_a_check_inside_a_trace_computes(device):
    @jax.jit
    def traced(x):
        ensure()
        return x

    traced(1.0)
    assert kernel_check.stored_results(DEVICE)[0].passed


def test_a_cpu_checks_nothing(monkeypatch):
    monkeypatch.setattr(kernel_check, "check_kernels", refuse)
    assert kernel_check.device_here() is None
    ensure()


def test_the_named_kernel_is_never_replaced(device):
    dispatch.replace_by_reference(KERNEL)
    x, scale = jnp.ones((2, 64)), jnp.ones((64,))
    form = {"kind": "rms", "eps": 1e-6, "implementation": "triton"}
    text = lower_for_cuda(lambda x, s: add_norm(x, x, s, **form), x, scale).as_text()
    assert "xla.gpu.triton" in text


class Asked(Exception):
    pass


def test_every_operation_belongs_to_the_kernel_that_dispatch_names(monkeypatch):
    """Else a failure would replace another kernel."""
    name_of = dispatch.kernel_name

    def ask(triton):
        raise Asked(name_of(triton))

    monkeypatch.setattr(dispatch, "kernel_name", ask)
    for kernel, operation in checks.problems():
        problem = checks._problems(kernel)[operation](np.random.default_rng(0), True)
        with pytest.raises(Asked, match=f"^{kernel}$"):
            problem.run(*problem.args, implementation=None)


def test_the_command_prints_what_failed_and_exits_with_1(monkeypatch, capsys):
    from jaxinfer.cli import main

    monkeypatch.setattr(checks, "FOLDERS", ONLY)
    assert main(["env", "--check"]) == 0
    assert " ok " in capsys.readouterr().out
    monkeypatch.setattr(api, "_add_norm", wrong(refuse))
    assert main(["env", "--check"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["env", "--check", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["passed"] is False and "no such instruction" in record["results"][0]["message"]
