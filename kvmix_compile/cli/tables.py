"""Tables for the terminal: sizes of a cache, results of an evaluation, what was found in a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Column, Table

from kvmix_compile.evaluate.arrival import Arrival
from kvmix_compile.evaluate.comparison import Result
from kvmix_compile.evaluate.drafting import Drafting
from kvmix_compile.evaluate.passkey import Retrieval
from kvmix_compile.evaluate.tasks import Score
from kvmix_compile.evaluate.writing import Writing
from kvmix_compile.report import Report
from kvmix_compile.runtime.cache import KVMixCache


@dataclass(frozen=True)
class CacheSize:
    """What a cache occupies. `elements`: keys and values of all tokens held, counted one by one."""

    tokens: int
    elements: int
    nbytes: int

    @classmethod
    def of(cls, cache: KVMixCache) -> "CacheSize":
        """What a cache occupies now."""
        tokens = int(cache.lengths.sum())
        per_token = sum(site.key_elements + site.value_elements for site in cache.plan.sites)
        return cls(tokens, tokens * per_token, cache.nbytes)

    def unquantized(self, itemsize: int = 2) -> int:
        """Bytes of the same elements at `itemsize` bytes each."""
        return self.elements * itemsize

    @property
    def beside_16_bits(self) -> str:
        """Its bytes, and how they compare with those of 16 bits an element."""
        unquantized = self.unquantized()
        return f"{megabytes(self.nbytes)}, {compared(self.nbytes, unquantized)} in 16 bits ({megabytes(unquantized)})"

    def __str__(self) -> str:
        bits = 8 * self.nbytes / self.elements
        return f"cache of {self.tokens} tokens: {self.beside_16_bits}; {bits:.2f} bits per element, all counted"


def compared(nbytes: int, other: int) -> str:
    """How large so many bytes are beside others, to go on with what these are: "3.41 times smaller than"."""
    smaller, larger = f"{other / nbytes:.2f}", f"{nbytes / other:.2f}"
    if "1.00" in (smaller, larger):
        return "as large as"
    return f"{smaller} times smaller than" if nbytes < other else f"{larger} times larger than"


def megabytes(count: int) -> str:
    """A number of bytes, written in megabytes of a million."""
    return f"{count / 1e6:.2f} MB"


def results_table(results: Sequence[Result], title: str) -> Table:
    """A line for each configuration."""
    table = Table(Column("configuration", overflow="fold"), title=title)
    for name in ("code\nbits", "stored\nbits", "held\nbits", "perplexity", "KL", "KL\n99.9%", "top-1"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row.configuration, f"{row.code_bits:.2f}", f"{row.stored_bits:.2f}", f"{row.held_bits:.2f}",
            f"{row.perplexity:.3f}", f"{row.divergence.mean:.4f}", f"{row.divergence.worst_permille:.3f}",
            f"{row.agreement:.1%}",
        )  # fmt: skip
    return table


def passkey_table(retrievals: Sequence[Retrieval]) -> Table:
    """A line for each configuration, a column for each length, and in it a mark for each depth."""
    lengths = sorted({retrieval.tokens for retrieval in retrievals})
    depths = list(dict.fromkeys(f"{retrieval.depth:g}" for retrieval in retrievals))
    table = Table(Column("configuration", overflow="fold"), title=f"passkeys at the depths {', '.join(depths)}")
    for length in lengths:
        table.add_column(f"{length} tokens", justify="right")
    table.add_column("retrieved", justify="right")
    for name in dict.fromkeys(retrieval.configuration for retrieval in retrievals):
        own = [retrieval for retrieval in retrievals if retrieval.configuration == name]
        marks = [
            "".join("+" if retrieval.retrieved else "-" for retrieval in own if retrieval.tokens == length)
            for length in lengths
        ]
        table.add_row(name, *marks, f"{sum(retrieval.retrieved for retrieval in own)}/{len(own)}")
    return table


def scores_table(scores: Sequence[Score]) -> Table:
    """A line for each task and length, a column for each configuration."""
    configurations = list(dict.fromkeys(score.configuration for score in scores))
    share = {(score.task, score.length, score.configuration): score for score in scores}
    table = Table("task", Column("tokens", justify="right"), title="what was expected, and the answers contain")
    for name in configurations:
        table.add_column(name, justify="right")
    for task, length in dict.fromkeys((score.task, score.length) for score in scores):
        own = [share[task, length, name] for name in configurations]
        table.add_row(task, str(length), *(f"{score.share:.0%} ± {score.error:.0%}" for score in own))
    return table


def arrivals_table(arrivals: Sequence[Arrival]) -> Table:
    """A line for each configuration and way."""
    table = Table(Column("configuration", overflow="fold"), "the text came", title="the same answer, however it came?")
    for name in ("KL", "KL from\ndecoded", "same\nanswer"):
        table.add_column(name, justify="right")
    for each in arrivals:
        same = "yes" if each.same_answer else "no"
        table.add_row(each.configuration, each.way, f"{each.divergence:.4f}", f"{each.from_decoded:.6f}", same)
    return table


def drafts_table(drafts: Sequence[Drafting]) -> Table:
    """A line for each configuration."""
    queries = list(drafts[0].step_seconds)
    table = Table(Column("configuration", overflow="fold"), title="drafts: tokens looked up in the prompt")
    for name in ("tokens\na step", "same\ntext", *(f"{number}\n(ms)" for number in queries)):
        table.add_column(name, justify="right")
    for each in drafts:
        times = (f"{1000 * each.step_seconds[number]:.1f}" for number in queries)
        table.add_row(each.configuration, f"{each.tokens_a_step:.2f}", "yes" if each.same_text else "no", *times)
    return table


def writing_table(writings: Sequence[Writing]) -> Table:
    """A line for each configuration, a column for each prompt: where its text begins to differ from the original's, how
    long it is and how much of it repeats itself.
    """
    prompts = list(dict.fromkeys(each.prompt for each in writings))
    title = "free writing: first difference / tokens (+: not ended) / repetition"
    table = Table(Column("configuration", overflow="fold"), title=title)
    for prompt in prompts:
        table.add_column(" ".join(prompt.split()[:4]), justify="right")
    for name in dict.fromkeys(each.configuration for each in writings):
        own = {each.prompt: each for each in writings if each.configuration == name}
        table.add_row(name, *(_written(own[prompt]) for prompt in prompts))
    return table


def _written(each: Writing) -> str:
    first = "none" if each.first_difference is None else str(each.first_difference)
    return f"{first} / {each.tokens}{'' if each.ended else '+'} / {each.repetition:.0%}"


def sites_table(report: Report) -> Table:
    """A line for each attention that was matched in a model."""
    table = Table(Column("layer", no_wrap=True), "heads", "KV heads", "head dim", "attention", title=report.model)
    for site in report.sites:
        dim = str(site.key_dim) if site.key_dim == site.value_dim else f"{site.key_dim}, values {site.value_dim}"
        table.add_row(site.layer, str(site.query_heads), str(site.kv_heads), dim, site.attention)
    return table


def times(report: Report) -> str:
    """Where the time went, stage by stage."""
    return "time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
