"""The scripts outside the package import only what the package has."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_name_that_a_script_imports_from_the_package_exists(script: Path) -> None:
    if script.name == "make_old_files.py":
        pytest.skip("runs with the version before the packages")
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scalewise":
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    getattr(module, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                except ModuleNotFoundError:
                    missing.append(f"{node.module}.{alias.name}")
    assert missing == []
