"""`jaxinfer dynamics`: the table, the picture, JSON, and one line for bad input."""

import json

import pytest

DELTA = "1,.7,.4,-.5,.1"


def test_json_has_the_trajectory_and_its_entropy(run):
    shared = ("--mu", "0.5,1,1.5,2,2.5", "--until", "9", "--solver", "rk4", "--points", "91")
    result = run("dynamics", "--field", "exp", *shared, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert len(found["time"]) == len(found["entropy"]) == len(found["v"]) == 91
    assert found["blow_up_time"] is None and found["stopped"] is False
    lowest = min(found["entropy"])
    assert lowest < found["entropy"][-1] < found["entropy"][0]


def test_a_table_and_a_picture_of_a_blow_up(run, tmp_path):
    picture = tmp_path / "joma.png"
    command = ("dynamics", "--delta", DELTA, "--solver", "rk4", "--plot", str(picture))
    result = run(*command)
    assert result.code == 0, result.err
    assert "entropy 1.6094 at first" in result.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run(*command)
    assert again.code == 2 and "--force" in again.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give delta (saliency, identity activation) or mu"),
        (("--mu", "a,b"), "--mu expects numbers such as 0.5,1,2, got 'a,b'"),
        (("--mu", "1", "--field", "cubic"), "field must be one of"),
        (("--delta", "nan"), "delta must be finite"),
        (("--mu", "1", "--until", "-1"), "until must be a number"),
        (("--mu", "1", "--solver", "euler"), "solver must be one of"),
    ],
)
def test_bad_input_is_one_line(run, options, message):
    result = run("dynamics", *options)
    assert result.code == 2 and message in result.err
    assert result.err.strip().count("\n") == 0 and not result.out
