"""The file of measured acceptance: round trips, whole writes, and errors that name the field."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.topology import Topology

MEASURED = Acceptance(
    p=(0.5, 0.1, 0.25), temperature=0.6, top_p=0.9, pair=("big", "small"), samples=1000, seed=17
)
GOOD = json.loads(json.dumps(MEASURED.to_dict()))


def test_files_round_trip(tmp_path):
    rows = Acceptance(p=((0.5, 0.1), (0.25, 0.25)))
    for name, one in (("a.json", MEASURED), ("b.json", rows)):
        one.save(tmp_path / "new" / name)
        assert Acceptance.load(tmp_path / "new" / name) == one
        assert hash(Acceptance.load(tmp_path / "new" / name)) == hash(one)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["a.json", "b.json"]
    assert (MEASURED.width, MEASURED.reject) == (3, pytest.approx(0.15))
    assert (rows.width, rows.reject) == (2, pytest.approx((0.4, 0.5)))
    assert Topology.optimal(MEASURED, 4) == Topology.optimal(MEASURED.p, 4)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    MEASURED.save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        Acceptance(p=(0.1,)).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert Acceptance.load(path) == MEASURED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "growmap"}, 'expected "format": "jaxinfer-acceptance", got .growmap.'),
        ({"version": 2}, "version is 2, expected 1"),
        ({"p": [0.5, 1.2]}, r"p\[1\] is 1.2, expected a probability"),
        ({"p": [[0.5], [-0.1]]}, r"p\[1, 0\] is -0.1"),
        ({"p": [0.5, math.nan]}, r"p\[1\] is nan"),
        ({"p": [0.7, 0.4]}, "p sums to 1.1, expected at most 1"),
        ({"p": []}, "p has shape"),
        ({"p": [[0.1], [0.1, 0.2]]}, "rows of equal length"),
        ({"p": [0.5, "x"]}, "p must hold numbers"),
        ({"p": 10**400}, "p must hold numbers"),
        ({"reject": 0.2}, "reject is not what"),
        ({"reject": [0.15]}, "reject is not what"),
        ({"width": 4}, "width is 4, but p has 3 ranks"),
        ({"temperature": -1}, "temperature must be .*, got -1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is an integer of 1329 bits"),
        ({"top_p": 0}, "top_p must be .*, got 0"),
        ({"top_p": True}, "top_p is True"),
        ({"pair": ["big"]}, "pair is"),
        ({"samples": 1.5}, "samples is 1.5, expected a whole number"),
        ({"seed": -1}, "seed must be .*, got -1"),
        ({"extra": 1}, "unknown field .'extra'."),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message) as raised:
        Acceptance.load(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=name):
        Acceptance.from_dict({key: value for key, value in GOOD.items() if key != name})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(GOOD)), JSON)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_json_is_an_acceptance_or_one_line_of_refusal(name, content):
    try:
        found = Acceptance.from_dict(json.loads(json.dumps(GOOD | {name: content})))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert Acceptance.from_dict(json.loads(json.dumps(found.to_dict()))) == found
