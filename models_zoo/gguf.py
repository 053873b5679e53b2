"""Models in GGUF files, with their weights unpacked, as transformers reads them."""

from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

READERS = ("gguf", "accelerate")  # what transformers needs to read a GGUF file


def check_readers(path: Path) -> None:
    """Raise ImportError, with the command that helps, where GGUF files cannot be read."""
    if missing := [name for name in READERS if find_spec(name) is None]:
        raise ImportError(f"Reading {path.name} needs more packages. Run: pip install {' '.join(missing)}")


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in a GGUF file, in eval mode on the CPU. Raises ImportError where GGUF files cannot be read."""
    check_readers(path)
    # Recent versions keep GGUF weights packed where they can.
    unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=unpacked
    )
    return model.eval()


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
