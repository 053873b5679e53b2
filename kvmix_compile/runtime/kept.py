"""Kept: what compiling a model by a plan gave is kept in the user's cache, so that the next process starts with it.

Kept is what does not belong to the model itself: the rewritten graph and what was found out about it. It is looked for
by a digest of all that it depends on (the code and settings of the model's forward, its weights, the plan, the releases
of the libraries), and tried on a short text against the model before it is used. Set KVMIX_KEEP=0 to keep nothing.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from kvmix_compile.kernels.cache_folder import cache_folder
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.single_nodes import StatefulModule
from kvmix_compile.passes.files import replacing
from kvmix_compile.passes.graph.plain import PlainNode, as_graph, as_plain
from kvmix_compile.passes.graph.rounding import TOLERANCE, difference
from kvmix_compile.passes.rewrite import original
from kvmix_compile.passes.rewrite.rewrite import Rewritten, constants, over, single_nodes
from kvmix_compile.passes.untouched.digest import digest
from kvmix_compile.passes.untouched.untouched import untouched
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.cache_file import weights_fingerprint
from kvmix_compile.runtime.program import Program, placement

SWITCH = "KVMIX_KEEP"

# Files that are kept; the ones that were used longest ago go first.
MOST_FILES = 100

# The text by which what was kept is tried: no plan quantizes any of so few tokens.
CHUNKS = (32, 1)

# What of a program is made anew: it belongs to the model, or is seen when it is first needed.
_MADE_ANEW = frozenset(
    {"rewritten", "device", "placement", "weights", "inductor", "places", "ignored_in_steps", "takes_rows"}
)


@dataclass(frozen=True)
class Kept:
    """A program without its model.

    nodes, constants, single_nodes: of the rewritten graph. reads: dtype and shape of what it reads of the model, by
    name. rewritten: its other fields. program: those of the program.
    """

    nodes: tuple[PlainNode, ...]
    constants: dict[str, Tensor]
    single_nodes: dict[str, StatefulModule]
    reads: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    rewritten: dict[str, Any]
    program: dict[str, Any]

    @classmethod
    def of(cls, program: Program) -> "Kept":
        """What is kept of a program."""
        module = program.rewritten.module
        return cls(
            nodes=as_plain(module.graph),
            constants=constants(program.rewritten),
            single_nodes=single_nodes(program.rewritten),
            reads=dict(_reads(module)),
            rewritten={name: held for name, held in _fields(program.rewritten).items() if name != "module"},
            program={name: held for name, held in _fields(program).items() if name not in _MADE_ANEW},
        )

    def of_model(self, model: nn.Module) -> Program:
        """The program again. Raises LookupError, or AttributeError, where the model has not what the graph reads."""
        module = over(model, as_graph(self.nodes), self.single_nodes, self.constants)
        if dict(_reads(module)) != self.reads:
            raise LookupError("the model's tensors are others")
        device = next(parameter.device for parameter in model.parameters() if parameter.is_floating_point())
        rewritten = Rewritten(module=module, **self.rewritten)
        return Program(
            rewritten=rewritten,
            device=device,
            placement=placement(model),
            weights=weights_fingerprint(model),
            **self.program,
        )


@dataclass(frozen=True)
class Start:
    """Where what a model compiles to by some plan is kept. `model_digest`: of the model before it is captured; None
    where nothing is kept.
    """

    model: nn.Module
    model_digest: str | None

    @classmethod
    def of(cls, model: nn.Module) -> "Start":
        """That of a model which nothing has run yet."""
        return cls(model, None if os.environ.get(SWITCH) == "0" else digest(model))

    def read(self, plan: Plan, *, is_verified: bool) -> Program | None:
        """The program that was kept; None where there is none that gives the model's logits. `is_verified`: whether it
        must have been verified when it was made.
        """
        if (file := self._file(plan)) is None or not file.is_file():
            return None
        # Whatever is wrong with a file, or with what it makes of this model: it is captured anew.
        try:
            # The digest knows all devices: what was saved goes to the one that it was on.
            kept: Kept = torch.load(file, weights_only=False)
            program = kept.of_model(self.model)
            if (is_verified and program.report.verified is None) or not _gives_logits_of(program, self.model):
                return None
            file.touch()
        except Exception:
            return None
        return program

    def write(self, plan: Plan, program: Program) -> None:
        """Keep a program, if it can be kept: one whose parts can be pickled, and can be tried on a short text."""
        if (file := self._file(plan)) is None or program.numbering.together:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(file) as unfinished:
                torch.save(Kept.of(replace(program, report=replace(program.report, seconds={}))), unfinished)
            for old in sorted(file.parent.glob("*.pt"), key=lambda it: it.stat().st_mtime)[:-MOST_FILES]:
                old.unlink(missing_ok=True)
        except (OSError, pickle.PicklingError, AttributeError, TypeError):
            return

    def _file(self, plan: Plan) -> Path | None:
        if self.model_digest is None:
            return None
        told = (
            self.model_digest, plan.as_json(), _own_code(), torch.__version__, transformers.__version__,
            torch.get_default_dtype(), torch.backends.cpu.get_cpu_capability(),
        )  # fmt: skip
        return cache_folder() / "starts" / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}.pt"


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _reads(module: fx.GraphModule) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """What a graph reads by name; LookupError or AttributeError where that is not there."""
    for name in dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr"):
        path, _, last = name.rpartition(".")
        tensor = getattr(module.get_submodule(path), last)
        yield name, (tensor.dtype, tuple(tensor.shape))


@cache
def _own_code() -> str:
    """Of all of kvmix_compile."""
    told = hashlib.sha256()
    # In a checkout some folders are links.
    folders = os.walk(Path(__file__).parents[1], followlinks=True)
    for file in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        told.update(file.read_bytes())
    return told.hexdigest()


@torch.no_grad()
def _gives_logits_of(program: Program, model: nn.Module) -> bool:
    """Whether a program gives the model's own logits for a short text and a step of decoding."""
    length = min(sum(CHUNKS), program.longest_context or sum(CHUNKS))
    ids = program.random_ids(length)
    with untouched(model):
        expected = original.whole(model, ids)
    held, logits = KVMixCache(program.format.of_a_trial), []
    for part in ids.split(CHUNKS[0], dim=1):
        every = torch.arange(part.shape[1], device=ids.device)
        inputs = (part, held.seen + every[None], every)
        none = torch.zeros(1, dtype=torch.int64, device=ids.device)
        logits.append(held.run(program.graph, inputs, none, part.shape[1]).float())
    return difference(torch.cat(logits, dim=1), expected) <= TOLERANCE[program.parameter_dtype]
