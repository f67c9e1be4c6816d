"""Trees from outside: bad arguments, JSON files, and what importing them costs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topology import LLAMA3, PARENTS

from jaxinfer.speculative.topology import MOST_NODES, Topology


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology(()), "1 to 4096 nodes, got 0"),
        (lambda: Topology((0,)), "node 0 is the root"),
        (lambda: Topology((-1, 1)), "node 1 has parent 1, expected 0 to 0"),
        (lambda: Topology((-1, 0, -1)), "node 2 has parent -1"),
        (lambda: Topology((-1, 0, 1, 0)), "numbered breadth first"),
        (lambda: Topology.chain(0), "n must be a whole number from 1 to 4096, got 0"),
        (lambda: Topology.chain(10**12), "n must be .*, got 10000000"),
        (lambda: Topology.k_chains(100, 100), "1 [+] k [*] n must be .*, got 10001"),
        (lambda: Topology.from_parents([-1, -1]), "expected one root .parent -1., got 2"),
        (lambda: Topology.from_parents([-1, 5]), "node 1 has parent 5"),
        (lambda: Topology.from_parents([-1, 2, 1]), "node 1 does not descend .* form a ring"),
        (lambda: Topology.from_parents([]), "got 0"),
        (lambda: Topology.from_children([[], "leaf"]), "list of its children, got 'leaf'"),
        (lambda: Topology.from_children([[]] * 5000), "at most 4096 nodes"),
        (lambda: Topology.optimal([0.5], 0), "nodes must be .*, got 0"),
        (lambda: Topology.optimal([0.5], 8, 0), "levels must be .*, got 0"),
        (lambda: Topology.optimal([0.5], 8, branching=0), "branching must be .*, got 0"),
        (lambda: Topology.optimal([], 8), "p has shape .0,."),
        (lambda: Topology.optimal([0.5, -0.1], 8), r"p\[1\] is -0.1"),
        (lambda: Topology.optimal([0.5, float("nan")], 8), r"p\[1\] is nan"),
        (lambda: Topology.optimal([0.7, 0.7], 8), "p sums to 1.4, expected at most 1"),
        (lambda: Topology.optimal(np.zeros((2, 2, 2)), 8), "p has shape"),
    ],
)
def test_bad_trees_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- files


@given(PARENTS)
def test_json_round_trips(parents):
    tree = Topology.from_parents(parents)
    assert Topology.from_json(tree.to_json()) == tree


def test_files_round_trip_and_errors_name_them(tmp_path):
    tree, path = Topology.optimal(LLAMA3, 32, 6), tmp_path / "new" / "tree.json"
    tree.save(path)
    assert Topology.load(path) == tree
    assert [file.name for file in path.parent.iterdir()] == ["tree.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tree\.json is not valid JSON"):
        Topology.load(path)
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        Topology.load(tmp_path / "none.json")


GOOD = json.loads(Topology.chain(3).to_json())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a tree file"),
        (GOOD | {"format": "growmap"}, "not a tree file"),
        (GOOD | {"version": 2}, "version 2, expected 1"),
        (GOOD | {"version": True}, "version True, expected 1"),
        (GOOD | {"parent": "x"}, 'no list "parent"'),
        (GOOD | {"parent": [-1, 0.0]}, "holds 0.0, expected whole numbers"),
        (GOOD | {"parent": [-1, True]}, "holds True"),
        (GOOD | {"parent": [-1, 0, 1, 0]}, "the tree holds no tree: node 3"),
        (GOOD | {"parent": [-1] + [0] * MOST_NODES}, "1 to 4096 nodes, got 4097"),
    ],
)
def test_bad_tree_files_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        Topology.from_json(json.dumps(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from(["format", "version", "parent"]), JSON)
def test_random_json_is_a_tree_or_one_line_of_refusal(name, content):
    try:
        tree = Topology.from_json(json.dumps(GOOD | {name: content}))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert tree.depth.max() == tree.levels - 1


@given(st.binary(max_size=40))
def test_random_bytes_are_refused(text):
    with pytest.raises(ValueError):
        Topology.from_json(text)


def test_trees_need_neither_jax_nor_matplotlib():
    program = """
import sys, types
for name in ("jaxinfer", "jaxinfer.speculative"):  # the packages themselves import jax
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
import jaxinfer.speculative.optimizer, jaxinfer.speculative.plot
print([name for name in ("jax", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
