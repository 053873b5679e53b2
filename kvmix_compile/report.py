"""The report: what was found in a model, what was done with it, and where the time went."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.passes.capture.single_nodes import CarriedState
from kvmix_compile.passes.graph.record import PassRecord
from kvmix_compile.passes.match.sites import Refusal


@dataclass(frozen=True)
class SiteReport(Shaped):
    """One attention that was matched: its module's path, heads, dimensions and what it does."""

    layer: str
    query_heads: int
    shape: SiteShape
    attention: str
    scale: float


@dataclass
class Report:
    """What `apply`, `analyze` or `doctor` found and did.

    verified: largest difference between the rewritten graph's logits and the captured graph's, as a share of the
        logits' standard deviation; None where it was not checked.
    calibration: what the importance was measured on; None where a plan was given.
    own_cache_bytes: bytes that the model's own cache holds of each token, where it keeps one. token_bytes: bytes that
        the compressed one holds of a token that is packed, once there is a plan.
    carried: what layers carry from token to token besides keys and values, at the model's precision.
    notes: what is kept otherwise than usual, and why.
    passes: what each pass over the graph matched and what it left, in their order.
    seconds: how long each stage took.
    """

    model: str
    sites: tuple[SiteReport, ...] = ()
    refused: tuple[Refusal, ...] = ()
    carried: tuple[CarriedState, ...] = ()
    verified: float | None = None
    calibration: str | None = None
    problem: str | None = None
    own_cache_bytes: float | None = None
    token_bytes: float | None = None
    notes: tuple[str, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to `seconds[stage]`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.sites)} attention sites matched, {len(self.refused)} refused"]
        lines += [
            f"  {site.layer}: {site.query_heads} query heads, {site.kv_heads} KV heads, head_dim "
            f"{site.key_dim}/{site.value_dim}, {site.attention}"
            for site in self.sites
        ]
        lines += [
            f"  {one.layer}: carries a state of {one.row_bytes} bytes a row, at the model's precision"
            for one in self.carried
        ]
        lines += [f"  {refusal.layer}: REFUSED: {refusal.reason}" for refusal in self.refused]
        if self.verified is not None:
            lines.append(f"verified: logits agree to {self.verified:.1e} of their standard deviation")
        if self.calibration is not None:
            lines.append(f"calibrated on {self.calibration}")
        lines += self._sizes()
        lines += self.notes
        lines += [f"pass {record.name}: {record}" for record in self.passes]
        if self.problem is not None:
            lines.append(f"PROBLEM: {self.problem}")
        if self.seconds:
            lines.append("time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))
        return "\n".join(lines)

    def _sizes(self) -> list[str]:
        """What a token takes in this cache and in the model's own, as far as it is known."""
        if self.token_bytes is None:
            return []
        own = f", in the model's own cache {self.own_cache_bytes:.0f}" if self.own_cache_bytes is not None else ""
        return [f"bytes a token: {self.token_bytes:.0f} once it is packed{own}"]
