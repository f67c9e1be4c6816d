"""`jaxinfer plan` and `jaxinfer simulate`: what they print, and what they refuse."""

import json

import pytest

CLUSTER = {
    "version": 1,
    "gpus": {
        "small": {"memory_bytes": 2e6, "bytes_per_s": 4e9, "flops_per_s": 7e10},
        "large": {"memory_bytes": 8e6, "bytes_per_s": 8e9, "flops_per_s": 9e10},
    },
    "machines": [
        {
            "name": name, "gpu": gpu, "count": count, "region": "here",
            "link": {"latency_s": 5e-6, "bytes_per_s": 12e9}, "price_per_hour": 1.5,
        }
        for name, gpu, count in (("one", "large", 1), ("two", "small", 2))
    ],
    "same_region": {"latency_s": 2e-4, "bytes_per_s": 1.25e9},
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
LOAD = ("--rate", "50", "--deadline", "0.5", "--lengths", "16:8,32:4:0.5")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def plan(files, *more):
    reserve = ("plan", str(files / "cluster.json"), "-m", str(files / "model"), *LOAD)
    return (*reserve, "--method", "start", "--reserve", "0", *more)


def test_a_plan_is_made_explained_saved_and_replayed(run, files):
    saved = files / "plan.json"
    result = run(*plan(files, "--save", str(saved), "--json"))
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record == json.loads(saved.read_text())
    assert record["model"]["layers"] == 6 and 0 <= record["attainment"] <= 1
    result = run(*plan(files))
    assert result.code == 0 and result.out.startswith("replica 0: ")
    assert "of requests within 0.5 s at 50 requests/s" in result.out
    result = run("simulate", str(saved), "--requests", "50", "--json", "--unit", "tokens")
    figures = json.loads(result.out)
    assert figures["requests"] == 50 and figures["lost"] == 0 and figures["deadline_s"] == 0.5
    assert figures["time_to_first_token_s"]["mean"] > 0
    result = run("simulate", str(saved), "--requests", "50", "--lose", "0:one", "--lose", "0:two")
    assert result.code == 0 and "50 lost" in result.out and "never" in result.out
    trace = files / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,16,8\n0.1,32,4\n")
    result = run("simulate", str(saved), "--trace", str(trace), "--deadline", "9", "--json")
    assert json.loads(result.out)["attainment"] == 1.0
    result = run(*plan(files, "--start", str(saved), "--json"))
    assert json.loads(result.out)["replicas"] == record["replicas"]


BAD = {
    "no such cluster": (("plan", "TMP/none", "-m", "TMP/model", *LOAD), "none"),
    "no such model": (("plan", "TMP/cluster.json", "-m", "TMP/none", *LOAD), "none"),
    "a cluster that is a model": (
        ("plan", "TMP/model/config.json", "-m", "TMP/model", *LOAD), "unknown field",
    ),
    "a model that is a cluster": (
        ("plan", "TMP/cluster.json", "-m", "TMP/cluster.json", *LOAD), "model_type",
    ),
    "lengths of three words": (
        ("plan", "TMP/cluster.json", "-m", "TMP/model", "--rate", "1", "--deadline", "1",
         "--lengths", "1:2:3:4"), "--lengths",
    ),
    "no rate": (
        ("plan", "TMP/cluster.json", "-m", "TMP/model", "--rate", "0", "--deadline", "1"),
        "requests_per_s",
    ),
    "an unknown method": (
        ("plan", "TMP/cluster.json", "-m", "TMP/model", *LOAD, "--method", "luck"), "genetic",
    ),
    "an unknown type": (
        ("plan", "TMP/cluster.json", "-m", "TMP/model", *LOAD, "--dtype", "int3"), "--dtype",
    ),
    "a model too large": (
        ("plan", "TMP/cluster.json", "-m", "TMP/model", *LOAD), "no group of accelerators",
    ),
    "no plan": (("simulate", "TMP/model/config.json"), "version of a plan"),
    "a trace with a rate": (
        ("simulate", "TMP/cluster.json", "--trace", "TMP/x", "--rate", "1"), "--trace",
    ),
    "an unknown unit": (("simulate", "TMP/cluster.json", "--unit", "words"), "--unit"),
    "an unknown router": (("simulate", "TMP/cluster.json", "--router", "luck"), "--router"),
    "a probe of no time": (("probe", "--seconds", "0"), "seconds must be a number"),
    "a probe of another dtype": (("probe", "--dtype", "int8"), "--dtype"),
    "more stages than layers": (("chaos", "tiny-llama", "--stages", "7"), "exceed the 6 layers"),
    "chaos without such a policy": (("chaos", "tiny-llama", "--policy", "luck"), "luck"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(name, run, files):
    words, expected = BAD[name]
    result = run(*(word.replace("TMP", str(files)) for word in words))
    assert result.code == 2 and not result.out
    assert expected in result.err and result.err.count("\n") == 1


def test_losses_that_name_nothing_are_refused(run, files):
    run(*plan(files, "--save", str(files / "plan.json")))
    for text, expected in (
        ("x", "SECONDS:MACHINE"),
        ("1:nowhere", "'nowhere'"),
        ("nan:one", "loss"),
    ):
        result = run("simulate", str(files / "plan.json"), "--lose", text)
        assert result.code == 2 and expected in result.err
