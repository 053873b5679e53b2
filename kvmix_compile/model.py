"""The compiled model: the user's own class, its forward replaced by the rewritten graph and its cache by a
KVMixCache.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvmix_compile.cache import KVMixCache
from kvmix_compile.changes import Changes, Steering
from kvmix_compile.errors import InputError
from kvmix_compile.inductor import InductorGraph
from kvmix_compile.module_tree import module_tree
from kvmix_compile.padding import read_padding
from kvmix_compile.passes.capture import MODEL
from kvmix_compile.passes.device import move_constants
from kvmix_compile.passes.plan import Plan
from kvmix_compile.passes.rewrite import Rewritten, rebind
from kvmix_compile.passes.signature import CACHE_NAMES, cache_name, parameters_of
from kvmix_compile.report import Report

T = TypeVar("T")

# Assisted generation takes back at most what the assistant proposed in one step, 20 tokens unless asked for more.
ASSISTED_ROLLBACK = 64

# What transformers' models take in their **kwargs and answer with more outputs.
_UNANSWERED = {"inputs_embeds", "output_attentions", "output_hidden_states"}

# By what name a cache goes to transformers' generate, and comes back from a forward.
_GENERATES_CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)
_RETURNED_CACHE = cache_name(CausalLMOutputWithPast)

# What a twin has its own of, so that what is set there is not set for the original.
_OWN_SETTINGS = {"config", "generation_config"}

# What generate passes along to some models and that follows from the cache.
_BOOKKEEPING = {"cache_position"}


@dataclass
class Program:
    """What a compiled model runs. `dtypes`: of each site's keys and values as the graph computes them. `weights`: the
    fingerprint of those that it was compiled with. `cache_name`: what the original's forward calls its cache.
    `steering`: what of the original the graph does not follow.
    `inductor`: the rewritten graph compiled by Inductor, where that was asked for.
    """

    rewritten: Rewritten
    plan: Plan
    report: Report
    dtypes: tuple[torch.dtype, ...]
    parameter_dtype: torch.dtype
    weights: str
    device: torch.device
    vocabulary: int
    longest_context: int | None
    returns_tensor: bool
    cache_name: str
    steering: Steering
    inductor: InductorGraph | None = None

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
        if parameter.device != self.device:
            move_constants(self.rewritten.module, parameter.device)
            self.device = parameter.device
            if self.inductor is not None:
                self.compile()

    def compile(self) -> InductorGraph:
        """Have Inductor compile the rewritten graph, when it is first called."""
        self.inductor = InductorGraph(self.rewritten.module, self.plan.layouts(), self.dtypes, self.device)
        return self.inductor

    @property
    def graph(self) -> Callable[..., Tensor]:
        """What is called with the arguments of `rewritten.module`."""
        return self.inductor or self.rewritten.module


class CompiledModel(nn.Module):
    """Mixed into the class of the user's model by `kvmix_compile.apply`.

    Weights are those of the original, not copies.
    """

    kvmix_program: Program
    kvmix_changes: Changes

    @property
    def kvmix_plan(self) -> Plan:
        """At which precision each site's keys and values are kept."""
        return self.kvmix_program.plan

    @property
    def kvmix_report(self) -> Report:
        """What was found, what was measured, and where the time went."""
        return self.kvmix_program.report

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A compiled model with weights of its own."""
        self.kvmix_changes.check()
        program = self.kvmix_program
        model = copy.deepcopy(program.rewritten.module.get_submodule(MODEL), memo)
        copied = replace(program, rewritten=rebind(program.rewritten, model))
        if program.inductor is not None:
            copied.compile()
        twin = attach(model, copied)
        for name in _OWN_SETTINGS & vars(self).keys() & vars(twin).keys():
            # In place, as submodules hold the same one.
            vars(vars(twin)[name]).update(copy.deepcopy(vars(vars(self)[name]), memo))
        return twin

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVMixCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: KVMixCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of `input_ids`, int64 `[batch, tokens]`, after what `cache` holds.

        attention_mask: 1 for tokens and 0 for padding, which must lead its row; `[batch, tokens held + tokens]` or
            `[batch, tokens]`.
        position_ids: int64 `[batch, tokens]`; by default each row counts on from the tokens that it holds.
        cache, or past_key_values, as transformers called it before 5.24: a KVMixCache, filled further; by default a new
            one.
        labels: as `input_ids`, -100 ignored; the next-token cross-entropy is then returned as `loss`.
        logits_to_keep: how many of the last positions' logits to compute (0: all), or which, int64 `[positions]`.

        Returns what the original's forward returned: transformers' CausalLMOutputWithPast (a tuple without
        `return_dict`), or the logits alone for a plain module that returned them so and was given no cache.
        """
        program = self.kvmix_program
        program.follow(self)
        given = one_of({"cache": cache, "past_key_values": past_key_values})
        self._check(input_ids, given, kwargs)
        if labels is not None and (
            isinstance(logits_to_keep, Tensor) or logits_to_keep or labels.shape != input_ids.shape
        ):
            raise InputError(
                "labels need the logits of every token: leave logits_to_keep out, one label for each token"
            )
        held = given if given is not None else KVMixCache(self)
        logits = self._run(input_ids, attention_mask, position_ids, held, logits_to_keep)
        loss = None if labels is None else next_token_loss(logits, labels.to(logits.device))
        if program.returns_tensor and given is None and not use_cache and not return_dict and loss is None:
            return logits
        if use_cache is None:
            use_cache = getattr(getattr(self, "config", None), "use_cache", True)
        returned: dict[str, Any] = {"loss": loss, "logits": logits, _RETURNED_CACHE: held if use_cache else None}
        output = CausalLMOutputWithPast(**returned)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, on a compressed cache: a new one, or the KVMixCache given as `cache` or
        `past_key_values`.
        """
        if kwargs.get("cache_implementation") or getattr(generation_config, "cache_implementation", None):
            raise InputError(
                "cache_implementation chooses one of transformers' own caches; leave it out, the cache of this "
                "model is a KVMixCache"
            )
        own_config = getattr(self, "generation_config", None)
        if any(
            getattr(config, "assistant_early_exit", None) is not None
            for config in (SimpleNamespace(**kwargs), generation_config, own_config)
        ):
            raise InputError(
                "assistant_early_exit drafts with the first layers alone, and the graph of this model runs them all: "
                "leave it out, or pass prompt_lookup_num_tokens or an assistant_model instead"
            )
        caching = kwargs.get("use_cache", getattr(generation_config, "use_cache", None))
        if caching is not False:
            # Some models do not cache unless they are asked to.
            kwargs["use_cache"] = True
        given = one_of({name: kwargs.pop(name, None) for name in CACHE_NAMES})
        if caching is not False and given is None:
            assisted = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None
            given = KVMixCache(self, rollback=ASSISTED_ROLLBACK if assisted else 0)
        if given is not None:
            kwargs[_GENERATES_CACHE] = given
        generator = super() if isinstance(self, GenerationMixin) else _PlainGenerator(self)
        return generator.generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[union-attr]

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVMixCache,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        program = self.kvmix_program
        batch, tokens = input_ids.shape
        padding = read_padding(attention_mask, cache, batch, tokens, input_ids.device)
        starts = padding.starts
        if program.rewritten.equal_rows and attention_mask is not None and bool((starts > 0).any()):
            raise InputError(
                "this model counts its positions itself, from the beginning of the batch, so its rows cannot be "
                "padded: pass rows of equal length, one at a time if need be"
            )
        cache.begin(batch, tokens, input_ids.device)
        every = torch.arange(tokens, device=input_ids.device)
        if position_ids is None:
            position_ids = (cache.lengths - starts)[:, None] + every
        position_ids = position_ids.expand(batch, tokens).clamp(min=0)
        if isinstance(logits_to_keep, int):
            logits_to_keep = every[-logits_to_keep:] if logits_to_keep else every
        logits = program.graph(input_ids, position_ids, logits_to_keep, cache.lengths, starts, *cache.tensors())
        cache.advance(tokens, starts)
        cache.every_row_has_tokens = padding.every_row_has_tokens
        return logits

    def _check(self, input_ids: Tensor, cache: object, options: dict[str, Any]) -> None:
        """Raise InputError, before anything is changed, for a call that cannot be answered."""
        self._check_options(options)
        seen = self._check_cache(cache)
        if seen == 0:
            self.kvmix_changes.check()
        self._check_ids(input_ids, seen)

    def _check_options(self, options: dict[str, Any]) -> None:
        asked = {name for name, value in options.items() if value is not None and value is not False} - _BOOKKEEPING
        if not asked:  # as in every step of decoding, which need not look at signatures
            return
        # What the original takes by name means something to it; what falls into its **kwargs does not.
        for name in asked & (_UNANSWERED | set(parameters_of(super().forward))):
            raise InputError(f"{name} is not available from a compiled model: call the original model for it")

    def _check_cache(self, cache: object) -> int:
        """The number of positions that the cache has seen."""
        if cache is None:
            return 0
        program = self.kvmix_program
        if not isinstance(cache, KVMixCache):
            raise InputError(
                f"{program.cache_name} is a {type(cache).__name__}; this model keeps its keys and values in a "
                "kvmix_compile.KVMixCache(model)"
            )
        if (cache.plan, cache.dtypes, cache.device) != (program.plan, program.dtypes, program.device):
            raise InputError(
                "this cache was made for a model with another plan, dtype or device; make one with "
                "kvmix_compile.KVMixCache(model)"
            )
        return cache.seen

    def _check_ids(self, input_ids: Tensor, seen: int) -> None:
        program = self.kvmix_program
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"input_ids must be int64 [batch, tokens] with at least one row and one token, not {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        if input_ids.device != program.device:
            raise InputError(
                f"input_ids are on {input_ids.device} and the model is on {program.device}: move them with "
                "input_ids.to(model.device)"
            )
        # On a GPU this would wait for the device at every step; there the embedding itself complains.
        if (
            input_ids.device.type == "cpu"
            and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < program.vocabulary
        ):
            raise InputError(f"input_ids must be from 0 to {program.vocabulary - 1}, the model's vocabulary")
        total = seen + input_ids.shape[1]
        if program.longest_context is not None and total > program.longest_context:
            raise InputError(
                f"{total} tokens are more than the {program.longest_context} positions that the model has: shorten the "
                "prompt, or continue with a new cache"
            )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each next token.

    `logits` `[batch, tokens, vocabulary]`, `labels` int64 `[batch, tokens]` (-100: ignored).
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def one_of(given: Mapping[str, T | None]) -> T | None:
    """The argument that was given, by whichever name it goes. Raises InputError where two were."""
    there = {name: value for name, value in given.items() if value is not None}
    if len(there) > 1:
        raise InputError(f"{' and '.join(there)} are two names of one argument: pass one of them")
    return next(iter(there.values()), None)


def attach(model: nn.Module, program: Program) -> nn.Module:
    """A twin of `model` that shares its weights and runs `program`. The original is left as it was.

    Its class is the model's own with `CompiledModel` in front, under the same name, so that whatever asks for the
    class by instance or by name still finds it.
    """
    twin = module_tree(model)
    twin.__dict__.pop("forward", None)
    # Those of the original are in the graph.
    twin.__dict__.update({name: type(held)() for name, held in vars(model).items() if name.startswith("_forward_")})
    original = type(model)
    twin.__class__ = type(original.__name__, (CompiledModel, original), {"__module__": original.__module__})
    twin.__dict__["kvmix_program"] = program
    twin.__dict__["kvmix_changes"] = Changes(program.steering, model, twin)
    return twin


class _PlainGenerator(PreTrainedModel, GenerationMixin):
    """Lends transformers' `generate` to a compiled model whose own class is not transformers'."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, compiled: CompiledModel) -> None:
        program = compiled.kvmix_program
        settings = {"vocab_size": program.vocabulary, "is_decoder": True}
        super().__init__(PreTrainedConfig.from_dict(settings))
        self.generation_config = GenerationConfig()
        self.compiled = compiled

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = True,
        cache: KVMixCache | None = None,
        past_key_values: KVMixCache | None = None,
    ) -> Any:
        return self.compiled(
            input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep,
            cache=cache, past_key_values=past_key_values, return_dict=True,
        )  # fmt: skip


def returns_tensor(model: nn.Module) -> bool:
    """Whether a model's forward returns its logits alone: it is no transformers model, whose outputs have names."""
    return not isinstance(model, GenerationMixin) and "return_dict" not in parameters_of(model.forward)
