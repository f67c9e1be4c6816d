"""Traces and workloads: what is drawn, and what is read from files."""

import numpy as np
import pytest

from jaxinfer.parallel.hexgen.workload import Trace, Workload

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,0
"""


def test_arrivals_are_poisson_and_another_rate_scales_them():
    load = Workload(requests_per_s=4.0, deadline_s=1.0, lengths=((10, 2, 3.0), (20, 4, 1.0)))
    trace = load.trace(20_000, 1)
    gaps = np.diff(trace.arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(
        0.25, rel=0.03
    )
    assert (trace.prompt == 10).mean() == pytest.approx(0.75, abs=0.01)
    assert ((trace.prompt == 10) == (trace.output == 2)).all()
    faster = Workload(requests_per_s=8.0, deadline_s=1.0, lengths=load.lengths).trace(20_000, 1)
    np.testing.assert_allclose(faster.arrival_s * 2, trace.arrival_s)
    assert load.mean_prompt == 12.5 and load.mean_output == 2.5 and load.context == 24
    first = np.random.default_rng(1).exponential(1.0, 20_000).cumsum()
    np.testing.assert_allclose(trace.arrival_s, first / 4)  # as hexgen.md 5.3 draws them


def test_a_trace_of_azure_is_read(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    trace = Trace.load(path)
    assert trace.arrival_s == pytest.approx([0.0, 4.314579, 4.541977], abs=1e-5)
    assert trace.prompt.tolist() == [374, 396, 879] and trace.output.tolist() == [44, 109, 1]


def test_a_saved_trace_is_read_again(tmp_path):
    trace = Workload(requests_per_s=3.0, deadline_s=1.0).trace(20)
    trace.save(tmp_path / "trace.csv")
    again = Trace.load(tmp_path / "trace.csv")
    np.testing.assert_allclose(again.arrival_s, trace.arrival_s - trace.arrival_s[0])
    assert (again.prompt == trace.prompt).all() and (again.output == trace.output).all()


BAD = {
    "no columns": ("", "columns"),
    "other columns": ("a,b,c\n1,2,3\n", "TIMESTAMP"),
    "no requests": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    "a missing column": ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "line 2"),
    "no time": ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,2,3\n", "TIMESTAMP"),
    "nan": ("TIMESTAMP,ContextTokens,GeneratedTokens\nnan,2,3\n", "finite"),
    "infinite": ("TIMESTAMP,ContextTokens,GeneratedTokens\ninf,2,3\n", "finite"),
    "negative tokens": ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,-2,3\n", "tokens"),
    "too many tokens": (f"TIMESTAMP,ContextTokens,GeneratedTokens\n1,{2**40},3\n", "tokens"),
    "many digits": (f"TIMESTAMP,ContextTokens,GeneratedTokens\n1,{'9' * 9999},3\n", "tokens"),
    "an endless field": (f"TIMESTAMP,ContextTokens,GeneratedTokens\n{'x' * 200_000}", "line"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trace_is_refused_in_one_line(name, tmp_path):
    text, expected = BAD[name]
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        Trace.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"requests_per_s": 0.0}, "requests_per_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"lengths": ()}, "kinds of requests"),
        ({"lengths": ((0, 1, 1.0),)}, "prompt tokens"),
        ({"lengths": ((1, 1),)}, "prompt, output, weight"),
        ({"lengths": ((1, 1, 0.0),)}, "weight"),
    ],
)
def test_a_bad_workload_is_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        Workload(**({"requests_per_s": 1.0, "deadline_s": 1.0} | change))
