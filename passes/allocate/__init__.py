"""From importance to a plan: which bits for which site."""
