"""The losses as functions, with the names and arguments of ``torch.nn.functional``."""

from .cross_entropy import cross_entropy
from .mse import mse_loss

__all__ = ["cross_entropy", "mse_loss"]
