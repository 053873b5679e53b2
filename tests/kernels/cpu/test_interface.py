"""The CPU's library and Python have the same structures, or the library is refused."""

import re
import shutil
from pathlib import Path

import pytest

from kvmix_compile.kernels.cpu import interface
from kvmix_compile.kernels.cpu import library as cpu_library

HEADER = cpu_library.SOURCE.with_name("interface.h").read_text()
FUNCTIONS = 'extern "C" void kvmix_attend() {}\nextern "C" void kvmix_append() {}\n'


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a library that has the structures of this header."""
    if not any(map(shutil.which, cpu_library.COMPILERS)):
        pytest.skip("there is no C++ compiler")

    def load(header: str) -> cpu_library.Library:
        source = tmp_path / "library.cpp"
        source.write_text(header + FUNCTIONS)
        monkeypatch.setattr(cpu_library, "SOURCE", source)
        return cpu_library.load(cpu_library.compiled(tmp_path))

    return load


def test_a_library_of_the_same_structures_is_loaded(load) -> None:
    load(HEADER)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("row_stride, head_stride, token_stride, dim", "head_stride, row_stride, token_stride, dim", "Side.row_stride"),
        ("int64_t sliding_window,", "int64_t more, sliding_window,", "Attention"),
        ("double scale, softcap", "float scale, softcap", "Attention"),
        ("slots", "places", "Shape.places"),
        ("MEMBER(Part, bits),", "", "Part.margin"),
    ],
)
def test_a_library_of_others_is_refused(load, old: str, new: str, difference: str) -> None:
    assert old in HEADER
    with pytest.raises(interface.InterfaceError, match=rf"has {difference} with"):
        load(HEADER.replace(old, new))


def test_no_structure_and_no_member_is_left_out() -> None:
    structures = re.findall(r"^struct (\w+) \{\n(.*?)^\};", re.sub("//.*", "", HEADER), re.DOTALL | re.MULTILINE)
    members = {name: re.findall(r"(\w+)(?:\[\d+\])?[,;]", body) for name, body in structures}
    del members["Extent"]  # says where the others lie
    listed = {name: re.findall(rf"MEMBER\({name}, (\w+)\)", HEADER) for name in members}
    declared = {each.__name__: [name for name, _ in each._fields_] for each in interface.STRUCTURES}
    assert list(listed.items()) == list(declared.items()) == list(members.items())
