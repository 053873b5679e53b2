"""Inductor: the rewritten graph, compiled once for prompts and once for steps of decoding.

Batch, tokens and the room of the cache are symbols in what is compiled, so a growing context compiles nothing anew.
What is compiled reads the weights that the model had then; they may change in place. On a CUDA device steps
of decoding are replayed from CUDA graphs, unless the weights are spread over ranks. These compile at one time, each
a graph of its own part of the weights, and all with the same collectives in the same order.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvmix_compile.errors import CompilationError
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.passes.capture.export import first_line
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.graph.symbols import symbolic_size
from kvmix_compile.runtime.cuda_graph import Replaying

# Those of torch.ops.kvmix.
OPERATORS = ("append", "attend", "attend_stepwise", "order_channels")

# What the graph is traced with; it holds for any sizes, one and none included. All different: see symbolic_size.
TRACED_BATCH, TRACED_TOKENS, TRACED_LOGITS, TRACED_BLOCKS, TRACED_SLOTS = 3, 11, 5, 17, 101


@dataclass(frozen=True)
class _Compiled:
    """One compiled graph, and whether it is right for (batch, tokens, logits, *blocks and *slots of each window)."""

    graph: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]  # of inputs and state
    holds: Callable[[tuple[int, ...]], bool]


class InductorGraph:
    """Called with the arguments of `Rewritten.module`, and gives what that gives.

    Raises CompilationError where there is nothing to compile with, and where Inductor fails, in all ranks where it does
    in one.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layouts: Sequence[StateLayout],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        check_compiler(device)
        self.ranks = ranks or Ranks()
        self.module, self.layouts, self.dtypes, self.device = module, tuple(layouts), tuple(dtypes), device
        windows = [layout.window for layout in layouts]
        # Sites of one window have the same sizes: the first one's are looked at.
        self._first_sites = [windows.index(window) for window in dict.fromkeys(windows)]
        self._compiled: dict[bool, _Compiled] = {}

    def prepare(self) -> None:
        """Compile both graphs now, and not when they are first called."""
        for decoding in (True, False):
            self._graph(decoding)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, logit_positions: Tensor, lengths: Tensor, starts: Tensor,
        *state: Tensor,
    ) -> Tensor:  # fmt: skip
        given = (input_ids, position_ids, logit_positions, lengths, starts)
        compiled = self._graph(input_ids.shape[1] == len(logit_positions) == 1)
        sinks, packed, rings = state[0::6], state[2::6], state[4::6]  # of keys
        sizes = [kept[site].shape[2] for kept in (packed, rings) for site in self._first_sites]
        # A short cache that was begun by a model which is not compiled has fewer sinks than are compiled for.
        are_whole = all(sinks[site].shape[2] == self.layouts[site].sinks for site in self._first_sites)
        if not are_whole or not compiled.holds((*input_ids.shape, len(logit_positions), *sizes)):
            return self.module(*given, *state)
        (logits,) = compiled.graph([tensor.contiguous() for tensor in given], state)
        return logits

    def _graph(self, decoding: bool) -> _Compiled:
        if decoding not in self._compiled:
            with self.ranks.together():
                self._compiled[decoding] = self._compile(decoding)
        return self._compiled[decoding]

    def _compile(self, decoding: bool) -> _Compiled:
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        batch: Any = symbolic_size(mode, "batch", TRACED_BATCH)
        tokens: Any = 1 if decoding else symbolic_size(mode, "tokens", TRACED_TOKENS)
        logits: Any = 1 if decoding else symbolic_size(mode, "logits", TRACED_LOGITS)
        blocks = symbolic_sizes(mode, "blocks", self.layouts, TRACED_BLOCKS)
        slots = symbolic_sizes(mode, "slots", self.layouts, TRACED_SLOTS)  # more where tokens can be taken back
        inputs: list[Any] = []
        with mode, torch.no_grad():
            for shape in ((batch, tokens), (batch, tokens), (logits,), (batch,), (batch,)):
                inputs.append(torch.empty(shape, dtype=torch.int64, device=self.device))
            for layout, dtype in zip(self.layouts, self.dtypes, strict=True):
                *fixed, recent_k, recent_v = SiteState.allocate(
                    layout, batch, blocks[layout.window], dtype, self.device
                ).tensors()
                rings = (
                    ring.new_empty(batch, layout.kv_heads, slots[layout.window], ring.shape[3])
                    for ring in (recent_k, recent_v)
                )
                inputs += [*fixed, *rings]
        try:
            with torch.no_grad(), own_compiled_code():
                graph = torch._inductor.compile(_returning_tuple(self.module), inputs)
        except Exception as error:
            raise CompilationError(
                f"Inductor could not compile the model: {first_line(error)}. Call kvmix_compile.apply without "
                "compile=True"
            ) from error
        # Whether collectives can be replayed was not tried.
        replayed = decoding and self.device.type == "cuda" and self.ranks.count == 1
        call = Replaying(graph) if replayed else lambda given, state: graph(*given, *state)
        return _Compiled(call, _holds(mode, (batch, tokens, logits, *blocks.values(), *slots.values())))


def symbolic_sizes(mode: FakeTensorMode, name: str, layouts: Sequence[StateLayout], traced: int) -> dict[int, Any]:
    """By window a size of the states that have it, as one that holds for any; traced with `traced`, and with one more
    for each further window.
    """
    windows = dict.fromkeys(layout.window for layout in layouts)
    return {
        window: symbolic_size(mode, f"{name}_{window}", traced + index) for index, window in enumerate(windows)
    }  # fmt: skip


def own_compiled_code() -> AbstractContextManager[None]:
    """While Inductor compiles: what it kept on disk for another version of kvmix_compile, or for another processor, is
    not taken. It finds that by the graph, in which operators have names and no signatures. And the code has a width of
    vectors in it: with PyTorch 2.13, what AVX-512 wrote to a shared home computes wrong numbers with AVX2.
    """
    operators = (getattr(torch.ops.kvmix, name) for name in OPERATORS)
    signatures = "\n".join(str(operator.default._schema) for operator in operators)
    told = f"{signatures}\n{torch.backends.cpu.get_cpu_capability()}"
    tag = f"{compiler_config.cache_key_tag} kvmix {hashlib.sha256(told.encode()).hexdigest()}"
    return compiler_config.patch({"cache_key_tag": tag})  # type: ignore[attr-defined]


def _returning_tuple(module: fx.GraphModule) -> fx.GraphModule:
    """A copy, on the same weights, that gives `(logits,)`: Inductor changes what returns anything else, in place."""
    graph = fx.Graph()
    graph.output((graph.graph_copy(module.graph, {}),))
    return fx.GraphModule(module, graph)


def check_compiler(device: torch.device) -> None:
    """Raise CompilationError where Inductor has nothing to compile with."""
    named = inductor_config.cpp.cxx
    candidates = filter(None, named if isinstance(named, list | tuple) else (named,))
    if device.type == "cpu" and not any(map(shutil.which, candidates)):
        raise CompilationError(
            "compile=True needs a C++ compiler, and PyTorch finds none: install g++, or name another in $CXX, or leave "
            "compile out"
        )


def _holds(mode: FakeTensorMode, sizes: tuple[int | torch.SymInt, ...]) -> Callable[[tuple[int, ...]], bool]:
    """Whether a graph that was traced with these sizes is right for others. What tracing and Inductor took for granted
    about them, such as that a number of elements fits an index, is not checked by the graph itself.
    """
    assert mode.shape_env is not None
    assumptions = [guard.expr for guard in mode.shape_env.guards]
    symbols = [size.node.expr if isinstance(size, torch.SymInt) else None for size in sizes]

    @cache
    def holds(actual: tuple[int, ...]) -> bool:
        known = {symbol: size for symbol, size in zip(symbols, actual, strict=True) if symbol is not None}
        return all(bool(assumption.xreplace(known)) for assumption in assumptions)

    return holds
