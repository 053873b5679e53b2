"""Stateful: which modules of a model carry a state from token to token besides keys and values, found by running the
model with its own cache.

Keys and values grow with every token. What a cache holds that does not is a state: of a recurrence, or the last tokens
that a convolution sees. The innermost module that writes to it is the one that carries it, whatever it is called.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvmix_compile.kernels.ambient import as_captured
from kvmix_compile.passes.capture.held import Mould, Way, held_at, item, tensors_held, values_held, with_held
from kvmix_compile.passes.capture.signature import cache_in, cache_name, parameters_of
from kvmix_compile.passes.capture.single_nodes import Sizes, StatefulModule
from kvmix_compile.passes.capture.state_trials import goes_on_by
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.untouched.untouched import untouched

# Rows and tokens of the two texts that a model is run on. All differ, so that each size is known for what it is.
SIZES = ((2, 11), (3, 14))
# And of two on which a cache shows what grows with tokens: no longer than the shortest of windows.
SHORT = ((2, 3), (2, 5))
PADDING = 3
# No vocabulary is smaller.
FEWEST_IDS = 23

OTHER_WAY = (
    "torch.compile(model, backend='kvmix') with a StaticCache leaves such layers as they are, and may do for this model"
)


@dataclass
class _Call:
    """A call of a module that was given the cache: its arguments, what it returned, the states that it wrote and those
    that modules within it did, and which keys and values it held."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    cache: Way
    before: Mapping[Way, Any]
    output: Any = None
    wrote: set[Way] = field(default_factory=set)
    within: set[Way] = field(default_factory=set)


@dataclass
class _Run:
    """What happened while a model ran on one text: `calls` by the path of their module, and the cache before it."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)
    fresh: Any = None


@torch.no_grad()
@as_captured()
def find_stateful(model: nn.Module) -> tuple[StatefulModule, ...]:
    """The modules of `model` that carry a state, each shown to go on from it as if it had read the text in one go.

    Raises CaptureError where a module carries a state in another way.
    """
    if cache_name(model.forward) not in parameters_of(model.forward):
        return ()
    with untouched(model):
        caches = [_cache_after(model, *sizes) for sizes in SHORT]
        states = _states(*caches)
        if not states:
            return ()
        watched = partial(_watched, model, type(caches[0]), states)
        first, second = (watched(*sizes) for sizes in SIZES)
        padded = watched(*SIZES[0], PADDING) if _takes_mask(model) else None
        found = [
            _stateful(model, path, call, _same_call(path, second), first.fresh, padded)
            for path, calls in first.calls.items()
            for call in _only(path, [call for call in calls if call.wrote - call.within])
        ]
        return tuple(found)


def _cache_after(model: nn.Module, rows: int, tokens: int, padding: int = 0) -> Any:
    """The model's own cache after a text, of which the first row begins with padding; None where it does not run so."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # Ids that differ: states of equal tokens would not show whether they are carried on.
    ids = (torch.arange(rows * tokens, device=device).reshape(rows, tokens) * 7 + 3) % FEWEST_IDS
    options: dict[str, Any] = {"use_cache": True}
    if padding:
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :padding] = 0
    try:
        return cache_in(model(ids, **options))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):  # what the model cannot do is seen later
        return None


def _takes_mask(model: nn.Module) -> bool:
    return "attention_mask" in parameters_of(model.forward)


def _states(cache: Any, longer: Any) -> set[Way]:
    """What the caches of two texts of as many rows hold of rows and not of tokens."""
    others = tensors_held(longer)
    return {
        way
        for way, tensor in tensors_held(cache).items()
        if tensor.dim() > 1 and tensor.shape[0] == SHORT[0][0] and way in others and others[way].shape == tensor.shape
    }


def _watched(model: nn.Module, kind: type, states: set[Way], rows: int, tokens: int, padding: int = 0) -> _Run:
    run = _Run()
    with _watching(model, kind, states, run):
        _cache_after(model, rows, tokens, padding)
    return run


@contextmanager
def _watching(model: nn.Module, kind: type, states: set[Way], run: _Run) -> Iterator[None]:
    """Around a run of the model: each call of a module that is given a cache of this kind, in which these are states,
    goes into `run`.
    """
    pending: list[_Call] = []

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        way = _way_to(kind, arguments, named)
        if way is None:
            return
        cache = held_at((arguments, named), way)
        if run.fresh is None:
            run.fresh = deepcopy(cache)
        call = with_held((arguments, named), {way: None})
        given = {at: tensor.clone() for at, tensor in tensors_held(call).items()}
        pending.append(_Call(with_held(call, given), way, _seen(cache)))

    def after(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        way = _way_to(kind, arguments, named)
        if way is None:
            return
        call, cache = pending.pop(), held_at((arguments, named), way)
        now = _seen(cache)
        call.output = output
        call.wrote = {way for way, seen in now.items() if call.before.get(way) != seen and way in states}
        if pending:
            pending[-1].within |= call.wrote | call.within
        run.calls.setdefault(paths[module], []).append(call)

    paths = {module: path for path, module in model.named_modules()}
    handles = []
    for module in paths:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _way_to(kind: type, arguments: tuple[Any, ...], named: dict[str, Any]) -> Way | None:
    """Where the cache is among the arguments of a call."""
    for index, value in enumerate(arguments):
        if type(value) is kind:
            return item(0, index)
    return next((item(1, name) for name, value in named.items() if type(value) is kind), None)


def _seen(cache: Any) -> dict[Way, tuple[int, int]]:
    """What changes with each tensor of a cache."""
    return {way: (id(tensor), tensor._version) for way, tensor in tensors_held(cache).items()}


def _only(path: str, calls: list[_Call]) -> list[_Call]:
    if len(calls) > 1:
        raise _error(path, f"is called {len(calls)} times for each token, and keeps a state each time")
    return calls


def _same_call(path: str, run: _Run) -> _Call:
    calls = [call for call in run.calls.get(path, []) if call.wrote - call.within]
    if len(calls) != 1:
        raise _error(path, "keeps a state for some texts and not for others")
    return calls[0]


def _stateful(
    model: nn.Module, path: str, call: _Call, other: _Call, fresh: Any, padded: _Run | None
) -> StatefulModule:
    module = model.get_submodule(path)
    kind = type(module).__name__
    given, others = _tensors_given(call), _tensors_given(other)
    if given.keys() != others.keys() or not given:
        raise _error(path, "is given other tensors for other texts")
    output, results = call.output, tensors_held(call.output)
    if results.keys() != tensors_held(other.output).keys():
        raise _error(path, "returns other tensors for other texts")
    sizes = [_sizes(path, tensor, others[way]) for way, tensor in given.items()]
    empty = dict.fromkeys(given)
    mask, mask_dtype = _mask_in(path, given.keys(), padded)
    held = [{**vars(one)} for one in module.modules()]
    cache, ways = _filled(module, call, fresh)
    if _simple_values(cache) != _simple_values(_filled(module, other, fresh)[0]):
        raise _error(path, "keeps what is no tensor beside it, otherwise for other texts")
    if any(_differ(before, vars(one)) for before, one in zip(held, module.modules(), strict=True)):
        raise _error(path, "keeps more in attributes of its own")
    states = tuple(_state_sizes(path, held_at(cache, way)) for way in ways)
    found = StatefulModule(
        path=path,
        kind=kind,
        call=with_held(call.arguments, {**empty, call.cache: None}),
        ways=tuple(given),
        given=tuple(sizes),
        cache=call.cache,
        mask=mask,
        mask_dtype=mask_dtype,
        output=with_held(output, dict.fromkeys(results)),
        result_ways=tuple(results),
        results=tuple(
            _sizes(path, tensor, held)
            for tensor, held in zip(results.values(), tensors_held(other.output).values(), strict=True)
        ),
        fresh=Mould.of(fresh, ()),
        filled=Mould.of(cache, ways),
        states=states,
    )
    by = goes_on_by(module, found, list(given.values()))
    if by is None:
        raise _error(path, "does not go on from its state as if it had read the text in one go")
    return replace(found, stepwise=by == "tokens")


def _filled(module: nn.Module, call: _Call, fresh: Any) -> tuple[Any, tuple[Way, ...]]:
    """The cache after this call alone, and the tensors that it wrote there."""
    cache = deepcopy(fresh)
    before = _seen(cache)
    arguments, named = with_held(call.arguments, {call.cache: cache})
    module.forward(*arguments, **named)
    return cache, tuple(way for way, seen in _seen(cache).items() if before.get(way) != seen)


def _differ(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() != after.keys() or any(after[name] is not value for name, value in before.items())


def _simple_values(cache: Any) -> dict[Way, Any]:
    return {way: value for way, value in values_held(cache).items() if not isinstance(value, Tensor)}


def _tensors_given(call: _Call) -> dict[Way, Tensor]:
    return tensors_held(with_held(call.arguments, {call.cache: None}))


def _mask_in(path: str, given: Any, padded: _Run | None) -> tuple[Way | None, torch.dtype | None]:
    """Where a module is given the mask of padding, where there is some."""
    if padded is None or len(calls := padded.calls.get(path, [])) != 1:
        return None, None
    rows, tokens = SIZES[0]
    expected = torch.ones(rows, tokens, dtype=torch.bool)
    expected[0, :PADDING] = False
    for way, tensor in _tensors_given(calls[0]).items():
        if way not in given and tensor.shape == expected.shape and torch.equal(tensor.bool().cpu(), expected):
            return way, tensor.dtype
    return None, None


def _sizes(path: str, tensor: Tensor, other: Tensor) -> Sizes:
    """What of a tensor's shape are rows and tokens, from the two texts."""
    (rows, tokens), (more_rows, more_tokens) = SIZES
    names: dict[tuple[int, int], Any] = {(rows, more_rows): "rows", (tokens, more_tokens): "tokens"}
    extents = []
    for extent, more in zip(tensor.shape, other.shape, strict=True):
        known = extent if extent == more else names.get((extent, more))
        if known is None or (isinstance(known, str) and known in extents):
            raise _error(
                path, f"takes or gives a tensor of the shape {list(tensor.shape)} for {rows} x {tokens} tokens"
            )
        extents.append(known)
    return Sizes(tuple(extents), tensor.dtype)


def _state_sizes(path: str, state: Tensor) -> Sizes:
    rows, tokens = SIZES[0]
    if state.dim() == 0 or state.shape[0] != rows or tokens in state.shape:
        raise _error(path, f"keeps a tensor of the shape {list(state.shape)} beside its state")
    return Sizes(("rows", *state.shape[1:]), state.dtype)


def _error(path: str, what: str) -> CaptureError:
    return CaptureError(
        f"{path or 'the model'} carries a state from token to token and {what}, which is not supported: {OTHER_WAY}"
    )
