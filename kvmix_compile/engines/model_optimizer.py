"""Model-Optimizer: a plan as the metadata that NVIDIA's Model-Optimizer writes into a checkpoint, and back.

As of its release candidate 0.48.0rc1 (modelopt/torch/export), in the file hf_quant_config.json, or within a
config.json as `quantization_config`. 0.47 writes one format for all layers, under `kv_cache_quant_algo` alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.whole_layers import FORMATS, CacheFormat

FILE = "hf_quant_config.json"
SCHEMA_VERSION = 1
MIXED = "MIXED_PRECISION"
# What a config.json has instead of the name FP8.
FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def metadata(plan: EnginePlan) -> dict[str, Any]:
    """The content of hf_quant_config.json for a checkpoint whose weights are not quantized.

    Raises PlanError where nothing is quantized, for which there is no metadata.
    """
    if not plan.formats:
        raise PlanError("every layer stays at 16 bits, for which a checkpoint needs no metadata: plan with fewer bits")
    algorithms = [each.name.upper() for each in plan.formats]
    kept = {name: layer.kept.name.upper() for layer in plan.layers if layer.kept is not None for name in layer.names}
    return {
        "producer": {"name": "kvmix_compile", "version": version("kvmix-compile")},
        "quantization": {
            "quant_algo": None,
            "quantized_layers": {},
            "kv_cache_quant_algo": algorithms[0] if len(algorithms) == 1 else MIXED,
            "kv_cache_quantized_layers": {name: {"quant_algo": algorithm} for name, algorithm in kept.items()},
            "kv_cache_schema_version": SCHEMA_VERSION,
        },
    }


@dataclass(frozen=True)
class Exported:
    """What a checkpoint's metadata says. formats: by layer, those at 16 bits left out; or one, of all layers."""

    path: Path
    formats: Mapping[str, CacheFormat] | CacheFormat

    def plan(self, layers: Sequence[tuple[tuple[str, ...], SiteShape]]) -> EnginePlan:
        """For the model that it is of, whose layers have these names and cache this. Raises PlanError for another."""
        named = {name for names, _ in layers for name in names}
        strange = [] if isinstance(self.formats, CacheFormat) else [name for name in self.formats if name not in named]
        if strange:
            raise PlanError(f"{self.path} is of another model: it has {strange[0]}, and this one {layers[0][0][0]}")
        return EnginePlan(tuple(EngineLayer(names, shape, self._kept(names)) for names, shape in layers))

    def _kept(self, names: Sequence[str]) -> CacheFormat | None:
        return self.formats if isinstance(self.formats, CacheFormat) else self.formats.get(names[0])


def read_metadata(path: Path) -> Exported:
    """What hf_quant_config.json, a config.json, or a folder with one of them says.

    Raises PlanError where the file cannot be read, or says nothing of the cache that is known here.
    """
    return Exported(path, _formats_in(_section_of(path), path))


def _section_of(path: Path) -> Mapping[str, Any]:
    """What the file says of quantization."""
    if path.is_dir():
        path = path / FILE if (path / FILE).is_file() else path / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not JSON, or is damaged ({error})") from error
    for name in ("quantization", "quantization_config"):
        if isinstance(document, dict) and isinstance(document.get(name), dict):
            return document[name]
    raise PlanError(f"{path} says nothing of quantization: give a file that Model-Optimizer or kvmix plan wrote")


def _formats_in(section: Mapping[str, Any], path: Path) -> Mapping[str, CacheFormat] | CacheFormat:
    """By layer, or of all layers."""
    layers = section.get("kv_cache_quantized_layers")
    if layers is None:
        algorithm = section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme")
        return _format("FP8" if algorithm == FP8_SCHEME else algorithm, path)
    if section.get("kv_cache_schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise PlanError(
            f"{path} has version {section['kv_cache_schema_version']} of Model-Optimizer's schema, and "
            f"{SCHEMA_VERSION} is what is known here: use a newer kvmix_compile"
        )
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise PlanError(
            f"{path} is damaged: kv_cache_quantized_layers has an entry for each layer, with its quant_algo"
        )
    return {name: _format(entry.get("quant_algo"), path) for name, entry in layers.items()}


def _format(algorithm: object, path: Path) -> CacheFormat:
    known = FORMATS.get(algorithm.lower()) if isinstance(algorithm, str) else None
    if known is None:
        what = "no format" if algorithm is None else f"the format {algorithm}"
        raise PlanError(
            f"{path} has {what} for the KV cache, and {', '.join(name.upper() for name in FORMATS)} are what is known "
            "here"
        )
    return known
