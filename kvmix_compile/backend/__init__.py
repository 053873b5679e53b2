"""torch.compile(model, backend="kvmix")."""

from kvmix_compile.backend.entry import kvmix, packed_cache

__all__ = ["kvmix", "packed_cache"]
