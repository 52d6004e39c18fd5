"""The losses as functions, with the names and arguments of ``torch.nn.functional``, and their family."""

from .cross_entropy import CrossEntropyMetrics, cross_entropy, cross_entropy_with_metrics, log_prob
from .mse import mse_loss

__all__ = ["CrossEntropyMetrics", "cross_entropy", "cross_entropy_with_metrics", "log_prob", "mse_loss"]
