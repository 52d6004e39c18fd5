"""Softmax cross-entropy: reference, ops' meta implementations, autograd, functions, module.

For a row of logits ``z`` with target weights ``t`` and ``S = sum_c t_c``::

    u      = z, or scale*z, or cap*tanh(scale*z/cap)
    lse    = logsumexp(u)
    loss   = S*lse - sum_c t_c*u_c + z_loss*lse^2
    dloss/du_c = S*softmax(u)_c - t_c + 2*z_loss*lse*softmax(u)_c

where ``t_c = w_c * ((1 - eps) * onehot_c + eps / C)`` for a class index and
``t_c = w_c * ((1 - eps) * p_c + eps / C)`` for class probabilities. torch's own loss is one call of the
kernels forward and one backward; every option beyond it is put together from a row's functions
(``_rows.py``). The kernels are in ``csrc/cpu`` and ``csrc/cuda``; ``csrc/cross_entropy.h`` says what they
compute.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _C, _rows
from ._autograd import (
    KERNEL_DTYPES,
    MEAN,
    NONE,
    accumulation,
    autocast_dtype,
    bare_apply,
    check_devices,
    differentiates_backward,
    divide,
    explain_bad_input,
    is_transformed,
    may_be_differentiated,
    ordered_sum,
    promote,
    reduction_code,
    run,
)
from ._explain import note
from ._rows import (
    NO_WEIGHT_DERIVATIVE,
    RowsBackward,
    class_dim,
    per_class,
    row_functions,
    row_shape,
    target_weights_reference,
    transform_reference,
)
from ._small import empty_scalar, is_small, takes_small_gradient

_forward = torch.ops.lossops.cross_entropy_forward.default
_backward = torch.ops.lossops.cross_entropy_backward.default


# --------------------------------------------------------------------------------------------------
# Reference


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
) -> Tensor:
    """Cross-entropy in plain PyTorch: what the kernels compute, written to be read.

    The tests' oracle, differentiable by autograd; takes what :func:`cross_entropy` takes.
    """
    dim = class_dim(input)
    u = transform_reference(input, logit_scale, softcap or 0.0)
    t, target_weight = target_weights_reference(u, target, weight, ignore_index, label_smoothing)
    lse = u.logsumexp(dim)
    log_softmax = u - lse.unsqueeze(dim)
    # A term of weight 0 adds 0, even where the log-probability is -inf.
    loss = -(t * log_softmax.masked_fill(t == 0, 0)).sum(dim)
    if z_loss:
        counted = target.reshape(loss.shape) != ignore_index if target.shape != input.shape else True
        loss = loss + (z_loss * lse.square()).where(torch.as_tensor(counted), 0)
    if row_weight is not None:
        row_weight = row_weight.reshape(loss.shape)
        loss = loss.masked_fill((row_weight == 0) & ~loss.isfinite(), 0) * row_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    divisor = torch.as_tensor(target_weight.sum() if normalizer is None else normalizer)
    result = loss.sum() / divisor
    return result.masked_fill(divisor == 0, 0) if empty == "zero" else result


# --------------------------------------------------------------------------------------------------
# Meta implementations: shapes and dtypes, for fake tensors, torch.compile and the meta device


@torch.library.register_fake("lossops::cross_entropy_forward")
def _(logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
    rows, index_target = row_shape("cross_entropy", logits, target, weight)
    stat_rows = 3 if label_smoothing != 0 or not index_target else 2
    loss = logits.new_empty(
        rows if reduction == NONE else (), dtype=_loss_dtype(logits, target, weight, out_dtype)
    )
    stats = logits.new_empty((stat_rows, *rows), dtype=accumulation(logits, target, weight))
    return loss, stats, logits.new_empty((), dtype=torch.float64)


@torch.library.register_fake("lossops::cross_entropy_backward")
def _(
    grad_loss,
    logits,
    target,
    weight,
    stats,
    normalizer,
    ignore_index,
    label_smoothing,
    need_logits,
    need_target,
):
    op = "cross_entropy_backward"
    row_shape(op, logits, target, weight)
    check_devices(op, logits, grad_loss=grad_loss, stats=stats, normalizer=normalizer)
    grad_logits = torch.empty_like(logits) if need_logits else logits.new_empty((0,))
    grad_target = torch.empty_like(target) if need_target else logits.new_empty((0,))
    return grad_logits, grad_target


# --------------------------------------------------------------------------------------------------
# Autograd of torch's own loss. Its second derivative is that of the row functions that it is made of.


def _loss_backward(needs, options, grad_loss, logits, target, weight, stats, normalizer):
    if differentiates_backward():
        rows, _ = row_functions(logits, target, weight, None, (1.0, 0.0, *options))
        upstream = _upstream(grad_loss, rows, normalizer)
        args = upstream, rows, logits, target, weight, None, 1.0, 0.0, *options, *needs, False
        grads = RowsBackward.apply(*args)[:2]
    else:
        grads = _backward(grad_loss, logits, target, weight, stats, normalizer, *options, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _upstream(grad_loss: Tensor, rows: Tensor, normalizer: Tensor | None) -> Tensor:
    """The gradients of the row functions that make up S*log_sum - dot."""
    planes = rows.unbind(0)
    g = divide(grad_loss.to(rows.dtype), normalizer).expand(rows.shape[1:])
    upstream = [torch.zeros_like(g)] * len(planes)
    upstream[_rows.LOG_SUM] = g * planes[_rows.TARGET_SUM]
    upstream[_rows.TARGET_SUM] = g * planes[_rows.LOG_SUM]
    upstream[_rows.DOT] = -g
    return torch.stack(upstream)


class EagerCrossEntropy(Function):
    """The loss of logits, target, weight and options, outside torch.func."""

    @staticmethod
    def forward(ctx, logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
        loss, stats, normalizer = _forward(
            logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype
        )
        ctx.save_for_backward(logits, target, weight, stats, normalizer if reduction == MEAN else None)
        ctx.options = ignore_index, label_smoothing
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads = _loss_backward(ctx.needs_input_grad[:2], ctx.options, grad_loss, *ctx.saved_tensors)
        return *grads, None, None, None, None, None


class SmallCrossEntropy(Function):
    """The mean for a small batch of class indices, with neither class weight nor smoothing."""

    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        rows, classes = logits.shape
        loss = empty_scalar()
        normalizer, stats = _C.small_cross_entropy_forward(
            logits.data_ptr(), target.data_ptr(), loss.data_ptr(), rows, classes, ignore_index
        )
        if normalizer < 0:
            _forward(logits, target, None, MEAN, ignore_index, 0.0, None)  # raises the IndexError
        ctx.save_for_backward(logits, target)
        ctx.rest = rows, classes, ignore_index, normalizer, stats
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target = ctx.saved_tensors
        if takes_small_gradient(grad_loss, logits, target, torch.int64):
            grad = torch.empty_like(logits)
            addresses = grad_loss.data_ptr(), logits.data_ptr(), target.data_ptr(), grad.data_ptr()
            if _C.small_cross_entropy_backward(*addresses, *ctx.rest):
                return grad, None, None
        ignore_index = ctx.rest[2]
        options = ignore_index, 0.0
        with torch.no_grad():
            _, stats, normalizer = _forward(logits, target, None, MEAN, *options, None)
        needs = True, False
        return (
            _loss_backward(needs, options, grad_loss, logits, target, None, stats, normalizer)[0],
            None,
            None,
        )


_apply_small = bare_apply(SmallCrossEntropy)


def _for_transforms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    rows, _ = row_functions(logits, target, weight, None, (1.0, 0.0, ignore_index, label_smoothing))
    dtype = _loss_dtype(logits, target, weight, out_dtype)
    return _reduced(rows, reduction, dtype)


def _loss_dtype(
    logits: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    return promote(logits, target, weight) if target.is_floating_point() else logits.dtype


# --------------------------------------------------------------------------------------------------
# The family: O(N) arithmetic on the row functions


def _row_losses(rows: Tensor, z_loss: float = 0.0) -> Tensor:
    planes = rows.unbind(0)
    loss = planes[_rows.TARGET_SUM] * planes[_rows.LOG_SUM] - planes[_rows.DOT]
    return loss + _z_losses(rows, z_loss) if z_loss else loss


def _lse(rows: Tensor) -> Tensor:
    return rows[_rows.MAX] + rows[_rows.LOG_SUM]


def _z_losses(rows: Tensor, z_loss: float) -> Tensor:
    return z_loss * _lse(rows).square()


def _reduced(
    rows: Tensor,
    reduction: int,
    dtype: torch.dtype,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
) -> Tensor:
    divisor: float | Tensor = 1.0 if normalizer is None else normalizer
    unused = None  # where a loss is multiplied by 0, whatever it is
    if reduction == MEAN and normalizer is None:
        divisor = ordered_sum(rows[_rows.TARGET_WEIGHT].detach(), torch.float64)
    if reduction == MEAN and empty == "zero":
        if isinstance(divisor, Tensor):
            divisor = divisor.to(rows.device, torch.float64)
        else:
            divisor = torch.full((), divisor, dtype=torch.float64, device=rows.device)
        unused = nothing = divisor == 0
        divisor = divisor.masked_fill(nothing, 1)
    if row_weight is not None:
        row_weight = row_weight.reshape(rows.shape[1:]).to(rows.dtype)
        unused = row_weight == 0 if unused is None else unused | (row_weight == 0)
    if unused is not None:
        # 0 times an infinity is NaN, in the loss and once more in the gradients of the planes.
        unused = unused & ~_row_losses(rows.detach(), z_loss).isfinite()
        rows = rows.masked_fill(unused, 0)
    loss = _row_losses(rows, z_loss)
    if row_weight is not None:
        loss = loss * row_weight
    if reduction == NONE:
        return loss.to(dtype)
    total = ordered_sum(loss, torch.float64)
    if reduction == MEAN:
        total = total / divisor
        if empty == "zero":
            total = total.masked_fill(nothing, 0)
    return total.to(dtype)


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


class _Family(NamedTuple):
    """The options beyond torch's."""

    logit_scale: float | Tensor
    softcap: float | None
    z_loss: float
    row_weight: Tensor | None
    normalizer: float | Tensor | None
    empty: str
    inplace_backward: bool

    def check(self, input: Tensor, rows: list[Any], index_target: bool) -> None:
        """Raises what no kernel sees."""
        scale, cap = self.logit_scale, self.softcap
        if isinstance(scale, Tensor):
            if scale.is_meta != input.is_meta:
                check_devices("cross_entropy", input, logit_scale=scale)
            if scale.dim() != 0 or not scale.is_floating_point():
                raise ValueError(
                    "cross_entropy: expected logit_scale to be a float or a 0-d floating point tensor, got "
                    f"shape {tuple(scale.shape)} of {scale.dtype}"
                )
        elif not isinstance(scale, (int, float)):
            raise TypeError(f"cross_entropy: expected logit_scale to be a float or a Tensor, got {scale!r}")
        if cap is not None and not isinstance(cap, (int, float)):
            raise TypeError(f"cross_entropy: expected softcap to be a float or None, got {cap!r}")
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"cross_entropy: expected softcap to be positive and finite, got {cap!r}")
        if not isinstance(self.z_loss, (int, float)):
            raise TypeError(f"cross_entropy: expected z_loss to be a float, got {self.z_loss!r}")
        if self.empty not in ("nan", "zero"):
            raise ValueError(f"cross_entropy: expected empty to be 'nan' or 'zero', got {self.empty!r}")
        weight = self.row_weight
        if weight is not None:
            if not _is_real(weight):
                given = _kind(weight)
                raise TypeError(
                    f"cross_entropy: expected row_weight to be a Tensor of real numbers, got {given}"
                )
            one = not rows and list(weight.shape) == [1]
            if list(weight.shape) != rows and not one:
                raise ValueError(
                    f"cross_entropy: expected row_weight of shape {tuple(rows)}, one for each row, got "
                    f"{tuple(weight.shape)}"
                )
            check_devices("cross_entropy", input, row_weight=weight)
        divisor = self.normalizer
        if divisor is None or isinstance(divisor, (int, float, torch.SymInt, torch.SymFloat)):
            return
        if not _is_real(divisor):
            raise TypeError(
                "cross_entropy: expected normalizer to be a float or a Tensor of real numbers, got "
                f"{_kind(divisor)}"
            )
        if divisor.dim() != 0:
            raise ValueError(
                "cross_entropy: expected normalizer to be a float or a 0-d tensor, got shape "
                f"{tuple(divisor.shape)}"
            )
        if divisor.device.type != "cpu":  # a number on the CPU serves every device
            check_devices("cross_entropy", input, normalizer=divisor)

    def scale(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, float]:
        """The scale as the ops take it: a tensor of the accumulation type, or a number."""
        if isinstance(self.logit_scale, Tensor):
            return self.logit_scale.to(device=device, dtype=dtype), 1.0
        return None, float(self.logit_scale)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_complex()


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _may_write_over(input: Tensor, *others: Tensor | float | None) -> bool:
    """Whether the backward may leave the gradient in the logits; raises where that would destroy something.

    What else needs the logits is autograd's version counter to notice. Where nothing asks it (compiled code;
    tensors saved through hooks, as torch.utils.checkpoint does), they stay as they are.
    """
    if torch.compiler.is_compiling():
        return False
    if is_transformed():
        return True  # refused by the row functions
    if not input.requires_grad or not torch.is_grad_enabled():
        return False
    refusal = "cross_entropy: inplace_backward=True writes the gradient over the logits, "
    base = input._base
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise RuntimeError(
            f"{refusal}which must not be a leaf that requires grad, nor a view of one; pass the output of a "
            "layer"
        )
    if _overlaps_itself(input):
        raise RuntimeError(
            f"{refusal}of which some share their memory (an expanded tensor); pass input.contiguous()"
        )
    if any(
        isinstance(other, Tensor) and torch._C._is_alias_of(input, other)  # type: ignore[attr-defined]
        for other in others
    ):
        raise RuntimeError(f"{refusal}whose memory target, weight or logit_scale shares; pass a copy of that")
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    if hooks is not None or input.is_neg():
        note("inplace_backward: saved-tensor hooks or a negated view; the gradient has memory of its own")
        return False
    return True


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share their memory."""
    reach = 0  # of the dimensions of smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def _with_options(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    out_dtype: torch.dtype | None,
    family: _Family,
    metrics: bool = False,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    shape, index_target = row_shape("cross_entropy", input, target, weight)
    family.check(input, shape, index_target)
    in_place = family.inplace_backward and _may_write_over(input, target, weight, family.logit_scale)
    dtype = _loss_dtype(input, target, weight, out_dtype)
    unweighted = target
    plain_target = index_target or (weight is None and label_smoothing == 0)
    if weight is not None and may_be_differentiated(weight):
        target, weight, label_smoothing = _weighted_target(input, target, weight, label_smoothing)
    scale_tensor, scale = family.scale(accumulation(input, target, weight), input.device)
    options = scale, float(family.softcap or 0.0), ignore_index, label_smoothing
    rows, predicted = row_functions(
        input,
        target,
        weight,
        scale_tensor,
        options,
        entropy=metrics,
        predicted=metrics,
        inplace_backward=in_place,
    )
    loss = _reduced(
        rows,
        reduction,
        dtype,
        family.z_loss,
        family.row_weight,
        family.normalizer,
        family.empty,
    )
    if not metrics:
        return loss, None
    logprob = _logprobs(rows, index_target)
    if not plain_target:
        note("logprob of probabilities with class weight or smoothing takes a second pass")
        logprob = _logprobs(
            row_functions(input, unweighted, None, scale_tensor, (*options[:3], 0.0))[0], index_target
        )
    z_losses = _z_losses(rows, family.z_loss) if family.z_loss else torch.zeros_like(rows[0])
    if index_target:
        best = target.reshape(predicted.shape)
    elif input.size(class_dim(input)):
        best = unweighted.argmax(class_dim(input))
    else:
        best = predicted
    correct = (predicted == best) & (predicted >= 0)
    return loss, CrossEntropyMetrics(_lse(rows), logprob, rows[_rows.ENTROPY], z_losses, predicted, correct)


def _logprobs(rows: Tensor, index_target: bool) -> Tensor:
    planes = rows.unbind(0)
    if index_target:
        return planes[_rows.PICKED] - planes[_rows.LOG_SUM]
    return planes[_rows.DOT] - planes[_rows.TARGET_SUM] * planes[_rows.LOG_SUM]


# --------------------------------------------------------------------------------------------------
# Functions and module


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy between logits and target, as :func:`torch.nn.functional.cross_entropy`.

    Formula and positional arguments are those of torch's documentation; label smoothing is that of
    `Rethinking the Inception Architecture for Computer Vision <https://arxiv.org/abs/1512.00567>`_.
    All options work together, for both kinds of target and all shapes, reductions and derivatives.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16, bfloat16,
            float32 or float64, any strides.
        target: class indices (int64, int32 or uint8) of the input's shape without ``C``, or class
            probabilities (any of the input's dtypes) of the input's shape.
        weight: a weight for each class, shape ``(C)``; any floating dtype. With probabilities it
            may require a gradient, at the price of a weighted copy of the target (made under
            torch.func and forward-mode AD too, where a weight may have a derivative unseen).
        size_average, reduce: deprecated, as in torch; given, they override ``reduction``.
        ignore_index: a class index whose rows add nothing to loss or gradient.
        reduction: ``"none"``, ``"mean"`` (over the weights of the targets for indices, over the
            rows for probabilities) or ``"sum"``.
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution.
        logit_scale: multiplies the logits, an inverse temperature: a number, or a 0-d floating point
            tensor, which gets a gradient (the learnable scale of `CLIP <https://arxiv.org/abs/2103.00020>`_).
        softcap: logits become ``softcap * tanh(logit_scale * z / softcap)``, as in `Gemma 2
            <https://arxiv.org/abs/2408.00118>`_; ``None`` for no cap.
        z_loss: adds ``z_loss * lse**2`` to the loss of each row that is not ignored, with ``lse`` the row's
            ``logsumexp``, as in `PaLM <https://arxiv.org/abs/2204.02311>`_.
        row_weight: multiplies the loss of each row (a mask, token weights, advantages); the rows' shape (that
            of class indices), any dtype, differentiable. It does not enter the divisor of the mean: for a
            masked mean give ``normalizer=mask.sum()``. A row of weight 0 adds nothing, not even NaN.
        normalizer: what ``"mean"`` divides by in place of its own count: a number, or a 0-d tensor, which is
            not waited for (a token count over micro-batches or ranks).
        empty: what ``"mean"`` over a divisor of 0 gives: ``"nan"``, torch's contract, or ``"zero"``, with
            zero gradients.
        out_dtype: dtype of the result, such as float32 from 16-bit logits; by default torch's.
        inplace_backward: write the gradient over the logits. They must be neither a leaf nor a view of one,
            and what autograd still needs of them is an error of its version counter; a second backward and
            second derivatives are errors too. Under torch.compile and saved-tensor hooks (checkpointing),
            where that counter is not asked, the gradient gets memory of its own as without the option.
            Without it nothing is ever written to an argument.

    Returns:
        The loss in the input's dtype (promoted with a probability target's; float32 under
        autocast) or ``out_dtype``: 0-d, or of the rows' shape for ``reduction="none"``. Computed in
        float32 (float64 where an operand is float64) and rounded once.

    Raises:
        IndexError: a class index outside [0, C) that is not ``ignore_index``.
        ValueError: an unknown reduction or ``empty``, a target whose batch differs from the input's, a
            wrong shape of ``row_weight``, ``normalizer`` or ``logit_scale``, a ``softcap`` that is not
            positive.
        RuntimeError: another wrong shape, a wrong dtype of target or weight, ``label_smoothing``
            outside [0, 1], ``ignore_index >= 0`` with probabilities, a class weight that requires
            grad with class indices, ``inplace_backward`` for a leaf or a view of one, for logits that
            share memory with each other or with another argument, or under torch.func.
        NotImplementedError: integer, complex, sparse or other input that no kernel takes.
        TypeError: not a tensor, or an option of a wrong type.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            row_weight=row_weight,
            normalizer=normalizer,
            empty=empty,
            out_dtype=out_dtype,
            inplace_backward=inplace_backward,
        )
    code = reduction_code(reduction, size_average, reduce)
    try:
        out_dtype = _checked_dtype(out_dtype) or autocast_dtype(input, target)
        # Written out: a call that asks for none of this pays for nothing but the question.
        if not (
            softcap is None
            and row_weight is None
            and normalizer is None
            and not inplace_backward
            and empty == "nan"
            and not isinstance(logit_scale, Tensor)
            and logit_scale == 1
            and z_loss == 0
        ):
            family = _Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty, inplace_backward)
            options = code, ignore_index, label_smoothing, out_dtype, family
            return _with_options(input, target, weight, *options)[0]
        if weight is not None and may_be_differentiated(weight):
            target, weight, label_smoothing = _weighted_target(input, target, weight, label_smoothing)
        plain = weight is None and label_smoothing == 0 and out_dtype is None and code == MEAN
        if (
            plain
            and input.dim() == 2
            and target.dim() == 1
            and len(input) == len(target)
            and is_small(input, target, torch.int64)
        ):
            note("a small batch: the kernels are called without the dispatcher")
            return _apply_small(input, target, ignore_index)
        args = input, target, weight, code, ignore_index, label_smoothing, out_dtype
        return run(EagerCrossEntropy, _for_transforms, _forward, (input, target), args)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _explain_bad_option(ignore_index, label_smoothing)
        explain_bad_input("cross_entropy", input=input, target=target, weight=weight)
        raise


def cross_entropy_with_metrics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, CrossEntropyMetrics]:
    """The loss of :func:`cross_entropy`, and what the same pass over the logits says of every row.

    Arguments and errors are those of :func:`cross_entropy`; :class:`CrossEntropyMetrics` names the
    results. With probabilities *and* a class weight or smoothing, ``logprob`` costs a second pass.

    >>> loss, metrics = lossops.functional.cross_entropy_with_metrics(logits, target)
    >>> accuracy = metrics.correct.float().mean()
    """
    code = reduction_code(reduction, None, None)
    family = _Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty, inplace_backward)
    try:
        out_dtype = _checked_dtype(out_dtype) or autocast_dtype(input, target)
        options = code, ignore_index, label_smoothing, out_dtype, family
        loss, metrics = _with_options(input, target, weight, *options, metrics=True)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _explain_bad_option(ignore_index, label_smoothing)
        explain_bad_input("cross_entropy", input=input, target=target, weight=weight)
        raise
    assert metrics is not None
    return loss, metrics


def log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of chosen classes, ``log_softmax(u).gather(target)``, and the softmax's entropy.

    What policy-gradient methods need of a language model's logits, differentiable to every order, without
    a tensor of the logits' size but their gradient.

    Args:
        logits: ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, as in :func:`cross_entropy`. Logits of
            shape ``(B, T, V)`` have their classes last: pass ``logits.movedim(-1, 1)``, which copies nothing.
        target: class indices of the logits' shape without ``C``.
        logit_scale, softcap: as in :func:`cross_entropy`.
        ignore_index: rows with this target give 0 and get no gradient.
        return_entropy: give ``(logprob, entropy)``.

    Returns:
        One value for each row, in float32 (float64 for float64 logits).

    Raises:
        RuntimeError, ValueError, IndexError, NotImplementedError, TypeError: as :func:`cross_entropy`;
            RuntimeError for probabilities.
    """
    family = _Family(logit_scale, softcap, 0.0, None, None, "nan", False)
    try:
        shape, index_target = row_shape("log_prob", logits, target, None)
        if not index_target:
            raise RuntimeError(
                f"log_prob: expected target of class indices of shape {tuple(shape)}, got probabilities of "
                f"shape {tuple(target.shape)}"
            )
        family.check(logits, shape, index_target)
        scale_tensor, scale = family.scale(accumulation(logits), logits.device)
        options = scale, float(softcap or 0.0), ignore_index, 0.0
        rows, _ = row_functions(logits, target, None, scale_tensor, options, entropy=return_entropy)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _explain_bad_option(ignore_index, 0.0)
        explain_bad_input("log_prob", input=logits, target=target)
        raise
    logprob = _logprobs(rows, True)
    return (logprob, rows[_rows.ENTROPY]) if return_entropy else logprob


def _checked_dtype(out_dtype: torch.dtype | None) -> torch.dtype | None:
    if out_dtype is not None and out_dtype not in KERNEL_DTYPES:
        raise TypeError(
            "cross_entropy: expected out_dtype to be float16, bfloat16, float32 or float64, got "
            f"{out_dtype!r}"
        )
    return out_dtype


def _explain_bad_option(ignore_index: Any, label_smoothing: Any) -> None:
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"cross_entropy: expected ignore_index to be an int, got {ignore_index!r}")
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"cross_entropy: expected ignore_index to fit 64 bits, got {ignore_index}")
    if not isinstance(label_smoothing, (int, float, torch.SymFloat)):
        raise TypeError(f"cross_entropy: expected label_smoothing to be a float, got {label_smoothing!r}")


def _weighted_target(
    input: Tensor, target: Tensor, weight: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor | None, float]:
    """Class weights that may need a derivative, moved into a probability target to get it there."""
    _, index_target = row_shape("cross_entropy", input, target, weight)
    if index_target:
        if weight.requires_grad:
            raise RuntimeError(NO_WEIGHT_DERIVATIVE)
        return target, weight, label_smoothing
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(
            f"cross_entropy: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )
    note("the class weight may need a derivative: a weighted copy of the target is made")
    classes = input.size(class_dim(input))
    t = per_class(weight, input) * ((1 - label_smoothing) * target + label_smoothing / max(classes, 1))
    return t, None, 0.0


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on the fused kernels: same constructor, buffers and state.

    The keyword-only options are those of :func:`lossops.functional.cross_entropy`, whose shapes, dtypes and
    errors hold; what belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call. A
    ``logit_scale`` that is a :class:`torch.nn.Parameter` becomes one of the module's.
    """

    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "logit_scale": 1.0,
        "softcap": None,
        "z_loss": 0.0,
        "empty": "nan",
        "out_dtype": None,
        "inplace_backward": False,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        empty: str = "nan",
        out_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.empty = empty
        self.out_dtype = out_dtype
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            row_weight=row_weight,
            normalizer=normalizer,
            empty=self.empty,
            out_dtype=self.out_dtype,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        given = {name: getattr(self, name) for name in self._DEFAULTS}
        return ", ".join(
            f"{name}={value}"
            for name, value in given.items()
            if isinstance(value, Tensor) or value != self._DEFAULTS[name]
        )
