"""Public names say what they are. "Public": no part of the name begins with an underscore.

Every module, class and function has a docstring, and every method and property, but for
- one that stands for a method of the same name which a base class in this repository describes;
- `forward` of a module of the models zoo: what a model's forward does is known;
- one of a single statement, where the name says it all; not so in what kvmix_compile itself exports.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.repository import BESIDE, ROOT, modules

FILES = [*modules().values(), *(path for package in BESIDE for path in sorted((ROOT / package).glob("*.py")))]
Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def exported() -> set[str]:
    """`kvmix_compile.__all__`."""
    for node in parsed(ROOT / "kvmix_compile" / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("kvmix_compile has no __all__")


def classes() -> dict[str, ast.ClassDef]:
    """Every class of the repository by its name, which bases are looked up by."""
    return {node.name: node for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)}


EXPORTED, CLASSES = exported(), classes()


def described_by_base(owner: ast.ClassDef, name: str) -> bool:
    """Whether a base of a class describes a member."""
    for base in owner.bases:
        known = CLASSES.get(ast.unparse(base).rpartition(".")[2])
        if known is None:
            continue
        members = [node for node in known.body if isinstance(node, ast.FunctionDef) and node.name == name]
        if any(ast.get_docstring(member) for member in members) or described_by_base(known, name):
            return True
    return False


def is_exempt(node: Described, owner: ast.ClassDef | None, path: Path) -> bool:
    """Whether a name without a docstring may be without, as the head of this file says."""
    if owner is None or isinstance(node, ast.Module | ast.ClassDef):
        return False
    if described_by_base(owner, node.name):
        return True
    if node.name == "forward" and path.is_relative_to(ROOT / "models_zoo"):
        return True
    return len(node.body) == 1 and not isinstance(node.body[0], ast.With | ast.For) and owner.name not in EXPORTED


def undocumented(body: list[ast.stmt], path: Path, owner: ast.ClassDef | None = None) -> Iterator[str]:
    """The public names in a body that ought to have docstrings and have none."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not is_exempt(node, owner, path):
            yield f"line {node.lineno}: {f'{owner.name}.' if owner else ''}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, path, node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_have_docstrings(path: Path) -> None:
    module = parsed(path)
    assert ast.get_docstring(module), "the module has no docstring"
    assert list(undocumented(module.body, path)) == []


def test_what_is_exported_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    assert {name for name in EXPORTED if f"::: kvmix_compile.{name}" not in page} == set()


def test_a_name_without_a_docstring_is_found() -> None:
    code = 'class Plan:\n    "x"\n    def bits(self):\n        return 1\nclass Other:\n    "x"\n'
    code += "    def bits(self):\n        return 1\n    def more(self):\n        x = 1\n        return x\n"
    code += "def alone():\n    return 1\n"
    assert list(undocumented(ast.parse(code).body, ROOT / "passes" / "x.py")) == [
        "line 3: Plan.bits", "line 9: Other.more", "line 12: alone"
    ]  # fmt: skip
