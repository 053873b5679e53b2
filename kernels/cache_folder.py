"""The folder in which kvmix_compile keeps what it need not make twice, for this user and machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KVMIX_CACHE, else $XDG_CACHE_HOME/kvmix_compile, else ~/.cache/kvmix_compile. It may not exist yet."""
    if chosen := os.environ.get("KVMIX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmix_compile"
