"""Tilings that a search found: how they are looked up, what is searched, and the search itself."""

import functools
import importlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import jax
import pytest

from bench.gpu.rows import Run
from pallas_kernels import tuned
from pallas_kernels.modal_step.configs import Config
from tools.kernels import tune_kernels
from tools.kernels.tune_kernels import KERNELS, Row

RUN = Run(out=Path("nowhere"), seed=0, quick=True, interpret=True, match="", number="1")
FOLDERS = {
    "key_weights": "dense_attention", "low_rank_read": "less_state",
    "low_rank_update": "less_state", "hyena_step": "modal_step",
}  # fmt: skip
MODAL = functools.partial(Config, rows=1, modes=4)
QUICK = ["--interpret", "--quick", "--only", "modal_step"]


@pytest.fixture
def gpu_file(tmp_path, monkeypatch):
    """The file of this machine's device, which passes for a GPU."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tuned, "_read_once", tuned.read)
    return tuned.path_of(jax.devices()[0].device_kind)


def write(path, kernel, key, fields):
    path.write_text(json.dumps({"kernels": {kernel: {key: fields}}}))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_argument_comes_before_a_file_and_that_before_the_heuristic(
    kernel, gpu_file, monkeypatch
):
    api = importlib.import_module(f"pallas_kernels.{FOLDERS.get(kernel, kernel)}.api")
    taken = []

    def dispatch(implementation, reference, triton, *args):
        taken.append(triton.keywords["config"])
        return reference(*args)

    monkeypatch.setattr(api, "dispatch", dispatch)
    problem = next(KERNELS[kernel](RUN))

    def ask(config):
        step = problem.make("interpret", config)
        state, given = jax.eval_shape(step.inputs, jax.ShapeDtypeStruct((), "uint32"))
        with tuned.lookups() as asked:
            jax.eval_shape(step.call, state, *given)
        return asked

    (asked,) = ask(None)
    default, other, third = problem.candidates(*asked.sizes)[:3]
    write(gpu_file, kernel, asked.key, asdict(other))
    ask(None)
    assert ask(third) == []
    assert taken == [default, other, third] and asked.default == default
    write(gpu_file, kernel, f"{asked.key}, more 1", asdict(other))
    ask(None)
    assert taken[-1] == default


def test_without_a_gpu_no_file_is_looked_at(gpu_file, monkeypatch):
    gpu_file.write_text("damaged")
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "FOLDER", gpu_file.parent)
    assert jax.default_backend() == "cpu"
    assert tuned.tuned("modal_step", "batch 1", Config) is None


def test_a_file_is_read_once(gpu_file, monkeypatch):
    monkeypatch.setattr(tuned, "_read_once", functools.cache(tuned.read))
    write(gpu_file, "modal_step", "batch 1", asdict(MODAL(channels=32)))
    assert tuned.tuned("modal_step", "batch 1", Config) == MODAL(channels=32)
    gpu_file.unlink()
    assert tuned.tuned("modal_step", "batch 1", Config) == MODAL(channels=32)


def test_sizes_that_vary_share_an_entry_up_to_a_power_of_two():
    def key(**sizes):
        return tuned.key_of({"batch": 1, "heads": 3, "keys": 4096} | sizes)

    assert key() == "batch 1, heads 3, keys 4096"
    assert key(keys=2049) == key() != key(keys=4097)
    assert key(batch=5) == key(batch=8) != key(batch=4)
    assert key(heads=4) != key()


def test_every_kind_of_device_has_a_file():
    assert tuned.path_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


ENTRY = '{"kernels": {"modal_step": {"batch 1": %s}}}'


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "{",
            "cpu.json is not JSON: .*; delete it or write it anew with tools/kernels/tune_",
        ),
        ("[]", 'cpu.json must hold "kernels": '),
        (ENTRY % "3", 'cpu.json must hold "kernels": '),
        (ENTRY % '{"rows": "1"}', "field: integer"),
        (
            ENTRY % '{"rows": 1, "channels": 32, "modes": 4, "row": 1}',
            "cpu.json has no valid configuration of modal_step for 'batch 1': .*'row'",
        ),
        (
            ENTRY % '{"rows": 3, "channels": 32, "modes": 4}',
            "cpu.json has no valid .*must be powers of two.*take the entry out",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_named(gpu_file, text, message):
    gpu_file.write_text(text)
    with pytest.raises(ValueError, match=message):
        tuned.tuned("modal_step", "batch 1", Config)


SIZES = {
    "add_norm": [(1, 64), (96, 576, 4096)],
    "dense_attention": [(1, 64), (1, 3, 32), (1, 9, 64), (16, 4096, 131072), (64, 80, 256), (2, 4)],
    "kivi_attention": [
        (1, 64),
        (3, 32),
        (1, 9, 64),
        (64, 4096, 131072),
        (64, 128),
        (2, 4),
        (2, 4, 8),
    ],
    "less_state": [(3, 32, 128), (1, 16, 512), (1, 5, 256)],
    "modal_step": [(1, 5, 64), (30, 768, 4096), (4, 8, 24)],
    "put_tokens": [(1, 2, 70, 4096), (1, 48, 128)],
    "sparse_heads": [(1, 64), (1, 3, 32), (1, 4, 32), (16, 4096, 131072), (64, 128, 256)],
    "skinny_matmul": [(1, 2, 16), (5, 576, 11008), (1, 40, 576, 12288), (2, 4)],
    "sparse_mlp": [(1, 3, 16, 64), (1, 8), (64, 576, 8192), (16, 1536, 28672), (2, 4)],
    "weight_matmul": [(1, 5, 16, 64, 200), (72, 512, 6144), (1, 9, 64, 172)],
}


@pytest.mark.parametrize("folder", SIZES)
def test_candidates_are_a_few_tilings_around_the_heuristic(folder):
    configs = importlib.import_module(f"pallas_kernels.{folder}.configs")
    for sizes in itertools.product(*SIZES[folder]):
        default = configs.heuristic(*sizes)
        spaces = [configs.candidates]
        if folder == "dense_attention":
            spaces.append(configs.weight_candidates)
        for space in spaces:
            found = space(*sizes)  # a configuration checks itself
            assert found[0] == default and 3 <= len(found) == len(set(found)) <= 24
            for config in found:
                fields = asdict(config)
                splits, _ = fields.pop("splits", 1), fields.pop("stages", 1)
                assert splits >= 1 and all(n >= 1 and n & (n - 1) == 0 for n in fields.values())


def test_matrix_products_of_candidates_have_sixteen_rows_and_columns():
    from pallas_kernels.sparse_mlp.configs import candidates

    for config in candidates(16, 1, 576, 384, 2):
        assert min(config.neurons, config.depth, config.columns, config.chain) >= 16


def test_the_default_of_quantize_pack_is_its_first_candidate():
    from pallas_kernels.quantize_pack.configs import Config, candidates

    assert candidates()[0] == Config() and len(candidates()) <= 24


def test_a_budget_reaches_every_kernel():
    problems = tune_kernels.problems_of(RUN, list(KERNELS))
    assert [p.kernel for p in problems[: len(KERNELS)]] == list(KERNELS)
    assert len(problems) > len(KERNELS)


def row(times, total=3):
    return Row(kernel="k", key="batch 1", default="slow", total=total, times=times)


def test_the_heuristic_stands_unless_another_is_clearly_faster():
    assert row({"slow": 10.0, "fast": 9.0}).best == "fast"
    assert row({"slow": 10.0, "fast": 9.9}).best == "slow"
    assert row({"fast": 9.9}).best == "fast"  # the heuristic's choice was wrong
    assert row({}).best is None


@pytest.fixture
def few(monkeypatch):
    """Two tilings to choose from; the second one is faster."""
    from bench.gpu.timing import Timed

    found = [MODAL(channels=32), MODAL(channels=64)]  # the first is the heuristic's
    monkeypatch.setattr("pallas_kernels.modal_step.cases.candidates", lambda *sizes: found)
    times = iter((10.0, 8.0))
    monkeypatch.setattr(Timed, "run", lambda self: {"us": next(times)})
    return found


def test_the_best_is_added_to_a_file(tmp_path, few, capsys):
    path = tmp_path / "tuned.json"
    write(path, "key_weights", "batch 1", {"rows": 16})
    assert tune_kernels.main([*QUICK, "--save", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["device"] == "cpu" and record["jax"] == jax.__version__ and record["date"]
    assert record["command"].startswith("python tools/kernels/tune_kernels.py --interpret --quick")
    assert tuned.read(path) == {
        "key_weights": {"batch 1": {"rows": 16}},
        "modal_step": {"batch 2, channels 64, modes 4": asdict(few[1])},
    }
    assert list(tmp_path.iterdir()) == [path]
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == [
        "modal_step", "batch", "2,", "channels", "64,", "modes", "4", "channels", "64", "8.00",
        "10.00", "1.25", "2", "of", "2",
    ]  # fmt: skip


def test_a_wrong_candidate_is_dropped(tmp_path, few, monkeypatch, capsys):
    from pallas_kernels.modal_step import api

    right = api._modal_step

    def wrong(*args, config, interpret):
        y, *states = right(*args, config=config, interpret=interpret)
        return (y + 1 if config == few[1] else y), *states

    monkeypatch.setattr(api, "_modal_step", wrong)
    path = tmp_path / "tuned.json"
    assert tune_kernels.main([*QUICK, "--save", str(path)]) == 1
    ((fields,),) = (entries.values() for entries in tuned.read(path).values())
    assert fields == asdict(few[0])
    printed = capsys.readouterr()
    assert f"dropped {few[1]}: wrong by " in printed.err and "1 of 2" in printed.out


def test_a_candidate_that_does_not_compile_is_dropped(few, monkeypatch, capsys):
    from pallas_kernels.modal_step import api

    right = api._modal_step

    def refuses(*args, config, interpret):
        if config == few[1]:
            raise NotImplementedError("too many registers")
        return right(*args, config=config, interpret=interpret)

    monkeypatch.setattr(api, "_modal_step", refuses)
    assert tune_kernels.main(QUICK) == 0  # only what is wrong is an error
    assert "NotImplementedError: too many registers" in capsys.readouterr().err


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_search_that_was_cut_short_replaces_no_entry(tmp_path, is_complete):
    path = tmp_path / "tuned.json"
    write(path, "k", "batch 1", {"rows": 2, "channels": 32, "modes": 4})
    found = row({MODAL(channels=32): 1.0}, total=1 if is_complete else 2)
    tune_kernels.store(path, found, {})
    assert tuned.read(path)["k"]["batch 1"]["rows"] == (1 if is_complete else 2)
    other = Row(kernel="k", key="batch 2", default=None, total=5, times=found.times)
    tune_kernels.store(path, other, {})
    assert tuned.read(path)["k"]["batch 2"] == asdict(MODAL(channels=32))


def test_no_time_is_no_error(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    assert tune_kernels.main([*QUICK, "--budget", "0", "--save", str(path)]) == 0
    assert not path.exists() and len(capsys.readouterr().out.splitlines()) == 1


def test_without_a_gpu_it_says_so(capsys):
    assert tune_kernels.main(["--only", "modal_step"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "no GPU here; --interpret --quick tries the search out"
    ]


def test_trial_times_stay_out_of_the_package(capsys):
    inside = Path(tuned.__file__).parent / "tuned" / "cpu.json"
    with pytest.raises(SystemExit):
        tune_kernels.main([*QUICK, "--save", str(inside)])
    assert "is in the package" in capsys.readouterr().err and not inside.exists()


def test_a_damaged_file_is_said_before_anything_is_timed(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="tuned.json is not JSON"):
        tune_kernels.main([*QUICK, "--save", str(path)])
