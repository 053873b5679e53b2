"""The compiled model while it runs: its cache, padding, positions, and what is refused."""
