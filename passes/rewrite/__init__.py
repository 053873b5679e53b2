"""From a graph and a plan to a graph with a cache, verified against the model."""
