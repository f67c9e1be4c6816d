"""Bad flags, prompts and files: exit code 2 and one line that says what is wrong."""

import pytest

GENERATE = ("generate", "hello", "--model", "MODEL")
CASES = {
    "unknown verb": (("dance",), "dance"),
    "unknown flag": ((*GENERATE, "--nonsense"), "--nonsense"),
    "flag without a value": ((*GENERATE, "--seed"), "--seed"),
    "text for a number": ((*GENERATE, "--top-k", "many"), "--top-k"),
    "negative temperature": ((*GENERATE, "--temperature", "-1"), "temperature"),
    "temperature nan": ((*GENERATE, "--temperature", "nan"), "temperature"),
    "temperature inf": ((*GENERATE, "--temperature", "inf"), "temperature"),
    "negative top-k": ((*GENERATE, "--top-k", "-3"), "top_k"),
    "top-p zero": ((*GENERATE, "--top-p", "0"), "top_p"),
    "top-p over one": ((*GENERATE, "--top-p", "1.5"), "top_p"),
    "min-p over one": ((*GENERATE, "--min-p", "2"), "min_p"),
    "no penalty": ((*GENERATE, "--repetition-penalty", "0"), "repetition_penalty"),
    "negative seed": ((*GENERATE, "--seed", "-1"), "--seed"),
    "huge seed": ((*GENERATE, "--seed", str(2**70)), "--seed"),
    "no new tokens": ((*GENERATE, "--max-new-tokens", "0"), "--max-new-tokens"),
    "too many new tokens": ((*GENERATE, "-n", str(2**31 - 1)), "from 1 to 1073741824"),
    "more new tokens than memory": ((*GENERATE, "-n", str(2**30)), "memory"),
    "no samples": ((*GENERATE, "--samples", "0"), "--samples"),
    "bias without value": ((*GENERATE, "--logit-bias", "5"), "--logit-bias"),
    "bias nan": ((*GENERATE, "--logit-bias", "5=nan"), "--logit-bias"),
    "bias inf": ((*GENERATE, "--logit-bias", "5=inf"), "--logit-bias"),
    "bias outside the vocabulary": ((*GENERATE, "--logit-bias", "99999=1"), "vocabulary"),
    "unknown policy": ((*GENERATE, "--policy", "perfect"), "perfect"),
    "misspelt policy": (
        (*GENERATE, "--policy", "kvi"),
        "did you mean 'kivi'? known policies: full",
    ),
    "misspelt argument": (
        (*GENERATE, "--policy", "kivi4", "--policy-args", "bit=2"),
        "did you mean 'bits'? it takes",
    ),
    "misspelt model": (("generate", "x", "--model", "smollm"), "did you mean 'smollm2-135m'?"),
    "misspelt draft": ((*GENERATE, "--draft", "prompt-lokup"), "did you mean 'prompt-lookup'?"),
    "misspelt verb": (("genrate", "x"), "did you mean 'generate'? see jaxinfer --help"),
    "misspelt training": (("train", "lss"), "did you mean 'less'?"),
    "unknown device": (("tree", "--target", "MODEL", "--roofline", "h20"), "did you mean 'h200'?"),
    "empty stop": ((*GENERATE, "--stop", ""), "--stop"),
    "standard input twice": (("generate", "-", "-", "--model", "MODEL"), "once"),
    "endless file": (("generate", "--prompt-file", "/dev/zero", "--model", "MODEL"), "characters"),
    "resume and restore": (("chat", "--model", "MODEL", "--resume", "--restore", "x"), "one of"),
    "report as json": (("bench", "report", "--json"), "--json"),
    "write without report": (("bench", "decode", "--write"), "--write"),
    "unknown policy argument": ((*GENERATE, "--policy-args", "bits=2"), "full"),
    "malformed policy argument": ((*GENERATE, "--policy-args", "bits"), "key=value"),
    "policy renamed": ((*GENERATE, "--policy-args", "name=full"), "key=value"),
    "unknown dtype": ((*GENERATE, "--dtype", "float7"), "float7"),
    "weights of three bits": ((*GENERATE, "--weights", "int3"), "int8"),
    "draft that is no model": ((*GENERATE, "--draft", "TMP/none"), "none"),
    "empty draft name": ((*GENERATE, "--draft", ""), "a draft"),
    "draft exit without a number": ((*GENERATE, "--draft", "exit:x"), "exit:N"),
    "draft exit of all layers": ((*GENERATE, "--draft", "exit:99"), "early exit"),
    "tree without draft": ((*GENERATE, "--tree", "TMP/none"), "--draft"),
    "tree file missing": ((*GENERATE, "--draft", "exit:1", "--tree", "TMP/none"), "none"),
    "tree file not a tree": ((*GENERATE, "--draft", "exit:1", "--tree", "TMP/binary"), ""),
    "tree sizes": (("tree", "--target", "MODEL", "--sizes", "2,x"), "--sizes"),
    "sparsity without a source": ((*GENERATE, "--sparsity", "deja-vu"), "deja_vu needs source"),
    "sparsity of a missing source": (
        (*GENERATE, "--sparsity", "lte", "--sparsity-args", "source=TMP/none"),
        "no sparsity artefact at",
    ),
    "misspelt sparsity": (
        (*GENERATE, "--sparsity", "deja-wu"),
        "did you mean 'deja_vu'? known methods: deja_vu",
    ),
    "misspelt argument of a sparsity": (
        (*GENERATE, "--sparsity", "deja-vu", "--sparsity-args", "densty=1"),
        "did you mean 'density'? it takes",
    ),
    "arguments without a sparsity": ((*GENERATE, "--sparsity-args", "density=1"), "--sparsity"),
    "malformed sparsity argument": (
        (*GENERATE, "--sparsity", "lte", "--sparsity-args", "density"),
        "key=value",
    ),
    "score with an unknown sparsity": (("score", "TMP/text", "--sparsity", "x"), "sparsity"),
    "info with an unknown sparsity": (("info", "MODEL", "--sparsity", "x"), "sparsity"),
    "eval with an unknown sparsity": (("eval", "recall", "BARE", "--sparsity", "x"), "sparsity"),
    "log-probs without json": ((*GENERATE, "--log-probs"), "--json"),
    "empty prompt": (("generate", "", "--model", "MODEL"), "empty"),
    "lone surrogate": (("generate", "\udcff", "--model", "MODEL"), ""),
    "prompt file missing": (("generate", "--prompt-file", "TMP/none"), "none"),
    "prompt file is a folder": (("generate", "--prompt-file", "TMP"), "irectory"),
    "prompt file not text": (("generate", "--prompt-file", "TMP/binary"), "UTF-8"),
    "no such model": (("generate", "x", "--model", "TMP/none"), "none"),
    "empty model name": (("generate", "x", "--model", ""), "model"),
    "a folder without a model": (("generate", "x", "--model", "TMP"), ""),
    "a model that is text": (("generate", "x", "--model", "TMP/text"), ""),
    "words for a model without tokenizer": (("generate", "hi", "--model", "BARE"), "token"),
    "token outside the vocabulary": (("generate", "999", "--model", "BARE"), "vocabulary"),
    "score nothing": (("score",), "file"),
    "score a missing file": (("score", "TMP/none", "--model", "MODEL"), "none"),
    "score an empty file": (("score", "TMP/empty", "--model", "MODEL"), ""),
    "score in chunks of none": (("score", "TMP/text", "--chunk", "0"), "--chunk"),
    "score with an unknown policy": (("score", "TMP/text", "--policy", "x"), "policy"),
    "convert without destination": (("convert", "MODEL"), ""),
    "convert nothing": (("convert", "TMP/none", "TMP/new"), "none"),
    "convert over a file": (("convert", "MODEL", "TMP/text"), "destination"),
    "convert over other files": (("convert", "MODEL", "TMP"), "destination"),
    "convert onto itself": (("convert", "MODEL", "MODEL"), "destination"),
    "convert to an empty name": (("convert", "MODEL", ""), "destination"),
    "info of nothing": (("info", "TMP/none"), "none"),
    "info without capacity": (("info", "MODEL", "--capacity", "0"), "--capacity"),
    "info beyond memory": (("info", "MODEL", "-c", str(2**26), "-b", "4096"), "memory"),
    "info for an unknown target": (("info", "MODEL", "--target", "abacus"), "h200"),
    "bench of nothing": (("bench", "nonsense"), "nonsense"),
    "misspelt bench": (("bench", "decod"), "did you mean 'decode'?"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name, run, model, bare_model, tmp_path, piped):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    before = sorted(tmp_path.iterdir())
    piped("")
    arguments, expected = CASES[name]
    places = {"MODEL": model, "BARE": bare_model}
    result = run(*(places.get(a, a.replace("TMP", str(tmp_path))) for a in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert expected in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_bench_without_a_checkout_says_what_to_do(run, tmp_path, monkeypatch):
    import jaxinfer.cli.bench as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "jaxinfer" / "cli" / "bench.py"))
    result = run("bench", "decode")
    assert result.code == 2
    assert result.err.startswith("error: benchmarks run from a source checkout")
    assert result.err.count("\n") == 1
