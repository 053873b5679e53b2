"""A cache as a safetensors file: its tensors, and in the metadata what it was made for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvmix_compile.errors import CacheError
from kvmix_compile.passes.files import replacing
from kvmix_compile.passes.untouched.digest import sampled

FORMAT = "kvmix-cache"
# To be raised when the bytes of a state change their meaning (kernels/format/packing.py, kernels/format/state.py), or
# its tensors their names or dtypes, or may be fewer. Since 4 there need not be room for all first and recent tokens,
# since 5 those of a float32 model are float16 where keys and values are quantized.
VERSION = 5
# Versions that are still read, and in which other words each named tensors.
OLDER: dict[str, dict[str, str]] = {"2": {"tail_": "recent_"}, "3": {}, "4": {}}


@dataclass(frozen=True)
class Header:
    """What a file says of its cache besides the tensors.

    model: its structure, as in a plan. weights: as `weights_fingerprint` gives it. plan: as JSON. dtypes: of each site.
    The counters, and `counts_on`: as KVMixCache has them. rank, ranks: which of how many processes saved it, where a
    model's weights are spread over several.
    """

    model: str
    weights: str
    plan: str
    dtypes: tuple[str, ...]
    rollback: int
    seen: int
    furthest: int
    counts_on: bool = True
    rank: int = 0
    ranks: int = 1


def path_of(path: str | os.PathLike[str], rank: int, ranks: int) -> Path:
    """The file of one of several processes, numbered as transformers numbers the files of a checkpoint; for one alone,
    `path` itself.
    """
    whole = Path(path)
    return whole if ranks == 1 else whole.with_name(f"{whole.stem}-{rank + 1:05d}-of-{ranks:05d}{whole.suffix}")


def weights_fingerprint(model: nn.Module) -> str:
    """Identifies a model's weights by their names, shapes and some elements of each, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {getattr(tensor, 'dtype', None)} {getattr(tensor, 'shape', None)}".encode())
        # A weight that is stored as something else than its elements has no cheap sample of them.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():
            digest.update(sampled(tensor))
    return digest.hexdigest()


def write(path: str | os.PathLike[str], header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a file; one that is already at `path` is replaced in one step.

    Raises CacheError where it cannot be written; what was at `path` before is then still there.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps(asdict(header))
    metadata = {"format": FORMAT, "version": str(VERSION), "header": described, "digest": _digest(described, held)}
    try:
        with replacing(Path(path)) as unfinished:
            save_file(held, unfinished, metadata)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"cannot write the cache to {path}: {error}") from error


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """What `write` wrote, on the CPU.

    Raises CacheError where the file cannot be read, is no cache, is damaged, or comes from another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Not parts of the mapped file, which another process may cut off while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CacheError(f"cannot read the cache {path}: {error}") from error
    except SafetensorError as error:
        raise CacheError(f"{path} is no safetensors file, or is damaged ({error}); save the cache again") from error
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{path} is a safetensors file, but not one that KVMixCache.save wrote")
    version = metadata.get("version")
    if version not in (str(VERSION), *OLDER):
        raise CacheError(
            f"{path} was written by a version of kvmix_compile that keeps caches otherwise; read its prompt again with "
            "this one"
        )
    described = metadata.get("header", "")
    if metadata.get("digest") != _digest(described, tensors):
        raise CacheError(f"{path} is damaged: its content is not what was written; save the cache again")
    for older, newer in OLDER.get(version, {}).items():
        tensors = {name.replace(older, newer): tensor for name, tensor in tensors.items()}
    content = json.loads(described)
    return Header(**content | {"dtypes": tuple(content["dtypes"])}), tensors


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Of everything in a file. The tensors are contiguous and on the CPU."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()
