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

from typing import Any, ClassVar

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _C, _rows
from ._ahead import Ahead
from ._autograd import (
    MEAN,
    NONE,
    accumulation,
    autocast_dtype,
    check_devices,
    differentiates_backward,
    divide,
    explain_bad_input,
    is_dtensor,
    is_transformed,
    may_be_differentiated,
    reduction_code,
    run,
)
from ._direct import ON_GPU, empty_loss, forget, is_unwatched, place, short_apply
from ._explain import note
from ._family import (
    CrossEntropyMetrics,
    Family,
    checked_dtype,
    explain_bad_option,
    logprobs,
    loss_dtype,
    metrics_of,
    options_given,
    reduced,
    upstream,
)
from ._rows import (
    NO_WEIGHT_DERIVATIVE,
    RowsBackward,
    check_smoothing,
    class_dim,
    row_functions,
    row_shape,
    target_weights_reference,
    transform_reference,
    weighted_probabilities,
)

_forward = torch.ops.lossops.cross_entropy_forward.default
_forward_backward = torch.ops.lossops.cross_entropy_forward_backward.default
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
        rows if reduction == NONE else (), dtype=loss_dtype(logits, target, weight, out_dtype)
    )
    stats = logits.new_empty((stat_rows, *rows), dtype=accumulation(logits, target, weight))
    return loss, stats, logits.new_empty((), dtype=torch.float64)


@torch.library.register_fake("lossops::cross_entropy_forward_backward")
def _(logits, *args):
    return *_forward(logits, *args), torch.empty_like(logits)


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
        grad = divide(grad_loss.to(rows.dtype), normalizer)
        args = upstream(rows, grad), rows, logits, target, weight, None, 1.0, 0.0, *options, *needs, False
        grads = RowsBackward.apply(*args)[:2]
    else:
        grads = _backward(grad_loss, logits, target, weight, stats, normalizer, *options, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_ahead = Ahead("cross_entropy")


class EagerCrossEntropy(Function):
    """The loss of logits, target, weight and options, outside torch.func."""

    @staticmethod
    def forward(ctx, logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
        args = logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype
        if _ahead.is_asked(ctx, reduction != NONE, logits, target):
            loss, stats, normalizer, ctx.gradient = _forward_backward(*args)
        else:
            loss, stats, normalizer = _forward(*args)
        ctx.save_for_backward(logits, target, weight, stats, normalizer if reduction == MEAN else None)
        ctx.options = ignore_index, label_smoothing
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        tensors = ctx.saved_tensors
        gradient = _ahead.gradient(ctx, grad_loss)
        if gradient is not None:
            return gradient, None, None, None, None, None, None
        grads = _loss_backward(ctx.needs_input_grad[:2], ctx.options, grad_loss, *tensors)
        return *grads, None, None, None, None, None


def _direct_forward(logits, target, gradient, ignore_index, where, loss_dtype):
    loss = empty_loss(logits, where, loss_dtype)
    kept = _C.direct_cross_entropy_forward(logits, target, loss, gradient, ignore_index)
    if kept is None:
        _forward(logits, target, None, MEAN, ignore_index, 0.0, None)  # raises the IndexError
    return loss, kept


class DirectCrossEntropy(Function):
    """The mean for a contiguous batch of class indices, with neither class weight nor smoothing."""

    @staticmethod
    def forward(ctx, logits, target, ignore_index, where, loss_dtype):
        ctx.gradient = empty_like(logits) if _ahead.is_asked_of_plain(ctx, where != ON_GPU) else None
        loss, ctx.kept = _direct_forward(logits, target, ctx.gradient, ignore_index, where, loss_dtype)
        ctx.save_for_backward(logits, target)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target = ctx.saved_tensors
        gradient = _ahead.gradient(ctx, grad_loss)
        if gradient is not None:
            return gradient, None, None, None, None
        options = ctx.ignore_index, 0.0
        if is_unwatched(grad_loss):
            grad = empty_like(logits)
            call = grad_loss, logits, target, grad, ctx.ignore_index, ctx.kept
            if _C.direct_cross_entropy_backward(*call):
                forget(ctx)
                return grad, None, None, None, None
        if differentiates_backward():  # and needs nothing else
            stats, normalizer = None, (target != ctx.ignore_index).sum(dtype=torch.float64)
        else:
            with torch.no_grad():
                _, stats, normalizer = _forward(logits, target, None, MEAN, *options, None)
        args = grad_loss, logits, target, None, stats, normalizer
        return _loss_backward((True, False), options, *args)[0], None, None, None, None


_apply_direct = short_apply(DirectCrossEntropy)


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
    dtype = loss_dtype(logits, target, weight, out_dtype)
    return reduced(rows, reduction, dtype, Family())


# --------------------------------------------------------------------------------------------------
# The options beyond torch's


def _may_write_over(input: Tensor, *others: Tensor | float | None) -> bool:
    """Whether the backward may leave the gradient in the logits; raises where that would destroy something.

    What else needs the logits is autograd's version counter to notice. Where nothing asks it (compiled code;
    tensors saved through hooks, as torch.utils.checkpoint does), they stay as they are.
    """
    if torch.compiler.is_compiling():
        note("inplace_backward: compiled code; the gradient has memory of its own")
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
    family: Family,
    inplace_backward: bool = False,
    metrics: bool = False,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    shape, index_target = row_shape("cross_entropy", input, target, weight)
    family.check("cross_entropy", input, shape)
    in_place = inplace_backward and _may_write_over(input, target, weight, family.logit_scale)
    dtype = loss_dtype(input, target, weight, out_dtype)
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
    loss = reduced(rows, reduction, dtype, family)
    if not metrics:
        return loss, None
    logprob = logprobs(rows, index_target)
    if not plain_target:
        note("logprob of probabilities with class weight or smoothing takes a second pass")
        unweighted_rows, _ = row_functions(input, unweighted, None, scale_tensor, (*options[:3], 0.0))
        logprob = logprobs(unweighted_rows, index_target)
    if index_target:
        best = target.reshape(predicted.shape)
    elif input.size(class_dim(input)):
        best = unweighted.argmax(class_dim(input))
    else:
        best = predicted
    return loss, metrics_of(rows, logprob, family.z_loss, predicted, best)


# --------------------------------------------------------------------------------------------------
# DTensors. Their module imports this one, and is slow to import: where a plain tensor is given it is not.


def _loss_of_dtensor(input: Any, target: Tensor, *given: Any, metrics: bool = False) -> Any:
    from ._dtensor import loss_of_dtensor
    from .vocab_parallel import Arguments

    return loss_of_dtensor("cross_entropy", input, target, Arguments(*given), metrics)


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
            float32 or float64, any strides. A DTensor may have its classes, its rows or both sharded; the
            loss is one then (docs/distributed.md).
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
            second derivatives are errors too. The gradient gets memory of its own, as without the option,
            where nothing asks that counter, which is under torch.compile (and compiled autograd) and while
            saved-tensor hooks are active (``torch.utils.checkpoint`` with ``use_reentrant=False``,
            ``save_on_cpu``), and for logits that are a negated view; :func:`lossops.explain` notes it.
            Without the option nothing is ever written to an argument.

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
    if type(input) is not Tensor and is_dtensor(input):
        if size_average is not None or reduce is not None:
            reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
        family = Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty)
        given = weight, ignore_index, reduction, label_smoothing, out_dtype, inplace_backward, family
        return _loss_of_dtensor(input, target, *given)[0]
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
        if out_dtype is None:
            out_dtype = autocast_dtype(input, target)
        else:
            checked_dtype("cross_entropy", out_dtype)
        # Written out: a call that asks for none of this pays for nothing but the question.
        if not (
            softcap is None
            and row_weight is None
            and normalizer is None
            and not inplace_backward
            and empty == "nan"
            and (type(logit_scale) is float or not isinstance(logit_scale, Tensor))
            and logit_scale == 1
            and z_loss == 0
        ):
            family = Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty)
            options = code, ignore_index, label_smoothing, out_dtype, family, inplace_backward
            return _with_options(input, target, weight, *options)[0]
        if weight is not None and may_be_differentiated(weight):
            target, weight, label_smoothing = _weighted_target(input, target, weight, label_smoothing)
        if (
            weight is None
            and label_smoothing == 0
            and code == MEAN
            and (where := place(_C.direct_cross_entropy, input, target))
        ):
            note("the kernels are called without the dispatcher")
            if input.requires_grad and is_grad_enabled():
                return _apply_direct(input, target, ignore_index, where, out_dtype)
            return _direct_forward(input, target, None, ignore_index, where, out_dtype)[0]
        args = input, target, weight, code, ignore_index, label_smoothing, out_dtype
        return run(EagerCrossEntropy, _for_transforms, _forward, (input, target), args)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        explain_bad_option("cross_entropy", ignore_index, label_smoothing)
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
    family = Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty)
    if type(input) is not Tensor and is_dtensor(input):
        given = weight, ignore_index, reduction, label_smoothing, out_dtype, inplace_backward, family
        return _loss_of_dtensor(input, target, *given, metrics=True)
    try:
        out_dtype = checked_dtype("cross_entropy", out_dtype) or autocast_dtype(input, target)
        options = code, ignore_index, label_smoothing, out_dtype, family, inplace_backward
        loss, metrics = _with_options(input, target, weight, *options, metrics=True)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        explain_bad_option("cross_entropy", ignore_index, label_smoothing)
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
    family = Family(logit_scale, softcap)
    try:
        shape, index_target = row_shape("log_prob", logits, target, None)
        if not index_target:
            raise RuntimeError(
                f"log_prob: expected target of class indices of shape {tuple(shape)}, got probabilities of "
                f"shape {tuple(target.shape)}"
            )
        family.check("log_prob", logits, shape)
        scale_tensor, scale = family.scale(accumulation(logits), logits.device)
        options = scale, float(softcap or 0.0), ignore_index, 0.0
        rows, _ = row_functions(logits, target, None, scale_tensor, options, entropy=return_entropy)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        explain_bad_option("log_prob", ignore_index, 0.0)
        explain_bad_input("log_prob", input=logits, target=target)
        raise
    logprob = logprobs(rows, True)
    return (logprob, rows[_rows.ENTROPY]) if return_entropy else logprob


def _weighted_target(
    input: Tensor, target: Tensor, weight: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor | None, float]:
    """Class weights that may need a derivative, moved into a probability target to get it there."""
    _, index_target = row_shape("cross_entropy", input, target, weight)
    if index_target:
        if weight.requires_grad:
            raise RuntimeError(NO_WEIGHT_DERIVATIVE)
        return target, weight, label_smoothing
    check_smoothing("cross_entropy", label_smoothing)
    classes = input.size(class_dim(input))
    return weighted_probabilities(target, weight, label_smoothing, classes), None, 0.0


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
        return options_given(self, self._DEFAULTS)
