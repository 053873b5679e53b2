"""Programs that are started in the repository's root, where Python finds its folders before what is installed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.repository import ROOT


def run_in_root(program: str, **environment: str) -> str:
    """What a program prints that runs in the root, with the root on Python's path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", program]
    made = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def test_transformers_does_not_take_our_folder_for_hugging_faces_package() -> None:
    program = (
        "import kvmix_compile, torch\n"
        "from kvmix_compile.models_zoo.tiny import tiny\n"
        "from transformers.utils import is_kernels_available\n"
        "model = kvmix_compile.apply(tiny('llama'), budget=16, verify=False)\n"
        "text = model.generate(torch.full((1, 3), 5), max_new_tokens=2, eos_token_id=None, pad_token_id=0)\n"
        "print(is_kernels_available(), tuple(text.shape))"
    )
    assert run_in_root(program) == "False (1, 5)"


def test_hugging_faces_package_is_found_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .layer import get_kernel\n")
    (tmp_path / "kernels" / "layer.py").write_text("def get_kernel():\n    return 'theirs'\n")
    program = "import kernels.layer\nfrom kernels import get_kernel\nprint(get_kernel(), kernels.layer.__name__)"
    assert run_in_root(program, PYTHONPATH=str(tmp_path)) == "theirs kernels.layer"
