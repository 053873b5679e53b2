"""Powers of two: a site whose keys and values are divided, head by head, before they are attended to and stored.

Queries are multiplied by what their keys were divided by, and what attention gives by what the values were. All of it
is exact. Which powers: see passes.measure.exponents.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.graph.edit import with_constant
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.passes.rewrite.queries import Change, with_changed_queries


def powers_of_two(exponents: Sequence[int], sign: int, like: Tensor) -> Tensor:
    """2 to the power of each exponent, times `sign`, `[1, heads, 1, 1]`, in the dtype of `like` and on its device."""
    powers = torch.tensor([2.0 ** (sign * exponent) for exponent in exponents], dtype=torch.float64)
    return powers.to(like.device, like.dtype)[None, :, None, None]


def with_divided_inputs(module: fx.GraphModule, site: AttentionSite, index: int, stored: StoredSite) -> AttentionSite:
    """The site with its keys and values divided, and its queries multiplied. `index`: the site's number."""
    keys, values = stored.key_exponents, stored.value_exponents
    shared = site.query_heads // site.kv_heads

    def multiply(name: str, exponents: Sequence[int]) -> Change | None:
        of_queries = [exponent for exponent in exponents for _ in range(shared)]
        return (lambda node: _times(module, node, site.output, name, of_queries, 1)) if exponents else None

    divided = with_changed_queries(
        module.graph,
        site,
        of_keys=multiply(f"query_powers_{index}", keys),
        of_values=multiply(f"query_value_powers_{index}", values),
    )
    if keys:
        divided = replace(divided, key=_times(module, site.key, site.output, f"key_powers_{index}", keys, -1))
    if values:
        divided = replace(divided, value=_times(module, site.value, site.output, f"value_powers_{index}", values, -1))
    return divided


def multiply_output(
    module: fx.GraphModule, site: AttentionSite, attended: fx.Node, index: int, stored: StoredSite
) -> None:
    """Multiply what attention gives, wherever it is used, by what the site's values were divided by."""
    shared = site.query_heads // site.kv_heads
    outputs = [exponent for exponent in stored.value_exponents for _ in range(shared)]
    if outputs:
        users = list(attended.users)
        product = _times(module, attended, attended.next, f"output_powers_{index}", outputs, 1)
        for user in users:
            user.replace_input_with(attended, product)


def _times(
    module: fx.GraphModule, node: fx.Node, before: fx.Node, name: str, exponents: Sequence[int], sign: int
) -> fx.Node:
    """`node` `[batch, heads, tokens, dim]` times powers of two that the module's constant `name` holds."""
    return with_constant(
        module, torch.ops.aten.mul.Tensor, node, before, name, lambda value: powers_of_two(exponents, sign, value)
    )
