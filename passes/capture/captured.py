"""Captured: a model as a graph, and all that follows from the graph alone, worked out once."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.capture import limits
from kvmix_compile.passes.capture.ranks import Ranks
from kvmix_compile.passes.capture.single_nodes import SingleNode, StatefulModule
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.record import PassRecord
from kvmix_compile.passes.graph.vocabulary import graph_inputs
from kvmix_compile.passes.untouched.reads import Reads
from kvmix_compile.passes.untouched.untouched import Written

# The submodule of a captured graph that the model is.
MODEL = "model"


@dataclass(frozen=True)
class Captured:
    """A model as a graph, which nothing changes any more, and the graph's symbols.

    `module` takes `(input_ids, position_ids, logit_positions)`: int64 `[batch, tokens]` twice and int64 `[logits]`,
    and gives `logits[batch, logits, vocabulary]`. `batch` and `tokens` are the symbolic sizes of `input_ids`. `reads`
    and `written`: which attributes the model's forward reads, and which it changes. `passes`: what made it of export's.

    `original`: the model as its user calls it, and `ranks`: the processes that its weights are spread over. The graph
    is then of what this one computes. `head_ranks`: those that the heads of keys and values are spread over, and
    `query_ranks` those of queries; the sites have the heads that are this one's.
    """

    module: fx.GraphModule
    batch: torch.SymInt
    tokens: torch.SymInt
    most_tokens: int | None
    has_position_input: bool
    reads: Reads
    written: Written
    original: nn.Module
    ranks: Ranks = Ranks()
    head_ranks: Ranks = Ranks()
    query_ranks: Ranks = Ranks()
    passes: tuple[PassRecord, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def model(self) -> nn.Module:
        """What the graph reads weights of: the original, or of one that is spread what this process has of it."""
        return self.module.get_submodule(MODEL)

    def whole(self, shape: SiteShape) -> SiteShape:
        """That of a site, with the heads of all ranks."""
        return replace(shape, kv_heads=shape.kv_heads * self.head_ranks.count)

    @property
    def stateful(self) -> tuple[StatefulModule, ...]:
        """The modules that carry a state besides keys and values, in the order in which they are called."""
        return tuple(child.stateful for child in self.module.children() if isinstance(child, SingleNode))

    @property
    def name(self) -> str:
        """Of the model's class."""
        return type(self.model).__name__

    @cached_property
    def dataflow(self) -> Dataflow:
        """Who feeds whom."""
        return Dataflow(self.graph)

    @cached_property
    def vocabulary(self) -> int:
        """The number of token ids that the graph can embed."""
        return limits.vocabulary_size(self.graph, self.placeholder("input_ids"))

    @cached_property
    def longest_context(self) -> int | None:
        """How many positions the model has: what its configuration says, or the rows of its position tables.

        None: no limit found. Raises CaptureError where the graph holds for fewer tokens and no table explains it.
        """
        configured = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return limits.longest_context(self.graph, self.dataflow, self.tokens, configured, self.most_tokens)

    @cached_property
    def parameter(self) -> nn.Parameter:
        """The first of the model's weights that is a floating-point one: what its dtype and device are told by."""
        return next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())

    def random_ids(self, rows: int, tokens: int) -> Tensor:
        """Token ids to try the model on, int64 `[rows, tokens]`, the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (rows, tokens), generator=generator).to(self.parameter.device)

    def inputs(self, row: Tensor, logits: slice = slice(None)) -> list[Tensor]:
        """What the graph takes, in its order, for one row of token ids, int64 `[tokens]`, of which these logits are
        asked for.
        """
        positions = torch.arange(row.numel(), device=row.device)
        given = {"input_ids": row[None], "position_ids": positions[None], "logit_positions": positions[logits]}
        return [given[node.name] for node in graph_inputs(self.graph)]

    def placeholder(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "placeholder" and node.name == name)
