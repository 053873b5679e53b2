"""The pipeline, top to bottom: capture, find sites, verify, measure, allocate, rewrite."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from kvmix_compile.arguments import DEFAULT_BUDGET, check_bits, check_model, check_tokenizer, read_plan
from kvmix_compile.calibration import Calibration, build_calibration
from kvmix_compile.errors import UnsupportedModelError
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import Policy
from kvmix_compile.passes.capture.export import Captured, capture
from kvmix_compile.passes.capture.limits import longest_context, vocabulary_size
from kvmix_compile.passes.capture.logits import follow_autocast
from kvmix_compile.passes.capture.signature import cache_name, parameters_of
from kvmix_compile.passes.capture.weights import check_weights
from kvmix_compile.passes.match.sites import AttentionSite, Refusal, find_sites
from kvmix_compile.passes.measure.exponents import described, with_fitting_exponents
from kvmix_compile.passes.measure.importance import Importance, check_reachable, check_rows, fingerprint, measure
from kvmix_compile.passes.measure.one_path import capture_to_measure
from kvmix_compile.passes.rewrite.rewrite import rewrite
from kvmix_compile.passes.rewrite.verify import verify as verify_rewrite
from kvmix_compile.passes.untouched.untouched import untouched
from kvmix_compile.progress import progress_bar
from kvmix_compile.report import Report, SiteReport
from kvmix_compile.runtime.cache_file import weights_fingerprint
from kvmix_compile.runtime.changes import Steering
from kvmix_compile.runtime.inductor import check_compiler
from kvmix_compile.runtime.model import CompiledModel, Program, attach, embedded_tokens, returns_tensor
from kvmix_compile.runtime.numbering import Numbering, find_numbering, ignores_zeros
from kvmix_compile.tails import Tail, unquantized_tokens

Model = TypeVar("Model", bound=nn.Module)

# Tokens of a calibration row: enough to reach past the sinks, little enough for a backward on a laptop.
CALIBRATION_LENGTH = 512


@dataclass(frozen=True)
class Found:
    """A captured model and its sites, all of them understood."""

    captured: Captured
    sites: tuple[AttentionSite, ...]
    longest_context: int | None


@as_captured()
def apply(
    model: Model,
    *,
    budget: float | None = None,
    storage_budget: float | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    policy: Policy = "fisher",
    tokenizer: Any = None,
    calibration: Any = None,
    tail: Tail = "window",
    sinks: int | None = None,
    recent: int | None = None,
    compile: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Model:
    """A drop-in twin of `model` whose KV cache is compressed. It shares the model's weights; the model itself is left
    as it was.

    Args:
        model: a causal language model in evaluation mode: transformers', or any module that maps `input_ids` to logits.
        budget: mean code bits per cached element, keys and values averaged (default 2.3); 16 is lossless. Scales and
            zero points add about 0.35 bits.
        storage_budget: instead, mean stored bits per quantized element: codes, scales and zero points.
        plan: instead, a Plan made earlier, or the path of one.
        policy: "fisher" (least predicted loss), "kvmix" (the paper's), or "uniform".
        tokenizer: of the model; with it, calibration is on built-in English unless `calibration` says otherwise.
        calibration: texts (with a tokenizer) or token ids to measure importance on. Without tokenizer and
            calibration, on tokens that the model itself samples.
        tail: which tokens of each row stay in the model's dtype: "window", the first 64 and the last 128, or "rpc", the
            paper's, none of the first and the last 40.
        sinks: another number of first tokens.
        recent: another number of last tokens, at least 32.
        compile: have Inductor compile the rewritten graph, once for prompts and once for steps of decoding. Takes
            minutes and makes steps faster; see docs/compile.md.
        verify: check that the rewritten graph reproduces the model's logits when nothing is quantized.
        progress: show progress bars.

    Raises:
        KVMixError: CaptureError, UnsupportedModelError, VerifyError, BudgetError, PlanError, CalibrationError or
            CompilationError; each says what to do.
    """
    check_model(model)
    sinks, recent = unquantized_tokens(tail, sinks, recent)
    check_bits(plan, budget, storage_budget, policy)
    if compile:
        check_compiler(next(parameter.device for parameter in model.parameters()))
    plan = read_plan(plan)
    report = Report(type(model).__name__)
    if plan is None:
        chosen = _given_calibration(model, report, tokenizer, calibration)
        if budget is None and storage_budget is None:
            budget = DEFAULT_BUDGET
    found = find(model, report)
    if plan is not None:
        plan = _checked_plan(found, plan)
    else:
        check_reachable(found.sites, recent=recent, budget=budget, storage_budget=storage_budget, policy=policy)
    if verify:
        _verify(found, report)
    if plan is None:
        importance = _measure(model, found, report, chosen, tokenizer, calibration, sinks, recent, progress)
        with report.timed("allocate"):
            plan = importance.allocate(budget=budget, storage_budget=storage_budget, policy=policy)
    twin = build(model, found, plan, report)
    if compile:
        with report.timed("compile"):
            cast(CompiledModel, twin).kvmix_program.compile().prepare()
    return twin


@as_captured()
def apply_plans(model: Model, plans: Sequence[Plan]) -> list[Model]:
    """What `apply(model, plan=...)` gives for each plan, from one capture and one verification."""
    check_model(model)
    report = Report(type(model).__name__)
    found = find(model, report)
    plans = [_checked_plan(found, plan) for plan in plans]
    _verify(found, report)
    return [build(model, found, plan, copy.deepcopy(report)) for plan in plans]


@as_captured()
def analyze(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    tail: Tail = "window",
    sinks: int | None = None,
    recent: int | None = None,
    progress: bool = False,
) -> Importance:
    """How much each layer's keys and values matter, measured once; `importance.allocate(budget=...)` makes
    plans of it.
    """
    check_model(model)
    sinks, recent = unquantized_tokens(tail, sinks, recent)
    report = Report(type(model).__name__)
    chosen = _given_calibration(model, report, tokenizer, calibration)
    check_weights(model)
    with report.timed("capture"):
        captured = capture_to_measure(model, CALIBRATION_LENGTH)
    return _measure(model, find_in(captured, report), report, chosen, tokenizer, calibration, sinks, recent, progress)


@as_captured()
def diagnose(model: nn.Module) -> Report:
    """What is found in a model, layer by layer, and why anything is not; never raises KVMixError."""
    from kvmix_compile.errors import KVMixError

    report = Report(type(model).__name__)
    try:
        check_model(model)
        _verify(find(model, report), report)
    except KVMixError as error:
        report.problem = str(error)
    return report


def find(model: nn.Module, report: Report) -> Found:
    """Capture a model and find its sites; what is found goes into the report too."""
    check_weights(model)
    with report.timed("capture"):
        captured = capture(model)
    return find_in(captured, report)


def find_in(captured: Captured, report: Report) -> Found:
    """Find a captured model's sites; what is found goes into the report too."""
    name = type(captured.model).__name__
    with report.timed("find sites"):
        limit = longest_context(captured)
        sites = find_sites(captured, limit)
    report.sites = tuple(
        SiteReport(
            site.layer, site.query_heads, site.kv_heads, site.key_dim, site.value_dim, site.attention,
            site.score_function.scale,
        )
        for site in sites.matched
    )  # fmt: skip
    report.refused = sites.refused
    if sites.refused:
        raise UnsupportedModelError(f"{name} cannot be given a compressed cache: {_reasons(sites.refused)}")
    if not sites.matched:
        raise UnsupportedModelError(
            f"no attention was found in {name}, so there is no KV cache to compress; if it was loaded "
            "with an attn_implementation of its own, load it with attn_implementation='sdpa'"
        )
    return Found(captured, sites.matched, limit)


def _reasons(refused: Sequence[Refusal]) -> str:
    """Each reason once, with the layers that it holds for."""
    layers: dict[str, list[str]] = {}
    for refusal in refused:
        layers.setdefault(refusal.reason, []).append(refusal.layer)
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in layers.items()
    )


def _checked_plan(found: Found, plan: Plan) -> Plan:
    """The plan, with exponents for what would not fit float16. Raises PlanError where it is another model's."""
    plan.check_fingerprint(
        fingerprint(found.captured, found.sites),
        [site.layer for site in found.sites],
        [(site.kv_heads, site.key_dim, site.value_dim) for site in found.sites],
    )
    return with_fitting_exponents(plan, found.captured, found.sites, found.longest_context)


def _verify(found: Found, report: Report) -> None:
    with report.timed("verify"), untouched(found.captured.model):
        report.verified = verify_rewrite(found.captured, found.sites, found.longest_context)


def _given_calibration(model: nn.Module, report: Report, tokenizer: Any, calibration: Any) -> Calibration | None:
    """What to measure on, made before anything else so that it is refused then; None where the model is to write it."""
    check_tokenizer(tokenizer)
    if tokenizer is None and calibration is None:
        return None
    with report.timed("calibration text"), untouched(model):
        chosen = build_calibration(model, tokenizer, calibration, length=CALIBRATION_LENGTH)
    check_rows(chosen.rows)
    return chosen


def _measure(
    model: nn.Module,
    found: Found,
    report: Report,
    chosen: Calibration | None,
    tokenizer: Any,
    calibration: Any,
    sinks: int,
    recent: int,
    progress: bool,
) -> Importance:
    length = min(CALIBRATION_LENGTH, found.longest_context or CALIBRATION_LENGTH)
    if chosen is None or chosen.longest > length:
        with report.timed("calibration text"), untouched(model):
            chosen = build_calibration(model, tokenizer, calibration, length=length)
    report.calibration = chosen.source
    device = next(parameter.device for parameter in model.parameters())
    rows = [row.to(device) for row in chosen.rows]
    with report.timed("measure"), progress_bar("measuring importance", len(rows), progress) as advance:
        return measure(found.captured, found.sites, rows, sinks=sinks, recent=recent, on_row=advance)


def build(model: Model, found: Found, plan: Plan, report: Report) -> Model:
    """The twin of `model`, which was captured and its sites found, that keeps its cache as the plan says."""
    plan = plan.with_windows([site.mask.size for site in found.sites])
    precisions = [(site.key, site.value) for site in plan.sites]
    orders = [site.channel_order for site in plan.sites]
    exponents = [(site.key_exponents, site.value_exponents) for site in plan.sites]
    recents = [layout.recent for layout in plan.layouts()]
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with report.timed("rewrite"):
        rewritten = rewrite(found.captured, found.sites, precisions, recents, orders, exponents)
    report.notes = tuple(described(plan))
    program = Program(
        rewritten=rewritten,
        plan=plan,
        report=report,
        dtypes=tuple(site.key.meta["val"].dtype for site in found.sites),
        parameter_dtype=parameter.dtype,
        weights=weights_fingerprint(model),
        device=parameter.device,
        vocabulary=vocabulary_size(found.captured),
        longest_context=found.longest_context,
        returns_tensor=returns_tensor(model),
        cache_name=cache_name(model.forward),
        logits_follow_autocast=follow_autocast(found.captured.graph),
        embedded=embedded_tokens(model),
        steering=Steering.of(model, found.captured.reads, found.captured.written),
    )
    twin = attach(model, program)
    with report.timed("numbering"), untouched(model):
        program.numbering = _numbering(model, cast(CompiledModel, twin))
        if "token_type_ids" in parameters_of(model.forward):
            program.zero_token_types = ignores_zeros(model, "token_type_ids", program.vocabulary)
    return twin  # type: ignore[return-value]


def _numbering(model: nn.Module, twin: CompiledModel) -> Numbering:
    program = twin.kvmix_program

    def run(numbering: Numbering, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        program.numbering = numbering
        return twin.without_past(input_ids, attention_mask)

    return find_numbering(model, run, program.vocabulary, program.longest_context)
