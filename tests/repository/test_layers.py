"""Imports between rooms point one way: a file may import from its own room and from those above it in ROOMS."""

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.repository import ROOT, modules

# Folders and loose modules of the installed package, without its name: each after all that it may import.
ROOMS = (
    "kernels",
    "passes.errors", "passes.files",
    "passes.graph", "passes.untouched", "passes.capture", "passes.match", "passes.allocate", "passes.rewrite",
    "passes.measure", "passes",
    "errors", "english", "progress", "config", "report",
    "runtime", "calibration", "model_check", "compiler", "pretrained",
    "fit", "engines", "models_zoo", "backend", "evaluate", "cli",
    "",  # kvmix_compile itself, which only hands names on
)  # fmt: skip

# Imports the other way, within functions alone, and why.
LAZY = {
    # A compiled model is unpickled by applying its plan to its original again, and whatever pickles is in the runtime.
    ("runtime.pickling", "compiler"),
    # One is refreshed by applying its plan to itself.
    ("runtime.refresh", "compiler"),
}


MODULES = modules()


def room_of(module: str) -> str | None:
    """The room that a module, or a name in one, lies in."""
    parts = module.split(".") if module else []
    return next((room for end in (2, 1) if (room := ".".join(parts[:end])) in ROOMS), None) if parts else ""


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line and name, without the package's, of every import of this package, and whether it is within a function."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, within = name.partition(".")
            if package == "kvmix_compile":
                yield node.lineno, within, id(node) in lazy


def wrong_ways(module: str, code: str) -> list[str]:
    """What a module imports of rooms that come after its own."""
    own = room_of(module)
    assert own is not None, f"{module} is in no room: put it into one, or into ROOMS"
    found = []
    for line, imported, is_lazy in imports(ast.parse(code)):
        room = room_of(imported)
        if room is None:  # a name that kvmix_compile hands on
            room = ""
        if ROOMS.index(room) > ROOMS.index(own) and not (is_lazy and (module, room) in LAZY):
            found.append(f"line {line}: {own} imports {imported}, of {room or 'kvmix_compile'}, which comes after it")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    assert not wrong_ways(module, path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_every_room_and_every_exception_is_there() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    for module, room in LAZY:
        code = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        assert any(is_lazy and room_of(imported) == room for _, imported, is_lazy in imports(code))


@pytest.mark.parametrize(
    ("module", "code", "found"),
    [
        ("kernels.ops", "from kvmix_compile.passes.graph import edit", "passes.graph"),
        ("passes.graph.edit", "import kvmix_compile.passes.capture.export", "passes.capture"),
        ("passes.match.sites", "def f():\n    import kvmix_compile.passes.rewrite.verify", "passes.rewrite"),
        ("runtime.pickling", "from kvmix_compile.compiler import apply", "compiler"),
        ("runtime.model", "def f():\n    from kvmix_compile.compiler import apply", "compiler"),
        ("runtime.pickling", "def f():\n    from kvmix_compile.compiler import apply", None),
        ("compiler", "from kvmix_compile import KVMixCache", "kvmix_compile"),
        ("backend.plan", "from kvmix_compile.compiler import analyze", None),
    ],
)  # fmt: skip
def test_an_import_the_other_way_is_named(module: str, code: str, found: str | None) -> None:
    assert [f", of {found}," in wrong for wrong in wrong_ways(module, code)] == ([True] if found else [])
