"""The scripts outside the package import only what the package has."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

# make_old_files.py runs with the version before the packages.
SCRIPTS = [
    path
    for path in sorted((Path(__file__).parents[1] / "scripts").rglob("*.py"))
    if path.name != "make_old_files.py"
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_name_that_a_script_imports_from_the_package_exists(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scalewise":
            module = importlib.import_module(node.module)
            names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            is_package = hasattr(module, "__path__")
            missing += [n for n in names if not (is_package and find_spec(f"{node.module}.{n}"))]
    assert missing == []
