"""Saving: a compiled model in a folder of transformers', its weights as any model's and its plan in config.json.

A program that never imports kvmix_compile, such as transformers' own server, loads it compressed where it trusts the
folder's code (trust_remote_code): that is a file which imports it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from kvmix_compile.errors import InputError
from kvmix_compile.passes.allocate.plan import Plan

# What transformers calls the way in which the model of a folder is compressed.
METHOD = "kvmix"
# Where its configurations keep that, and which code is the folder's.
ATTRIBUTE, CODE = "quantization_config", "auto_map"

# The folder's code: classes that are transformers' own, by their names, in a file that imports kvmix_compile.
FILE = "kvmix.py"
SOURCE = '''"""Where transformers trusts this folder's code, it loads the model with a compressed KV cache."""

import kvmix_compile  # noqa: F401  # knows what config.json says of the cache
import transformers


class {config}(transformers.{config}):
    """As it is."""


class {model}(transformers.{model}):
    """As it is."""

    config_class = {config}
'''


def record(plan: Plan, compile: bool) -> dict[str, Any]:
    """What config.json says of a compiled model."""
    return {"quant_method": METHOD, "plan": json.loads(plan.as_json()), "compile": compile}


def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
    """transformers' `save_pretrained`, with the plan in config.json: `from_pretrained` gives the compiled model again,
    in a process that has imported kvmix_compile, and without measuring.

    Raises InputError where config.json already says how the weights are quantized.
    """
    program, config = self.kvmix_program, self.config
    said = {ATTRIBUTE: record(program.plan, program.inductor is not None)}
    names = _own_classes(self)
    if names:
        said[CODE] = {auto: f"{Path(FILE).stem}.{name}" for auto, name in names.items()}
    with _saying(config, said):
        saved = PreTrainedModel.save_pretrained(self, save_directory, **kwargs)
    if names:
        code = SOURCE.format(config=names["AutoConfig"], model=names["AutoModelForCausalLM"])
        Path(save_directory, FILE).write_text(code, encoding="utf-8")
    return saved


def _own_classes(model: Any) -> dict[str, str]:
    """What classes of transformers' the configuration and model are of, by what loads them; empty where they are of
    others, whose code transformers saves itself.
    """
    config, (_, original) = type(model.config), type(model).__bases__
    if transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None) is not original:
        return {}
    return {"AutoConfig": config.__name__, "AutoModelForCausalLM": original.__name__}


@contextmanager
def _saying(config: PreTrainedConfig, said: dict[str, Any]) -> Iterator[None]:
    held = vars(config)
    if (method := _method(held.get(ATTRIBUTE))) != METHOD:
        raise InputError(
            f"save_pretrained cannot keep the plan, as config.json says how the weights are quantized ({method}): save "
            "the original model, and the plan beside it with model.kvmix_plan.save(..)"
        )
    before = {name: held[name] for name in said if name in held}
    held.update(said)
    try:
        yield
    finally:
        for name in said:
            del held[name]
        held.update(before)


def _method(said: Any) -> str:
    """What a configuration calls the way in which its model is compressed: ours, where it says nothing."""
    if said is None:
        return METHOD
    # Of a config.json that was only read, it is a dictionary.
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method) or "of no name")
