"""Loading: what a user calls a model on the command line becomes the model and its tokenizer."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

from kvmix_command.launched import processes
from kvmix_compile.errors import KVMixError
from kvmix_compile.fit.weightless import weightless
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.gguf import load_gguf, load_gguf_tokenizer
from kvmix_compile.models_zoo.plain import convolution, fused_arange, hand_written
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.models_zoo.tiny import TINY, TINY_HYBRID, TINY_LATENT, TINY_OTHERS, TINY_SPECIAL, tiny

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "hand_written": hand_written,
    "fused_arange": fused_arange,
    "convolution": convolution,
}
TINY_PREFIX = "tiny:"
TOYS = (*TINY, *TINY_SPECIAL, *TINY_LATENT, *TINY_HYBRID, *TINY_OTHERS)
NAMES = ("smollm2", *(f"{TINY_PREFIX}{name}" for name in TOYS), *PLAIN)

GGUF, SAFETENSORS = ".gguf", ".safetensors"
# How long huggingface.co has to answer the first question: a slow line does, and one that is down is soon given up.
HUB_SECONDS = 5
# Of what others say is wrong, in a message of ours.
MESSAGE_CHARACTERS = 300


class LoadError(KVMixError):
    """There is no model of this name, or it cannot be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and its tokenizer where it has one. On the CPU, unless torchrun started several
    processes, over whose devices it is spread.
    """

    model: nn.Module
    tokenizer: Any

    def require_tokenizer(self) -> Any:
        """The tokenizer; raises LoadError where there is none."""
        if self.tokenizer is None:
            raise LoadError("this model comes without a tokenizer, and text is needed here: save one next to the model")
        return self.tokenizer


def load_model(name: str) -> LoadedModel:
    """The model that `name` stands for: one of NAMES (the models zoo), a folder, a GGUF file, a safetensors file in a
    folder with its config.json, or a name that transformers knows.

    Raises LoadError, saying what there is, where it cannot be loaded.
    """
    path = Path(name).expanduser()
    if processes() > 1 and (name in NAMES or path.suffix == GGUF):
        raise LoadError(
            f"cannot load {name} in {processes()} processes: torchrun spreads what is a folder with a transformers "
            "model, or a name that transformers knows"
        )
    try:
        if name == "smollm2":
            return LoadedModel(*load_smollm2())
        if name in PLAIN:
            return LoadedModel(PLAIN[name](), None)
        if name.startswith(TINY_PREFIX):
            return LoadedModel(tiny(name.removeprefix(TINY_PREFIX)), character_tokenizer())
        if path.suffix in (GGUF, SAFETENSORS) and not path.is_file():
            raise LoadError(f"cannot load {name}: there is no such file")
        if path.suffix == GGUF:
            return LoadedModel(load_gguf(path), load_gguf_tokenizer(path))
        if path.suffix == SAFETENSORS:
            return _from_pretrained(_folder_of(path))
        return _from_pretrained(path) if path.exists() else _from_pretrained(name, **_how_to_download(name))
    except KeyError as error:
        raise LoadError(f"there is no model {name}; the models zoo has {', '.join(NAMES)}") from error
    except (ImportError, OSError, ValueError) as error:
        raise LoadError(f"cannot load {name}: {error}") from error


def load_on_paper(name: str, dtype: torch.dtype | None) -> nn.Module:
    """The model that `name` stands for, as in load_model, or that a config.json describes, without its weights. Of
    the models zoo, and of a GGUF file, with them.

    dtype: None: the one that it is kept in. Raises LoadError, saying what there is, where there is no such model.
    """
    path = Path(name).expanduser()
    if name in NAMES or name.startswith(TINY_PREFIX) or path.suffix == GGUF:
        model = load_model(name).model
        return model if dtype is None else model.to(dtype)
    options: dict[str, Any] = {} if path.exists() else _how_to_download(name)
    try:
        config = AutoConfig.from_pretrained(path if path.exists() else name, **options)
        return weightless(config, dtype or config.dtype or torch.bfloat16)
    except (ImportError, OSError, ValueError, KeyError, StrictDataclassError) as error:
        # transformers may list every architecture that it has.
        reason = shorten(str(error), MESSAGE_CHARACTERS, placeholder=" ..")
        raise LoadError(f"cannot make a model of the configuration of {name}: {reason}") from error


def _from_pretrained(name: str | Path, **options: Any) -> LoadedModel:
    spread = {"distributed_config": DistributedConfig(tp_size=processes())} if processes() > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **spread, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    return LoadedModel(model.eval(), tokenizer)


def _folder_of(weights: Path) -> Path:
    """The folder of a model whose weights are in a file. Raises LoadError where it is none."""
    if not (weights.parent / "config.json").is_file():
        raise LoadError(
            f"cannot load {weights}: it holds weights alone, so put the config.json of its model beside it, and its "
            "tokenizer's files"
        )
    return weights.parent


def _how_to_download(name: str) -> dict[str, bool]:
    """What from_pretrained is told of a name: to load what was downloaded before, where huggingface.co cannot be asked.

    That is tried here once, as from_pretrained would try it six times for each file. Raises LoadError where there is
    nothing to load.
    """
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HFValidationError as error:
        raise LoadError(f"cannot load {name}: there is no such folder{_meant(name)}") from error
    except RepositoryNotFoundError as error:
        raise LoadError(
            f"cannot load {name}: there is no such folder, and on huggingface.co no such model that you may "
            f"see{_meant(name)}"
        ) from error
    except Exception as error:  # of whichever HTTP client it has
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise LoadError(
                f"cannot load {name}: there is no such folder, no model of this name was downloaded before, and "
                f"huggingface.co cannot be reached{_meant(name)}"
            ) from error
        print(f"huggingface.co cannot be reached: {name} is loaded as it was downloaded before", file=sys.stderr)
        return {"local_files_only": True}
    return {}


def _meant(name: str) -> str:
    close = get_close_matches(name, NAMES, n=1)
    return f". Did you mean {close[0]}?" if close else "; kvmix doctor --help names models that need no download"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; raises LoadError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path} as a text in UTF-8: {error}") from error
