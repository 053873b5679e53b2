"""The pipeline, top to bottom: capture, find sites, verify, measure, allocate, rewrite."""

import copy
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kvmix_compile.calibration import Calibration, build_calibration
from kvmix_compile.config import Config, RecentWindow
from kvmix_compile.errors import CompilationError, KVMixError, PlanError, UnsupportedModelError
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.model_check import check_model
from kvmix_compile.passes.allocate.outlook import left_unquantized, wider_than
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import Policy
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture, devices_of
from kvmix_compile.passes.capture.logits import follow_autocast
from kvmix_compile.passes.capture.module_tree import module_tree
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.signature import cache_name, parameters_of
from kvmix_compile.passes.capture.weights import check_weights
from kvmix_compile.passes.match.sites import AttentionSite, Refusal, find_sites
from kvmix_compile.passes.match.spread import with_spread_heads
from kvmix_compile.passes.measure.exponents import described, with_fitting_exponents
from kvmix_compile.passes.measure.importance import (
    Importance,
    check_reachable,
    fingerprint,
    measure,
    usable_rows,
    usual_context,
)
from kvmix_compile.passes.measure.one_path import capture_to_measure
from kvmix_compile.passes.rewrite import original
from kvmix_compile.passes.rewrite.absorb import absorb
from kvmix_compile.passes.rewrite.rewrite import rewrite
from kvmix_compile.passes.rewrite.verify import verify as verify_rewrite
from kvmix_compile.passes.untouched.untouched import untouched
from kvmix_compile.progress import progress_bar
from kvmix_compile.report import Report, SiteReport
from kvmix_compile.runtime.cache_file import weights_fingerprint
from kvmix_compile.runtime.changes import Steering
from kvmix_compile.runtime.inductor import check_compiler
from kvmix_compile.runtime.kept import Start
from kvmix_compile.runtime.model import CompiledModel, attach, returns_tensor
from kvmix_compile.runtime.numbering import Numbering, find_numbering, ignores_zeros
from kvmix_compile.runtime.padding import takes_padding
from kvmix_compile.runtime.program import Program, embedded_tokens, placement

Model = TypeVar("Model", bound=nn.Module)

# Tokens of a calibration row: enough to reach past the sinks, little enough for a backward on a laptop.
CALIBRATION_LENGTH = 512


@dataclass(frozen=True)
class Found:
    """A captured model and its sites, all of them understood."""

    captured: Captured
    sites: tuple[AttentionSite, ...]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each site's keys and values as the graph computes them."""
        return tuple(site.key.meta["val"].dtype for site in self.sites)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where each site's keys and values are made."""
        return tuple(site.key.meta["val"].device for site in self.sites)

    @property
    def shapes(self) -> tuple[SiteShape, ...]:
        """What each site caches, on all ranks together."""
        return tuple(self.captured.whole(site.shape) for site in self.sites)

    @cached_property
    def own_cache_bytes(self) -> float | None:
        """What the model's own cache holds of a token; None where it keeps none."""
        model = self.captured.original
        with untouched(model):
            return original.cache_bytes(model, self.captured.random_ids(1, original.LONGER_TEXT))


@dataclass(frozen=True)
class Examined:
    """A model that can be compiled: what was measured of it, the plan made or given, and what the sites cache."""

    importance: Importance
    plan: Plan
    dtypes: tuple[torch.dtype, ...]
    longest_context: int | None


@as_captured()
def apply(
    model: Model,
    *,
    budget: float | None = None,
    storage_budget: float | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    policy: Policy = Config.policy,
    tokenizer: Any = None,
    calibration: Any = None,
    recent_window: RecentWindow = Config.recent_window,
    sinks: int | None = None,
    recent: int | None = None,
    exact_chunks: bool | None = None,
    context: int | None = None,
    strict: bool = False,
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
        recent_window: which tokens of each row stay unquantized: "fixed", the first 64 and the last 128, or
            "rpc", the paper's, none of the first and the last 40.
        sinks: another number of first tokens.
        recent: another number of last tokens, at least 32.
        exact_chunks: True makes what a token reads independent of how its text came in: read in one go, in chunks,
            token by token, from a saved cache, or proposed by a draft model. False shows the tokens of one call each
            other in full precision. None: as the plan says, and False where there is none.
        context: tokens of the texts that the budget is for, over all of whose elements bits are averaged. Layers with a
            sliding window hold few of a long text, and get more bits. None: as many as the model takes, 8192 at most.
        strict: refuse a plan that was made for another version of the model (with other adapters, weights quantized
            otherwise, more tokens), whose attention is the same. False: the report says so.
        compile: have Inductor compile the rewritten graph, once for prompts and once for steps of decoding. Takes
            minutes and makes steps faster; see docs/compile.md.
        verify: check that the rewritten graph reproduces the model's logits when nothing is quantized.
        progress: show progress bars.

    Raises:
        KVMixError: CaptureError, UnsupportedModelError, VerifyError, BudgetError, PlanError, CalibrationError or
            CompilationError; each says what to do.
    """
    check_model(model)
    with Ranks.of(model).together():
        config = Config(
            plan=plan,
            budget=budget,
            storage_budget=storage_budget,
            policy=policy,
            tokenizer=tokenizer,
            calibration=calibration,
            recent_window=recent_window,
            sinks=sinks,
            recent=recent,
            exact_chunks=exact_chunks,
            context=context,
            strict=strict,
        ).checked()
    return _applied(model, config, compile, verify, progress)


@as_captured()
def apply_in_place(model: nn.Module, config: Config, *, compile: bool = False, verify: bool = True) -> None:
    """`apply` with `config`, which was checked, for a model that is nobody's yet: `model` becomes the twin itself."""
    check_model(model)
    _applied(module_tree(model), config, compile, verify, progress=False, twin=model)


def _applied(
    model: Model, config: Config, compile: bool, verify: bool, progress: bool, twin: Model | None = None
) -> Model:
    """`twin`: what becomes the twin; None: a new one."""
    ranks = Ranks.of(model)
    report, given = Report(type(model).__name__), config.given_plan
    with ranks.together():
        if compile:
            _check_one_device(model)
            check_compiler(next(parameter.device for parameter in model.parameters()))
        text = None if given else given_calibration(model, report, config)
    _check_same_call(ranks, config, text is None, verify, compile)
    with report.timed("look up"):
        start = Start.of(model)
        kept = None if given is None or config.strict else start.read(given, is_verified=verify)
    if kept:
        kept.report.seconds.update(report.seconds)
        return _ready(cast(Model, attach(model, kept, twin)), compile)
    found = find(model, report)
    if compile:
        check_carries_nothing(found.captured)
    plan = given and _checked_plan(found, given, report, strict=config.strict)
    if not plan:
        _check_budget(found, config)
    if verify:
        _verify(found, report)
    plan = plan or _planned(_measure(found, report, config, text, progress), report, config)
    twin = build(model, found, plan, report, twin)
    program = cast(CompiledModel, twin).kvmix_program
    start.write(given or program.plan, program)
    return _ready(twin, compile)


def _check_one_device(model: nn.Module) -> None:
    """Raise CompilationError for what Inductor is not yet asked to compile."""
    if len(devices := devices_of(model)) > 1:
        raise CompilationError(
            f"the model's weights are on several devices ({', '.join(map(str, devices))}), and Inductor does not "
            "compile such a graph yet: call kvmix_compile.apply without compile=True"
        )


def _check_same_call(ranks: Ranks, config: Config, samples: bool, verify: bool = False, compile: bool = False) -> None:
    """Raise PlanError where processes that work together were asked for different things. `samples`: whether the model
    is to write what is measured on.
    """
    plan = config.given_plan and config.given_plan.as_json()
    plain = {name: held for name, held in vars(config).items() if isinstance(held, bool | int | float | str)}
    asked = ranks.told((plan, plain if plan is None else {}, samples, verify, compile))
    if any(other != asked[0] for other in asked):
        raise PlanError(
            "the processes that the model's weights are spread over asked for different plans, budgets or options: "
            "call kvmix_compile in all of them with the same arguments"
        )


def _ready(twin: Model, compile: bool) -> Model:
    """The twin, compiled by Inductor where that is asked for."""
    if compile:
        program = cast(CompiledModel, twin).kvmix_program
        with program.report.timed("compile"):
            program.compile().prepare()
    return twin


@as_captured()
def apply_plans(model: Model, plans: Sequence[Plan]) -> list[Model]:
    """What `apply(model, plan=...)` gives for each plan, from one capture and one verification."""
    check_model(model)
    report = Report(type(model).__name__)
    found = find(model, report)
    plans = [_checked_plan(found, plan, report) for plan in plans]
    _verify(found, report)
    return [build(model, found, plan, copy.deepcopy(report)) for plan in plans]


@as_captured()
def analyze(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    recent_window: RecentWindow = Config.recent_window,
    sinks: int | None = None,
    recent: int | None = None,
    progress: bool = False,
) -> Importance:
    """How much each layer's keys and values matter, measured once; `importance.allocate(budget=...)` makes
    plans of it.
    """
    check_model(model)
    ranks = Ranks.of(model)
    with ranks.together():
        config = Config(
            tokenizer=tokenizer, calibration=calibration, recent_window=recent_window, sinks=sinks, recent=recent
        ).checked()
        report = Report(type(model).__name__)
        text = given_calibration(model, report, config)
    _check_same_call(ranks, config, text is None)
    check_weights(model)
    with report.timed("capture"):
        captured = capture_to_measure(model, CALIBRATION_LENGTH)
    return _measure(find_in(captured, report), report, config, text, progress)


@as_captured()
def diagnose(model: nn.Module) -> Report:
    """What is found in a model, layer by layer, and why anything is not; never raises KVMixError."""
    report = Report(type(model).__name__)
    _found_or_problem(model, report)
    return report


@as_captured()
def examine(model: nn.Module, config: Config, *, progress: bool = False) -> tuple[Report, Examined | None]:
    """All that `apply` with `config`, which was checked, finds out about a model. Where a plan is given, the importance
    of its sites is measured as well. None where the model cannot be compiled: `report.problem` says why.

    Raises BudgetError, AllocationError, PlanError or CalibrationError for what the model cannot be given.
    """
    report, given = Report(type(model).__name__), config.given_plan
    text = given_calibration(model, report, config)
    found = _found_or_problem(model, report)
    if found is None:
        return report, None
    if given:
        given = _checked_plan(found, given, report, strict=config.strict)
        config = replace(config, sinks=given.sinks, recent=given.recent)
    else:
        _check_budget(found, config)
    importance = _measure(found, report, config, text, progress)
    plan = given or _planned(importance, report, config)
    twin = cast(CompiledModel, build(model, found, plan, report))
    return report, Examined(importance, twin.kvmix_plan, found.dtypes, found.captured.longest_context)


def _found_or_problem(model: nn.Module, report: Report) -> Found | None:
    """What is found in a model that can be compiled. Else None, and the report has the problem."""
    try:
        check_model(model)
        found = find(model, report)
        _verify(found, report)
    except KVMixError as error:
        report.problem = str(error)
        return None
    return found


def find(model: nn.Module, report: Report) -> Found:
    """Capture a model and find its sites; what is found goes into the report too."""
    check_weights(model)
    with report.timed("capture"):
        captured = capture(model)
    return find_in(captured, report)


def find_in(captured: Captured, report: Report) -> Found:
    """Find a captured model's sites; what is found goes into the report too."""
    name = captured.name
    with report.timed("find sites"):
        sites = find_sites(captured)
        absorbed, latents = absorb(captured, sites.matched)
        if absorbed is not captured:
            captured, sites = absorbed, find_sites(absorbed)
    report.sites = tuple(
        SiteReport(
            layer=site.layer,
            query_heads=site.query_heads,
            shape=site.shape,
            attention=site.attention,
            scale=site.score_function.scale,
        )
        for site in sites.matched
    )
    report.refused = sites.refused
    report.carried = tuple(one.carried for one in captured.stateful)
    report.passes = (*captured.passes, latents, sites.record)
    if sites.refused:
        raise UnsupportedModelError(f"{name} cannot be given a compressed cache: {_reasons(sites.refused)}")
    if not sites.matched and captured.stateful:
        raise UnsupportedModelError(
            f"no attention was found in {name}, whose layers carry states of fixed size from token to token "
            f"({captured.stateful[0].path}), so there is no KV cache to compress"
        )
    if not sites.matched:
        raise UnsupportedModelError(
            f"no attention was found in {name}, so there is no KV cache to compress; if it was loaded "
            "with an attn_implementation of its own, load it with attn_implementation='sdpa'"
        )
    return Found(with_spread_heads(captured, sites.matched), sites.matched)


def _reasons(refused: Sequence[Refusal]) -> str:
    """Each reason once, with the layers that it holds for."""
    layers: dict[str, list[str]] = {}
    for refusal in refused:
        layers.setdefault(refusal.reason, []).append(refusal.layer)
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in layers.items()
    )


def _checked_plan(found: Found, plan: Plan, report: Report, *, strict: bool = False) -> Plan:
    """The plan, with exponents for what would not fit float16. Raises PlanError where it is another model's, or keeps
    fewer tokens than a site attends to.
    """
    fitted = plan.fitted(
        fingerprint(found.captured, found.sites),
        [site.layer for site in found.sites],
        found.shapes,
        strict=strict,
    )
    if fitted.fingerprint != plan.fingerprint:
        report.notes += (
            "the plan was made for another version of this model: its attention is the same, and its other parameters "
            "have other names or shapes",
        )
    fitted.check_windows([site.window for site in found.sites])
    return with_fitting_exponents(fitted, found.captured, found.sites)


def _check_budget(found: Found, config: Config) -> None:
    """Raise BudgetError or AllocationError for a budget that no measurement could meet."""
    check_reachable(
        found.sites,
        recent=config.unquantized[1],
        budget=config.budget,
        storage_budget=config.storage_budget,
        policy=config.policy,
        context=config.context or usual_context(found.captured),
    )


def _verify(found: Found, report: Report) -> None:
    captured = found.captured
    with report.timed("verify"), captured.ranks.together(), untouched(captured.original):
        report.verified = verify_rewrite(captured, found.sites)


def given_calibration(model: nn.Module, report: Report, config: Config) -> Calibration | None:
    """What to measure on, made before anything else so that it is refused then; None where the model is to write it."""
    if config.tokenizer is None and config.calibration is None:
        return None
    text = _calibration(model, report, config, CALIBRATION_LENGTH)
    usable_rows(text.rows)  # or refused
    return text


def _calibration(model: nn.Module, report: Report, config: Config, length: int) -> Calibration:
    with report.timed("calibration text"), untouched(model):
        return build_calibration(model, config.tokenizer, config.calibration, length=length)


def _planned(importance: Importance, report: Report, config: Config) -> Plan:
    with report.timed("allocate"):
        plan = config.allocate(importance)
    report.notes += tuple(left_unquantized(importance.sites, plan))
    return plan


def rows_to_measure(found: Found, report: Report, config: Config, text: Calibration | None) -> list[Tensor]:
    """Rows of token ids on the model's device, int64 `[tokens]` each, the same on all ranks. `text`: they are of this,
    made anew where it is longer than the model's context, or not yet made.
    """
    captured = found.captured
    length = min(CALIBRATION_LENGTH, captured.longest_context or CALIBRATION_LENGTH)
    if text is None or text.longest > length:
        text = _calibration(captured.original, report, config, length)
    report.calibration = text.source
    return [row.to(captured.parameter.device) for row in captured.ranks.told(text.rows)[0]]


def _measure(found: Found, report: Report, config: Config, text: Calibration | None, progress: bool) -> Importance:
    """`text`: as of `rows_to_measure`."""
    rows = rows_to_measure(found, report, config, text)
    sinks, recent = config.unquantized
    with report.timed("measure"), progress_bar("measuring importance", len(rows), progress) as advance:
        return measure(found.captured, found.sites, rows, sinks=sinks, recent=recent, on_row=advance)


def build(model: Model, found: Found, plan: Plan, report: Report, twin: Model | None = None) -> Model:
    """The twin of `model`, which was captured and its sites found, that keeps its cache as the plan says. `twin`: what
    becomes it; None: a new one.
    """
    plan = plan.with_windows([site.window for site in found.sites])
    captured, parameter, heads = found.captured, found.captured.parameter, found.captured.head_ranks
    own_plan = plan.of_heads(heads.number, heads.count)
    _compare_sizes(found, own_plan, report)
    with report.timed("rewrite"):
        rewritten = rewrite(captured, found.sites, own_plan.stored_sites())
    report.notes += tuple(described(plan))
    if captured.ranks.count > 1:
        kept = "all heads" if heads.count == 1 else f"one of {heads.count} parts of the heads"
        report.notes += (
            f"the model is spread over {captured.ranks.count} processes, each of which keeps the keys and values of "
            f"{kept}: heads and sizes are those of one process",
        )
    if len(set(found.devices)) > 1:
        kept = ", ".join(f"{number} on {device}" for device, number in Counter(found.devices).items())
        report.notes += (f"layers keep keys and values on the device that they are on: {kept}",)
    report.passes += rewritten.passes
    program = Program(
        rewritten=rewritten,
        plan=plan,
        own_plan=own_plan,
        ranks=captured.ranks,
        report=report,
        dtypes=found.dtypes,
        parameter_dtype=parameter.dtype,
        weights=weights_fingerprint(captured.model),
        device=parameter.device,
        site_devices=found.devices,
        placement=placement(captured.model),
        vocabulary=captured.vocabulary,
        longest_context=captured.longest_context,
        returns_tensor=returns_tensor(model),
        cache_name=cache_name(model.forward),
        logits_follow_autocast=follow_autocast(captured.graph),
        embedded=embedded_tokens(model),
        steering=Steering.of(captured.model, captured.reads, captured.written),
    )
    twin = cast(Model, attach(model, program, twin))
    with report.timed("numbering"), untouched(model):
        program.numbering = _numbering(captured, cast(CompiledModel, twin))
        typing = [name for name in parameters_of(model.forward) if name.endswith("token_type_ids")]
        program.zero_token_types = frozenset(name for name in typing if ignores_zeros(captured, name))
    if not takes_padding(rewritten, program.numbering):
        reason = (
            "layers carry states into which it goes" if rewritten.carried else "the model counts its positions itself"
        )
        report.notes += (f"rows cannot be padded: {reason}, so pass rows of equal length",)
    return twin


def check_carries_nothing(captured: Captured) -> None:
    """Raise CompilationError where a graph calls modules of the model, which Inductor does not look into."""
    if captured.stateful:
        one = captured.stateful[0]
        raise CompilationError(
            f"{one.path} ({one.kind}) carries a state from token to token and is called as it is, which Inductor does "
            "not compile: call kvmix_compile.apply without compile=True"
        )


def _compare_sizes(found: Found, plan: Plan, report: Report) -> None:
    """Note what a token takes by the plan and in the model's own cache. Raises BudgetError where that holds less."""
    with report.timed("own cache"):
        own = report.own_cache_bytes = found.own_cache_bytes
    report.token_bytes = plan.token_bytes(found.dtypes)
    if own is not None:
        report.notes += tuple(wider_than(own, original.LONGER_TEXT, plan, found.dtypes, found.captured.name))


def _numbering(captured: Captured, twin: CompiledModel) -> Numbering:
    program = twin.kvmix_program

    def run(numbering: Numbering, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        program.numbering = numbering
        return twin.without_past(input_ids, attention_mask)

    return find_numbering(captured, run)
