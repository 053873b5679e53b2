"""Loading: what a user calls a model on the command line becomes the model and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmix_compile.errors import KVMixError
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.plain import convolution, fused_arange, hand_written
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.models_zoo.tiny import TINY, TINY_HYBRID, TINY_OTHERS, TINY_SPECIAL, tiny

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "hand_written": hand_written,
    "fused_arange": fused_arange,
    "convolution": convolution,
}
TINY_PREFIX = "tiny:"
NAMES = ("smollm2", *(f"{TINY_PREFIX}{name}" for name in (*TINY, *TINY_SPECIAL, *TINY_HYBRID, *TINY_OTHERS)), *PLAIN)


class LoadError(KVMixError):
    """There is no model of this name, or it cannot be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU, and its tokenizer where it has one."""

    model: nn.Module
    tokenizer: Any

    def require_tokenizer(self) -> Any:
        """The tokenizer; raises LoadError where there is none."""
        if self.tokenizer is None:
            raise LoadError("this model comes without a tokenizer, and text is needed here: save one next to the model")
        return self.tokenizer


def load_model(name: str) -> LoadedModel:
    """The model that `name` stands for: one of NAMES (the models zoo), or a folder or name that transformers knows.

    Raises LoadError, saying what there is, where it cannot be loaded.
    """
    try:
        if name == "smollm2":
            return LoadedModel(*load_smollm2())
        if name in PLAIN:
            return LoadedModel(PLAIN[name](), None)
        if name.startswith(TINY_PREFIX):
            return LoadedModel(tiny(name.removeprefix(TINY_PREFIX)), character_tokenizer())
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except KeyError as error:
        raise LoadError(f"there is no model {name}; the models zoo has {', '.join(NAMES)}") from error
    except (ImportError, OSError, ValueError) as error:
        close = get_close_matches(name, NAMES, n=1)
        meant = f"\nDid you mean {close[0]}?" if close else ""
        raise LoadError(
            f"cannot load {name}: {error}{meant}\nGive a folder with a transformers model, the name of one, or one of "
            f"the models zoo: {', '.join(NAMES)}"
        ) from error
    return LoadedModel(model.eval(), _tokenizer(name))


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; raises LoadError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path} as a text in UTF-8: {error}") from error
