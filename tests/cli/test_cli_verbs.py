"""What each verb prints, for people and as JSON."""

import json

import jaxinfer as ji

STATS = {"prefill_s", "decode_s", "compile_s", "tokens_per_s", "tokens_per_step", "cache_bytes"}
SHORT = ("-n", "6")


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
    shown = run(*arguments).out
    assert "tokens/step" in shown and "one draft pass" in shown
    chain = tmp_path / "chain.json"
    chain.write_text('{"format": "jaxinfer-tree", "version": 1, "parent": [-1, 0, 1]}')
    plain = run("generate", "hello", "--model", model, *SHORT)
    ahead = run(
        "generate", "hello", "--model", model, "--draft", "exit:1", "--tree", str(chain), *SHORT
    )
    assert ahead.code == 0 and ahead.out == plain.out
