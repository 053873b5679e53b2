"""Every error that kvmix_compile raises on purpose. All derive from KVMixError and say what to do about it."""

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.passes.allocate.plan import PlanError
from kvmix_compile.passes.allocate.policies import AllocationError, BudgetError
from kvmix_compile.passes.errors import CalibrationError, CaptureError, UnsupportedModelError, VerifyError

__all__ = [
    "AllocationError",
    "BudgetError",
    "CacheError",
    "CalibrationError",
    "CaptureError",
    "CompilationError",
    "InputError",
    "KVMixError",
    "PlanError",
    "PredictedLossWarning",
    "UnsupportedModelError",
    "VerifyError",
]


class InputError(KVMixError):
    """A call of the compiled model that it cannot answer; nothing was added to the cache."""


class CompilationError(KVMixError):
    """`compile=True` where Inductor cannot compile."""


class CacheError(KVMixError):
    """A cache used with the wrong model, batch or operation."""


class PredictedLossWarning(UserWarning):
    """A budget that is too small for some layer: the model is compiled, and predicted to be no longer itself."""
