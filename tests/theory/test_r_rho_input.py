"""What `r_rho` and `jaxinfer transport` refuse, in one line, and the edges that they do not."""

import json

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cli import main
from jaxinfer.theory import r_rho
from tests.theory.r_rho_instances import REFERENCE, small

X, Y = np.eye(4, 3), np.eye(4, 3) + 2.0
BAD = {
    "no points": ((np.zeros((0, 3)), Y), {}, "at least one"),
    "no dimensions": ((np.zeros((4, 0)), Y), {}, "at least one"),
    "a flat array": ((X[0], Y), {}, "[points, dimensions]"),
    "other dimensions": ((X[:, :2], Y), {}, "equally many dimensions"),
    "NaN": ((X * np.nan, Y), {}, "finite"),
    "huge": ((X * 1e200, Y), {}, "within 1e+15"),
    "float16": ((X.astype(np.float16), Y), {}, "float16"),
    "words": ((np.asarray([["a"]]), Y), {}, "float32 or float64"),
    "ragged": (([[1.0], [1.0, 2.0]], Y), {}, "array of numbers"),
    "negative weights": ((X, Y, [0.5, 0.7, -0.1, -0.1]), {}, "negative"),
    "weights of 2": ((X, Y, np.full(4, 0.5)), {}, "add up to 1"),
    "weights of 0": ((X, Y, np.zeros(4)), {}, "add up to 1"),
    "NaN weights": ((X, Y, np.full(4, np.nan)), {}, "finite"),
    "no weights": ((X, Y, None, np.zeros(0)), {}, "one weight for each of 4"),
    "float16 weights": ((X, Y, np.full(4, 0.25, np.float16)), {}, "float16"),
    "rho below 1": ((X, Y), {"rho": 0.9}, "rho must be from"),
    "rho of 1": ((X, Y), {"rho": 1}, "earth mover's"),
    "infinite rho": ((X, Y), {"rho": np.inf}, "rho must be from"),
    "NaN rho": ((X, Y), {"rho": np.nan}, "rho must be"),
    "a word for rho": ((X, Y), {"rho": "big"}, "rho must be"),
    "unknown method": ((X, Y), {"method": "magic"}, "'alternating'"),
    "no tolerance": ((X, Y), {"tol": 0}, "tol must be"),
    "negative lift": ((X, Y), {"lift": -1.0}, "lift must be"),
    "no sweeps": ((X, Y), {"most_sweeps": 0}, "most_sweeps"),
    "sampled above 2": ((X, Y), {"rho": 3, "method": "sampled"}, "up to 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    arguments, options, expected = BAD[name]
    with pytest.raises(ValueError) as caught:
        r_rho(*arguments, **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_traced_arrays_are_pointed_to_distance():
    with pytest.raises(ValueError, match=r"transport\.distance"):
        jax.grad(lambda x: r_rho(x, Y).value)(np.float32(X))


def test_one_distribution_has_no_distance_from_itself():
    """In another order, with atoms split, all points equal, one point: exactly 0."""
    one = small(0)
    order = [2, 0, 3, 1]
    split = np.concatenate([one.x[order], one.x[:1]]), np.r_[one.a[order], 0]
    split[1][[1, 4]] = one.a[0] / 2
    for x, y, a, b in (
        (one.x, one.x[order], one.a, one.a[order]),
        (one.x, split[0], one.a, split[1]),
        (np.ones((5, 2)), np.ones((3, 2)), None, None),
        (np.ones((1, 2)), np.ones((1, 2)), None, None),
    ):
        found = r_rho(x, y, a, b)
        assert found.value == found.upper == 0 and found.converged
        assert [len(z) for z in found.potentials] == [len(x), len(y)]


def test_edges_share_one_program():
    """All points equal on one side, coincident supports, atoms without weight, far apart sizes."""
    one = small(1)
    with jax.enable_x64(False):
        found = r_rho(*one, rho=1.5, tol=1e-8)
        assert ji.theory.r_rho is r_rho and not jax.config.jax_enable_x64
        np.testing.assert_allclose(found.value, REFERENCE[1][3], rtol=1e-8)
    assert found.potentials[0].dtype == np.float64 and found.lift == 0
    for scale in (1e12, 1e-200):
        scaled = r_rho(one.x * scale, one.y * scale, one.a, one.b, rho=1.5, tol=1e-8)
        np.testing.assert_allclose(scaled.value / scale, found.value, rtol=1e-8)
    shared = one.y.copy()
    shared[0] = one.x[0]
    lifted = r_rho(one.x, shared, one.a, one.b, rho=1.5)
    assert lifted.lift > 0 and lifted.converged and np.isfinite(lifted.potentials[0]).all()
    light = np.r_[one.a[:5] / one.a[:5].sum(), 0]
    with_light = r_rho(one.x, one.y, light, one.b, rho=1.5, tol=1e-8)
    assert np.isfinite(with_light.potentials[0]).all() and with_light.converged
    repeated = np.concatenate([one.y, one.y[:2]])
    b = np.r_[one.b[:2] / 2, one.b[2:], one.b[:2] / 2]
    merged = r_rho(one.x, repeated, one.a, b, rho=1.5, tol=1e-8)
    np.testing.assert_allclose(merged.value, found.value, rtol=1e-12)
    assert len(merged.potentials[1]) == 8


@pytest.fixture
def files(tmp_path):
    one = small(1)
    arrays = {"x": one.x, "y": one.y, "a": one.a, "b": one.b, "half": one.x.astype(np.float16)}
    arrays |= {"objects": np.asarray([{}, None]), "odd": one.x[:, :1], "wrong": one.a * 2}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-8])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    claims = whole.replace(b"(6, 3)", b"(6, 3000000000000)", 1)
    (tmp_path / "claims.npy").write_bytes(claims)
    return tmp_path


REFUSED = {
    "missing": (("none.npy", "y.npy"), "none.npy"),
    "a folder": ((".", "y.npy"), "regular file"),
    "objects": (("objects.npy", "y.npy"), "expected float32"),
    "half precision": (("half.npy", "y.npy"), "float16"),
    "cut short": (("short.npy", "y.npy"), "bytes"),
    "text": (("text.npy", "y.npy"), "not an array"),
    "empty": (("empty.npy", "y.npy"), "not an array"),
    "a forged shape": (("claims.npy", "y.npy"), "claims.npy"),
    "other dimensions": (("odd.npy", "y.npy"), "dimensions"),
    "weights of 2": (("x.npy", "y.npy", "--a", "wrong.npy"), "add up to 1"),
    "rho of 1": (("x.npy", "y.npy", "--rho", "1"), "rho"),
    "unknown method": (("x.npy", "y.npy", "--method", "magic"), "magic"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_verb_refuses_in_one_line(name, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    arguments, expected = REFUSED[name]
    assert main(["transport", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and expected in printed.err
    assert printed.err.count("\n") == 1


def test_the_verb_prints_the_bracket(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    arguments = ["transport", "x.npy", "y.npy", "--a", "a.npy", "--b", "b.npy", "--rho", "1.5"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["lower"] <= REFERENCE[1][3] <= record["upper"] and record["points"] == [6, 6]
    assert main(arguments) == 0
    assert "R_rho" in capsys.readouterr().out
