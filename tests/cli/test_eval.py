"""`jaxinfer eval` and `jaxinfer score --stream`: what they print and what they refuse."""

import json

import pytest

import jaxinfer as ji
from jaxinfer.eval import perplexity
from jaxinfer.texts import write_source

TEXT = "Some words that are to be scored, and then some more of them.\n" * 4
STREAMING = ("--policy", "streaming", "--policy-args", "sinks=2,window=30")


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def rows_of(result) -> list[dict]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_perplexity_has_a_row_for_full_policy_and_equal_memory(run, model, lm, text):
    rows = rows_of(
        run("eval", "perplexity", model, "--text", text, "--context", "100", "--json", *STREAMING)
    )
    assert [row["row"] for row in rows] == ["full", "policy", "equal memory"]
    expected = perplexity(lm, [TEXT], ji.streaming(2, 30), context=100)
    assert rows[1]["nll"] == expected.nll and rows[0]["share_of_full"] == 1
    assert rows[2]["bytes_per_token"] <= rows[1]["bytes_per_token"]


def test_people_get_a_markdown_table(run, model, text):
    result = run("eval", "perplexity", model, "--text", text, "--tokens", "64")
    assert result.out.startswith("| row | policy | bytes_per_token |")
    assert result.out.count("\n") == 3


def test_a_stream_has_its_curve_and_a_recompute_row(run, model, text):
    rows = rows_of(
        run(
            "eval", "stream", model, "--text", text, "--tokens", "120", "--every", "40", "--alone",
            "--recompute", "32", "--stride", "16", "--json", *STREAMING,
        )
    )  # fmt: skip
    assert [row["row"] for row in rows] == ["policy", "recompute"]
    assert [point["end"] for point in rows[0]["details"]] == [41, 81, 120]
    assert rows[1]["bytes_per_token"] == 0


def test_passkey_prints_depth_by_length(run, model):
    result = run("eval", "passkey", model, "--lengths", "450", "--depths", "0,1", "--samples", "1")
    assert "| depth | 450 |" in result.out and "| 1 | " in result.out


def test_recall_needs_no_tokenizer_and_writes_a_record(run, bare_model, tmp_path):
    rows = rows_of(
        run(
            "eval", "recall", bare_model, "--lengths", "6", "--samples", "2", "--json",
            "--results", str(tmp_path / "out"),
        )
    )  # fmt: skip
    assert rows[0]["distance 6"] == rows[0]["accuracy"]
    record = json.loads((tmp_path / "out" / "eval-recall.jsonl").read_text())
    assert record["config"]["lengths"] == [6] and record["metrics"]["rows"][0]["row"] == "full"


def test_lines_and_rouge_answer(run, model, text):
    lines = rows_of(
        run("eval", "lines", model, "--lines", "6", "--every", "3", "--distances", "1", "--json")
    )
    assert 0 <= lines[0]["1 lines"] <= 1
    rouge = rows_of(
        run(
            "eval", "rouge", model, "--text", text, "--prompt-tokens", "30", "--new-tokens", "8",
            "--json",
        )
    )  # fmt: skip
    assert rouge[0]["rougeL"] in (0.0, 1.0)  # of itself; 0 where the text has no word


def test_sparsity_has_a_row_for_the_dense_model_and_each_method_and_density(
    run, model, text, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    write_source(tmp_path / "texts", "brown", [("ca01", TEXT * 40), ("cd01", TEXT * 2)])
    arguments = (
        "eval", "sparsity", model, "--text", text, "--tokens", "48", "--prompt-tokens", "16",
        "--new-tokens", "4", "--densities", "0.5,0.25", "--methods", "static",
        "--block-size", "8", "--calibration", "1",
    )  # fmt: skip
    rows = rows_of(run(*arguments, "--json", "--results", str(tmp_path / "out")))
    assert [(row["method"], row.get("density")) for row in rows] == [
        ("dense", None), ("static", 0.5), ("static", 0.25),
    ]  # fmt: skip
    assert rows[0]["relative"] == 1 and rows[2]["used"] == pytest.approx(0.333, abs=0.001)
    assert all(0 <= row["agreement"] <= 1 and row["perplexity"] > 1 for row in rows)
    record = json.loads((tmp_path / "out" / "eval-sparsity.jsonl").read_text())
    assert record["config"]["block_size"] == 8 and len(record["metrics"]["rows"]) == 3


def test_score_streams_past_the_context_what_score_finds(run, model, text):
    arguments = ("score", text, "--model", model, "--json", *STREAMING)
    (streamed,), (scored,) = rows_of(run(*arguments, "--stream")), rows_of(run(*arguments))
    assert streamed["nll"] == pytest.approx(scored["nll"], rel=1e-4)
    assert streamed["tokens"] == scored["tokens"] and streamed["curve"]


CASES = {
    "unknown task": (("luck", "MODEL"), "passkey"),
    "an option of another task": (("recall", "MODEL", "--depths", "0"), "passkey"),
    "text for a task without": (("lines", "MODEL", "--text", "TEXT"), "--text"),
    "numbers that are none": (("recall", "MODEL", "--lengths", "a,b"), "--lengths"),
    "no numbers": (("recall", "MODEL", "--lengths", ","), "--lengths"),
    "unknown policy": (("recall", "MODEL", "--policy", "perfect"), "perfect"),
    "unknown kind": (("recall", "MODEL", "--kind", "luck"), "associative"),
    "unknown scoring": (("passkey", "MODEL", "--scoring", "luck"), "greedy"),
    "unknown reference": (("rouge", "MODEL", "--text", "TEXT", "--reference", "x"), "full"),
    "unknown baseline": (("recall", "MODEL", *STREAMING, "--baseline", "x"), "window"),
    "missing text": (("perplexity", "MODEL", "--text", "none"), "none"),
    "missing source": (("perplexity", "MODEL", "--source", "nowhere"), "fetch_texts"),
    "short passkey": (("passkey", "MODEL", "--lengths", "20"), "no room"),
    "words for a model without tokenizer": (("lines", "BARE"), "tokenizer"),
    "stride beyond the window": (
        ("stream", "MODEL", "--text", "TEXT", "--recompute", "8", "--stride", "8", "--tokens", "9"),
        "stride",
    ),
    "unknown method": (("sparsity", "MODEL", "--text", "TEXT", "--methods", "luck"), "moefication"),
    "density above 1": (("sparsity", "MODEL", "--text", "TEXT", "--densities", "2"), "density"),
    "texts too short": (("sparsity", "MODEL", "--text", "TEXT", "--tokens", "999"), "longer texts"),
    "blocks that do not divide": (
        (
            "sparsity",
            "MODEL",
            "--text",
            "TEXT",
            "--tokens",
            "40",
            "--methods",
            "random",
            "--block-size",
            "7",
        ),
        "48 neurons",
    ),  # fmt: skip
    "an option of sparsity": (("recall", "MODEL", "--block-size", "4"), "option of sparsity"),
    "a policy under sparsity": (("sparsity", "MODEL", *STREAMING), "--policy"),
    "no option of sparsity": (("sparsity", "MODEL", "--lines", "4"), "--lines"),
    "stride without recompute": (("stream", "MODEL", "--text", "TEXT", "--stride", "8"), "--rec"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name, run, model, bare_model, text):
    arguments, expected = CASES[name]
    places = {"MODEL": model, "BARE": bare_model, "TEXT": text}
    result = run("eval", *(places.get(a, a) for a in arguments))
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert expected in result.err


@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_score_stream_is_refused_for_policies_that_grow(run, model, text, policy):
    result = run("score", text, "--model", model, "--stream", "--policy", policy)
    assert result.code == 2 and "choose streaming" in result.err
