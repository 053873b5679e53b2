"""The repository, and its modules as they are installed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
# Packages of their own: what the command line declares, and the plugin for vLLM.
BESIDE = ("kvmix_command", "kvmix_vllm")
# Each other folder of modules, and where it lies in the installed package.
FOLDERS = {"kvmix_compile": "", "passes": "passes", "kernels": "kernels", "models_zoo": "models_zoo"}


def modules() -> dict[str, Path]:
    """The name of every module without that of the package, and its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # which follows no links
            within = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = within[:-1] if within[-1] == "__init__" else within
            found[".".join(filter(None, (package, *parts)))] = path
    return found
