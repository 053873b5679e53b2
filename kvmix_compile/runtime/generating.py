"""What a call of `generate` asks for, wherever it says so, and what of it a compiled model cannot do."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kvmix_compile.errors import InputError
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.cache_format import CacheFormat

# How many tokens a cache for assisted generation can take back from the beginning; it grows where more are proposed.
ASSISTED_ROLLBACK = 64

# What asks for assisted generation, beside an assistant model.
_PROPOSING = ("assistant_model", "prompt_lookup_num_tokens")

# Ways of decoding that read hidden states, which a compiled model does not compute: a setting, and what it asks for.
_READING_STATES = {
    "dola_layers": "DoLa",
    "use_mtp": "multi-token prediction",
    "speculation_type": "drafting from hidden states",
}

# Stored in models' own configurations for transformers' sake, which ignores it there.
_IGNORED_CACHE = "hybrid"


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, the configuration passed to it, and the model's own, the first of which counts."""

    inputs: Any
    arguments: Mapping[str, Any]
    configuration: GenerationConfig | None
    own: GenerationConfig | None

    def setting(self, name: str) -> Any:
        """What the call sets `name` to; None where nothing does."""
        if self.arguments.get(name) is not None:
            return self.arguments[name]
        passed = getattr(self.configuration, name, None)
        return passed if passed is not None else getattr(self.own, name, None)

    @property
    def is_assisted(self) -> bool:
        """Whether tokens are proposed and, where they are wrong, taken back."""
        return any(self.setting(name) is not None for name in _PROPOSING)

    @property
    def is_assistant(self) -> bool:
        """Whether this model proposes tokens to another one, which takes them back."""
        return bool(getattr(self.configuration, "is_assistant", False))

    @property
    def caches(self) -> bool:
        """Whether the text is kept in a cache. A model's own configuration may leave it out, and is not heard."""
        asked = self.arguments.get("use_cache", getattr(self.configuration, "use_cache", None))
        return asked is not False

    @property
    def prompt(self) -> Tensor | None:
        """Token ids; None where generation begins with the first token. Raises InputError for texts."""
        ids = self.inputs if self.inputs is not None else self.arguments.get("input_ids")
        if ids is not None and not isinstance(ids, Tensor):
            raise InputError(
                f"the prompt is a {type(ids).__name__}, not a tensor of token ids: pass "
                "**tokenizer(texts, return_tensors='pt')"
            )
        return ids

    def check(self, held: CacheFormat) -> None:
        """Raise InputError for a way of decoding that a compiled model has not. `held`: what its caches hold."""
        self._check_cache_implementation()
        if held.carried and (self.is_assisted or self.is_assistant):
            raise InputError(
                f"assisted generation takes tokens back, and {held.carrying_layers} carries a state from token to "
                "token, which cannot be taken back: generate without assistant_model and prompt_lookup_num_tokens"
            )
        if self.setting("assistant_early_exit") is not None:
            raise InputError(
                "assistant_early_exit drafts with the first layers alone, and the graph of this model runs them all: "
                "leave it out, or pass prompt_lookup_num_tokens or an assistant_model instead"
            )
        for name, meaning in _READING_STATES.items():
            if self.setting(name):
                raise InputError(
                    f"{name}={self.setting(name)!r} asks for {meaning}, which reads hidden states: a compiled model "
                    "computes logits alone, so leave it out, or generate with the original model"
                )
        contrastive = (self.setting("penalty_alpha") or 0) > 0 and self.setting("top_k") not in (0, 1)
        if contrastive and self.setting("do_sample") is not True and (self.setting("num_beams") or 1) == 1:
            raise InputError(
                "penalty_alpha asks for contrastive search, which reads hidden states: a compiled model computes "
                "logits alone, so leave it out, or generate with the original model"
            )

    def _check_cache_implementation(self) -> None:
        own = getattr(self.own, "cache_implementation", None)
        passed = getattr(self.configuration, "cache_implementation", None)
        # The configuration of an assistant is made by transformers, which before 5.24 chose a cache for it.
        if self.arguments.get("cache_implementation") or (passed and not self.is_assistant):
            raise InputError(
                "cache_implementation chooses one of transformers' own caches; leave it out, the cache of this "
                "model is a KVMixCache"
            )
        if own is not None and own != _IGNORED_CACHE:
            raise InputError(
                f"model.generation_config.cache_implementation is {own!r}, one of transformers' own caches, and the "
                "cache of this model is a KVMixCache: set it to None"
            )

    def check_prompt(self, cache: KVMixCache) -> None:
        """Raise InputError where the prompt does not go on from what the cache holds."""
        if self.is_assisted and cache.seen:
            raise InputError(
                f"assisted decoding reads the whole prompt, and the cache that was given holds {cache.seen} tokens "
                "already: pass none, or an empty kvmix_compile.KVMixCache(model)"
            )
        ids = self.prompt
        mask = self.arguments.get("attention_mask")
        if ids is None or ids.dim() != 2:
            return
        is_whole = mask is None or mask.shape == ids.shape  # and not only what is new, with a mask of everything
        if cache.seen and is_whole and ids.shape[1] <= cache.seen:
            raise InputError(
                f"the prompt has {ids.shape[1]} tokens and the cache that was given holds {cache.seen}: pass the whole "
                "text, that of the cache and at least one token more, or a new kvmix_compile.KVMixCache(model)"
            )

    def with_cache(self) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """The configuration, and arguments beside those given: some models do not cache unless they are asked to."""
        ids, asked = self.prompt, {}
        if self.is_assistant and ids is not None and self.arguments.get("attention_mask") is None:
            # One row without padding, which is not to be guessed from what was written.
            asked["attention_mask"] = torch.ones_like(ids)
        if self.configuration is None:
            return None, {"use_cache": True, **asked}
        configuration = copy.copy(self.configuration)
        configuration.use_cache, configuration.cache_implementation = True, None
        return configuration, asked

    def new_cache(self, model: Any) -> KVMixCache:
        """An empty cache for this call."""
        cache = KVMixCache(model, rollback=ASSISTED_ROLLBACK if self.is_assisted or self.is_assistant else 0)
        cache.is_read_again = self.is_assistant
        return cache

    @contextmanager
    def recording(self, cache: KVMixCache) -> Iterator[None]:
        """Around generation: what is proposed can be taken back. An assistant's cache is cropped after its call."""
        recorded = cache.records_past
        if self.is_assisted or self.is_assistant:
            cache.activate_past_recording()
        try:
            yield
        finally:
            cache.records_past = recorded or self.is_assistant
