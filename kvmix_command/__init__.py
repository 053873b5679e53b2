"""The console script `kvmix`: what can be typed, and nothing of what is done about it.

It is a package of its own so that a help text, a completion or a mistyped option need not wait for PyTorch, which
`import kvmix_compile` imports.
"""
