"""The package `benchmarks`, which is not installed: the repository's root stays off Python's path (Makefile)."""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from tests.helpers.repository import ROOT


def benchmark(name: str) -> ModuleType:
    """The module benchmarks.<name>."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = spec_from_file_location("benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec and spec.loader
        sys.modules["benchmarks"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")
