"""The options beyond torch's: checks, and the O(N) arithmetic that makes every loss of the row functions.

Whatever computes the planes of :mod:`lossops._rows` for all rows, from logits, from the chunks of a linear
head or from the shards of a vocabulary, has the whole family by what stands here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _rows
from ._autograd import KERNEL_DTYPES, MEAN, NONE, check_devices, ordered_sum, promote


class CrossEntropyMetrics(NamedTuple):
    """What one pass over the logits says of every row, each of the rows' shape; zeros for ignored rows.

    In float32 (float64 where an operand is float64), of the logits as scaled and capped.
    """

    lse: Tensor
    """``logsumexp`` of the row; differentiable."""
    logprob: Tensor
    """Log-probability of the target class, or ``sum_c p_c * log softmax_c`` of probabilities ``p``, without
    class weight and smoothing; differentiable."""
    entropy: Tensor
    """Of the softmax, in nats; differentiable."""
    z_loss: Tensor
    """``z_loss * lse**2``, before ``row_weight`` and reduction; differentiable."""
    predicted: Tensor
    """The class of the largest logit (int64), the lowest where several are; -1 for ignored rows."""
    correct: Tensor
    """Whether ``predicted`` is the target class (of probabilities, their most probable one)."""


class Family(NamedTuple):
    """The options of a loss beyond torch's."""

    logit_scale: float | Tensor = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    row_weight: Tensor | None = None
    normalizer: float | Tensor | None = None
    empty: str = "nan"

    def check(self, op: str, input: Tensor, rows: list[Any]) -> None:
        """Raises what no kernel sees; `rows` is the shape that a row weight has to have."""
        scale, cap = self.logit_scale, self.softcap
        if isinstance(scale, Tensor):
            if scale.is_meta != input.is_meta:
                check_devices(op, input, logit_scale=scale)
            if scale.dim() != 0 or not scale.is_floating_point():
                raise ValueError(
                    f"{op}: expected logit_scale to be a float or a 0-d floating point tensor, got "
                    f"shape {tuple(scale.shape)} of {scale.dtype}"
                )
        elif not isinstance(scale, (int, float)):
            raise TypeError(f"{op}: expected logit_scale to be a float or a Tensor, got {scale!r}")
        if cap is not None and not isinstance(cap, (int, float)):
            raise TypeError(f"{op}: expected softcap to be a float or None, got {cap!r}")
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"{op}: expected softcap to be positive and finite, got {cap!r}")
        if not isinstance(self.z_loss, (int, float)):
            raise TypeError(f"{op}: expected z_loss to be a float, got {self.z_loss!r}")
        if self.empty not in ("nan", "zero"):
            raise ValueError(f"{op}: expected empty to be 'nan' or 'zero', got {self.empty!r}")
        self._check_row_weight(op, input, rows)
        self._check_normalizer(op, input)

    def _check_row_weight(self, op: str, input: Tensor, rows: list[Any]) -> None:
        weight = self.row_weight
        if weight is None:
            return
        if not _is_real(weight):
            given = _kind(weight)
            raise TypeError(f"{op}: expected row_weight to be a Tensor of real numbers, got {given}")
        one = not rows and list(weight.shape) == [1]
        if list(weight.shape) != rows and not one:
            raise ValueError(
                f"{op}: expected row_weight of shape {tuple(rows)}, one for each row, got "
                f"{tuple(weight.shape)}"
            )
        check_devices(op, input, row_weight=weight)

    def _check_normalizer(self, op: str, input: Tensor) -> None:
        divisor = self.normalizer
        if divisor is None or isinstance(divisor, (int, float, torch.SymInt, torch.SymFloat)):
            return
        if not _is_real(divisor):
            raise TypeError(
                f"{op}: expected normalizer to be a float or a Tensor of real numbers, got {_kind(divisor)}"
            )
        if divisor.dim() != 0:
            raise ValueError(
                f"{op}: expected normalizer to be a float or a 0-d tensor, got shape {tuple(divisor.shape)}"
            )
        if divisor.device.type != "cpu":  # a number on the CPU serves every device
            check_devices(op, input, normalizer=divisor)

    def scale(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, float]:
        """The scale as the ops take it: a tensor of the accumulation type, or a number."""
        if isinstance(self.logit_scale, Tensor):
            return self.logit_scale.to(device=device, dtype=dtype), 1.0
        return None, float(self.logit_scale)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_complex()


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def checked_dtype(op: str, out_dtype: torch.dtype | None) -> torch.dtype | None:
    if out_dtype is not None and out_dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{op}: expected out_dtype to be float16, bfloat16, float32 or float64, got {out_dtype!r}"
        )
    return out_dtype


def explain_bad_option(op: str, ignore_index: Any, label_smoothing: Any) -> None:
    """Raises what the dispatcher would say less clearly of torch's own options."""
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{op}: expected ignore_index to be an int, got {ignore_index!r}")
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: expected ignore_index to fit 64 bits, got {ignore_index}")
    if not isinstance(label_smoothing, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: expected label_smoothing to be a float, got {label_smoothing!r}")


def options_given(module: torch.nn.Module, defaults: dict[str, Any]) -> str:
    """A module's options that are not the defaults, as its `extra_repr`."""
    given = {name: getattr(module, name) for name in defaults}
    return ", ".join(
        f"{name}={value}"
        for name, value in given.items()
        if isinstance(value, Tensor) or value != defaults[name]
    )


def loss_dtype(
    logits: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    return promote(logits, target, weight) if target.is_floating_point() else logits.dtype


# --------------------------------------------------------------------------------------------------
# Losses of the planes


def lse(rows: Tensor) -> Tensor:
    return rows[_rows.MAX] + rows[_rows.LOG_SUM]


def z_losses(rows: Tensor, z_loss: float) -> Tensor:
    return z_loss * lse(rows).square()


def logprobs(rows: Tensor, index_target: bool) -> Tensor:
    planes = rows.unbind(0)
    if index_target:
        return planes[_rows.PICKED] - planes[_rows.LOG_SUM]
    return planes[_rows.DOT] - planes[_rows.TARGET_SUM] * planes[_rows.LOG_SUM]


def row_losses(rows: Tensor, z_loss: float = 0.0) -> Tensor:
    planes = rows.unbind(0)
    loss = planes[_rows.TARGET_SUM] * planes[_rows.LOG_SUM] - planes[_rows.DOT]
    return loss + z_losses(rows, z_loss) if z_loss else loss


def upstream(rows: Tensor, grad: Tensor, z_loss: float = 0.0) -> Tensor:
    """The gradients of the planes in ``sum(grad * row_losses(rows, z_loss))``."""
    planes = rows.unbind(0)
    g = grad.expand(rows.shape[1:])
    grads = [torch.zeros_like(g)] * len(planes)
    slope = planes[_rows.TARGET_SUM]
    if z_loss:
        slope = slope + 2 * z_loss * lse(rows)
    grads[_rows.LOG_SUM] = g * slope
    grads[_rows.TARGET_SUM] = g * planes[_rows.LOG_SUM]
    grads[_rows.DOT] = -g
    return torch.stack(grads)


def unused_rows(rows: Tensor, family: Family, nothing: Tensor | None = None) -> Tensor | None:
    """Where an infinite or NaN loss is going to be multiplied by 0; None where nothing is.

    `nothing`: whether the divisor of the mean is 0 and stands for an empty batch.
    """
    unused = nothing
    if family.row_weight is not None:
        weightless = family.row_weight.reshape(rows.shape[1:]) == 0
        unused = weightless if unused is None else unused | weightless
    return None if unused is None else unused & ~row_losses(rows.detach(), family.z_loss).isfinite()


def without_unused(rows: Tensor, family: Family, nothing: Tensor | None = None) -> Tensor:
    """The planes, with zeros there: 0 times an infinity is NaN, in the loss and again in the gradients."""
    unused = unused_rows(rows, family, nothing)
    return rows if unused is None else rows.masked_fill(unused, 0)


def weighted_losses(rows: Tensor, family: Family, nothing: Tensor | None = None) -> Tensor:
    loss = row_losses(without_unused(rows, family, nothing), family.z_loss)
    if family.row_weight is None:
        return loss
    return loss * family.row_weight.reshape(loss.shape).to(loss.dtype)


def mean_divisor(rows: Tensor, family: Family) -> tuple[float | Tensor, Tensor | None]:
    """What the mean divides by, and, where that is asked, whether it stands for an empty batch."""
    divisor = family.normalizer
    if divisor is None:
        divisor = ordered_sum(rows[_rows.TARGET_WEIGHT].detach(), torch.float64)
    if family.empty != "zero":
        return divisor, None
    if isinstance(divisor, Tensor):
        divisor = divisor.to(rows.device, torch.float64)
    else:
        divisor = torch.full((), divisor, dtype=torch.float64, device=rows.device)
    nothing = divisor == 0
    return divisor.masked_fill(nothing, 1), nothing


def reduced(rows: Tensor, reduction: int, dtype: torch.dtype, family: Family) -> Tensor:
    """The loss of the planes of all rows."""
    if reduction == NONE:
        return weighted_losses(rows, family).to(dtype)
    if reduction != MEAN:
        return ordered_sum(weighted_losses(rows, family), torch.float64).to(dtype)
    divisor, nothing = mean_divisor(rows, family)
    total = ordered_sum(weighted_losses(rows, family, nothing), torch.float64)
    return mean_of(total, divisor, nothing).to(dtype)


def mean_of(total: Tensor, divisor: float | Tensor, nothing: Tensor | None) -> Tensor:
    mean = total / divisor
    return mean if nothing is None else mean.masked_fill(nothing, 0)


def metrics_of(
    rows: Tensor, logprob: Tensor, z_loss: float, predicted: Tensor, best: Tensor
) -> CrossEntropyMetrics:
    """`best`: the target class of every row, the most probable one of probabilities."""
    correct = (predicted == best) & (predicted >= 0)
    losses = z_losses(rows, z_loss) if z_loss else torch.zeros_like(rows[0])
    return CrossEntropyMetrics(lse(rows), logprob, rows[_rows.ENTROPY], losses, predicted, correct)
