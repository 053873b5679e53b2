"""Plan: what `torch.compile(.., backend="kvmix", options=..)` is told, and the plan that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import tracing

from kvmix_compile.backend.calls import compiled_call
from kvmix_compile.backend.equality import same
from kvmix_compile.compiler import analyze
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError, PlanError
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.capture.signature import parameters_of
from kvmix_compile.passes.match.sites import AttentionSite, traced_model

BROKEN_GRAPH = (
    "Dynamo broke the model's graph and hands over a part of it: see TORCH_LOGS=graph_breaks; for transformers' models "
    "pass attention_mask and position_ids, as generate does"
)


@dataclass(frozen=True)
class Options(Config):
    """The options of the backend: those of `kvmix_compile.apply`, and `backend`, what compiles the rest of the graph,
    any backend of torch.compile.
    """

    backend: Any = "inductor"

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Options":
        """Raises InputError for an option that there is not, and what `kvmix_compile.apply` raises for others."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"backend 'kvmix' has no option {unknown[0]!r}; it takes {', '.join(known)}")
        if given.get("strict"):
            raise InputError(
                "backend 'kvmix' takes no strict: it sees graphs, and not the model whose structure that is about"
            )
        return cls(**given).checked()


def choose_plan(options: Options, sites: Sequence[AttentionSite]) -> Plan:
    """The plan for a graph's sites, which may be some of the model's.

    Raises PlanError where the plan was made for another model, what kvmix_compile.analyze raises, and InputError where
    there is only a budget and no model to measure.
    """
    plan = options.given_plan or _planned(options, sites[0].output)
    by_layer = {site.layer: planned for site in sites if (planned := _planned_for(site.layer, plan)) is not None}
    layers = [site.layer for site in sites]
    if not by_layer:
        raise PlanError(f"the plan has no layer {layers[0]!r}: either it was made for another model, or {BROKEN_GRAPH}")
    if not all(site.layer in by_layer and _holds(by_layer[site.layer], site) for site in sites):
        plan.check_attention(layers, [site.shape for site in sites])
    chosen = replace(plan, sites=tuple(by_layer[layer] for layer in layers))
    # What a layer that keeps its whole StaticCache attends to shows only when the graph runs.
    chosen.check_windows([site.window or by_layer[site.layer].window for site in sites])
    return chosen


def _holds(planned: SitePlan, site: AttentionSite) -> bool:
    """Whether the plan is for keys and values of these heads and dimensions, be the window what it may."""
    return replace(planned.shape, window=0) == replace(site.shape, window=0)


def _planned_for(layer: str, plan: Plan) -> SitePlan | None:
    """The plan for a layer. Where Dynamo broke the model's graph, paths begin at a part of the model: such a path may
    be the end of one planned layer's.
    """
    ends = [site for site in plan.sites if f".{site.layer}".endswith(f".{layer}")]
    exact = [site for site in ends if site.layer == layer]
    found = exact or ends
    return found[0] if len(found) == 1 else None


# A model is measured once, however many graphs it is compiled to.
_plans: WeakKeyDictionary[nn.Module, list[tuple[Options, Plan]]] = WeakKeyDictionary()


def _planned(options: Options, node: fx.Node) -> Plan:
    model = _model_behind(node)
    for known, plan in _plans.setdefault(model, []):
        if all(same(getattr(known, field.name), getattr(options, field.name)) for field in fields(Options)):
            return plan
    # The model is measured as it is, outside the compilation that is going on.
    with torch.compiler.set_stance("force_eager"), tracing(None), torch.no_grad():
        importance = analyze(
            model,
            tokenizer=options.tokenizer,
            calibration=options.calibration,
            recent_window=options.recent_window,
            sinks=options.sinks,
            recent=options.recent,
        )
    plan = options.allocate(importance)
    _plans[model].append((options, plan))
    return plan


def _model_behind(node: fx.Node) -> nn.Module:
    """The model that Dynamo is compiling: what was compiled, even where this graph is a part of it, or what that
    calls.
    """
    call = compiled_call()
    traced = traced_model(node, InstructionTranslator.current_tx().output.local_scope)
    for model in (None if call is None else call.called, traced):
        if isinstance(model, nn.Module) and "input_ids" in parameters_of(model.forward):
            return model
    raise InputError(
        "the model that this graph is of cannot be reached, so its layers cannot be measured: compile the model "
        "itself, or pass options={'plan': kvmix_compile.analyze(model).allocate(budget=..)}; if it is the model "
        f"itself, {BROKEN_GRAPH}"
    )
