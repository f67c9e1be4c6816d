"""The report from synthetic records, and the one-line summaries."""

import pytest

from bench.harness import summarise
from bench.report import headline, write_report
from bench.routines import recurrence
from jaxinfer.records import Record, append


def rate(*values):
    return {
        "first_s": 1.0,
        "tokens_per_s": summarise(values),
        "ms_per_step": summarise([1e3 / v for v in values]),
        "seconds": summarise([1 / v for v in values]),
    }


def records():
    common = {"env": {"cpu": "A CPU", "jax": "0.0", "device": "cpu"}, "seed": 0}
    model = {"model": "m", "preset": "standard"}
    peers = {
        "jaxinfer": rate(20.0, 22.0),
        "torch": rate(10.0, 11.0),
        "ratios": {"torch": summarise([2.0, 2.0])},
        "peer_facts": {"torch": {"threads": 2}},
        "missing": {"llama.cpp": "node not installed"},
    }
    floor = {"floor_ms": 40.0, "floor_share": 0.8, "step_mb": 538.0, "read_gb_per_s": 12.0}
    points = [
        {
            "context": live,
            "capacity": live * factor,
            "factor": factor,
            "floor_ms": 40.0,
            "ms_per_token": summarise([45.0, 46.0]),
        }
        for live in (128, 256)
        for factor in (1, 4)
    ]
    scaling = {"points": points, "capacity_cost": 1.01, "missing": {}}
    start = {
        "cold": {"seconds": 12.0},
        "warm": {
            key: summarise([2.0, 3.0]) for key in ("seconds", "import_s", "load_s", "first_token_s")
        },
        "import_beyond_jax_s": summarise([0.3]),
        "missing": {},
    }
    sparse = {
        "dense": rate(10.0),
        "density 0.25": rate(20.0),
        "ratios": {"density 0.25": summarise([2.0, 2.2])},
        "lists": {"density 0.25": 6},
        "same_tokens_as_masked": {"density 0.25": False},
        "missing": {},
    }
    timed = [
        {"form": form, "prompt": prompt, "cache_bytes": size, "ms_per_step": summarise([ms])}
        | {"tokens_per_s": summarise([1e3 / ms])}
        for form, prompt, ms, size in (
            ("full", 512, 1.0, 2e6), ("full", 2048, 3.0, 8e6), ("full", 8192, 9.0, 32e6),
            ("modal", 512, 2.0, 3e6), ("modal", 2048, 2.0, 3e6), ("modal", 8192, 2.1, 3e6),
        )
    ]  # fmt: skip
    recurrent = {
        "points": timed,
        "flat": recurrence.flat(timed),
        "crossover_prompt": recurrence.crossover(timed, lambda p: p["ms_per_step"]["median"]),
        "crossover_bytes": recurrence.crossover(timed[:2] + timed[3:], lambda p: 1),
        "missing": {},
    }
    found = [
        ("decode", {"batch": 1}, peers | floor | {"same_tokens_as_torch": 1.0}),
        ("decode", {"batch": 8}, peers | {"gain_over_first_batch": 3.7}),
        ("prefill", {"tokens": 512}, peers),
        ("context-scaling", {}, scaling),
        ("startup", {}, start),
        ("sparsity", {"batch": 1}, sparse),
        ("sparsity", {"batch": 1, "tree": 4, "weights": "int8"}, sparse),
        ("recurrence", {"batch": 1}, recurrent),
    ]
    return [
        Record(name=name, config=model | config, metrics=metrics, command=f"run {name}", **common)
        for name, config, metrics in found
    ]


@pytest.fixture
def folder(tmp_path):
    for one in records():
        append(one, tmp_path)
    return tmp_path


def test_report_states_medians_ratios_commands_and_versions(folder):
    text = write_report(folder).read_text()
    assert "| m | 1 | torch, 2 threads | 21.0 | 10.5 |" in text
    assert "2.00 (2.00-2.00)" in text
    assert "3.70x the rate of batch 1" in text
    assert "no llama.cpp: node not installed" in text
    assert "| m | batch 1 | density 0.25 | 50.00 | 100.00 | 2.10 (2.00-2.20) | 6 |" in text
    assert "| m int8 | tree of 4 | density 0.25 | 50.00 |" in text
    assert "m: other tokens than masked: density 0.25." in text
    assert "| m | 1 | 8192 | modal | 2.10 (2.10-2.10) | 476 | 3.00 |" in text
    assert "longest prompt takes 1.05 times one behind the shortest." in text
    assert "from prompts of 2048 modes take less time." in text and "less bytes" not in text
    assert "`run startup`" in text and "A CPU" in text and "jax 0.0" in text


def test_report_draws_its_plots(folder):
    write_report(folder)
    for name in ("decode", "context-scaling"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp*"))


def test_a_later_record_replaces_an_earlier_one_of_the_same_config(folder):
    old = records()[0]
    newer = dict(old.metrics, jaxinfer=rate(30.0, 32.0))
    append(
        Record(
            name=old.name, config=old.config, metrics=newer, env=old.env, command="again", seed=0
        ),
        folder,
    )
    text = write_report(folder).read_text()
    assert "| m | 1 | torch, 2 threads | 31.0 |" in text
    assert "`run decode`" in text  # batch 8 is still the earlier run's


def test_report_without_results_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="python -m bench all"):
        write_report(tmp_path)


@pytest.mark.parametrize("one", records(), ids=lambda r: r.name)
def test_every_record_has_a_headline(one):
    line = headline(one)
    assert line.startswith(f"{one.name} m: ") and "\n" not in line
