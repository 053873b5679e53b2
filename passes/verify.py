"""Verify: the rewritten graph, run losslessly in uneven chunks, must reproduce the captured graph's logits.

This catches any mixing of tokens that the passes did not understand: a convolution or recurrence over the sequence, a
second use of keys or values, a position they did not see.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvmix_compile.kernels.precision import Precision
from kvmix_compile.kernels.state import SiteState, StateLayout, unpacked_tokens
from kvmix_compile.passes.capture import Captured
from kvmix_compile.passes.errors import VerifyError
from kvmix_compile.passes.limits import vocabulary_size
from kvmix_compile.passes.mixing import running, suspects
from kvmix_compile.passes.rewrite import Rewritten, rewrite
from kvmix_compile.passes.rounding import coarsest_dtype
from kvmix_compile.passes.sites import AttentionSite

# A small state, so that a short probe passes through sinks, packed blocks and tail. The chunks straddle their
# boundaries.
SINKS, RECENT = 4, 32
CHUNKS = (7, 1, 40, 1, 33, 2, 29)
PADDING = 3

# Largest difference of a token's logits, as a share of their standard deviation. On SmolLM2-135M rounding makes 2e-5 in
# float32, 0.013 in float16 and 0.11 in bfloat16; a window of 100 tokens overlooked in one of 30 layers makes 0.4.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.25}


def verify(captured: Captured, sites: Sequence[AttentionSite], longest_context: int | None) -> float:
    """Raise VerifyError unless the rewritten graph gives the captured graph's logits.

    Returns the difference (root mean square over the vocabulary) of the worst token, as a share of the logits' standard
    deviation.
    """
    recents = [_lossless_layout(site).recent for site in sites]
    rewritten = rewrite(captured, sites, [(Precision(16), Precision(16))] * len(sites), recents)
    chunks = list(_chunks(longest_context))
    padding = 0 if rewritten.equal_rows else PADDING
    ids = _probe_ids(captured, sum(chunks))
    with torch.no_grad(), running(captured):
        expected = torch.stack(
            [_captured_logits(captured, row, start) for row, start in zip(ids, (0, padding), strict=True)]
        )
        try:
            actual = _chunked_logits(rewritten, ids, chunks, padding)
        except (RuntimeError, IndexError) as error:  # shapes or positions that no longer go together
            raise VerifyError(
                f"the model cannot be given a KV cache: {suspects(captured)}; run in chunks with one, it fails"
            ) from error
    ignored = torch.zeros(2, ids.shape[1], dtype=torch.bool, device=ids.device)
    ignored[1, :padding] = True
    difference = (actual - expected).square().mean(-1).sqrt().masked_fill(ignored, 0).max()
    share = (difference / expected[~ignored].std()).item()
    if not share <= TOLERANCE[coarsest_dtype(captured.graph)]:
        raise VerifyError(
            f"the model cannot be given a KV cache: {suspects(captured)}; run in chunks with one, its logits differ by "
            f"{share:.2g} standard deviations from those of the whole text"
        )
    return share


def _chunks(longest_context: int | None) -> Iterator[int]:
    left = longest_context or sum(CHUNKS)
    for chunk in CHUNKS:
        if min(chunk, left) > 0:
            yield min(chunk, left)
        left -= chunk


def _probe_ids(captured: Captured, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(captured), (2, tokens), generator=generator)
    return ids.to(next(iter(_floating(captured))).device)


def _floating(captured: Captured) -> Iterator[Tensor]:
    return (parameter for parameter in captured.model.parameters() if parameter.is_floating_point())


def _captured_logits(captured: Captured, row: Tensor, start: int) -> Tensor:
    """Float32 `[tokens, vocabulary]` of the row from token `start` on, run whole; zeros before."""
    positions = torch.arange(row.numel() - start, device=row.device)
    logits = captured.module(row[None, start:], positions[None], positions)[0].float()
    return torch.cat([logits.new_zeros(start, logits.shape[-1]), logits])


def _chunked_logits(rewritten: Rewritten, ids: Tensor, chunks: Sequence[int], padding: int) -> Tensor:
    """Float32 `[2, tokens, vocabulary]`; the second row begins with `padding` tokens that are none."""
    states = [_lossless_state(site, ids) for site in rewritten.sites]
    lengths = torch.zeros(2, dtype=torch.int64, device=ids.device)
    logits = []
    for chunk, part in zip(chunks, ids.split(list(chunks), dim=1), strict=True):
        starts = torch.tensor([0, padding], device=ids.device)
        padding = 0
        positions = (lengths - starts)[:, None] + torch.arange(chunk, device=ids.device)
        every = torch.arange(chunk, device=ids.device)
        tensors = [tensor for state in states for tensor in state.tensors()]
        logits.append(rewritten.module(part, positions.clamp(min=0), every, lengths, starts, *tensors).float())
        lengths = lengths + chunk - starts
    return torch.cat(logits, dim=1)


def _lossless_layout(site: AttentionSite) -> StateLayout:
    return StateLayout(
        *(site.kv_heads, site.key_dim, site.value_dim, Precision(16), Precision(16)),
        *unpacked_tokens(site.mask.size, SINKS, RECENT),
        window=site.mask.size,
    )


def _lossless_state(site: AttentionSite, ids: Tensor) -> SiteState:
    layout = _lossless_layout(site)
    blocks = layout.required_blocks(ids.shape[1])
    return SiteState.allocate(layout, ids.shape[0], blocks, site.key.meta["val"].dtype, ids.device)
