"""What a plan costs: perplexity, comparisons, passkeys, records and plots."""
