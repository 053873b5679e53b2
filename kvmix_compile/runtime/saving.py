"""Saving: a compiled model in a folder of transformers', its weights as any model's and its plan in config.json."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from kvmix_compile.errors import InputError
from kvmix_compile.passes.allocate.plan import Plan

# What transformers calls the way in which the model of a folder is compressed.
METHOD = "kvmix"
# Where its configurations keep that.
ATTRIBUTE = "quantization_config"


def record(plan: Plan, compile: bool) -> dict[str, Any]:
    """What config.json says of a compiled model."""
    return {"quant_method": METHOD, "plan": json.loads(plan.as_json()), "compile": compile}


def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
    """transformers' `save_pretrained`, with the plan in config.json: `from_pretrained` gives the compiled model again,
    in a process that has imported kvmix_compile, and without measuring.

    Raises InputError where config.json already says how the weights are quantized.
    """
    program = self.kvmix_program
    with _saying(self.config, record(program.plan, program.inductor is not None)):
        return PreTrainedModel.save_pretrained(self, save_directory, **kwargs)


@contextmanager
def _saying(config: PreTrainedConfig, said: dict[str, Any]) -> Iterator[None]:
    held = vars(config)
    before = held.get(ATTRIBUTE)
    method = getattr(before, "quant_method", METHOD)
    if method != METHOD:
        raise InputError(
            "save_pretrained cannot keep the plan, as config.json says how the weights are quantized "
            f"({getattr(method, 'value', method)}): save the original model, and the plan beside it with "
            "model.kvmix_plan.save(..)"
        )
    held[ATTRIBUTE] = said
    try:
        yield
    finally:
        if before is None:
            del held[ATTRIBUTE]
        else:
            held[ATTRIBUTE] = before
