"""Options and presets: sizes, commands without paths, and clear refusals."""

from pathlib import Path

import pytest

from bench.options import PRESETS, Options, load_preset
from bench.routines import ROUTINES, run


def test_command_repeats_the_run_without_naming_paths(tmp_path):
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    options = Options(model="/somewhere/model", gguf=str(gguf), rounds=2, torch=False)
    assert options.command("decode") == (
        "python -m bench decode --model model --gguf m.gguf --rounds 2 --no-torch --seed 0"
    )


def test_a_method_of_sparsity_is_named_by_the_last_part_of_its_path():
    options = Options(model="tiny-opt", sparsity="/somewhere/lte-tiny-opt", weights="int8")
    assert options.command("sparsity") == (
        "python -m bench sparsity --model tiny-opt --sparsity lte-tiny-opt --weights int8 --seed 0"
    )


def test_rounds_replace_the_presets_for_every_batch():
    assert Options(rounds=2).settings("decode")["rounds"] == [2, 2]
    assert Options(rounds=2).settings("prefill")["rounds"] == 2


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        Options(rounds=0)


def test_a_gguf_file_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--gguf nowhere.gguf is not a file"):
        Options(gguf="nowhere.gguf")


@pytest.mark.parametrize("name", ["nothing", "../presets/quick", ""])
def test_unknown_presets_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="quick, standard"):
        load_preset(name)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda p: Path(p).stem)
def test_presets_have_a_table_for_every_routine(path):
    assert set(load_preset(path.stem)) == set(ROUTINES)


def test_unknown_benchmarks_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no benchmark 'x'; choose one of decode, prefill"):
        run("x", Options())
