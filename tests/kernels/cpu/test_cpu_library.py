"""How the CPU's kernels are compiled, kept and found, and what happens where they cannot be."""

import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.cpu import library as cpu_library
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.weighting import Weighting

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, cpu_library.COMPILERS)), reason="there is no C++ compiler"
)

SMALL_SOURCE = f'''#include "{cpu_library.SOURCE.with_name("interface.h")}"
extern "C" void kvmix_attend() {{}}
extern "C" void kvmix_append() {{}}
'''


@pytest.fixture(autouse=True)
def forgotten_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is looked for anew, in an empty cache."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(cpu_library.SWITCH, raising=False)
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "cache"))
    cpu_library.library.cache_clear()
    yield
    cpu_library.library.cache_clear()


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that compiles faster than cpu.cpp."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL_SOURCE)
    monkeypatch.setattr(cpu_library, "SOURCE", source)
    return source


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def check_the_reference_runs() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32)
    one, other = (SiteState.allocate(layout, 1, 3, torch.float32) for _ in range(2))
    storage = layout.storage
    k, nothing = torch.randn(1, 1, 70, 16), torch.zeros(1, dtype=torch.int64)
    text = Chunk(key=k, value=k, lengths=nothing, starts=nothing)
    cpu.append(text, one, storage)
    reference.append(text, other, storage)
    q, k = torch.randn(1, 2, 1, 16), k[:, :, :1]
    token = Chunk(key=k, value=k, lengths=nothing + 70, starts=nothing)
    attended = cpu.attend(q, token, one, storage, Weighting(0.25))
    assert torch.equal(attended, reference.attend(q, token, other, storage, Weighting(0.25)))


def test_without_a_compiler_there_is_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no-such-compiler is installed. Install a C.. compiler") as warned:
        check_the_reference_runs()
    assert len(warned) == 1


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'error: no such luck' >&2; exit 1"))
    with pytest.warns(RuntimeWarning, match="broken failed: error: no such luck"):
        check_the_reference_runs()
    assert not list(cpu_library.cache_folder().iterdir())


def test_a_cache_that_cannot_be_written_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 0"))
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        check_the_reference_runs()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_the_reference_runs()
    assert not cpu_library.cache_folder().exists()


@needs_compiler
def test_many_at_once_leave_one_complete_file(small_source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(cpu_library.compiled, [tmp_path / "cache"] * 4))
    assert list((tmp_path / "cache").iterdir()) == list(files)
    cpu_library.load(*files)


@needs_compiler
def test_what_is_compiled_is_found_again_until_something_changes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cpu_library.compiled(tmp_path)
    written = first.stat().st_mtime_ns
    assert cpu_library.compiled(tmp_path) == first and first.stat().st_mtime_ns == written
    small_source.write_text(SMALL_SOURCE + "// changed\n")
    second = cpu_library.compiled(tmp_path)
    monkeypatch.setattr(cpu_library, "_processor", lambda: b"another")
    assert len({first, second, cpu_library.compiled(tmp_path)}) == 3


@needs_compiler
def test_a_compiler_need_not_know_the_machine(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next(filter(None, map(shutil.which, cpu_library.COMPILERS)))
    command = f'case "$*" in *=native*) echo unknown >&2; exit 1;; esac\nexec {found} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "plain", command))
    cpu_library.load(cpu_library.compiled(tmp_path))


@needs_compiler
def test_there_is_one_openmp_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("loaded libraries are read from /proc")
    monkeypatch.delenv("KVMIX_CACHE")  # the library that there is
    before = _openmp_runtimes(maps)
    loaded = cpu_library.library()
    assert loaded is not None and loaded.parallel
    assert _openmp_runtimes(maps) == before


def _openmp_runtimes(maps: Path) -> set[str]:
    return {line.split()[-1] for line in maps.read_text().splitlines() if "omp.so" in line or "omp5.so" in line}
