"""Fused mean squared error and softmax cross-entropy for PyTorch.

``lossops.cross_entropy``, ``lossops.mse_loss``, ``lossops.CrossEntropyLoss`` and ``lossops.MSELoss``
take the place of their namesakes in ``torch.nn.functional`` and ``torch.nn``.
"""

from . import functional
from ._C import __version__
from ._cpu import empty_cache
from ._cuda import check_async_errors, cuda_build_info
from ._distributed import global_normalizer
from ._explain import Explanation, explain
from .cross_entropy import CrossEntropyLoss, CrossEntropyMetrics
from .functional import (
    cross_entropy,
    linear_cross_entropy,
    mse_loss,
    vocab_parallel_cross_entropy,
)
from .linear_cross_entropy import LinearCrossEntropyLoss, LinearCrossEntropyMetrics
from .mse import MSELoss
from .overrides import FusedLosses, disable, enable, fused_losses

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyMetrics",
    "Explanation",
    "FusedLosses",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyMetrics",
    "MSELoss",
    "__version__",
    "check_async_errors",
    "cross_entropy",
    "cuda_build_info",
    "disable",
    "empty_cache",
    "enable",
    "explain",
    "functional",
    "fused_losses",
    "global_normalizer",
    "linear_cross_entropy",
    "mse_loss",
    "vocab_parallel_cross_entropy",
]
