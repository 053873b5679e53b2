"""How keys and values are stored, written and attended to: no word of graphs or models.

Nothing is imported here, on purpose. Where Python runs in this repository's folder it also finds this package as plain
`kernels`; transformers, looking for Hugging Face's package of that name, then imports it, and goes on without it as
long as that import does nothing.
"""
