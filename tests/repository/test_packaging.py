"""What is installed: every module, header and page of the repository's folders, each once, under one package; and the
packages beside it.
"""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from tests.helpers.repository import BESIDE, FOLDERS, ROOT


def test_the_wheel_holds_every_module_header_and_page(tmp_path: Path) -> None:
    # Of a copy, as setuptools leaves what it builds in the folder.
    names = [*FOLDERS, *BESIDE, "pyproject.toml", "README.md", "LICENSE"]
    copied = ["tar", "--exclude=__pycache__", "-cf", str(tmp_path / "sources.tar"), *names]
    subprocess.run(copied, cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", "sources.tar"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "made", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "made").glob("*.whl")
    held = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {
        str(Path("kvmix_compile", package, path.relative_to(ROOT / folder)))
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")  # which follows no links
        if path.suffix in (".py", ".cpp", ".h", ".html", ".typed")
    }
    expected |= {str(path.relative_to(ROOT)) for package in BESIDE for path in (ROOT / package).glob("*.py")}
    assert sorted(held) == sorted(expected)
