"""What every pass needs of a graph: its vocabulary, who feeds whom, running a slice of it, editing it."""
