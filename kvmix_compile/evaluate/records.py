"""An evaluation as JSON: its numbers, and on what, with what and how they were made."""

import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.arrival import Arrival
from kvmix_compile.evaluate.comparison import Result
from kvmix_compile.evaluate.divergence import Divergence
from kvmix_compile.evaluate.drafting import Drafting
from kvmix_compile.evaluate.passkey import Retrieval
from kvmix_compile.evaluate.perplexity import CHUNK, WINDOW
from kvmix_compile.evaluate.tasks import Score
from kvmix_compile.evaluate.writing import Writing
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import Importance

PACKAGES = ("kvmix-compile", "torch", "transformers")


@dataclass(frozen=True)
class TextResults:
    """What every configuration did on so many tokens of a text, called `text`; the first one is the original."""

    text: str
    tokens: int
    results: Sequence[Result]
    window: int = WINDOW
    chunk: int = CHUNK

    def __str__(self) -> str:
        return f"{self.tokens} tokens ({self.text}) in windows of {self.window}, read in chunks of {self.chunk}"


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of a model; empty what was not asked for."""

    texts: Sequence[TextResults] = ()
    retrievals: Sequence[Retrieval] = ()
    scores: Sequence[Score] = ()
    arrivals: Sequence[Arrival] = ()
    drafts: Sequence[Drafting] = ()
    writings: Sequence[Writing] = ()


def record(
    model: str, found: Findings, importance: Importance, plans: Mapping[str, Plan], packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Everything measured of a model; `packages` are those whose versions matter besides PACKAGES."""
    return {
        "model": model,
        "texts": [asdict(text) for text in found.texts],
        "passkeys": [asdict(each) | {"retrieved": each.retrieved} for each in found.retrievals],
        "tasks": [asdict(score) for score in found.scores],
        "ways": [asdict(arrival) for arrival in found.arrivals],
        "drafts": [asdict(drafting) for drafting in found.drafts],
        "writing": [asdict(writing) for writing in found.writings],
        "importance": _importance(importance),
        "precisions": {name: _precisions(plan) for name, plan in plans.items()},
        **circumstances("kvmix", torch.device("cpu"), packages),
    }


@dataclass(frozen=True)
class Evaluation:
    """What a file of `record` says of a model's predictions. layers: names of the model's attention sites."""

    model: str
    layers: tuple[str, ...]
    texts: tuple[TextResults, ...]


def read_evaluation(path: Path) -> Evaluation:
    """What `kvmix eval --json` wrote. Raises InputError where the file cannot be read or is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(
            model=str(document["model"]),
            layers=tuple(str(site["layer"]) for site in document["importance"]),
            texts=tuple(_text_results(text) for text in document["texts"]),
        )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not what `kvmix eval --json` writes: evaluate the model again") from error


def circumstances(program: str, device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """On what, with what and how this run of `program` was made: what a stored result needs besides its numbers."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "device": name,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *packages)},
        "command": [program, *sys.argv[1:]],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Raises InputError where the file cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _importance(importance: Importance) -> list[dict[str, Any]]:
    """Of each layer, KVmix's scores, and the loss predicted at the precision that would lose most."""
    return [
        {
            "layer": site.layer,
            "key_gradient_norm": _number(site.key_gradient_norm),
            "value_gradient_norm": _number(site.value_gradient_norm),
            "key_predicted_loss": max(site.key_sensitivity.values()),
            "value_predicted_loss": max(site.value_sensitivity.values()),
        }
        for site in importance.sites
    ]


def _precisions(plan: Plan) -> dict[str, list[list[int]]]:
    """Of each layer Precision.as_ints: bits of a code, group size, bits of a scale, bits of leading tiers."""
    return {
        "keys": [site.key.as_ints() for site in plan.sites],
        "values": [site.value.as_ints() for site in plan.sites],
    }


def _text_results(text: Mapping[str, Any]) -> TextResults:
    """Raises ValueError, TypeError or KeyError where it is none."""
    results = [_result(result) for result in text["results"]]
    if not results:
        raise ValueError("there is no original to compare with")
    return TextResults(
        str(text["text"]), int(text["tokens"]), results, window=int(text["window"]), chunk=int(text["chunk"])
    )


def _result(record: Mapping[str, Any]) -> Result:
    found = record["divergence"]
    along = tuple(map(float, found["by_position"]))
    divergence = Divergence(by_position=along, **_floats(Divergence, found))
    return Result(configuration=str(record["configuration"]), divergence=divergence, **_floats(Result, record))


def _floats(kind: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """What `record` has for those fields of a dataclass that are floats."""
    return {each.name: float(record[each.name]) for each in fields(kind) if each.type in (float, "float")}


def _number(measured: float) -> float | None:
    """JSON knows no NaN, which a norm is where there is no projection."""
    return measured if math.isfinite(measured) else None
