"""The base of every error this project raises on purpose."""


class KVMixError(Exception):
    """Something the caller can put right; the message says how."""
