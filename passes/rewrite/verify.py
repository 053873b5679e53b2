"""Verify: the rewritten graph, run losslessly, must give the logits of the model itself: for one row and several, one
token and many, whole and in uneven chunks, and for whatever sizes export assumed not to come.

This catches what no pass understood: a convolution or recurrence over the sequence, a second use of keys or values, a
position they did not see, another path for some sizes. What it cannot tell right from wrong is a model that rounds its
activations to few levels, whose logits depend on the order of its arithmetic: that is said of it (nudged.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import SiteState, StateLayout, unpacked_tokens
from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.single_nodes import nothing_carried
from kvmix_compile.passes.errors import UnsupportedModelError, VerifyError
from kvmix_compile.passes.graph.rounding import TOLERANCE, coarsest_dtype, difference
from kvmix_compile.passes.match.mixing import constant_reach, running, suspects
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.rewrite import nudged, original
from kvmix_compile.passes.rewrite.lengths import Assumption, broken_assumptions
from kvmix_compile.passes.rewrite.rewrite import Rewritten, rewrite
from kvmix_compile.passes.rewrite.together import reads_together

# A small state, so that a short probe passes through sinks, packed blocks and recent window. The chunks straddle their
# boundaries.
SINKS, RECENT = 4, 32
CHUNKS = (7, 1, 40, 1, 33, 2, 29)
PADDING = 3
# Rows and tokens of the calls without a cache: export's graphs are of several of both, and may be wrong for one.
WHOLE = ((2, 48, "two rows"), (1, 37, "one row"), (3, 1, "rows of one token"), (1, 1, "one token"))

# Tokens of a text that is read one token a call: some of them are packed by its end.
ONE_BY_ONE = 72

# A difference is put down to rounding up to so many times what a nudge of the embeddings makes.
OF_ONE_SIZE = 10

# Rows times tokens that a model is run with at most to see whether an assumption that does not hold there matters, and
# for how many sizes it is.
LARGEST_TRIAL = 4096
TRIALS = 3


def verify(captured: Captured, sites: Sequence[AttentionSite]) -> float:
    """Raise VerifyError unless the rewritten graph gives the model's logits, and UnsupportedModelError where it holds
    for some sizes only.

    A model whose tokens of one call see each other is held against the graph one token a call.

    Returns the difference (root mean square over the vocabulary) of the worst token, as a share of the logits' standard
    deviation.
    """
    trial = _Trial(captured, sites, rewrite(captured, sites, [StoredSite(_lossless_layout(site)) for site in sites]))
    chunks = list(_chunks(captured.longest_context, constant_reach(trial.rewritten.module.graph, captured)))
    most = captured.longest_context or LARGEST_TRIAL
    with torch.no_grad():
        for assumption in broken_assumptions(captured, captured.longest_context):
            trial.check_assumption(assumption)
        try:
            shares = [
                *(trial.check_whole(rows, min(tokens, most), what) for rows, tokens, what in WHOLE),
                trial.check_chunks(chunks),
            ]
        except VerifyError:
            if not reads_together(captured):
                raise
            shares = [trial.check_one_by_one()]
    return max(shares)


@dataclass(frozen=True)
class _Trial:
    """The model, and the graph that is to take its place."""

    captured: Captured
    sites: Sequence[AttentionSite]
    rewritten: Rewritten

    def check_whole(self, rows: int, tokens: int, what: str) -> float:
        """The difference in one call of so many rows and tokens. Raises VerifyError where there is one."""
        share = self._whole(rows, tokens)
        if not share <= self._tolerance:
            self._check_rounding(share)
            raise VerifyError(
                f"the graph that was made of {self.captured.name} gives other logits for {what} than "
                f"the model itself, by {share:.2g} standard deviations: its forward does something else there, which "
                "is not supported"
            )
        return share

    def check_one_by_one(self) -> float:
        """The difference where both read one token a call. Raises VerifyError where there is one."""
        tokens = min(ONE_BY_ONE, self.captured.longest_context or ONE_BY_ONE)
        ids = self.captured.random_ids(1, tokens)
        expected = original.in_chunks(self.captured.original, ids, [1] * tokens)
        assert expected is not None  # or it would not have been seen to read together
        share = difference(self._run(ids, [1] * tokens), expected)
        if not share <= self._tolerance:
            raise VerifyError(
                f"the graph that was made of {self.captured.name} gives other logits than the model itself, by "
                f"{share:.2g} standard deviations, where both read one token a call: this is not supported"
            )
        return share

    def check_assumption(self, assumption: Assumption) -> None:
        """Raise UnsupportedModelError where an assumption about sizes does not hold and it matters, or cannot be seen
        not to.
        """
        within = [sizes for sizes in assumption.broken if sizes[0] * sizes[1] <= LARGEST_TRIAL]
        sizes = dict.fromkeys([*within[:TRIALS], *within[-1:]])
        if not sizes or not all(self._agrees(rows, tokens) for rows, tokens in sizes):
            raise UnsupportedModelError(
                f"the graph of {self.captured.name} holds where {assumption.text} and not for every "
                f"number of rows and tokens: its forward takes another path for others, at {assumption.where}, which "
                "is not supported"
            )

    def check_chunks(self, chunks: Sequence[int]) -> float:
        """The difference where the text comes in chunks: of one row from the model in chunks, on its own cache if it
        has one, and of one that is padded from the model on the whole row. Raises VerifyError where there is one.
        """
        padding = min(PADDING, chunks[0] - 1) if self._leaves_padding_out else 0
        ids, model = self.captured.random_ids(2, sum(chunks)), self.captured.original
        first, second = self._of_first_row(ids[:1], chunks), original.whole(model, ids[1:, padding:])
        try:
            actual = self._run(ids, chunks, padding)
        except (RuntimeError, IndexError) as error:  # shapes or positions that no longer go together
            raise VerifyError(
                f"the model cannot be given a KV cache: {suspects(self.captured)}; run in chunks with one, it fails"
            ) from error
        share = max(difference(actual[:1], first), difference(actual[1:, padding:], second))
        if not share <= self._tolerance:
            share = min(share, self._share_of_caches(actual, first, ids, [chunks[0] - padding, *chunks[1:]], padding))
        if not share <= self._tolerance:
            self._check_rounding(share)
            raise VerifyError(
                f"the model cannot be given a KV cache: {suspects(self.captured)}; run in chunks with one, its logits "
                f"differ by {share:.2g} standard deviations from those of the whole text"
            )
        return share

    @property
    def _leaves_padding_out(self) -> bool:
        """Whether padding leaves no trace in a row. Of a state it may: see runtime/numbering.py."""
        return not (self.rewritten.equal_rows or self.rewritten.carried)

    def _of_first_row(self, ids: Tensor, chunks: Sequence[int]) -> Tensor:
        """What the first row is held against: the model in chunks; whole, where it keeps no cache, or goes on rightly
        from a state by single tokens alone.
        """
        model, of_single_tokens = self.captured.original, any(one.stepwise for one in self.captured.stateful)
        in_chunks = None if of_single_tokens else original.in_chunks(model, ids, chunks)
        return original.whole(model, ids) if in_chunks is None else in_chunks

    def _share_of_caches(
        self, actual: Tensor, first: Tensor, ids: Tensor, chunks: Sequence[int], padding: int
    ) -> float:
        """The difference where both rows of the model are in chunks: of a model that computes something else in chunks
        than whole, as some that change their positions for long texts do, a twin does what it does.
        """
        second = original.in_chunks(self.captured.original, ids[1:, padding:], chunks)
        if second is None:
            return torch.inf
        return max(difference(actual[:1], first), difference(actual[1:, padding:], second))

    def _check_rounding(self, share: float) -> None:
        """Raise VerifyError where a difference of logits is of the size of those that rounding makes in this model."""
        captured, tokens = self.captured, sum(CHUNKS)
        with running(captured):
            row = captured.random_ids(1, min(captured.longest_context or tokens, tokens))[0]
            response = nudged.response(captured, row)
        if response > self._tolerance and share <= OF_ONE_SIZE * response:
            raise VerifyError(
                f"{captured.name} rounds its activations to so few levels that its logits differ by {share:.2g} "
                "standard deviations with the order of its arithmetic, in chunks or whole (a change of its embeddings "
                f"by {nudged.nudge(captured):.0e} of themselves makes {response:.2g}), so no graph can be verified "
                "against it: quantize its weights and not its activations, or pass verify=False"
            )

    def _agrees(self, rows: int, tokens: int) -> bool:
        try:
            return self._whole(rows, tokens) <= self._tolerance
        except (RuntimeError, IndexError):
            return False

    def _whole(self, rows: int, tokens: int) -> float:
        """The difference in one call; none where the model itself cannot be called so."""
        ids = self.captured.random_ids(rows, tokens)
        try:
            expected = original.whole(self.captured.original, ids)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):
            return 0.0
        with running(self.captured):
            return difference(self._run(ids, [tokens]), expected)

    def _run(self, ids: Tensor, chunks: Sequence[int], padding: int = 0) -> Tensor:
        """Float32 `[rows, tokens, vocabulary]` of the rewritten graph; the last row begins with `padding` tokens that
        are none.
        """
        states = [_lossless_state(site, *ids.shape) for site in self.sites]
        tensors = [tensor for state in states for tensor in state.tensors()]
        lengths, logits = torch.zeros(len(ids), dtype=torch.int64, device=ids.device), []
        carried = nothing_carried(self.rewritten.carried)
        starts = torch.zeros_like(lengths)
        starts[-1] = padding
        for part in ids.split(list(chunks), dim=1):
            every = torch.arange(part.shape[1], device=ids.device)
            positions = ((lengths - starts)[:, None] + every).clamp(min=0)
            found = self.rewritten.module(part, positions, every, lengths, starts, *tensors, *carried)
            found, carried = self.rewritten.apart(found)
            logits.append(found.float())
            lengths, starts = lengths + part.shape[1] - starts, torch.zeros_like(starts)
        return torch.cat(logits, dim=1)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[coarsest_dtype(self.captured.graph)]


def _chunks(longest_context: int | None, reach: int) -> Iterator[int]:
    """The sizes of the chunks of a text that the model has positions for, beyond whatever its graph reaches back."""
    left = longest_context or sum(CHUNKS) + reach
    for chunk in (CHUNKS[0] + reach, *CHUNKS[1:]):
        if min(chunk, left) > 0:
            yield min(chunk, left)
        left -= chunk


def _lossless_layout(site: AttentionSite) -> StateLayout:
    sinks, recent = unpacked_tokens(site.window, SINKS, RECENT)
    return StateLayout(site.shape, key=Precision(16), value=Precision(16), sinks=sinks, recent=recent)


def _lossless_state(site: AttentionSite, rows: int, tokens: int) -> SiteState:
    layout, key = _lossless_layout(site), site.key.meta["val"]
    return SiteState.allocate(layout, rows, layout.required_blocks(tokens), key.dtype, key.device)
