"""What can go wrong between a model and its rewritten graph. Each message says what to do about it."""

from kvmix_compile.kernels.errors import KVMixError


class CaptureError(KVMixError):
    """The model could not be turned into one graph."""


class UnsupportedModelError(KVMixError):
    """The graph holds something that cannot be given a compressed cache; the message names the layer."""


class CalibrationError(KVMixError):
    """The data cannot be calibrated on; the message says what to pass instead."""


class VerifyError(KVMixError):
    """The rewritten graph does not reproduce the captured one, so it is never used."""
