"""The shape of the code itself: sizes of files and functions, and what public signatures say."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = {"jaxinfer": 300, "pallas_kernels": 400}
MOST_BODY = 60
PUBLIC = (
    "jaxinfer",
    "jaxinfer.cache",
    "jaxinfer.models",
    "jaxinfer.decode",
    "jaxinfer.serve",
    "jaxinfer.speculative",
    "jaxinfer.testing",
)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def functions(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function behind its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    assert node.end_lineno is not None
    return node.end_lineno - body[0].lineno + 1 if body else 0


def public_objects() -> list[tuple[str, Any]]:
    found = {}
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("jaxinfer"):
                found[f"{package}.{name}"] = value
    return sorted(found.items())


def annotations(value: Any):
    """(name, annotations) of a function as written, or of a class's fields and public methods."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    for part in ast.walk(node) if isinstance(node, ast.ClassDef) else [node]:
        name = getattr(part, "name", None) or ""  # of a handler without "as" it is None
        public = not name.startswith("_") or name == "__init__"
        if isinstance(part, ast.FunctionDef) and public:
            arguments = part.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
            yield name, [one.annotation for one in every] + [part.returns]
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
                yield ast.unparse(part.target), [part.annotation]


def says_any(annotation: ast.expr | None) -> bool:
    if annotation is None:
        return False
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    # A forward reference is a string, the shape of an array too.
    strings = [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant)]
    return "Any" in names or any(re.search(r"\bAny\b", s) for s in strings if isinstance(s, str))


@pytest.mark.parametrize("package", MOST_LINES)
def test_files_are_short(package):
    lengths = {path: len(path.read_text().splitlines()) for path in modules(package)}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MOST_LINES[package]}
    assert lengths and not long


def test_function_bodies_are_short():
    found = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in modules("jaxinfer")
        for node in functions(path)
        if (lines := body_lines(node)) > MOST_BODY
    }
    assert not found


def test_no_public_signature_says_any():
    objects = public_objects()
    assert len(objects) > 60
    loose = [
        f"{place}: {name}"
        for place, value in objects
        for name, written in annotations(value)
        if any(says_any(one) for one in written)
    ]
    assert not loose


def test_the_checks_of_signatures_find_any():
    def says(text: str) -> bool:
        return says_any(ast.parse(text, mode="eval").body)

    assert says("Any") and says("dict[str, Any]") and says("'Sequence[Any] | None'")
    assert not says("dict[str, object]") and not says("Anything | None")
    found = dict(annotations(Loose))
    assert [says_any(one) for one in found["method"]] == [False, True, False]
    assert says_any(found["field"][0])


class Loose:
    """Says too little."""

    field: Any

    def method(self, value: Any) -> int:
        return value


def test_no_two_test_files_have_one_name():
    """pytest could collect only one of them."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 200 and len(set(names)) == len(names)
