"""The README's and the documentation's Python runs as it stands, with a tiny model in the place of SmolLM2."""

import re
from pathlib import Path

import pytest

from kvmix_compile.models_zoo import smollm2
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.cache_argument import CACHE_ARGUMENT

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (tiny("llama"), character_tokenizer()))
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(page))
    if CACHE_ARGUMENT != "cache":  # the pages are written for today's transformers
        code = code.replace("cache=cache)", f"{CACHE_ARGUMENT}=cache)")
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links), links
