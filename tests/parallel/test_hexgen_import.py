"""`ji.hexgen` is there when it is used, costs nothing before, and plans without Ray."""

import ast
from pathlib import Path

import jaxinfer as ji


def test_hexgen_is_reached_by_name():
    assert ji.hexgen.__name__ == "jaxinfer.parallel.hexgen" and "hexgen" in dir(ji)
    assert all(hasattr(ji.hexgen, name) for name in ji.hexgen.__all__)


def test_planning_imports_no_ray():
    folder = Path(ji.hexgen.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert {"jaxinfer", "numpy", "scipy"} <= imported and "ray" not in imported
