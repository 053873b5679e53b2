"""The README's and the documentation's Python runs as it stands, with a tiny model in the place of SmolLM2. What pages
link to, files that they name, and names that they describe are there.
"""

import re
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvmix_compile.models_zoo import smollm2
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.cache_argument import CACHE_ARGUMENT
from tests.helpers.chats import chat_tokenizer
from tests.helpers.repository import ROOT

PAGES = (
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("**/*.md")),
)
# Folders that pages name files of, and files that they name of others.
FOLDERS = ("kvmix_compile", "kvmix_command", "kvmix_vllm", "passes", "kernels", "models_zoo", "benchmarks", "tests")
OTHERS = {"argparse.py", "transformer.h", "llama.cpp"}
PACKAGES = ("torch/", "transformers/")
# What examples show and not every environment has: pyproject.toml's extra `clients`.
CLIENTS = ("langchain_huggingface", "langchain_openai", "llama_index", "outlines", "xgrammar")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (tiny("llama"), chat_tokenizer()))
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    missing = [name for name in CLIENTS if find_spec(name) is None and any(name in block for block in blocks)]
    code = "\n".join(block for block in blocks if not any(name in block for name in missing))
    if CACHE_ARGUMENT != "cache":  # the pages are written for today's transformers
        code = code.replace("cache=cache)", f"{CACHE_ARGUMENT}=cache)")
    exec(compile(code, str(page), "exec"), {})
    if missing:
        pytest.skip(f"all examples ran but those of {', '.join(missing)}, not installed: make clients")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links), links


def file_names() -> set[str]:
    """Every file's path, and every end of it."""
    parts = [path.relative_to(ROOT).parts for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return OTHERS | {"/".join(names[begin:]) for names in parts for begin in range(len(names))}


FILE_NAMES = file_names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_are_called_what_they_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\[([^\]\s]+\.(?:py|h|cpp|md|toml|txt))\]\(([^)#]+)", text)
    assert [(name, path) for name, path in linked if not path.endswith(name)] == []
    named = re.findall(r"(?<![\w./*-])(?:\w+/)*\w+\.(?:py|h|cpp)\b", text)
    assert [name for name in named if name not in FILE_NAMES and not name.startswith(PACKAGES)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_described_are_there(page: Path) -> None:
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        parts = name.split(".")
        # The longest beginning that is all lower case is a module, or a function in one.
        end = next((index for index, part in enumerate(parts) if part != part.lower()), len(parts) - 1)
        assert reduce(getattr, parts[end:], import_module(".".join(parts[:end]))) is not None
