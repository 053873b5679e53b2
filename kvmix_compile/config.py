"""Config: what `apply`, `analyze`, the backend and the command line can be told, with its defaults, checked before
anything is captured or measured.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from kvmix_compile.errors import BudgetError, CalibrationError, PlanError, PredictedLossWarning
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, UNQUANTIZED_BITS
from kvmix_compile.passes.allocate.outlook import ruined
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import KVMIX_OTHER_BITS, UNIFORM_BITS, Policy, check_policy, limit
from kvmix_compile.passes.measure.importance import Importance
from kvmix_compile.passes.measure.sensitivity import CANDIDATE_BITS

# The paper's headline configuration: K 2.19 and V 2.38 bits, 2.3 on average.
DEFAULT_BUDGET = 2.3

RecentWindow = Literal["fixed", "rpc"]

# (attention sinks, recent tokens) of each.
#
# "fixed": of at most 64 sinks and 128 recent tokens the most, which tell in accuracy (docs/method.md).
#
# "rpc": KVmix (arXiv 2506.08018), Recent Pivotal Context. Of the recent tokens it keeps a tenth (2-bit tensors)
# or a fifth, and quantizes what else fills groups of 32: while decoding, 3 to 34 or 8 to 39 tokens wait. A window of 40
# lets 9 to 40 wait. The paper keeps no sinks.
RECENT_WINDOWS: Mapping[RecentWindow, tuple[int, int]] = {"fixed": (64, 128), "rpc": (0, 40)}

# The fewest code bits of each policy, whatever the model.
_LEAST_BITS: Mapping[Policy, int] = {
    "fisher": min(CANDIDATE_BITS),
    "kvmix": KVMIX_OTHER_BITS,
    "uniform": UNIFORM_BITS[0][0],
}

_ASKED_OF_A_TOKENIZER = ("encode", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Config:
    """How a model's cache is to be kept.

    plan: a Plan made earlier, or the path of one; instead of a budget.
    budget: mean code bits per cached element, keys and values averaged.
    storage_budget: instead, mean stored bits per quantized element: codes, scales and zero points.
    policy: how a budget becomes a plan: "fisher" (least predicted loss), "kvmix" (the paper's), or "uniform".
    tokenizer: of the model; with it, calibration is on built-in English unless `calibration` says otherwise.
    calibration: texts (with a tokenizer) or token ids to measure importance on.
    recent_window: which tokens of each row stay unquantized, one of RECENT_WINDOWS.
    sinks, recent: other numbers of first and of last tokens.
    exact_chunks: whether what a token reads depends not on how its text was cut into chunks; None: as the plan says.
    context: tokens of the texts that a budget is for; None: as many as the model takes, 8192 at most.
    strict: whether a plan must have been made for a model of the very same structure, and not for a version of it.
    """

    plan: Plan | str | os.PathLike[str] | None = None
    budget: float | None = None
    storage_budget: float | None = None
    policy: Policy = "fisher"
    tokenizer: Any = None
    calibration: Any = None
    recent_window: RecentWindow = "fixed"
    sinks: int | None = None
    recent: int | None = None
    exact_chunks: bool | None = None
    context: int | None = None
    strict: bool = False

    def checked(self) -> Self:
        """The same with the plan read and the defaults filled in.

        Raises PlanError, BudgetError, AllocationError or CalibrationError for what no model can be given.
        """
        sinks, recent = self.unquantized
        self._check_bits()
        self._check_tokenizer()
        if self.exact_chunks is not None and not isinstance(self.exact_chunks, bool):
            raise PlanError(f"exact_chunks is True or False, not {self.exact_chunks!r}")
        if self.context is not None:
            if isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1:
                raise PlanError(f"context is a number of tokens, 1 or more, not {self.context!r}")
            if self.plan is not None:
                raise PlanError("give either a plan or a context: a plan has its own")
        if self.strict and self.plan is None:
            raise PlanError("strict is about a plan that was made earlier: pass plan=... as well, or leave strict out")
        budget = self.budget
        if self.plan is None and budget is None and self.storage_budget is None:
            budget = DEFAULT_BUDGET
        plan = None if self.plan is None else self._with_chunks(_read(self.plan))
        return replace(self, plan=plan, budget=budget, sinks=sinks, recent=recent)

    def allocate(self, importance: Importance) -> Plan:
        """The plan that spends the budget of one that was checked. Warns where the model would no longer be itself."""
        plan = importance.allocate(
            budget=self.budget, storage_budget=self.storage_budget, policy=self.policy, context=self.context
        )
        if found := ruined(importance.sites, plan):
            rest = f", and {len(found) - 1} more are" if len(found) > 1 else ""
            warnings.warn(f"{found[0]}{rest}: choose a larger budget", PredictedLossWarning, stacklevel=2)
        return self._with_chunks(plan)

    def _with_chunks(self, plan: Plan) -> Plan:
        return plan if self.exact_chunks is None else replace(plan, exact_chunks=self.exact_chunks)

    @property
    def given_plan(self) -> Plan | None:
        """The plan of one that was checked."""
        assert self.plan is None or isinstance(self.plan, Plan)
        return self.plan

    @property
    def unquantized(self) -> tuple[int, int]:
        """The sinks and recent tokens."""
        return unquantized_tokens(self.recent_window, self.sinks, self.recent)

    def _check_bits(self) -> None:
        check_policy(self.policy)
        if self.budget is None and self.storage_budget is None:
            return
        if self.plan is not None:
            raise PlanError("give either a plan or a budget: a plan has its own bits")
        asked = limit(self.budget, self.storage_budget)
        least = _LEAST_BITS[self.policy]
        if asked.bits < least:
            raise BudgetError(
                f"{asked.unit}={asked.bits:g} cannot be met: {asked.meaning} per cached element can average {least} to "
                f"{UNQUANTIZED_BITS} at most with policy {self.policy!r}"
            )

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and not all(hasattr(self.tokenizer, name) for name in _ASKED_OF_A_TOKENIZER):
            raise CalibrationError(
                f"tokenizer is a {type(self.tokenizer).__name__}: pass the tokenizer itself, as loaded with "
                "transformers.AutoTokenizer.from_pretrained(..)"
            )


def unquantized_tokens(recent_window: RecentWindow, sinks: int | None, recent: int | None) -> tuple[int, int]:
    """The sinks and recent tokens asked for, those that go with `recent_window` where None is given.

    Raises PlanError where there is no such recent window, or no state that keeps so many.
    """
    if not isinstance(recent_window, str) or recent_window not in RECENT_WINDOWS:
        raise PlanError(
            f"there is no recent window {recent_window!r}; choose one of {', '.join(get_args(RecentWindow))}"
        )
    usual_sinks, usual_recent = RECENT_WINDOWS[recent_window]
    sinks, recent = usual_sinks if sinks is None else sinks, usual_recent if recent is None else recent
    for name, tokens in (("sinks", sinks), ("recent", recent)):
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise PlanError(f"{name} is a whole number of tokens, not {tokens!r}")
    if sinks < 0 or recent < BLOCK_TOKENS:
        raise PlanError(
            f"sinks={sinks} and recent={recent} are not possible: sinks is 0 or more, recent {BLOCK_TOKENS} (one "
            "block) or more"
        )
    return sinks, recent


def _read(plan: object) -> Plan:
    """The plan, be it a Plan or the path of one. Raises PlanError for what is none, or cannot be read."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | os.PathLike):
        raise PlanError(
            f"plan is a {type(plan).__name__}: pass a kvmix_compile.Plan, or the path of one that was saved"
        )
    return Plan.load(plan)
