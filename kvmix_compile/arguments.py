"""Arguments: what is wrong in a call of `apply` or `analyze` is said first, before anything is captured or measured."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kvmix_compile.errors import BudgetError, CalibrationError, CaptureError, PlanError
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import (
    KVMIX_OTHER_BITS,
    UNIFORM_BITS,
    Policy,
    check_policy,
    limit,
)
from kvmix_compile.passes.capture.export import check_capturable
from kvmix_compile.passes.capture.signature import parameters_of
from kvmix_compile.passes.measure.sensitivity import CANDIDATE_BITS
from kvmix_compile.runtime.model import CompiledModel

# The paper's headline configuration: K 2.19 and V 2.38 bits, 2.3 on average.
DEFAULT_BUDGET = 2.3

# The fewest code bits of each policy, whatever the model.
_LEAST_BITS: Mapping[Policy, int] = {
    "fisher": min(CANDIDATE_BITS),
    "kvmix": KVMIX_OTHER_BITS,
    "uniform": UNIFORM_BITS[0][0],
}

_ASKED_OF_A_TOKENIZER = ("encode", "bos_token_id", "eos_token_id")

# Attributes by which a wrapper holds the module that it wraps.
_WRAPPED = ("_orig_mod", "module")


def check_model(model: object) -> None:
    """Raise CaptureError for what is no model, is compiled already, or cannot be captured for a reason that shows."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}: load it first, as with "
            "transformers.AutoModelForCausalLM.from_pretrained(..)"
        )
    if isinstance(model, CompiledModel):
        raise CaptureError(
            f"this {type(model).__name__} was compiled by kvmix_compile already: pass the original model, which is as "
            "it was"
        )
    for name in _WRAPPED:
        if "input_ids" not in parameters_of(model.forward) and isinstance(getattr(model, name, None), nn.Module):
            raise CaptureError(f"a {type(model).__name__} wraps the model: pass model.{name}, what is inside")
    _check_weights(model)
    check_capturable(model)


def _check_weights(model: nn.Module) -> None:
    weights = list(model.parameters())
    if any(weight.device.type == "meta" for weight in weights):
        raise CaptureError(
            "weights of the model are not in memory but offloaded, or on the meta device: load it onto one device, "
            "without offloading (device_map={'': 0} or {'': 'cpu'})"
        )
    for path, module in model.named_modules():
        if any(isinstance(held, torch.ScriptObject) for held in vars(module).values()):
            raise CaptureError(
                f"{path or 'the model'} ({type(module).__name__}) keeps its weights packed for torch.ao's kernels, "
                "which cannot be captured: pass the model as it was before it was quantized"
            )
    if not any(weight.is_floating_point() for weight in weights):
        raise CaptureError(
            f"{type(model).__name__} has no floating-point parameter, so there is nothing to tell its dtype by: pass a "
            "model whose embeddings or norms at least are not quantized"
        )


def check_bits(plan: object, budget: float | None, storage_budget: float | None, policy: Policy) -> None:
    """Raise PlanError for a plan and a budget at once; BudgetError or AllocationError for a policy that there is not,
    or a budget that it cannot meet in any model.
    """
    check_policy(policy)
    if plan is not None and not (budget is None and storage_budget is None):
        raise PlanError("give either a plan or a budget: a plan has its own bits")
    if budget is None and storage_budget is None:
        return
    asked = limit(budget, storage_budget)
    if asked.bits < _LEAST_BITS[policy]:
        raise BudgetError(
            f"{asked.unit}={asked.bits:g} cannot be met: {asked.meaning} per cached element can average "
            f"{_LEAST_BITS[policy]} to {UNQUANTIZED_BITS} at most with policy {policy!r}"
        )


def read_plan(plan: object) -> Plan | None:
    """The plan, be it a Plan, the path of one or None. Raises PlanError for what is none, or cannot be read."""
    if plan is None or isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | os.PathLike):
        raise PlanError(
            f"plan is a {type(plan).__name__}: pass a kvmix_compile.Plan, or the path of one that was saved"
        )
    return Plan.load(plan)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise CalibrationError for what cannot make token ids of texts."""
    if tokenizer is not None and not all(hasattr(tokenizer, name) for name in _ASKED_OF_A_TOKENIZER):
        raise CalibrationError(
            f"tokenizer is a {type(tokenizer).__name__}: pass the tokenizer itself, as loaded with "
            "transformers.AutoTokenizer.from_pretrained(..)"
        )
