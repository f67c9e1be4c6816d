"""The mutations of `tools/mutate.py` still fit the sources; that command runs them."""

import ast
from pathlib import Path

import pytest

from tools.mutate import MUTATIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_changes_one_place_and_names_tests_that_exist(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1
    ast.parse(source.replace(mutation.old, mutation.new))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text


def test_names_of_mutations_differ():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)
