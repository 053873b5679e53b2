"""Single nodes: a module that carries a state from token to token is not traced, but called as one node of the graph.

While a model is exported, the forward of such a module notes a call of the operator `kvmix::single_node`, of which only
the shapes are known. In the captured graph a SingleNode stands in its place, which calls the module itself: with the
state of before, where there is one, and giving the state of after.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kvmix_compile.passes.capture.held import Mould, Way, held_at, tensors_held, with_held
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import operation

_LIBRARY = torch.library.Library("kvmix", "FRAGMENT")
# The path of the module, what its forward is given, and what it gives: the extents of each tensor, behind one another,
# how many axes each has, and of which dtype each is, by its name: PyTorch 2.11 makes numbers of those in a list.
_LIBRARY.define("single_node(str path, Tensor[] given, SymInt[] extents, int[] axes, str[] dtypes) -> Tensor[]")

# What a SingleNode is called in a graph, followed by its number.
NAME = "single_node_"


@torch.library.register_fake("kvmix::single_node")
def _noted(path: str, given: list[Tensor], extents: list[int], axes: list[int], dtypes: list[str]) -> list[Tensor]:
    results, begin = [], 0
    for count, dtype in zip(axes, dtypes, strict=True):
        results.append(given[0].new_empty(extents[begin : begin + count], dtype=getattr(torch, dtype)))
        begin += count
    return results


@dataclass(frozen=True)
class Sizes:
    """The shape and dtype of a tensor of a call: how many elements each axis has, "rows" and "tokens" for as many as
    the call has of these.
    """

    extents: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def token_axis(self) -> int | None:
        """The axis along which tokens lie; None: none."""
        return self.extents.index("tokens") if "tokens" in self.extents else None

    def of(self, rows: Any, tokens: Any) -> list[Any]:
        """The shape in a call of so many rows and tokens."""
        return [{"rows": rows, "tokens": tokens}.get(cast(str, extent), extent) for extent in self.extents]

    def read(self, tensor: Tensor, extent: str) -> Any:
        """How many rows, or tokens, there are, as this tensor of the call has it; None: it does not."""
        return tensor.shape[self.extents.index(extent)] if extent in self.extents else None


@dataclass(frozen=True)
class CarriedState:
    """What a layer carries from token to token besides keys and values. layer: the path of its module. tensors: of the
    state, rows first; of fixed size a row.
    """

    layer: str
    tensors: tuple[Sizes, ...]

    @property
    def row_bytes(self) -> int:
        """What it takes of a row."""
        return sum(math.prod(sizes.of(1, 1)) * sizes.dtype.itemsize for sizes in self.tensors)


def nothing_carried(carried: Sequence[CarriedState]) -> list[Any]:
    """What a rewritten graph is given for the tensors of these before the first token."""
    return [None for one in carried for _ in one.tensors]


@dataclass(frozen=True)
class StatefulModule:
    """A module that carries a state in a cache, and how it is called.

    path, kind: where it is in the model, and its class. call: its arguments, positional and named, without the tensors
    `given`, the cache and the mask of padding, which are at `ways`, `cache` and `mask`, `mask_dtype` (None: it is given
    none). output: what it returns, without the tensors `results` at `result_ways`. fresh, filled: its cache before the
    first call and after it. states: what that then holds, of one row each. stepwise: it goes on from a state by one
    token at a time only.
    """

    path: str
    kind: str
    call: tuple[tuple[Any, ...], dict[str, Any]]
    ways: tuple[Way, ...]
    given: tuple[Sizes, ...]
    cache: Way
    mask: Way | None
    mask_dtype: torch.dtype | None
    output: Any
    result_ways: tuple[Way, ...]
    results: tuple[Sizes, ...]
    fresh: Mould
    filled: Mould
    states: tuple[Sizes, ...]
    stepwise: bool = False

    @property
    def carried(self) -> CarriedState:
        """What it carries, for those who need not call it."""
        return CarriedState(self.path, self.states)

    def run(
        self, module: nn.Module, given: Sequence[Tensor], states: Sequence[Tensor] | None, starts: Tensor | None = None
    ) -> tuple[Any, list[Tensor]]:
        """What the module returns, and its state afterwards.

        given: the tensors of the call. states: its state before, which is left as it is; None: there is none yet.
        starts: how much padding leads each row, int64 `[rows]`; of a first call alone.
        """
        cache = (
            self.fresh.filled([])
            if states is None
            else self.filled.filled([state.to(given[0].device, copy=True) for state in states])
        )
        placed: dict[Way, Any] = {**dict(zip(self.ways, given, strict=True)), self.cache: cache}
        if states is None and starts is not None and self.mask is not None and bool(starts.any()):
            slots = torch.arange(self._read(given, "tokens"), device=starts.device)
            placed[self.mask] = (slots >= starts[:, None]).to(self.mask_dtype)
        arguments, named = with_held(self.call, placed)
        output = module.forward(*arguments, **named)
        return output, [held_at(cache, way) for way in self.filled.ways]

    def sizes_of_results(self, given: Sequence[Tensor]) -> list[list[Any]]:
        """The shape of each result of a call."""
        rows, tokens = self._read(given, "rows"), self._read(given, "tokens")
        return [sizes.of(rows, tokens) for sizes in self.results]

    def tokens_of(self, given: Sequence[Tensor]) -> int:
        """How many tokens a call has."""
        return int(self._read(given, "tokens"))

    def part(self, given: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
        """What would be given in a call of some of the tokens."""
        return [
            tensor if sizes.token_axis is None else tensor.narrow(sizes.token_axis, begin, end - begin)
            for tensor, sizes in zip(given, self.given, strict=True)
        ]

    def _read(self, given: Sequence[Tensor], extent: str) -> Any:
        found = (sizes.read(tensor, extent) for tensor, sizes in zip(given, self.given, strict=True))
        return next(size for size in found if size is not None)


class SingleNode(nn.Module):
    """A stateful module of a model in a graph.

    Called with its state of before (a tuple of tensors, or of None: there is none yet), how much padding leads each row
    (int64 `[rows]`, or None) and the tensors that the module is given, it returns a tuple of those that the module
    returns, followed by its state of after. The state that is given is left as it is.
    """

    def __init__(self, model: nn.Module, stateful: StatefulModule) -> None:
        super().__init__()
        self.stateful = stateful
        # Not a submodule: it is one of the model already.
        self._module = (model.get_submodule(stateful.path),)

    def forward(self, states: Sequence[Tensor | None], starts: Tensor | None, *given: Tensor) -> tuple[Tensor, ...]:
        """As the class says."""
        stateful, tokens = self.stateful, self.stateful.tokens_of(given)
        before = None if states[0] is None else cast(Sequence[Tensor], states)
        each = 1 if stateful.stepwise and before is not None else tokens
        results: list[list[Tensor]] = []
        for begin in range(0, tokens, each):
            output, before = stateful.run(self._module[0], stateful.part(given, begin, begin + each), before, starts)
            results.append([held_at(output, way) for way in stateful.result_ways])
        joined = [
            parts[-1] if len(parts) == 1 or sizes.token_axis is None else torch.cat(parts, sizes.token_axis)
            for parts, sizes in zip(zip(*results, strict=True), stateful.results, strict=True)
        ]
        assert before is not None
        return (*joined, *before)


@contextmanager
def noted(model: nn.Module, stateful: Sequence[StatefulModule]) -> Iterator[None]:
    """Around an export: each of these modules notes that it is called, and what it gives."""
    modules = [model.get_submodule(one.path) for one in stateful]
    # A forward of its own is what accelerate's hooks give a module.
    before = [vars(module).get("forward") for module in modules]
    try:
        for module, one in zip(modules, stateful, strict=True):
            vars(module)["forward"] = partial(_note, one)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _note(stateful: StatefulModule, *arguments: Any, **named: Any) -> Any:
    # Some models make a cache whether they are asked to or not.
    tensors = tensors_held(with_held((arguments, named), {stateful.cache: None}))
    if set(tensors) != set(stateful.ways):
        raise CaptureError(
            f"{stateful.path} ({stateful.kind}) is given other tensors without a cache than with one: its state cannot "
            "be carried"
        )
    given = [tensors[way] for way in stateful.ways]
    shapes = stateful.sizes_of_results(given)
    results = torch.ops.kvmix.single_node(
        stateful.path, given, [extent for shape in shapes for extent in shape], [len(shape) for shape in shapes],
        [str(sizes.dtype).removeprefix("torch.") for sizes in stateful.results],
    )  # fmt: skip
    return with_held(stateful.output, dict(zip(stateful.result_ways, results, strict=True)))


def give_modules(module: fx.GraphModule, model: nn.Module, stateful: Sequence[StatefulModule]) -> None:
    """Put a SingleNode in the place of each call that was noted. In place."""
    by_path = {one.path: one for one in stateful}
    calls = [node for node in module.graph.nodes if operation(node) == "single_node"]
    for index, node in enumerate(calls):
        path, given = node.args[:2]
        one = by_path.pop(cast(str, path), None)
        if one is None:
            raise CaptureError(f"{path} is called more than once for each token: its state cannot be carried")
        name = f"{NAME}{index}"
        module.add_module(name, SingleNode(model, one))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, ((None,) * len(one.states), None, *cast(list[fx.Node], given)))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
