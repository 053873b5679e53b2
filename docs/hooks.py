"""What `make docs` does besides MkDocs: pages from outside docs/, a page for every module, and links between them all.

Pages link to files of the repository by relative paths, which a forge follows. In the site such a link leads to the
page made of that file: of README.md the first one, of a module its reference. Any other file is copied into the site.
"""

import ast
import os.path
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# Pages of the site that lie outside docs/, by their places in the repository.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
# Folders of modules, and the package that each is installed as.
PACKAGES = {
    "kvmix_compile": "kvmix_compile",
    "kvmix_command": "kvmix_command",
    "kvmix_vllm": "kvmix_vllm",
    "passes": "kvmix_compile.passes",
    "kernels": "kvmix_compile.kernels",
    "models_zoo": "kvmix_compile.models_zoo",
}
# What docs/ describes too is linked to there: by the inventory, a name is in one place.
REFERENCE = """# {name}

::: {name}
    options:
      skip_local_inventory: true
"""
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def modules() -> Iterator[tuple[str, str]]:
    """The path of every module in the repository, and its name as it is imported."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # which follows no links
            within = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = within[:-1] if within[-1] == "__init__" else within
            yield path.relative_to(ROOT).as_posix(), ".".join((package, *parts))


def places() -> dict[str, str]:
    """Where in the site each page made of a file outside docs/ is, by the file's path in the repository."""
    return PAGES | {path: f"reference/{name}.md" for path, name in modules()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/, and the files that pages link to."""
    for path, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    for _, name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=REFERENCE.format(name=name)))
    files.append(File.generated(config, "reference/index.md", content=_every_module()))
    known = set(places())
    for page in [*(ROOT / path for path in PAGES), *sorted((ROOT / DOCS).rglob("*.md"))]:
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = _joined(page.relative_to(ROOT).as_posix(), link)
            outside = not path.startswith((DOCS, "../")) and path not in known
            if outside and (ROOT / path).is_file():
                known.add(path)
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to where those are in the site."""
    place = page.file.src_uri
    source = {page: path for path, page in PAGES.items()}.get(place, DOCS + place)
    known = places()

    def led(match: re.Match[str]) -> str:
        path = _joined(source, match[2])
        target = path.removeprefix(DOCS) if path.startswith(DOCS) else known.get(path, f"files/{path}")
        return match[1] + os.path.relpath(target, os.path.dirname(place) or ".") + match[3]

    if place.startswith("reference/"):
        return markdown
    pieces = FENCE.split(markdown)
    return "".join(piece if piece.startswith("```") else LINK.sub(led, piece) for piece in pieces)


def _joined(page: str, link: str) -> str:
    """The path in the repository that a page's relative link leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link)).replace(os.sep, "/")


def _every_module() -> str:
    lines = ["# Every module", "", "Those of a room, each with the first sentence of what it says of itself.", ""]
    for path, name in modules():
        said = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        first = " ".join(said.split("\n\n")[0].split())
        lines.append(f"- [{name}]({name}.md): {first}")
    return "\n".join(lines) + "\n"
