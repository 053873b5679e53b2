"""Program: what a compiled model runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvmix_compile.errors import InputError
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.graph.devices import move_constants
from kvmix_compile.passes.rewrite.rewrite import Rewritten
from kvmix_compile.report import Report
from kvmix_compile.runtime.cache_format import CacheFormat
from kvmix_compile.runtime.changes import Steering
from kvmix_compile.runtime.inductor import InductorGraph
from kvmix_compile.runtime.numbering import Numbering


@dataclass
class Program:
    """What a compiled model runs. `plan`: of the whole model. `own_plan`: what of it this process stores, one of the
    `ranks` that the weights are spread over. `dtypes`: of each site's keys and values as the graph computes them.
    `device`: where it takes token ids. `site_devices`: where each site's keys and values are made, and kept.
    `placement`: as of the function of that name. `weights`: the fingerprint of those that it was compiled with.
    `cache_name`: what the original's forward calls its
    cache. `logits_follow_autocast`: as of passes.capture.logits. `embedded`: as `embedded_tokens` counts them.
    `numbering`: what positions that forward counts. `zero_token_types`: the arguments that type tokens and of which
    zeros, given to it, change nothing.
    `steering`: what of the original the graph does not follow. `inductor`: the rewritten graph compiled by Inductor,
    where that was asked for. Seen where it is first needed: `places`, where what that forward caches goes
    (own_forward.py); `ignored_in_steps` and `takes_rows`, what it makes of some arguments (taken.py).
    """

    rewritten: Rewritten
    plan: Plan
    own_plan: Plan
    report: Report
    dtypes: tuple[torch.dtype, ...]
    parameter_dtype: torch.dtype
    weights: str
    device: torch.device
    site_devices: tuple[torch.device, ...]
    vocabulary: int
    longest_context: int | None
    returns_tensor: bool
    cache_name: str
    logits_follow_autocast: bool
    steering: Steering
    ranks: Ranks = Ranks()
    placement: tuple[torch.device, ...] = ()
    embedded: int | None = None
    numbering: Numbering = Numbering()
    zero_token_types: frozenset[str] = frozenset()
    inductor: InductorGraph | None = None
    places: Mapping[int, tuple[Any, ...]] | None = None
    ignored_in_steps: dict[str, Any] = field(default_factory=dict)
    takes_rows: dict[int, bool] = field(default_factory=dict)

    def under_autocast(self, logits: Tensor) -> Tensor:
        """Logits in the dtype that the original gives them in, with autocast on or off."""
        kind = logits.device.type
        if not self.logits_follow_autocast or not torch.is_autocast_enabled(kind):
            return logits
        return logits.to(torch.get_autocast_dtype(kind))

    def follow(self, model: nn.Module) -> None:
        """Follow the model to the device that it was moved to; refuse another dtype, which the graph was not
        captured for.
        """
        parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        if parameter.dtype != self.parameter_dtype:
            raise InputError(
                f"the model was converted from {self.parameter_dtype} to {parameter.dtype} after it was compiled: "
                "convert the original model and call kvmix_compile.apply again"
            )
        if self.embedded is not None and embedded_tokens(model) != self.embedded:
            raise InputError(
                f"the model was given {embedded_tokens(model)} token embeddings (resize_token_embeddings), and was "
                f"compiled with {self.embedded}: call kvmix_compile.apply on the original model again"
            )
        if parameter.device != self.device:
            self.check_placement(model)
            move_constants(self.rewritten.module, parameter.device)
            self.device, self.site_devices = parameter.device, (parameter.device,) * len(self.site_devices)
            if self.inductor is not None:
                self.compile()

    def check_placement(self, model: nn.Module) -> None:
        """Raise InputError where weights that are, or were, on several devices have been moved."""
        if placement(model) != self.placement:
            raise InputError(
                "weights of the model were moved from one device to another after it was compiled, and a graph over "
                "several devices does not follow that: move them back, or call kvmix_compile.apply again"
            )

    def random_ids(self, tokens: int) -> Tensor:
        """Token ids to try the model on, int64 `[1, tokens]`, the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (1, tokens), generator=generator).to(self.device)

    def check_length(self, tokens: int) -> None:
        """Raise InputError for a text of more tokens than the model has positions."""
        if self.longest_context is not None and tokens > self.longest_context:
            raise InputError(
                f"{tokens} tokens are more than the {self.longest_context} positions that the model has: shorten the "
                "prompt, or continue with a new cache"
            )

    def check_same_text(self, input_ids: Tensor | None) -> None:
        """Raise InputError, in all processes that the weights are spread over, where their texts are not the same."""
        if self.ranks.count == 1 or not isinstance(input_ids, Tensor):
            return
        given = self.ranks.told((tuple(input_ids.shape), hash(tuple(input_ids.flatten().tolist()))))
        if any(other != given[0] for other in given):
            raise InputError(
                f"the {self.ranks.count} processes that the model's weights are spread over were given different token "
                "ids: pass the same ones in all, and seed them alike where they sample"
            )

    def compile(self) -> InductorGraph:
        """Have Inductor compile the rewritten graph, when it is first called."""
        self.inductor = InductorGraph(
            self.rewritten.module, self.own_plan.layouts(), self.format.state_dtypes, self.device, self.ranks
        )
        return self.inductor

    @property
    def format(self) -> CacheFormat:
        """What its caches are made for."""
        # Inductor compiles for so many sinks. So does Triton, and for so many recent tokens: on a GPU each of the sizes
        # that a state grows through would compile its kernels anew, seconds each, for room that the text soon fills.
        begins_whole = self.inductor is not None or self.device.type == "cuda"
        return CacheFormat(
            self.own_plan, self.dtypes, self.device, self.site_devices, self.weights, self.rewritten.carried,
            begins_whole, self.ranks,
        )  # fmt: skip

    @property
    def graph(self) -> Callable[..., Any]:
        """What is called with the arguments of `rewritten.module`, and gives what that gives."""
        return self.inductor or self.rewritten.module


def placement(model: nn.Module) -> tuple[torch.device, ...]:
    """On which device each weight of a model lies that is spread over several; empty for one that is not."""
    devices = tuple(parameter.device for parameter in model.parameters())
    return devices if len(set(devices)) > 1 else ()


def embedded_tokens(model: nn.Module) -> int | None:
    """For how many tokens a transformers model has embeddings; None where that cannot be told."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
