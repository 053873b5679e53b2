"""The compiler: from a model to a graph, from a graph to a graph with a cache. docs/passes has a page for each pass."""
