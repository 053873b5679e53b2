"""The CPU's library as other processors have it."""

import pytest

from kvmix_compile.kernels.cpu import binding
from kvmix_compile.kernels.cpu import library as cpu_library
from kvmix_compile.kernels.cpu.library import Library


# Four and eight lanes to a vector, which is also what processors other than x86 have.
@pytest.fixture(scope="session", params=["-mno-avx", "-mno-avx512f"])
def narrow_library(request: pytest.FixtureRequest) -> Library:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu_library, "MACHINE_FLAGS", (("-march=native", request.param),))
        try:
            return cpu_library.load(cpu_library.compiled(cpu_library.cache_folder()))
        except cpu_library.CompilerError:
            pytest.skip(f"the compiler does not know {request.param}")


@pytest.fixture
def narrower_vectors(narrow_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """attend and append run with it."""
    monkeypatch.setattr(binding, "library", lambda: narrow_library)
