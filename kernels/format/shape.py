"""Shape: what an attention site caches of each token, and of how many tokens; stated once, and held by whatever
describes a site.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteShape:
    """Of one attention site.

    kv_heads: heads of the keys and values, before they are repeated for the query heads.
    key_dim, value_dim: elements of one head's key and of its value.
    window: the most tokens that one attends to, itself included, where attention has a sliding window or chunks; no
        more are kept. 0: all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0


class Shaped:
    """Mixed into a record with a `shape`: its numbers go by their own names."""

    shape: SiteShape

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def key_dim(self) -> int:
        return self.shape.key_dim

    @property
    def value_dim(self) -> int:
        return self.shape.value_dim

    @property
    def window(self) -> int:
        return self.shape.window

    @property
    def key_elements(self) -> int:
        """Key elements of one token."""
        return self.kv_heads * self.key_dim

    @property
    def value_elements(self) -> int:
        """Value elements of one token."""
        return self.kv_heads * self.value_dim

    def visible_elements(self, tokens: int) -> int:
        """Key and value elements that the next token attends to, beside its own, of a row of so many tokens."""
        visible = min(tokens, self.window - 1) if self.window else tokens
        return visible * (self.key_elements + self.value_elements)
