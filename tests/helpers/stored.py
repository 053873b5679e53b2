"""How sites are stored in tests that rewrite a graph without a plan."""

from collections.abc import Sequence

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.match.sites import AttentionSite

SINKS, RECENT = 4, 32
LOSSLESS = Precision(16)


def stored_alike(
    sites: Sequence[AttentionSite], key: Precision = LOSSLESS, value: Precision = LOSSLESS
) -> list[StoredSite]:
    """Every site at the same two precisions."""
    return [StoredSite(StateLayout(site.shape, key=key, value=value, sinks=SINKS, recent=RECENT)) for site in sites]
