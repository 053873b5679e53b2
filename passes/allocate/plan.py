"""The plan: at which precision every attention site keeps its keys and values, and how that is kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, TIERS, UNQUANTIZED_BITS, Precision
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.kernels.format.state import StateLayout, held_blocks, is_packed, unpacked_tokens
from kvmix_compile.passes.files import replacing

FORMAT = "kvmix-plan"
VERSION = 7
# Version 6 says nothing of chunks and context, version 5 has no rotated values, version 4 another name for one field.
READ_VERSIONS = (4, 5, 6, VERSION)
RENAMED = {"channel_quarters": "channel_tiers"}

# Powers of two that float32 and bfloat16 have, and their inverses too.
MOST_EXPONENT = 120

FieldType = TypeVar("FieldType", str, int, bool, dict, list)


class PlanError(KVMixError):
    """A plan that is impossible, damaged, or made for another model."""


@dataclass(frozen=True)
class SitePlan(Shaped):
    """What one attention site stores.

    layer: name of the site in the model, such as "model.layers.3.self_attn".
    key, value: precision of the cached keys and values.
    channel_tiers: where key has important_bits, a string for each head, with a digit for each of its channels: the
        channel's tier, from 0, the most important one, to 3. Else empty.
    key_exponents, value_exponents: for each head the power of two by which its quantized keys or values are divided
        (see passes.measure.exponents); empty: by none.
    values_rotated: whether its values are stored rotated (see passes.rewrite.rotation).
    """

    layer: str
    shape: SiteShape
    key: Precision
    value: Precision
    channel_tiers: tuple[str, ...] = ()
    key_exponents: tuple[int, ...] = ()
    value_exponents: tuple[int, ...] = ()
    values_rotated: bool = False

    def __post_init__(self) -> None:
        dimensions = (self.kv_heads, self.key_dim, self.value_dim)
        if min(dimensions) < 1:
            raise PlanError(f"{self.layer}: kv_heads, key_dim and value_dim must be at least 1, not {dimensions}")
        if self.window < 0:
            raise PlanError(f"{self.layer}: window counts tokens: {self.window} cannot be negative")
        if len(self.channel_tiers) != (self.kv_heads if self.key.important_bits else 0):
            raise PlanError(
                f"{self.layer}: important_bits and channel_tiers go together, the latter a string for each head; "
                f"{self.key} of {self.kv_heads} heads has {len(self.channel_tiers)}"
            )
        for what, exponents in (("key", self.key_exponents), ("value", self.value_exponents)):
            if len(exponents) not in (0, self.kv_heads) or max(map(abs, exponents), default=0) > MOST_EXPONENT:
                raise PlanError(
                    f"{self.layer}: {what}_exponents must be a number from -{MOST_EXPONENT} to {MOST_EXPONENT} for "
                    f"each of {self.kv_heads} heads, or none at all, not {list(exponents)}"
                )
        balanced = sorted(channel * TIERS // self.key_dim for channel in range(self.key_dim))
        for tiers in self.channel_tiers:
            if sorted(tiers) != list(map(str, balanced)):
                raise PlanError(
                    f"{self.layer}: channel_tiers must put as many of a head's {self.key_dim} channels into each of "
                    f"the tiers 0 to {TIERS - 1}, not {tiers!r}"
                )

    def unquantized(self) -> SitePlan:
        """The same at 16 bits."""
        untouched = Precision(UNQUANTIZED_BITS)
        return SitePlan(self.layer, self.shape, key=untouched, value=untouched)

    def of_heads(self, number: int, count: int) -> SitePlan:
        """As Plan.of_heads."""
        heads = self.kv_heads // count
        own = slice(number * heads, (number + 1) * heads)
        return replace(
            self,
            shape=replace(self.shape, kv_heads=heads),
            channel_tiers=self.channel_tiers[own],
            key_exponents=self.key_exponents[own],
            value_exponents=self.value_exponents[own],
        )

    @property
    def channel_order(self) -> list[list[int]] | None:
        """For each head its key's channels, the most important tier first; None where all are kept alike."""
        if not self.channel_tiers:
            return None
        return [sorted(range(self.key_dim), key=tiers.__getitem__) for tiers in self.channel_tiers]


@dataclass(frozen=True)
class StoredSite:
    """What a rewritten graph is told of one site.

    layout: of its state. channel_order: for each head its key's channels in the order that they are kept in; None: the
    model's. key_exponents, value_exponents, values_rotated: as in SitePlan. exact_chunks: as in Plan.
    """

    layout: StateLayout
    channel_order: list[list[int]] | None = None
    key_exponents: tuple[int, ...] = ()
    value_exponents: tuple[int, ...] = ()
    values_rotated: bool = False
    exact_chunks: bool = False


@dataclass(frozen=True)
class Plan:
    """How a model's KV cache is stored, and read.

    sites: one entry an attention site, in the order of the model.
    policy: the allocation policy that chose the precisions.
    fingerprint: identifies the structure of the model that the plan was made for.
    sinks: leading tokens of a row that stay unquantized.
    recent: recent tokens of a row that stay unquantized.
    exact_chunks: whether the tokens of a chunk see those of them that are recent no more as they are stored, as they
        would if all came one by one; else in full precision. See kernels.stepwise.
    context: tokens of the texts that its bits are averaged over; 0: of any, each site counting alike.
    """

    sites: tuple[SitePlan, ...]
    policy: str
    fingerprint: str
    sinks: int
    recent: int
    exact_chunks: bool = False
    context: int = 0

    def __post_init__(self) -> None:
        if not self.sites:
            raise PlanError("a plan needs at least one attention site")
        for name in ("sinks", "recent", "context"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} counts tokens: {getattr(self, name)} cannot be negative")

    @property
    def quantized_sites(self) -> tuple[SitePlan, ...]:
        """Those of which anything is quantized, all but windows of no more than recent tokens; what bits are averaged
        over.
        """
        return tuple(site for site in self.sites if is_packed(site.window, self.recent))

    @property
    def key_bits(self) -> float:
        """Code bits of a cached key element, averaged over all elements."""
        return _mean(self._key_elements(lambda site: site.key.mean_bits))

    @property
    def value_bits(self) -> float:
        """Code bits of a cached value element, averaged over all elements."""
        return _mean(self._value_elements(lambda site: site.value.bits))

    @property
    def code_bits(self) -> float:
        """Code bits of a cached element, averaged over the elements of keys and values: what `budget` counts. In a text
        of `context` tokens, where that is told: a site with a window holds fewer of them.
        """
        keys = self._key_elements(lambda site: site.key.mean_bits)
        return _mean(keys + self._value_elements(lambda site: site.value.bits))

    @property
    def storage_bits(self) -> float:
        """Stored bits of a quantized element, scales and zero points included: what `storage_budget` counts. In a text
        of `context` tokens, as code_bits.
        """
        keys = self._key_elements(lambda site: site.key.stored_bits(site.key_dim))
        return _mean(keys + self._value_elements(lambda site: site.value.stored_bits(site.value_dim)))

    def _key_elements(self, bits: Callable[[SitePlan], float]) -> list[tuple[float, int]]:
        """Of each quantized site the bits of a key element, and how many it holds, in blocks of 32 tokens."""
        return [
            (bits(site), site.key_elements * held_blocks(site.window, self.context)) for site in self.quantized_sites
        ]

    def _value_elements(self, bits: Callable[[SitePlan], float]) -> list[tuple[float, int]]:
        return [
            (bits(site), site.value_elements * held_blocks(site.window, self.context)) for site in self.quantized_sites
        ]

    def layouts(self, rollback: int = 0) -> tuple[StateLayout, ...]:
        """The state of each site; `rollback` is the number of tokens that can be taken back."""
        return tuple(_layout(site, self.sinks, self.recent, rollback) for site in self.sites)

    def stored_sites(self) -> tuple[StoredSite, ...]:
        """What a rewritten graph is told of each site."""
        return tuple(
            StoredSite(
                layout=layout,
                channel_order=site.channel_order,
                key_exponents=site.key_exponents,
                value_exponents=site.value_exponents,
                values_rotated=site.values_rotated,
                exact_chunks=self.exact_chunks,
            )
            for site, layout in zip(self.sites, self.layouts(), strict=True)
        )

    def cache_bytes(
        self,
        tokens: int,
        batch: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        rollback: int = 0,
        begins_whole: bool = False,
    ) -> int:
        """Bytes that the cache of a model of `dtype` occupies once it has seen `tokens` tokens in each of
        `batch` rows.

        begins_whole: it has room for all first and recent tokens from the beginning, as on a GPU, with compile=True,
        and through torch.compile's backend.
        """
        counters = torch.int64.itemsize * batch
        layouts = self.layouts(rollback)
        return counters + sum(
            layout.bytes(batch, layout.room(tokens, begins_whole), layout.unquantized_dtype(dtype))
            for layout in layouts
        )

    def token_bytes(self, dtypes: Sequence[torch.dtype], tokens: int = 0) -> float:
        """Bytes of a token's keys and values once they are packed, at the sites that attend to more than `tokens`.

        dtypes: of each site's keys and values in the model.
        """
        return sum(
            layout.kv_heads * layout.packed_bytes(dtype) / BLOCK_TOKENS
            for layout, dtype in zip(self.layouts(), dtypes, strict=True)
            if not 0 < layout.window <= tokens
        )

    def of_heads(self, number: int, count: int) -> Plan:
        """What one of `count` processes stores, `number` from 0, over which the heads of a site are spread evenly."""
        return self if count == 1 else replace(self, sites=tuple(site.of_heads(number, count) for site in self.sites))

    def with_windows(self, windows: Sequence[int]) -> Plan:
        """The same plan for a model whose sites attend to so many tokens (0: to all). Those of which nothing is ever
        quantized have 16 bits.
        """
        shapes = [replace(site.shape, window=window) for site, window in zip(self.sites, windows, strict=True)]
        sites = [replace(site, shape=shape) for site, shape in zip(self.sites, shapes, strict=True)]
        return replace(
            self, sites=tuple(site if is_packed(site.window, self.recent) else site.unquantized() for site in sites)
        )

    def check_windows(self, windows: Sequence[int]) -> None:
        """Raise PlanError where the plan keeps fewer tokens than a site attends to, or attends to at least (0: all)."""
        for site, window in zip(self.sites, windows, strict=True):
            if site.window and not 0 < window <= site.window:
                raise PlanError(
                    f"the plan keeps the last {site.window} tokens of {site.layer}, which attends to "
                    f"{window or 'all'}: make a new plan for this model"
                )

    def as_json(self) -> str:
        """What `save` writes: equal for equal plans."""
        return _to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, one site a line. A file already at `path` is replaced in one step.

        Raises PlanError where the file cannot be written; what was at `path` before is then still there.
        """
        path = Path(path)
        try:
            with replacing(path) as unfinished:
                unfinished.write_text(self.as_json(), encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write the plan to {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises PlanError where the file cannot be read, is no plan, is damaged, or comes from a newer version.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not JSON, or is damaged ({error}); save the plan again") from error
        except KVMixError as error:
            raise PlanError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of which `as_json` gave this. Raises PlanError as `load` does."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"this is not JSON, or is damaged ({error}); save the plan again") from error
        return _from_document(document)

    def check_attention(self, layers: Sequence[str], shapes: Sequence[SiteShape]) -> None:
        """Raise PlanError, saying what differs, unless the plan is for such attention sites, in this order. Something
        may stand in front of the names of all layers, as around a model with adapters.
        """
        difference = _difference(self.sites, layers, shapes)
        if difference:
            raise PlanError(f"this plan was made for another model: {difference}. Make a new plan for this model")

    def fitted(
        self, fingerprint: str, layers: Sequence[str], shapes: Sequence[SiteShape], *, strict: bool = False
    ) -> Plan:
        """The plan for a model of this structure with these attention sites: the one that it was made for, or, unless
        `strict`, a version of it with the same attention, be it with adapters or trained on, quantized or with a longer
        vocabulary.

        Raises PlanError, saying what differs, for another model.
        """
        self.check_attention(layers, shapes)
        if strict and fingerprint != self.fingerprint:
            raise PlanError(
                "this plan was made for another version of this model: the attention is the same, the names or shapes "
                "of other parameters differ. Make a new plan, or leave strict out"
            )
        sites = tuple(replace(site, layer=layer) for site, layer in zip(self.sites, layers, strict=True))
        return replace(self, fingerprint=fingerprint, sites=sites)


def _layout(site: SitePlan, sinks: int, recent: int, rollback: int) -> StateLayout:
    """Where the plan leaves so many sinks and recent tokens unquantized."""
    sinks, recent = unpacked_tokens(site.window, sinks, recent)
    return StateLayout(site.shape, key=site.key, value=site.value, sinks=sinks, recent=recent, rollback=rollback)


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    """Mean of (number, weight) pairs; of none, what an element has that is never quantized."""
    total = sum(weight for _, weight in weighted)
    return sum(number * weight for number, weight in weighted) / total if total else float(UNQUANTIZED_BITS)


def _difference(sites: Sequence[SitePlan], layers: Sequence[str], shapes: Sequence[SiteShape]) -> str:
    """What differs between the sites of a plan and those of a model; empty where nothing does."""
    if len(sites) != len(layers):
        return f"the plan has {len(sites)} attention sites, this model {len(layers)}"
    in_front = _in_front(sites[0].layer, layers[0])
    for site, layer in zip(sites, layers, strict=True):
        if in_front is None or _in_front(site.layer, layer) != in_front:
            return f"the plan has an attention site {site.layer!r} where this model has {layer!r}"
    for site, shape in zip(sites, shapes, strict=True):
        for name in ("kv_heads", "key_dim", "value_dim"):
            planned, actual = getattr(site.shape, name), getattr(shape, name)
            if planned != actual:
                return f"at {site.layer} the plan has {name}={planned}, this model {name}={actual}"
    return ""


def _in_front(planned: str, layer: str) -> tuple[str, str] | None:
    """What stands in front of what two layers' names have in common, in the plan and in the model; None where one is
    not the end of the other.
    """
    longer, shorter = (planned, layer) if len(planned) > len(layer) else (layer, planned)
    if not f".{longer}".endswith(f".{shorter}"):
        return None
    return planned.removesuffix(shorter), layer.removesuffix(shorter)


def _to_json(plan: Plan) -> str:
    head = {
        "format": FORMAT,
        "version": VERSION,
        "policy": plan.policy,
        "fingerprint": plan.fingerprint,
        "sinks": plan.sinks,
        "recent": plan.recent,
        "exact_chunks": plan.exact_chunks,
        "context": plan.context,
    }
    fields = [f"  {json.dumps(name)}: {json.dumps(content)}" for name, content in head.items()]
    sites = ",\n".join("    " + json.dumps(_site_record(site)) for site in plan.sites)
    return "{\n" + ",\n".join(fields) + ',\n  "sites": [\n' + sites + "\n  ]\n}\n"


def _site_record(site: SitePlan) -> dict[str, object]:
    record: dict[str, object] = {
        "layer": site.layer,
        "kv_heads": site.kv_heads,
        "key_dim": site.key_dim,
        "value_dim": site.value_dim,
        "key": _precision_record(site.key),
        "value": _precision_record(site.value),
    }
    if site.channel_tiers:
        record["channel_tiers"] = site.channel_tiers
    if site.window:
        record["window"] = site.window
    if site.key_exponents:
        record["key_exponents"] = site.key_exponents
    if site.value_exponents:
        record["value_exponents"] = site.value_exponents
    if site.values_rotated:
        record["values_rotated"] = True
    return record


def _precision_record(precision: Precision) -> dict[str, object]:
    record = {"bits": precision.bits, "group": precision.group, "scale_bits": precision.scale_bits}
    return record | ({"important_bits": precision.important_bits} if precision.important_bits else {})


def _from_document(document: object) -> Plan:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError('this is JSON, but not a plan: a plan says "format": "kvmix-plan"')
    version = _field(document, "version", int, "the plan")
    if version > VERSION:
        raise PlanError(f"this plan (version {version}) was made by a newer kvmix_compile; upgrade kvmix_compile")
    if version not in READ_VERSIONS:
        raise PlanError(f"this plan (version {version}) was made by an older kvmix_compile; make a new one")
    records = _field(document, "sites", list, "the plan")
    return Plan(
        sites=tuple(_site_plan(record, f"site {index}") for index, record in enumerate(records)),
        policy=_field(document, "policy", str, "the plan"),
        fingerprint=_field(document, "fingerprint", str, "the plan"),
        sinks=_field(document, "sinks", int, "the plan"),
        recent=_field(document, "recent", int, "the plan"),
        exact_chunks=_field(document, "exact_chunks", bool, "the plan") if "exact_chunks" in document else False,
        context=_field(document, "context", int, "the plan") if "context" in document else 0,
    )


def _site_plan(record: object, where: str) -> SitePlan:
    if not isinstance(record, dict):
        raise PlanError(f"{where} is not a JSON object; save the plan again")
    record = {RENAMED.get(name, name): content for name, content in record.items() if isinstance(name, str)}
    return SitePlan(
        layer=_field(record, "layer", str, where),
        shape=SiteShape(
            kv_heads=_field(record, "kv_heads", int, where),
            key_dim=_field(record, "key_dim", int, where),
            value_dim=_field(record, "value_dim", int, where),
            window=_field(record, "window", int, where) if "window" in record else 0,
        ),
        key=_precision(_field(record, "key", dict, where), f"the key of {where}"),
        value=_precision(_field(record, "value", dict, where), f"the value of {where}"),
        channel_tiers=_channel_tiers(record, where),
        key_exponents=_integers(record, "key_exponents", where),
        value_exponents=_integers(record, "value_exponents", where),
        values_rotated=_field(record, "values_rotated", bool, where) if "values_rotated" in record else False,
    )


def _channel_tiers(record: dict[str, object], where: str) -> tuple[str, ...]:
    if "channel_tiers" not in record:
        return ()
    tiers = _field(record, "channel_tiers", list, where)
    if not all(isinstance(of_head, str) for of_head in tiers):
        raise PlanError(f"{where}: channel_tiers must be a string for each head; save the plan again")
    return tuple(tiers)


def _precision(record: object, where: str) -> Precision:
    bits, group, scale_bits = (_field(record, name, int, where) for name in ("bits", "group", "scale_bits"))
    important_bits = _integers(record, "important_bits", where)
    try:
        return Precision(bits, group, scale_bits, important_bits)
    except KVMixError as error:
        raise PlanError(f"{where}: {error}") from error


def _integers(record: object, name: str, where: str) -> tuple[int, ...]:
    """Of a field that may be missing."""
    if not isinstance(record, dict) or name not in record:
        return ()
    numbers = _field(record, name, list, where)
    if not all(type(number) is int for number in numbers):
        raise PlanError(f"{where}: {name} must be a list of numbers; save the plan again")
    return tuple(numbers)


def _field(record: object, name: str, kind: type[FieldType], where: str) -> FieldType:
    """The field `name` of a JSON object, which must be there and of this type."""
    if not isinstance(record, dict):
        raise PlanError(f"{where} is not a JSON object; save the plan again")
    if name not in record:
        raise PlanError(f"{where} lacks the field {name!r}; save the plan again")
    content = record[name]
    # Not isinstance: JSON's true is an int to Python.
    if type(content) is not kind:
        raise PlanError(f"{name!r} of {where} is {content!r}, of the wrong type; save the plan again")
    return content
