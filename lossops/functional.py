"""The losses as functions, with the names and arguments of ``torch.nn.functional``, and their family."""

from .cross_entropy import CrossEntropyMetrics, cross_entropy, cross_entropy_with_metrics, log_prob
from .linear_cross_entropy import (
    LinearCrossEntropyMetrics,
    linear_cross_entropy,
    linear_cross_entropy_with_metrics,
)
from .mse import mse_loss
from .vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_cross_entropy_with_metrics

__all__ = [
    "CrossEntropyMetrics",
    "LinearCrossEntropyMetrics",
    "cross_entropy",
    "cross_entropy_with_metrics",
    "linear_cross_entropy",
    "linear_cross_entropy_with_metrics",
    "log_prob",
    "mse_loss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_with_metrics",
]
