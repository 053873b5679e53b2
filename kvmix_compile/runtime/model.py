"""The compiled model: the user's own class, its forward replaced by the rewritten graph and its cache by a
KVMixCache.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvmix_compile.errors import InputError
from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.captured import MODEL
from kvmix_compile.passes.capture.module_tree import module_tree
from kvmix_compile.passes.capture.signature import CACHE_NAMES, cache_name, caching, parameters_of
from kvmix_compile.passes.rewrite.rewrite import rebind
from kvmix_compile.report import Report
from kvmix_compile.runtime import own_forward
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.changes import Changes
from kvmix_compile.runtime.generating import Request
from kvmix_compile.runtime.interface import OWN, with_signature_of
from kvmix_compile.runtime.padding import check_padding, note_padding, put_back, read_padding
from kvmix_compile.runtime.pickling import attributes_of_its_own, give_settings, rebuild, settings_of
from kvmix_compile.runtime.positions import default_positions, given_positions
from kvmix_compile.runtime.program import Program
from kvmix_compile.runtime.refresh import refresh
from kvmix_compile.runtime.saving import save_pretrained
from kvmix_compile.runtime.taken import asks, left_to_own_forward
from kvmix_compile.runtime.unavailable import refusals

T = TypeVar("T")

# What transformers' models take in their **kwargs and answer with more outputs.
_CONFIGURED = ("output_attentions", "output_hidden_states")

# By what name a cache goes to transformers' generate, and comes back from a forward.
_GENERATES_CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)
_RETURNED_CACHE = cache_name(CausalLMOutputWithPast)

# What generate passes along to some models and that follows from the cache.
_BOOKKEEPING = {"cache_position"}

# By what a call tells several texts in one row apart, besides positions.
_SEVERAL_TEXTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class CompiledModel(nn.Module):
    """Mixed into the class of the user's model by `kvmix_compile.apply`.

    Weights are those of the original, not copies.
    """

    kvmix_program: Program
    kvmix_changes: Changes
    kvmix_own_forward: Callable[..., Any] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "a compiled model is made of one that there is: load the original model, and call kvmix_compile.apply on it"
        )

    @property
    def kvmix_plan(self) -> Plan:
        """At which precision each site's keys and values are kept."""
        return self.kvmix_program.plan

    @property
    def kvmix_report(self) -> Report:
        """What was found, what was measured, and where the time went."""
        return self.kvmix_program.report

    def kvmix_refresh(self, *, verify: bool = True) -> None:
        """Capture this model anew, as it is now, and compile it by its own plan, in place: after adapters were loaded
        into it, switched on or off, or anything else in it was changed that its graph does not follow. What fails
        leaves it as it was. Caches that were filled before do not go on.

        Raises what `kvmix_compile.apply` raises.
        """
        refresh(self, type(self).__bases__[1], verify=verify)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A compiled model with weights of its own."""
        self._check_whole("copied")
        self.kvmix_changes.check()
        program = self.kvmix_program
        model = copy.deepcopy(program.rewritten.module.get_submodule(MODEL), memo)
        copied = replace(program, rewritten=rebind(program.rewritten, model), ignored_in_steps={}, takes_rows={})
        if program.inductor is not None:
            copied.compile()
        twin = attach(model, copied)
        give_settings(twin, copy.deepcopy(settings_of(self), memo))
        return twin

    def __copy__(self) -> nn.Module:
        """Another compiled model with the same weights, as copy.copy of any module."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def _check_whole(self, what: str) -> None:
        """Raise InputError where other processes have parts of the weights."""
        if self.kvmix_program.ranks.count > 1:
            raise InputError(
                f"a compiled model whose weights are spread over processes cannot be {what}: keep its plan "
                "(model.kvmix_plan.save(..)), and call kvmix_compile.apply(model, plan=..) where it is needed"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_whole("pickled")
        program = self.kvmix_program
        if program.placement:  # no more than the original, whose hooks are functions within functions
            raise InputError(
                "a compiled model whose weights are on several devices cannot be pickled: keep its plan "
                "(model.kvmix_plan.save(..)) or save_pretrained(..) it, and load it with a device_map again"
            )
        original = program.rewritten.module.get_submodule(MODEL)
        kept = (original, program.plan, program.inductor is not None, settings_of(self))
        return rebuild, kept, attributes_of_its_own(self, original)

    def train(self, mode: bool = True) -> Self:
        """Only `eval()`, which this model is in from the beginning. Raises InputError for training."""
        if mode:
            raise InputError(
                "a compiled model is not trained: train the original, and call kvmix_compile.apply on it again"
            )
        return super().train(mode)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
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

        attention_mask: 1 for tokens and 0 for padding, `[batch, tokens held + tokens]`. Padding is not stored; its
            logits mean nothing.
        position_ids: int64 `[batch, tokens]`; by default what the original counts.
        cache, or past_key_values, as transformers called it before 5.24: a KVMixCache, filled further; by default a new
            one.
        labels: as `input_ids`, -100 ignored; the next-token cross-entropy is then returned as `loss`.
        logits_to_keep: how many of the last positions' logits to compute (0: all), or which, int64 `[positions]`.

        Returns what the original's forward returned: transformers' CausalLMOutputWithPast (a tuple without
        `return_dict`), or the logits alone for a plain module that returned them so and was given no cache.

        Under autocast all is computed and kept in the dtypes that the model has, and where the original would have
        given its logits in autocast's dtype, they are converted to it. A cache may be filled in inference mode, or
        under autocast, and go on without.
        """
        program = self.kvmix_program
        program.follow(self)
        given = one_of({"cache": cache, "past_key_values": past_key_values})
        seen = self._check_cache(given)
        if seen == 0:
            with program.ranks.together():
                self.kvmix_changes.check()
            program.check_placement(self)
            program.check_same_text(input_ids)
        options = self._check_options(kwargs)
        with as_captured():
            position_ids, left = left_to_own_forward(program, self._own_forward, input_ids, position_ids, options, seen)
        if left:
            arguments = {
                "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                "labels": labels, "logits_to_keep": logits_to_keep, **options,
            }  # fmt: skip
            return self._by_own_forward(left, arguments, given, self._caches(use_cache), return_dict)
        input_ids = self._check_ids(input_ids, seen)
        if labels is not None and (
            isinstance(logits_to_keep, Tensor) or logits_to_keep or labels.shape != input_ids.shape
        ):
            raise InputError(
                "labels need the logits of every token: leave logits_to_keep out, one label for each token"
            )
        held = given if given is not None else KVMixCache(self)
        apart = attention_mask is None and given is None and not self._caches(use_cache)
        with as_captured():
            ids = input_ids.to(program.device)
            logits = self._run(ids, attention_mask, position_ids, held, logits_to_keep, apart)
        logits = program.under_autocast(logits).to(input_ids.device)
        loss = None if labels is None else next_token_loss(logits, labels.to(logits.device))
        if program.returns_tensor and given is None and not use_cache and not return_dict and loss is None:
            return logits
        kept = held if self._caches(use_cache) else None
        returned: dict[str, Any] = {"loss": loss, "logits": logits, _RETURNED_CACHE: kept}
        output = CausalLMOutputWithPast(**returned)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, on a compressed cache: a new one, or the KVMixCache given as `cache` or
        `past_key_values`.
        """
        given = one_of({name: kwargs.pop(name, None) for name in CACHE_NAMES})
        request = Request(inputs, kwargs, generation_config, getattr(self, "generation_config", None))
        request.check(self.kvmix_program.format)
        generator: Any = super() if isinstance(self, GenerationMixin) else _PlainGenerator(self)
        if given is None and not request.caches:
            return generator.generate(inputs, generation_config=generation_config, **kwargs)
        cache = request.new_cache(self) if given is None else given
        self._check_cache(cache)
        request.check_prompt(cache)
        if request.caches:
            generation_config, asked = request.with_cache()
            kwargs |= asked
        kwargs[_GENERATES_CACHE] = cache
        with request.recording(cache):
            return generator.generate(inputs, generation_config=generation_config, **kwargs)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVMixCache,
        logits_to_keep: int | Tensor,
        tells_texts_apart: bool = False,
    ) -> Tensor:
        """`tells_texts_apart`: whether the original would take positions that begin anew for another text."""
        program, numbering = self.kvmix_program, self.kvmix_program.numbering
        batch, tokens = input_ids.shape
        padding = read_padding(attention_mask, cache, batch, tokens, input_ids.device)
        if padding.comes or padding.is_enclosed:
            ends_are_kept = isinstance(logits_to_keep, int) and logits_to_keep > 0
            check_padding(padding, program.rewritten, numbering, cache.seen, ends_are_kept)
        if position_ids is None and not cache.counts_on:
            raise InputError(
                "behind images or sound this model does not number the tokens of a text by counting: pass "
                "position_ids, as generate does"
            )
        if position_ids is None:
            position_ids = default_positions(numbering, padding, cache, tokens)
        elif numbering.is_input:
            must_follow = tells_texts_apart or not numbering.has_mask
            position_ids = given_positions(position_ids, padding, tokens, program.longest_context, must_follow)
        else:
            raise InputError("this model takes no position_ids: it counts its positions itself")
        wanted = torch.arange(tokens, device=input_ids.device)
        if isinstance(logits_to_keep, Tensor):
            wanted = wanted[logits_to_keep.to(wanted.device)]
        elif logits_to_keep:
            wanted = wanted[-logits_to_keep:]
        columns, which = padding.columns(wanted)
        inputs = (padding.arrange(input_ids), position_ids, columns)
        logits = cache.run(program.graph, inputs, padding.starts, tokens, logits=len(wanted))
        note_padding(cache, padding)
        return put_back(logits, which)

    def _caches(self, use_cache: bool | None) -> bool:
        """Whether the original would keep a cache, where a call says so or leaves it out."""
        if use_cache is not None:
            return bool(use_cache)
        config = getattr(self, "config", None)
        if isinstance(config, PreTrainedConfig):
            config = config.get_text_config(decoder=True)
        return bool(getattr(config, "use_cache", True))

    def read_ids(self, input_ids: Tensor, cache: KVMixCache, position_ids: Tensor | None = None) -> Tensor:
        """The logits of every token behind what `cache` holds, with no more checks than `forward` leaves to be made."""
        with torch.no_grad():
            return self._run(input_ids, None, position_ids, cache, 0)

    def without_past(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits of every token, with nothing cached, as a trial, and no more checks than `forward` leaves to be
        made.
        """
        with torch.no_grad():
            return self._run(input_ids, attention_mask, None, KVMixCache(self.kvmix_program.format.of_a_trial), 0)

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those that ask for anything. Raises InputError for what no compiled model can do."""
        config = getattr(self, "config", None)
        for name in _CONFIGURED:
            if getattr(config, name, False) and options.get(name) is None:
                raise InputError(
                    f"model.config.{name} asks for what is not available from a compiled model: set it to False, or "
                    "call the original model for it"
                )
        asked = {name: value for name, value in options.items() if asks(value) and name not in _BOOKKEEPING}
        for name in asked:
            if name in _SEVERAL_TEXTS:
                raise InputError(
                    f"{name} puts several texts into a row: pass each as a row of its own, padded on the left"
                )
            if name in _CONFIGURED:
                raise InputError(f"{name} is not available from a compiled model: call the original model for it")
        return asked

    def _by_own_forward(
        self, left: frozenset[str], arguments: dict[str, Any], given: KVMixCache | None, caches: bool,
        return_dict: bool | None,
    ) -> Any:  # fmt: skip
        """What the original's forward returns for a call of which the graph does not take the arguments `left`."""
        program, forward = self.kvmix_program, self._own_forward
        taken = parameters_of(forward)
        unknown = sorted(left.difference(taken))
        if unknown or program.cache_name not in taken:
            name = (unknown or sorted(left))[0]
            raise InputError(f"{name} is not available from a compiled model: call the original model for it")
        keep = arguments["logits_to_keep"]
        arguments = {
            name: value for name, value in arguments.items()
            if value is not None and (name in taken or name not in OWN)
        }  # fmt: skip
        logits = keep.numel() if isinstance(keep, Tensor) else keep
        with as_captured():
            if caches:
                held = KVMixCache(self) if given is None else given
                output = own_forward.read(self, forward, held, arguments, logits)
            else:
                output = forward(**arguments, **caching(forward, False), return_dict=True)
        output["logits"] = program.under_autocast(output["logits"])
        return output.to_tuple() if return_dict is False else output

    @property
    def _own_forward(self) -> Callable[..., Any]:
        """The original's, on this twin."""
        return self.kvmix_own_forward or super().forward

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
        held = cache.format
        kept_as = held.plan, held.dtypes, held.device, held.site_devices
        if kept_as != (program.own_plan, program.dtypes, program.device, program.site_devices):
            raise InputError(
                "this cache was made for a model with another plan, dtype or device; make one with "
                "kvmix_compile.KVMixCache(model)"
            )
        if cache.seen and held.weights != program.weights:
            raise InputError(
                "this cache was filled by a model with other weights: make a new kvmix_compile.KVMixCache(model)"
            )
        return cache.seen

    def _check_ids(self, input_ids: object, seen: int) -> Tensor:
        """The token ids. Raises InputError, before anything is changed, for what are none."""
        program = self.kvmix_program
        if not isinstance(input_ids, Tensor):
            given = "missing" if input_ids is None else f"a {type(input_ids).__name__}, not a tensor of token ids"
            raise InputError(f"input_ids is {given}: pass tokenizer(texts, return_tensors='pt')['input_ids']")
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"input_ids must be int64 [batch, tokens] with at least one row and one token, not {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        # An original on several devices moves them itself, and its logits back.
        if input_ids.device != program.device and not program.placement:
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
        program.check_length(seen + input_ids.shape[1])
        return input_ids


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


def attach(model: nn.Module, program: Program, twin: nn.Module | None = None) -> nn.Module:
    """A twin of `model` that shares its weights and runs `program`. The original is left as it was. `twin`: a module
    tree of it, which becomes the twin; None: a new one.

    Its class is the model's own with `CompiledModel` in front, under the same name, so that whatever asks for the
    class by instance or by name still finds it.
    """
    twin = module_tree(model) if twin is None else twin
    # An original that accelerate has spread over devices has a forward of its own, which moves what it is given.
    twin.__dict__["kvmix_own_forward"] = twin.__dict__.pop("forward", None)
    # Those of the original are in the graph.
    twin.__dict__.update({name: type(held)() for name, held in vars(model).items() if name.startswith("_forward_")})
    original = type(model)
    forward = with_signature_of(model.forward, CompiledModel.forward)
    described = {"__module__": original.__module__, "forward": forward, **refusals(original)}
    if issubclass(original, PreTrainedModel):
        described["save_pretrained"] = save_pretrained
    twin.__class__ = type(original.__name__, (CompiledModel, original), described)
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
        # What wraps a model of transformers, as peft does, has its settings: where a text ends, for one.
        own = getattr(compiled, "generation_config", None)
        self.generation_config = copy.deepcopy(own) if isinstance(own, GenerationConfig) else GenerationConfig()
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
        if not self.compiled.kvmix_program.numbering.is_input:
            position_ids = None
        return self.compiled(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            logits_to_keep=logits_to_keep, cache=cache, past_key_values=past_key_values, return_dict=True,
        )  # fmt: skip


def returns_tensor(model: nn.Module) -> bool:
    """Whether a model's forward returns its logits alone: it is no transformers model, whose outputs have names."""
    return not isinstance(model, GenerationMixin) and "return_dict" not in parameters_of(model.forward)
