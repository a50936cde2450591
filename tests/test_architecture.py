"""The shape of the package: who may import whom, and how long things may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "scalewise"
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))
}

ROOMS = [
    "method",
    "common",
    "mini",
    "config",
    "models",
    "data",
    "training",
    "pipelines",
    "planning",
    "metrics",
    "evaluation",
    "studies",
    "cli",
]
"""Packages from the ground up: each imports only itself and those before it."""
FRONT = ("__init__", "__main__", "api")
"""Modules at the top of the package: the front doors of Python and of the command line."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names below `scalewise` that a file imports, also inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "scalewise" and not rest.startswith("__"):
                yield rest


def module_of(name: str) -> str:
    """The module that a dotted import reads: "method.losses.mmd" is of "method.losses"."""
    parts = name.split(".")
    while parts and f"{'/'.join(parts)}.py" not in FILES and f"{'/'.join(parts)}/__init__.py" not in FILES:
        parts.pop()
    return ".".join(parts)


def imports_by_module() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file, tree in FILES.items():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found[module] = {module_of(name) for name in imported(tree)} - {module, ""}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


def calls() -> Iterator[tuple[str, str]]:
    """Every call: where it stands, and what is called as it is written, such as "torch.load"."""
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{file}:{node.lineno}", ast.unparse(node.func)


def test_every_file_lies_in_a_room():
    assert {room(m) for m in imports_by_module()} == {*ROOMS, *FRONT}


def test_the_method_imports_nothing_else_of_the_package():
    outside = {
        module: {other for other in others if room(other) != "method"}
        for module, others in imports_by_module().items()
        if room(module) == "method"
    }
    assert {module: others for module, others in outside.items() if others} == {}


def test_a_room_imports_only_itself_and_those_before_it():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports_by_module().items()
        for other in sorted(others)
        if room(module) in ROOMS
        and (room(other) in FRONT or ROOMS.index(room(other)) > ROOMS.index(room(module)))
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    """A package's own file is left out: it offers what lies in its modules."""
    packages = {file.removesuffix("/__init__.py").replace("/", ".") for file in FILES if "/__init__" in file}
    graph = {m: others - packages for m, others in imports_by_module().items() if m not in packages}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_importing_the_package_imports_none_of_its_modules():
    # scalewise.load is found on demand: the command line must not wait for torch to say its help.
    code = "import sys, scalewise; print([m for m in sys.modules if m.startswith(('scalewise.', 'torch'))])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert {name.rpartition(".")[2] for name in imported(FILES["__init__.py"])} == {
        "Recipe", "ScaleSchedule", "distill", "find_recipe", "load", "load_student", "quiet_imports",
    }  # fmt: skip


def test_losses_know_nothing_but_tensors():
    assert imports_by_module()["method.losses"] == set()


def test_files_stay_within_400_lines():
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 400} == {}


def test_functions_stay_within_60_lines():
    long = {
        where: length for where, node in functions() if (length := node.end_lineno - node.lineno + 1) > 60
    }
    assert long == {}


def is_command(where: str, node: ast.FunctionDef) -> bool:
    """Tell whether typer makes a command of a function; its parameters are then the command's options."""
    registered = where.startswith(("cli/making.py", "cli/measuring.py"))
    return registered or any(ast.unparse(d).startswith("app.") for d in node.decorator_list)


def test_functions_take_at_most_5_positional_parameters():
    many = {}
    for where, node in functions():
        names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
        if len(names) > 5 and not is_command(where, node):
            many[where] = names
    assert many == {}


def test_optional_parameters_after_the_second_are_given_by_name():
    unnamed = {}
    for where, node in functions():
        names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
        late = [n for i, n in enumerate(names) if i >= 2 and i >= len(names) - len(node.args.defaults)]
        if late and not is_command(where, node):
            unnamed[where] = late
    assert unnamed == {}


def test_nothing_is_printed_past_the_console():
    assert [where for where, name in calls() if name == "print"] == []


def test_nothing_is_ever_unpickled():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
                assert node.module != "torch" or not {a.name for a in node.names} & {"load", "save"}, file
    unsafe = {
        "torch.load",
        "torch.save",
        "np.load",
        "numpy.load",
        "torch.hub.load",
        "yaml.load",
        "yaml.unsafe_load",
        "eval",
        "exec",
    }
    assert [(where, name) for where, name in calls() if name in unsafe] == []


def test_no_work_is_left_as_a_note():
    notes = [
        f"{file}:{number}"
        for file in FILES
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", line)
    ]
    assert notes == []


def test_mypy_is_strict_about_every_module_of_the_package() -> None:
    settings = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["strict"]
    own = [o["module"] for o in settings["overrides"] if "scalewise" in str(o["module"])]
    assert own == []
    silenced = [f for f in FILES if re.search(r"^# *mypy:", (ROOT / f).read_text(encoding="utf-8"), re.M)]
    assert silenced == []


def test_a_marker_exists_only_where_a_test_carries_it() -> None:
    settings = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pytest"
    ]
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    for marker in settings["ini_options"].get("markers", []):
        assert f"mark.{marker.partition(':')[0]}" in tests


SHAPE = re.compile(r"\[(?:[A-Z]\w*|[a-z]\b|\d+(?=, [A-Z])|\*)[^\]]*\]")
"""A shape such as [N, C, H, W], [N, *shape], [n, ...] or [3, F, H, W]; a range such as [0, 1000] is none."""


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    """Every public function, and every public method of a public class with its class."""
    for file, tree in FILES.items():
        for node in tree.body:
            inside = [node] if isinstance(node, ast.FunctionDef) else []
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                inside = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for function in inside:
                if function.name == "__call__" or not function.name.startswith("_"):
                    yield (
                        f"{file}:{function.name}",
                        function,
                        node if isinstance(node, ast.ClassDef) else None,
                    )


def test_every_public_tensor_argument_and_result_has_a_shape_in_the_docstring():
    """A method without a docstring takes over that of the method of the same name that it overrides."""
    methods: dict[str, str] = {}
    for _, function, owner in public_functions():
        if owner:
            methods[function.name] = methods.get(function.name, "") + (ast.get_docstring(function) or "")
    bare = []
    for where, function, owner in public_functions():
        args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        annotations = [ast.unparse(arg.annotation) for arg in args if arg.annotation]
        annotations += [ast.unparse(function.returns)] if function.returns else []
        if not any(re.fullmatch(r"Tensor( \| None)?", text) for text in annotations):
            continue
        text = ast.get_docstring(function) or methods[function.name]
        if owner and function.name in ("__call__", "forward"):
            text += ast.get_docstring(owner) or ""
        if not SHAPE.search(text):
            bare.append(where)
    assert bare == []
