"""Measure: how much each site's keys and values matter to the loss.

One forward and one backward of the captured graph for each calibration row give two answers:

- the KVmix score (arXiv 2506.08018): the norm of the loss's gradient with respect to the weights of the key and of the
  value projection;
- the sensitivity to each candidate precision: half the sum, over the tokens that read and a head's channels, of (sum
  over the stored tokens of how the loss changes with this read x quantization error)^2. This is the second-order
  increase of the loss, with the Hessian replaced by the empirical Fisher information, of which only what joins the
  stored tokens that one token reads through one channel is kept.
  Unlike the score, it compares keys with values and one precision with another, because the error is the one that the
  quantizer really makes. Only reads of *stored* keys and values count, those that a later token reads from the cache
  in quantized form: what it reads of recent tokens and of attention sinks has no error to multiply.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

from torch import Tensor

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, UNQUANTIZED_BITS, Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import is_packed
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.allocate.policies import Policy, SiteImportance, allocate
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import CalibrationError
from kvmix_compile.passes.match.mixing import running
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.measure.products import products_in_float32
from kvmix_compile.passes.measure.read_again import KeyReaders
from kvmix_compile.passes.measure.recorder import Recorder
from kvmix_compile.passes.measure.sensitivity import Tally, candidates_for
from kvmix_compile.passes.measure.stored_reads import JointReads, RowAttention, StoredReads, stored_reads
from kvmix_compile.passes.rewrite.rotation import back, there

# A budget holds in texts of so many tokens and of more. In shorter ones a model with sliding windows takes more bits
# than it says: the longer this is, the more bits the windows get.
USUAL_CONTEXT = 8192


@dataclass(frozen=True)
class Importance:
    """What was measured, and for which state: the first `sinks` and last `recent` tokens of a row stay in full
    precision. context: tokens of the texts that a budget is for, where none are told.
    """

    sites: tuple[SiteImportance, ...]
    fingerprint: str
    sinks: int
    recent: int
    tokens: int
    loss: float
    context: int = 0

    def allocate(
        self,
        *,
        budget: float | None = None,
        storage_budget: float | None = None,
        policy: Policy = "fisher",
        context: int | None = None,
    ) -> Plan:
        """A plan that spends a budget of bits where they matter; see passes.allocate.policies. A site whose window is
        no longer than the recent tokens has nothing quantized, and is no part of the budget.

        context: tokens of the texts that the budget is for, over all of whose elements bits are averaged: sites with a
            sliding window hold few of a long text, and get more bits. None: those of usual_context.
        """
        context = self.context if context is None else context
        packed = [is_packed(site.window, self.recent) for site in self.sites]
        quantized = [site.in_context(context) for site in compress(self.sites, packed)]
        chosen = allocate(quantized, policy=policy, budget=budget, storage_budget=storage_budget) if quantized else ()
        untouched, in_order = Precision(UNQUANTIZED_BITS), iter(chosen)
        # The published methods store values as they are.
        rotated = policy == "fisher"
        sites = tuple(
            _site_plan(site, *(next(in_order) if is_quantized else (untouched, untouched)), rotated)
            for site, is_quantized in zip(self.sites, packed, strict=True)
        )
        # Without windows the context says nothing, and a plan nothing of it.
        told = context if any(site.window for site in quantized) else 0
        return Plan(sites, policy, self.fingerprint, self.sinks, self.recent, context=told)


def usual_context(captured: Captured) -> int:
    """Tokens of the texts that a budget is for where none are told: those the model takes, USUAL_CONTEXT at most."""
    return min(captured.longest_context or USUAL_CONTEXT, USUAL_CONTEXT)


def check_reachable(
    sites: Sequence[AttentionSite],
    *,
    recent: int,
    budget: float | None = None,
    storage_budget: float | None = None,
    policy: Policy = "fisher",
    context: int = 0,
) -> None:
    """Raise BudgetError or AllocationError where no measurement could make a plan of this budget."""
    unmeasured = tuple(
        SiteImportance(
            layer=site.layer,
            shape=site.shape,
            key_gradient_norm=0.0,
            value_gradient_norm=0.0,
            key_sensitivity=dict.fromkeys(candidates_for(site.key_dim, Axis.TOKENS), 0.0),
            value_sensitivity=dict.fromkeys(candidates_for(site.value_dim, Axis.CHANNELS), 0.0),
        )
        for site in sites
    )
    importance = Importance(unmeasured, "", sinks=0, recent=recent, tokens=0, loss=0.0)
    importance.allocate(budget=budget, storage_budget=storage_budget, policy=policy, context=context)


def _site_plan(site: SiteImportance, key: Precision, value: Precision, rotated: bool) -> SitePlan:
    return SitePlan(
        layer=site.layer,
        shape=site.shape,
        key=key,
        value=value,
        channel_tiers=site.channel_tiers if key.important_bits else (),
        key_exponents=site.key_exponents if key.is_quantized else (),
        value_exponents=site.value_exponents if value.is_quantized else (),
        values_rotated=rotated and value.is_quantized,
    )


def usable_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """Those long enough to measure something on. Raises CalibrationError where none is."""
    usable = [row for row in rows if row.numel() >= BLOCK_TOKENS]
    if not usable:
        raise CalibrationError(
            f"calibration needs a row of at least {BLOCK_TOKENS} tokens, the block that is quantized together: pass "
            "longer texts"
        )
    return usable


def measure(
    captured: Captured,
    sites: Sequence[AttentionSite],
    rows: Sequence[Tensor],
    *,
    sinks: int,
    recent: int,
    on_row: Callable[[], None] = lambda: None,
) -> Importance:
    """The importance of every site on `rows` of token ids (int64 `[tokens]`), one forward and one backward each.

    The model's weights need no gradient and get none. `on_row` is called after each row.
    """
    rows = usable_rows(rows)
    recorder = Recorder(captured, sites)
    keys = [Tally(candidates_for(site.key_dim, Axis.TOKENS), Axis.TOKENS) for site in sites]
    values = [Tally(candidates_for(site.value_dim, Axis.CHANNELS), Axis.CHANNELS) for site in sites]
    total_loss, predicted = 0.0, 0
    products = products_in_float32(captured.model)
    for row in rows:
        with running(captured), products:
            total_loss += _add_row(recorder, row, keys, values, sinks, recent)
        predicted += row.numel() - 1
        on_row()
    for tally in (*keys, *values):
        tally.join(captured.head_ranks, captured.query_ranks)
    # Elements first: what is wrong with those of one layer is wrong with the gradients of all before it.
    for check in (Tally.check_elements, Tally.check_losses):
        for site, key, value in zip(sites, keys, values, strict=True):
            check(key, "keys", site.layer)
            check(value, "values", site.layer)
    measured = tuple(
        _site_importance(site.layer, captured.whole(site.shape), key, value, rows=len(rows))
        for site, key, value in zip(sites, keys, values, strict=True)
    )
    return Importance(
        measured,
        fingerprint(captured, sites),
        sinks=sinks,
        recent=recent,
        tokens=sum(row.numel() for row in rows),
        loss=total_loss / predicted,
        context=usual_context(captured),
    )


def fingerprint(captured: Captured, sites: Sequence[AttentionSite]) -> str:
    """A digest of the model's structure: its parameters' names and shapes, and its sites.

    The same for every set of weights, and over however many ranks they are spread.
    """
    parts = [f"{name}{tuple(parameter.shape)}" for name, parameter in captured.original.named_parameters()]
    queries = captured.query_ranks.count
    shapes = [(site, captured.whole(site.shape)) for site in sites]
    parts += [
        f"{attention.layer}{(site.query_heads * queries, whole.kv_heads, site.key_dim, site.value_dim)}"
        for site, whole in shapes
        for attention in site.attentions
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _site_importance(layer: str, shape: SiteShape, key: Tally, value: Tally, rows: int) -> SiteImportance:
    key_losses, channel_tiers = key.losses(rows), tuple[str, ...]()
    tiers = key.tiers()
    if divided := key.losses_of_tiers(tiers, rows):
        key_losses |= divided
        channel_tiers = tuple("".join(map(str, of_head)) for of_head in tiers.tolist())
    return SiteImportance(
        layer=layer,
        shape=shape,
        key_gradient_norm=key.gradient_norm / rows,
        value_gradient_norm=value.gradient_norm / rows,
        key_sensitivity=key.where_saturated(key_losses, rows),
        value_sensitivity=value.where_saturated(value.losses(rows), rows),
        channel_tiers=channel_tiers,
        key_exponents=key.exponents(),
        value_exponents=value.exponents(),
    )


def _state_in(tokens: int, sinks: int, recent: int) -> tuple[int, int]:
    """The sinks and recent tokens that a row of so many tokens is measured with: fewer where it is too short for half
    of its tokens to read from storage.
    """
    shortened = max(1.0, 2 * (sinks + recent) / tokens)
    return int(sinks / shortened), int(recent / shortened)


def _add_row(
    recorder: Recorder, row: Tensor, keys: Sequence[Tally], values: Sequence[Tally], sinks: int, recent: int
) -> float:
    """Add one row's gradients and sensitivities to the tallies; returns its summed loss in nats."""
    tokens = row.numel()
    sinks, recent = _state_in(tokens, sinks, recent)
    loss, gradients = recorder.gradients_on(row)
    for site, pair, key, value in zip(recorder.sites, recorder.projections, keys, values, strict=True):
        for node, projection, tally in ((site.key, pair[0], key), (site.value, pair[1], value)):
            tally.gradient_norm += recorder.weight_gradient_norm(node, projection, gradients) / (tokens - 1)
    for site, key, value in zip(recorder.sites, keys, values, strict=True):
        # What is stored once is lost by each attention that reads it, in another layer's outcome.
        for attention in site.attentions:
            read = recorder.attention_on(attention, gradients[attention.output][0], sinks, recent)
            _add_reads(attention, read, key, value)
    recorder.forget()
    return loss


def _add_reads(site: AttentionSite, row: RowAttention, key: Tally, value: Tally) -> None:
    """Add what one attention reads of the row to the tallies of its keys and values."""
    keys = row.key[..., site.value_dim :] if site.values_are_keys else row.key
    predictions = keys.shape[1] - row.sinks - row.recent
    of_keys, of_values = _how_read(site, row)
    key.add(keys, of_keys[0], row.sinks, predictions, of_keys[1])
    # As they are stored, which is rotated.
    rotated = row.value @ there(site.value_dim, row.value)
    value.add(rotated, of_values[0], row.sinks, predictions, of_values[1])


def _how_read(
    site: AttentionSite, row: RowAttention
) -> tuple[tuple[StoredReads, KeyReaders], tuple[StoredReads | JointReads, KeyReaders | None]]:
    """How what a site stores is read, keys and values, which are rotated; and who reads again what is scored."""
    scored, weighed = stored_reads(row)
    # Of the dtype that values are stored in: float16's rotation divides by another power of two.
    inverse = back(site.value_dim, row.value).float()
    if not site.values_are_keys:
        return (scored, KeyReaders.of(row)), (weighed.of_turned(inverse), None)
    first, others = slice(0, site.value_dim), slice(site.value_dim, None)
    both = JointReads((scored.of_channels(first), weighed)).of_turned(inverse)
    return (scored.of_channels(others), KeyReaders.of(row, others)), (both, KeyReaders.of(row, first, inverse))
