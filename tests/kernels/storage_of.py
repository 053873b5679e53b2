"""What kernels are told of how a layout stores."""

from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.kernels.format.storage import Storage


def storage_of(layout: StateLayout) -> Storage:
    return Storage(key=layout.key, value=layout.value, recent=layout.recent, window=layout.window)
