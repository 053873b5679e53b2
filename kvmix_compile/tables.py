"""Tables for the terminal: sizes of a cache, and perplexities of several configurations."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Column, Table

from kvmix_compile.cache import KVMixCache
from kvmix_compile.passes.plan import Plan
from kvmix_compile.report import Report

UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class CacheSize:
    """What a cache occupies. `elements`: keys and values of all tokens held, counted one by one."""

    tokens: int
    elements: int
    nbytes: int

    @classmethod
    def of(cls, cache: KVMixCache) -> "CacheSize":
        tokens = int(cache.lengths.sum())
        per_token = sum(site.key_elements + site.value_elements for site in cache.plan.sites)
        return cls(tokens, tokens * per_token, cache.nbytes)

    def unquantized(self, itemsize: int = 2) -> int:
        """Bytes of the same elements at `itemsize` bytes each."""
        return self.elements * itemsize

    def __str__(self) -> str:
        share = self.unquantized() / self.nbytes
        return (
            f"cache of {self.tokens} tokens: {megabytes(self.nbytes)}, {share:.2f} times smaller than in 16 bits "
            f"({megabytes(self.unquantized())}); {8 * self.nbytes / self.elements:.2f} bits per element, all counted"
        )


@dataclass(frozen=True)
class Evaluated:
    """One configuration and its perplexity through the cache. Bits are per cached element."""

    configuration: str
    code_bits: float
    stored_bits: float
    perplexity: float

    @classmethod
    def original(cls, perplexity: float) -> "Evaluated":
        return cls("original", UNQUANTIZED_BITS, UNQUANTIZED_BITS, perplexity)

    @classmethod
    def compressed(cls, name: str, plan: Plan, perplexity: float) -> "Evaluated":
        return cls(name, plan.code_bits, plan.storage_bits, perplexity)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def perplexity_table(rows: Sequence[Evaluated], title: str) -> Table:
    """A line for each configuration."""
    table = Table(title=title)
    table.add_column("configuration")
    for name in ("code bits", "stored bits", "perplexity"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.configuration, f"{row.code_bits:.2f}", f"{row.stored_bits:.2f}", f"{row.perplexity:.3f}")
    return table


def sites_table(report: Report) -> Table:
    """A line for each attention that was matched in a model."""
    table = Table(
        Column("layer", no_wrap=True), "heads", "KV heads", "head dim", "mask", "soft cap", title=report.model
    )
    for site in report.sites:
        dim = str(site.key_dim) if site.key_dim == site.value_dim else f"{site.key_dim}, values {site.value_dim}"
        cap = f"{site.softcap:g}" if site.softcap else "none"
        table.add_row(site.layer, str(site.query_heads), str(site.kv_heads), dim, site.mask, cap)
    return table


def times(report: Report) -> str:
    """Where the time went, stage by stage."""
    return "time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
