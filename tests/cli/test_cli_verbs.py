"""What each verb prints, for people and as JSON."""

import inspect
import json
import re
import runpy
import sys

import pytest

import jaxinfer as ji
from jaxinfer.cli import notices
from jaxinfer.records import Record, append
from jaxinfer.train.windows import MIXTURE

STATS = {"prefill_s", "decode_s", "compile_s", "tokens_per_s", "tokens_per_step", "cache_bytes"}
SHORT = ("-n", "6")


def rows_of(result) -> list[dict]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_one_prompt_is_answered_in_the_chat_template(run, model, lm):
    result = run("generate", "hello", "--model", model, *SHORT)
    prompt = lm.tokenizer.encode(
        lm.chat_prompt([{"role": "user", "content": "hello"}]), add_special=False
    )
    assert result.code == 0
    assert result.out == lm.generate(prompt, max_new_tokens=6)[0].text + "\n"


def test_raw_continues_the_text_as_it_is(run, model, lm):
    result = run("generate", "hello", "--raw", "--model", model, *SHORT)
    assert result.out == lm.generate("hello", max_new_tokens=6)[0].text + "\n"


def test_weights_in_fewer_bits_are_those_of_load(run, model):
    result = run("generate", "hello", "--raw", "--model", model, "--weights", "int8", *SHORT)
    small = ji.load(model, weights="int8")
    assert result.out == small.generate("hello", max_new_tokens=6)[0].text + "\n"


def test_json_prints_one_object_per_prompt(run, model):
    result = run("generate", "one", "two two", "--json", "--log-probs", "--model", model, *SHORT)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["prompt"] for record in records] == [0, 1]
    for record in records:
        assert {"text", "tokens", "finish_reason", "stats", "log_probs"} <= set(record)
        assert set(record["stats"]) >= STATS
        assert len(record["tokens"]) == len(record["log_probs"]) <= 6


def test_stats_in_json_are_the_prompts_own_and_say_what_is_the_batchs(run, model):
    prompts, shared = ("a", "four"), ("--raw", "--json", "--model", model, *SHORT)
    records = rows_of(run("generate", *prompts, "--samples", "2", *shared))
    alone = [rows_of(run("generate", prompt, *shared))[0] for prompt in prompts]
    assert [record["stats"]["prompt_tokens"] for record in records] == [1, 1, 4, 4]
    for record in records:
        own, one = record["stats"], alone[record["prompt"]]
        assert own["prompt_tokens"] == one["stats"]["prompt_tokens"]
        assert own["cache_bytes"] == one["stats"]["cache_bytes"]
        assert own["new_tokens"] == len(record["tokens"])
        assert own["tokens_per_s"] == (own["new_tokens"] - 1) / own["decode_s"]
        assert {"prefill_s", "decode_s", "compile_s"} <= set(own["of_batch"])
        batch = record["batch"]
        assert batch["completions"] == 4 and batch["prompt_tokens"] == 10
        assert batch["new_tokens"] == sum(len(other["tokens"]) for other in records)
        assert batch["cache_bytes"] == sum(other["stats"]["cache_bytes"] for other in records)
    for one in alone:
        assert one["batch"] == {"completions": 1} | one["stats"] and "of_batch" not in one["stats"]


def test_samples_differ_by_their_seed_and_repeat_with_it(run, model):
    arguments = ("generate", "x", "--json", "-t", "1.5", "--samples", "3", "--model", model, *SHORT)
    first, second = run(*arguments).out, run(*arguments).out
    tokens = [json.loads(line)["tokens"] for line in first.splitlines()]
    assert len({tuple(t) for t in tokens}) > 1
    assert tokens == [json.loads(line)["tokens"] for line in second.splitlines()]


def test_a_prompt_comes_from_a_file_or_a_pipe(run, model, tmp_path, piped):
    (tmp_path / "prompt.txt").write_text("hello")
    direct = run("generate", "hello", "--model", model, *SHORT).out
    file = run("generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--model", model, *SHORT)
    piped("hello")
    assert file.out == direct == run("generate", "--model", model, *SHORT).out


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_prompt_has_no_byte_order_mark_and_no_final_newline(run, plain_model, piped, ending):
    arguments = ("generate", "--raw", "--json", "--model", plain_model, *SHORT)
    (expected,) = rows_of(run(*arguments, " hi\n"))
    piped(("\ufeff hi\n" + ending).encode())
    (found,) = rows_of(run(*arguments))
    if ending:
        assert found["tokens"] == expected["tokens"]
        assert found["stats"]["prompt_tokens"] == expected["stats"]["prompt_tokens"] == 4
    else:  # the one newline is the final one
        assert found["stats"]["prompt_tokens"] == 3


def test_a_scored_text_is_read_as_it_is_but_for_the_byte_order_mark(run, plain_model, piped):
    found = []
    for text in ("one\n", "\ufeffone\n", "one"):
        for stream in ((), ("--stream", "--policy", "streaming", "--policy-args", "window=60")):
            piped(text)
            (row,) = rows_of(run("score", "-", "--json", "--model", plain_model, *stream))
            found.append(row["tokens"])
    assert found == [4, 4, 4, 4, 3, 3]


def test_standard_input_that_is_no_text_or_empty_is_one_line(run, model, plain_model, piped):
    for data, expected in ((b"\xff\xfea\x00", "standard input is not UTF-8"), (b"", "empty")):
        for name in (model, plain_model):
            piped(data)
            result = run("generate", "--model", name)
            assert result.code == 2 and expected in result.err and result.err.count("\n") == 1


def test_stop_strings_have_escapes():
    from jaxinfer.cli.options import stop_strings

    given = [r"\n", r"\\n", r"a\tb", r"\x41\u00e9", r"\d", "\\", r"\x4", "\n"]
    assert stop_strings(given) == (
        "\n", "\\n", "a\tb", "A\u00e9", "\\d", "\\", "\\x4", "\n"
    )  # fmt: skip


def test_a_stop_string_of_a_newline_ends_the_text_there(run, model):
    newline = lambda *more: run(  # noqa: E731
        "generate",
        "a",
        "--raw",
        "--json",
        "--logit-bias",
        "198=1e9",
        "--model",
        model,
        *more,
        *SHORT,
    )
    (record,) = rows_of(newline())
    assert record["text"] == "\n" * 6, "the bias is not on the newline's byte"
    (record,) = rows_of(newline("--stop", "\\n"))
    assert record["finish_reason"] == "stop" and record["text"] == ""


def test_a_logit_bias_forces_a_token(run, model):
    result = run(
        "generate", "a", "--raw", "--json", "--logit-bias", "65=1e9", "--model", model, *SHORT
    )
    assert json.loads(result.out)["tokens"] == [65] * 6


def test_a_model_without_a_tokenizer_takes_token_ids(run, bare_model):
    result = run("generate", "1 2, 3", "--json", "--model", bare_model, *SHORT)
    expected = ji.load(bare_model).generate([1, 2, 3], max_new_tokens=6)[0].tokens
    assert json.loads(result.out)["tokens"] == expected


def test_score_prints_what_the_library_finds(run, model, lm, tmp_path):
    (tmp_path / "text.txt").write_text("a few words to be scored")
    result = run(
        "score", str(tmp_path / "text.txt"), "--json", "--model", model, "--policy", "full",
        "--chunk", "8", "--max-tokens", "20",
    )  # fmt: skip
    record = json.loads(result.out)
    (expected,) = lm.score([lm.encode("a few words to be scored")[:20]], chunk=8)
    assert {"tokens", "nll", "perplexity", "cache_bytes", "chunk"} <= set(record)
    assert (record["tokens"], record["chunk"]) == (20, 8)
    assert record["nll"] == expected.nll and record["cache_bytes"] == expected.cache_bytes


def test_a_converted_model_gives_the_same_text(run, model, tmp_path):
    result = run("convert", model, str(tmp_path / "copy"), "--json")
    assert result.code == 0 and json.loads(result.out)["bytes"] > 0
    again = run("generate", "hello", "--model", str(tmp_path / "copy"), *SHORT)
    assert again.out == run("generate", "hello", "--model", model, *SHORT).out


def test_info_has_the_documented_keys(run, model):
    result = run("info", model, "--policy", "full", "--capacity", "256", "--json")
    record = json.loads(result.out)
    assert record["cache_bytes"] == 256 * record["cache_bytes_per_token"]
    assert {"parameters", "parameter_bytes", "config"} <= set(record)
    assert set(record["decode"]) >= {
        "compile_s", "cache_copies", "temp_bytes", "alias_bytes", "traces", "floor_ms", "step_ms",
        "floor_share", "fusions",
    }  # fmt: skip


def test_info_prints_tables(run, model):
    result = run("info", model, "--capacity", "128")
    assert result.code == 0
    assert "num_kv_heads" in result.out and "cache_copies" in result.out


def test_env_names_versions_devices_and_folders(run):
    record = json.loads(run("env", "--json").out)
    assert record["devices"] and record["versions"]["jax"]
    assert {"threads", "model_cache", "program_cache", "extras"} <= set(record)
    assert run("env").code == 0


def test_the_version_is_the_packages(run):
    assert run("--version").out == f"jaxinfer {ji.__version__}\n"


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxinfer", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("jaxinfer", run_name="__main__")
    assert capsys.readouterr().out == f"jaxinfer {ji.__version__}\n"


def test_help_names_what_there_is(run):
    from jaxinfer.cache.presets import POLICIES
    from jaxinfer.io.model_index import MODELS
    from jaxinfer.loading import DRAFTS
    from jaxinfer.names import SPARSITIES

    words = set(re.findall(r"[\w-]+", run("generate", "--help").out.replace("-\n", "-")))
    text = " ".join(run("generate", "--help").out.split()).replace("- ", "-")
    registered = [*POLICIES.names(), *SPARSITIES.names(), *MODELS, *DRAFTS]
    for name in [*registered, "prompt-lookup", "exit:N", "int8", "int4"]:
        assert name in words or name in text
    for name in ("kivi", "streaming", "h2o", "less"):
        for parameter in inspect.signature(POLICIES.find(name)).parameters:
            assert parameter in words or parameter in ("kernels", "options")
    for name in ("deja_vu", "lte"):
        for parameter in inspect.signature(SPARSITIES.find(name)).parameters:
            assert parameter in words
    sources = " ".join(run("eval", "--help").out.split())
    assert all(name in sources for name in (*MIXTURE, "essays", "fetch_texts.py"))


def test_a_group_without_a_verb_prints_its_help(run):
    for arguments in ((), ("train",)):
        result = run(*arguments)
        assert result.code == 0 and result.err == "" and result.out.startswith("Usage: jaxinfer")


def test_help_fits_into_any_terminal(run, monkeypatch):
    for columns in ("1", "20", "0", "nonsense", "10000"):
        monkeypatch.setenv("COLUMNS", columns)
        for arguments in (("--help",), ("generate", "--help"), ("env",)):
            assert run(*arguments).code == 0


def test_a_report_is_printed_and_written_only_when_asked(run, tmp_path):
    record = Record(name="other", config={}, metrics={}, env={}, command="", seed=0)
    append(record, tmp_path)
    before = sorted(tmp_path.iterdir())
    printed = run("bench", "report", "--results", str(tmp_path))
    assert printed.code == 0 and "# Benchmark results" in printed.out
    assert sorted(tmp_path.iterdir()) == before
    assert run("bench", "report", "--write", "--results", str(tmp_path)).code == 0
    assert (tmp_path / "REPORT.md").read_text() + "\n" == printed.out


@pytest.mark.parametrize("text, holds", [("a few words " * 4, True), ("a few words " * 20, False)])
def test_a_policy_that_has_nothing_to_do_is_said_to_have(run, model, tmp_path, text, holds):
    (tmp_path / "text").write_text(text)
    file, policy = str(tmp_path / "text"), ("--policy", "streaming", "--policy-args", "window=92")
    for verb in (("score", file, "--model", model), ("eval", "perplexity", model, "--text", file)):
        result = run(*verb, *policy)
        assert result.code == 0 and ("figures are those of the full cache" in result.err) == holds


def test_score_past_the_context_says_what_to_do_about_scoring(run, short_model, tmp_path):
    (tmp_path / "text").write_text("x" * 90)
    result = run("score", str(tmp_path / "text"), "--model", short_model)
    assert result.code == 0 and "exceed the model's 64 positions; read fewer" in result.err
    assert "max_new_tokens" not in result.err


def test_a_warning_is_printed_before_the_text_and_once(run, short_model, monkeypatch):
    places = []
    monkeypatch.setattr(notices, "note", lambda text: places.append(text))
    monkeypatch.setattr("builtins.print", lambda *text, **_: places.append(text))
    assert run("generate", "x", "--raw", "--model", short_model, "-n", "80").code == 0
    (first,) = [i for i, text in enumerate(places) if "exceed the model's" in str(text)]
    assert first == 0 < len(places) - 1


def test_help_is_printed_for_the_command_and_for_every_verb(run):
    assert "generate" in run().out
    for verb in ["generate", "chat", "score", "convert", "info", "bench", "env"]:
        result = run(verb, "--help")
        assert result.code == 0 and result.out.startswith(f"Usage: jaxinfer {verb}")


def test_without_the_default_model_the_committed_one_answers(run, model, monkeypatch):
    from jaxinfer.cli import models
    from jaxinfer.io.model_index import ModelUnavailable

    plain = models._load

    def load(source, **options):
        if source == "smollm2-135m":
            raise ModelUnavailable("no connection")
        return plain(model, **options)

    monkeypatch.setattr(models, "_load", load)
    result = run("generate", "hello", *SHORT)
    assert result.code == 0
    assert "no connection" in result.err and "tiny-llama" in result.err


def test_a_tree_is_measured_saved_drawn_and_used(run, model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    saved, drawn = tmp_path / "tree.json", tmp_path / "tree.png"
    arguments = (
        *("tree", "--target", model, "--draft", "exit:1", "--sizes", "2,4", "--tokens", "8"),
        *("--roofline", "h200", "--save", str(saved), "--plot", str(drawn)),
    )
    record = json.loads(run(*arguments, "--json").out)
    assert record["acceptance"]["width"] == 16 and {"this machine", "h200"} <= set(record)
    assert set(record["this machine"]["verify_ms"]) == {"1", "2", "4"}
    assert saved.is_file() and drawn.read_bytes()[:4] == b"\x89PNG"
    shown = run(*arguments, "--force").out
    assert "tokens/step" in shown and "one draft pass" in shown
    one = tmp_path / "one.json"
    one.write_text('{"format": "jaxinfer-tree", "version": 1, "parent": [-1]}')
    plainly = ("--draft", "exit:1", "--tree", str(one), *SHORT)
    assert "no speculation" in run("generate", "hello", "--model", model, *plainly).err
    chain = tmp_path / "chain.json"
    chain.write_text('{"format": "jaxinfer-tree", "version": 1, "parent": [-1, 0, 1]}')
    plain = run("generate", "hello", "--model", model, *SHORT)
    ahead = run(
        "generate", "hello", "--model", model, "--draft", "exit:1", "--tree", str(chain), *SHORT
    )
    assert ahead.code == 0 and ahead.out == plain.out
