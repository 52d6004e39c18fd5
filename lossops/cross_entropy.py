"""Softmax cross-entropy: reference, ops' meta implementations, autograd, function, module.

For a row of logits ``z`` with target weights ``t`` and ``S = sum_c t_c``::

    loss       = S * logsumexp(z) - sum_c t_c * z_c
    dloss/dz_c = S * softmax(z)_c - t_c

where ``t_c = w_c * ((1 - eps) * onehot_c + eps / C)`` for a class index and
``t_c = w_c * ((1 - eps) * p_c + eps / C)`` for class probabilities. The kernels are in
``csrc/cpu/cross_entropy.inl``; ``csrc/cross_entropy.h`` says what they compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _C
from ._autograd import (
    MEAN,
    NONE,
    Combine,
    accumulation,
    autocast_dtype,
    bare_apply,
    check_devices,
    differentiates_backward,
    divide,
    explain_bad_input,
    may_be_differentiated,
    promote,
    reduction_code,
    run,
    vmap_by_loop,
)
from ._small import empty_scalar, is_small, takes_small_gradient

_forward = torch.ops.lossops.cross_entropy_forward.default
_backward = torch.ops.lossops.cross_entropy_backward.default
_backward_backward = torch.ops.lossops.cross_entropy_backward_backward.default

# Class probabilities have no ignored rows; the ops want an ignore_index that says so.
_NO_IGNORE = -100

_NO_WEIGHT_DERIVATIVE = (
    "cross_entropy: is not differentiable with respect to argument 'weight' for class indices. "
    "This input cannot have requires_grad True."
)


# --------------------------------------------------------------------------------------------------
# Reference


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _per_class(weight: Tensor, logits: Tensor) -> Tensor:
    shape = [1] * logits.dim()
    shape[_class_dim(logits)] = -1
    return weight.view(shape)


def _target_weights(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """t_c in the shape of the logits, and the weight of each row's target class (0 if ignored)."""
    dim = _class_dim(logits)
    classes = logits.size(dim)
    w = torch.ones(classes, dtype=logits.dtype, device=logits.device) if weight is None else weight
    w = w.to(logits.dtype)
    if target.shape == logits.shape:
        rows = torch.ones_like(logits.select(dim, 0)) if classes else logits.sum(dim)
        t = _per_class(w, logits) * ((1 - label_smoothing) * target + label_smoothing / classes)
        return t, rows
    if logits.dim() == 1:
        target = target.reshape(())
    target = target.long()  # or a narrow target would meet ignore_index modulo its own range
    counted = target != ignore_index
    index = target.where(counted, 0)
    onehot = torch.zeros_like(logits).scatter(dim, index.unsqueeze(dim), 1.0)
    t = _per_class(w, logits) * ((1 - label_smoothing) * onehot + label_smoothing / classes)
    return t * counted.unsqueeze(dim), w[index] * counted


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy in plain PyTorch: what the kernels compute, written to be read.

    The tests' oracle, differentiable by autograd; takes what :func:`cross_entropy` takes.
    """
    dim = _class_dim(input)
    t, row_weight = _target_weights(input, target, weight, ignore_index, label_smoothing)
    log_softmax = input - input.logsumexp(dim, keepdim=True)
    # A term of weight 0 adds 0, even where the log-probability is -inf.
    loss = -(t * log_softmax.masked_fill(t == 0, 0)).sum(dim)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / row_weight.sum()


def _backward_backward_reference(
    tangent: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What cross_entropy_backward_backward computes, for derivatives of the third order and up."""
    dim = _class_dim(logits)
    t, _ = _target_weights(logits, target, weight, ignore_index, label_smoothing)
    softmax = logits.softmax(dim)
    target_sum = t.sum(dim)
    mean = (softmax * tangent).sum(dim, keepdim=True)
    row_dot = target_sum * mean.squeeze(dim) - (t * tangent).sum(dim)
    grad_logits = (grad_loss * target_sum).unsqueeze(dim) * softmax * (tangent - mean)
    w = torch.ones((), dtype=logits.dtype) if weight is None else _per_class(weight, logits)
    grad_target = grad_loss.unsqueeze(dim) * (1 - label_smoothing) * w * (mean - tangent)
    return row_dot, grad_logits, grad_target


# --------------------------------------------------------------------------------------------------
# Meta implementations: shapes and dtypes, for fake tensors, torch.compile and the meta device


def _row_shape(op: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[list[Any], bool]:
    """The rows' shape, and whether the target holds class indices; the ops' own checks in short."""
    if logits.dim() == 0:
        raise RuntimeError(f"{op}: expected logits of shape (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    check_devices(op, logits, target=target, weight=weight)
    dim = _class_dim(logits)
    classes = logits.shape[dim]
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != classes):
        raise RuntimeError(
            f"{op}: weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {tuple(weight.shape)}"
        )
    rows = [*logits.shape[:dim], *logits.shape[dim + 1 :]]
    if target.shape == logits.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"{op}: Expected floating point type for target with class probabilities, got {target.dtype}"
            )
        return rows, False
    got = list(target.shape)
    if got != rows and not (logits.dim() == 1 and got == [1]):
        by_batch = len(got) == 1 if logits.dim() == 1 else not got or got[0] != rows[0]
        raise (ValueError if by_batch else RuntimeError)(
            f"{op}: expected target of shape {tuple(rows)} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(got)}"
        )
    if target.is_floating_point():
        raise RuntimeError(
            f"{op}: expected target dtype to be Long, Int or Byte for class indices, got {target.dtype}"
        )
    return rows, True


@torch.library.register_fake("lossops::cross_entropy_forward")
def _(logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
    rows, index_target = _row_shape("cross_entropy", logits, target, weight)
    stat_rows = 3 if label_smoothing != 0 or not index_target else 2
    loss = logits.new_empty(
        rows if reduction == NONE else (), dtype=_loss_dtype(logits, target, weight, out_dtype)
    )
    stats = logits.new_empty((stat_rows, *rows), dtype=accumulation(logits, target, weight))
    return loss, stats, logits.new_empty((), dtype=torch.float64)


def _fake_gradients(logits, target, need_logits, need_target):
    grad_logits = torch.empty_like(logits) if need_logits else logits.new_empty((0,))
    grad_target = torch.empty_like(target) if need_target else logits.new_empty((0,))
    return grad_logits, grad_target


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
    _row_shape(op, logits, target, weight)
    check_devices(op, logits, grad_loss=grad_loss, stats=stats, normalizer=normalizer)
    return _fake_gradients(logits, target, need_logits, need_target)


@torch.library.register_fake("lossops::cross_entropy_backward_backward")
def _(
    tangent,
    grad_loss,
    logits,
    target,
    weight,
    stats,
    ignore_index,
    label_smoothing,
    need_logits,
    need_target,
):
    op = "cross_entropy_backward_backward"
    rows, _ = _row_shape(op, logits, target, weight)
    check_devices(op, logits, tangent=tangent, grad_loss=grad_loss, stats=stats)
    return stats.new_empty(rows), *_fake_gradients(logits, target, need_logits, need_target)


# --------------------------------------------------------------------------------------------------
# Autograd. Three Functions, each the derivative of the one before; the third is differentiated
# through its reference. The loss is linear in a probability target, so that derivatives along a
# target are the loss and its gradient again, with the direction in the target's place.


def _loss_backward(needs, options, grad_loss, logits, target, weight, stats, normalizer):
    options = *options, *needs
    if differentiates_backward():
        rows = divide(grad_loss.to(stats.dtype), normalizer).expand(stats.shape[1:])
        grads = CrossEntropyBackward.apply(rows, logits, target, weight, stats, *options)
    else:
        grads = _backward(grad_loss, logits, target, weight, stats, normalizer, *options)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


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


class CrossEntropy(Function):
    """(loss, stats, normalizer) of logits, target, weight and options, for every transform."""

    @staticmethod
    def forward(logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
        return _forward(logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, ctx.reduction, *ctx.options, ctx.out_dtype = inputs
        _, stats, normalizer = output
        ctx.mark_non_differentiable(stats, normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats, normalizer)
        ctx.save_for_forward(logits, target, weight, stats, normalizer)

    @staticmethod
    def backward(ctx, grad_loss, _stats, _normalizer):
        if grad_loss is None:
            return (None,) * 7
        logits, target, weight, stats, normalizer = ctx.saved_tensors
        if ctx.reduction != MEAN:
            normalizer = None
        saved = logits, target, weight, stats, normalizer
        grads = _loss_backward(ctx.needs_input_grad[:2], ctx.options, grad_loss, *saved)
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx, logits_t, target_t, weight_t, *_):
        if weight_t is not None:
            raise RuntimeError(_NO_WEIGHT_DERIVATIVE)
        logits, target, weight, stats, normalizer = ctx.saved_tensors
        dtype = _loss_dtype(logits, target, weight, ctx.out_dtype)
        terms = []
        if logits_t is not None:
            ones = torch.ones(stats.shape[1:], dtype=stats.dtype, device=stats.device)
            args = logits_t, ones, logits, target, weight, stats, *ctx.options, False, False
            terms.append(CrossEntropyBackwardBackward.apply(*args)[0])
        if target_t is not None:
            along = _loss_along(logits, target_t, weight, stats.dtype)[0]
            terms.append(Combine.apply(1 - ctx.options[1], False, None, stats.dtype, along))
        if not terms:
            return None, None, None
        normalizer = normalizer if ctx.reduction == MEAN else None
        return Combine.apply(1, ctx.reduction != NONE, normalizer, dtype, *terms), None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, reduction, ignore_index, label_smoothing, out_dtype):
        options = ignore_index, label_smoothing
        fold = _Fold.of(info, in_dims[:3], logits, target, weight)
        if fold is None:
            args = (logits, target, weight, reduction, *options, out_dtype)
            return vmap_by_loop(CrossEntropy, info, in_dims, args)
        # Rows in the accumulation type: reduced here, they are rounded once as in the op.
        row_dtype = out_dtype if reduction == NONE else accumulation(logits, target, weight)
        loss, stats, normalizer = CrossEntropy.apply(
            fold.logits, fold.target, weight, NONE, *options, row_dtype
        )
        if reduction == NONE:
            normalizer = normalizer.expand(info.batch_size)
        else:
            samples = range(loss.dim() - 1)
            normalizer = (
                fold.row_weight(weight, ignore_index).sum(tuple(samples))
                if samples
                else fold.row_weight(weight, ignore_index)
            )
            loss = loss.sum(tuple(samples)) if samples else loss
            if reduction == MEAN:
                loss = loss.double() / normalizer
            loss = loss.to(_loss_dtype(logits, target, weight, out_dtype))
        return (loss, stats, normalizer), (loss.dim() - 1, stats.dim() - 1, 0)


class CrossEntropyBackward(Function):
    """(grad_logits, grad_target) of a gradient for each row, logits, target, weight and stats."""

    @staticmethod
    def forward(
        grad_loss, logits, target, weight, stats, ignore_index, label_smoothing, need_logits, need_target
    ):
        options = ignore_index, label_smoothing, need_logits, need_target
        return _backward(grad_loss, logits, target, weight, stats, None, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_loss, logits, target, weight, stats, ctx.ignore_index, ctx.label_smoothing, *ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
        ctx.save_for_backward(grad_loss, logits, target, weight, stats)
        ctx.save_for_forward(grad_loss, logits, target, weight, stats)

    @staticmethod
    def backward(ctx, logits_v, target_v):
        grad_loss, logits, target, weight, stats = ctx.saved_tensors
        _, need_logits, need_target = ctx.needs_input_grad[:3]
        to_grad_loss = to_logits = to_target = None
        if logits_v is not None:
            options = ctx.ignore_index, ctx.label_smoothing, need_logits, need_target
            to_grad_loss, to_logits, to_target = CrossEntropyBackwardBackward.apply(
                logits_v, grad_loss, logits, target, weight, stats, *options
            )
        if target_v is not None:
            keep = 1 - ctx.label_smoothing
            loss, stats_v = _loss_along(logits, target_v, weight, stats.dtype)
            to_grad_loss = keep * loss if to_grad_loss is None else to_grad_loss + keep * loss
            if need_logits:
                along = _gradient_along(grad_loss * keep, logits, target_v, weight, stats_v)
                to_logits = along if to_logits is None else to_logits + along
        if to_grad_loss is not None:
            to_grad_loss = to_grad_loss.to(grad_loss.dtype)
        return (
            to_grad_loss,
            to_logits if need_logits else None,
            to_target if need_target else None,
            *(None,) * 6,
        )

    @staticmethod
    def jvp(ctx, grad_loss_t, logits_t, target_t, *_):
        grad_loss, logits, target, weight, stats = ctx.saved_tensors
        options = ctx.ignore_index, ctx.label_smoothing, *ctx.needs
        to_logits, to_target = [], []
        if grad_loss_t is not None:
            grads = CrossEntropyBackward.apply(grad_loss_t, logits, target, weight, stats, *options)
            to_logits.append(grads[0])
            to_target.append(grads[1])
        if logits_t is not None:
            args = logits_t, grad_loss, logits, target, weight, stats, *options
            _, along_logits, along_target = CrossEntropyBackwardBackward.apply(*args)
            to_logits.append(along_logits)
            to_target.append(along_target)
        if target_t is not None and ctx.needs[0]:
            stats_t = _loss_along(logits, target_t, weight, stats.dtype)[1]
            scaled = Combine.apply(1 - ctx.label_smoothing, False, None, grad_loss.dtype, grad_loss)
            to_logits.append(_gradient_along(scaled, logits, target_t, weight, stats_t))
        return tuple(
            Combine.apply(1, False, None, terms[0].dtype, *terms) if need and terms else None
            for need, terms in zip(ctx.needs, (to_logits, to_target), strict=True)
        )

    @staticmethod
    def vmap(info, in_dims, grad_loss, logits, target, weight, stats, *options):
        fold = _Fold.of(info, in_dims[1:4], logits, target, weight)
        if fold is None:
            return vmap_by_loop(
                CrossEntropyBackward, info, in_dims, (grad_loss, logits, target, weight, stats, *options)
            )
        grad_loss, stats = fold.last(grad_loss, in_dims[0]), fold.last(stats, in_dims[4])
        grads = CrossEntropyBackward.apply(grad_loss, fold.logits, fold.target, weight, stats, *options)
        return grads, fold.gradient_dims(*options[2:])


class CrossEntropyBackwardBackward(Function):
    """(row_dot, grad_logits, grad_target) along a tangent of the logits; see csrc/cross_entropy.h."""

    @staticmethod
    def forward(
        tangent,
        grad_loss,
        logits,
        target,
        weight,
        stats,
        ignore_index,
        label_smoothing,
        need_logits,
        need_target,
    ):
        options = ignore_index, label_smoothing, need_logits, need_target
        return _backward_backward(tangent, grad_loss, logits, target, weight, stats, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tangent, grad_loss, logits, target, weight, _stats, ctx.ignore_index, ctx.label_smoothing, *needs = (
            inputs
        )
        ctx.set_materialize_grads(False)
        ctx.kept = [0, *(k for k, need in enumerate(needs, start=1) if need)]  # which outputs are real
        ctx.mark_non_differentiable(*(t for k, t in enumerate(output) if k not in ctx.kept))
        ctx.save_for_backward(tangent, grad_loss, logits, target, weight)
        ctx.save_for_forward(tangent, grad_loss, logits, target, weight)

    @staticmethod
    def _reference(ctx):
        """The reference as a function of what may be differentiated, and those arguments."""
        tangent, grad_loss, logits, target, weight = ctx.saved_tensors
        primals = (tangent, grad_loss, logits, target)[: 4 if target.is_floating_point() else 3]

        def function(tangent, grad_loss, logits, target=target):
            options = weight, ctx.ignore_index, ctx.label_smoothing
            results = _backward_backward_reference(tangent, grad_loss, logits, target, *options)
            return tuple(results[k] for k in ctx.kept)

        return function, primals

    @staticmethod
    def backward(ctx, *grads):
        function, primals = CrossEntropyBackwardBackward._reference(ctx)
        outputs, vjp, *_ = torch.func.vjp(function, *primals)
        grads = tuple(
            torch.zeros_like(out) if grads[k] is None else grads[k].to(out.dtype)
            for k, out in zip(ctx.kept, outputs, strict=True)
        )
        results = vjp(grads)
        return *results, *(None,) * (10 - len(results))

    @staticmethod
    def jvp(ctx, *tangents):
        function, primals = CrossEntropyBackwardBackward._reference(ctx)
        along = tuple(
            torch.zeros_like(p) if t is None else t
            for p, t in zip(primals, tangents[: len(primals)], strict=True)
        )
        # Copies: torch will not make a dual of an expanded tensor.
        results = torch.func.jvp(function, tuple(p.clone() for p in primals), along)[1]
        by_output = dict(zip(ctx.kept, results, strict=True))
        return tuple(by_output.get(k) for k in range(3))

    @staticmethod
    def vmap(info, in_dims, tangent, grad_loss, logits, target, weight, stats, *options):
        fold = _Fold.of(info, in_dims[2:5], logits, target, weight)
        if fold is None:
            args = tangent, grad_loss, logits, target, weight, stats, *options
            return vmap_by_loop(CrossEntropyBackwardBackward, info, in_dims, args)
        results = CrossEntropyBackwardBackward.apply(
            fold.classes(tangent, in_dims[0]),
            fold.last(grad_loss, in_dims[1]),
            fold.logits,
            fold.target,
            weight,
            fold.last(stats, in_dims[5]),
            *options,
        )
        return results, (results[0].dim() - 1, *fold.gradient_dims(*options[2:]))


def _loss_dtype(
    logits: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    return promote(logits, target, weight) if target.is_floating_point() else logits.dtype


def _loss_along(
    logits: Tensor, direction: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The loss of each row with a direction of the target's space as its target, and its stats."""
    loss, stats, _ = CrossEntropy.apply(logits, direction, weight, NONE, _NO_IGNORE, 0.0, dtype)
    return loss, stats


def _gradient_along(
    grad_loss: Tensor, logits: Tensor, direction: Tensor, weight: Tensor | None, stats: Tensor
) -> Tensor:
    options = _NO_IGNORE, 0.0, True, False
    return CrossEntropyBackward.apply(grad_loss, logits, direction, weight, stats, *options)[0]


class _Fold:
    """A vmapped batch as more rows of one call: the batch goes last, or first of one-row logits."""

    def __init__(self, info: Any, in_dims: tuple[Any, ...], logits: Tensor, target: Tensor) -> None:
        self.size = info.batch_size
        self.one_row = logits.dim() - (in_dims[0] is not None) == 1
        self.logits = self.classes(logits, in_dims[0])
        self.index_target = not target.is_floating_point()
        self.target = self.last(target, in_dims[1]) if self.index_target else self.classes(target, in_dims[1])

    @classmethod
    def of(
        cls, info: Any, in_dims: tuple[Any, ...], logits: Tensor, target: Tensor, weight: Tensor | None
    ) -> _Fold | None:
        """None where the batch cannot be rows: a weight for each sample, or a target of shape (1,)."""
        target_dims = target.dim() - (in_dims[1] is not None)
        logits_dims = logits.dim() - (in_dims[0] is not None)
        single = not target.is_floating_point() and logits_dims == 1 and target_dims == 1
        return None if in_dims[2] is not None or single else cls(info, in_dims, logits, target)

    def last(self, x: Tensor, dim: int | None) -> Tensor:
        return x.unsqueeze(-1).expand(*x.shape, self.size) if dim is None else x.movedim(dim, -1)

    def classes(self, x: Tensor, dim: int | None) -> Tensor:
        x = self.last(x, dim)
        return x.movedim(-1, 0) if self.one_row else x

    def row_weight(self, weight: Tensor | None, ignore_index: int) -> Tensor:
        """What each row adds to the normalizer, in float64."""
        if not self.index_target:
            return torch.ones((), dtype=torch.float64, device=self.logits.device).expand(
                self.logits.select(_class_dim(self.logits), 0).shape
            )
        target = self.target.long()
        counted = target != ignore_index
        if weight is None:
            return counted.double()
        return weight.double()[target.where(counted, 0)] * counted

    def gradient_dims(self, need_logits: bool, need_target: bool) -> tuple[int | None, int | None]:
        dim = 0 if self.one_row else self.logits.dim() - 1
        return dim if need_logits else None, dim if need_target else None


# --------------------------------------------------------------------------------------------------
# Function and module


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Softmax cross-entropy between logits and target, as :func:`torch.nn.functional.cross_entropy`.

    Formula and arguments are those of torch's documentation; label smoothing is that of
    `Rethinking the Inception Architecture for Computer Vision <https://arxiv.org/abs/1512.00567>`_.

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

    Returns:
        The loss in the input's dtype (promoted with a probability target's; float32 under
        autocast): 0-d, or of the rows' shape for ``reduction="none"``. Computed in float32
        (float64 where an operand is float64) and rounded once.

    Raises:
        IndexError: a class index outside [0, C) that is not ``ignore_index``.
        ValueError: an unknown reduction, or a target whose batch differs from the input's.
        RuntimeError: another wrong shape, a wrong dtype of target or weight, ``label_smoothing``
            outside [0, 1], ``ignore_index >= 0`` with probabilities, a class weight that requires
            grad with class indices.
        NotImplementedError: integer, complex, sparse or other input that no kernel takes.
        TypeError: not a tensor.
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
        )
    code = reduction_code(reduction, size_average, reduce)
    try:
        out_dtype = autocast_dtype(input, target)
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
            return _apply_small(input, target, ignore_index)
        args = input, target, weight, code, ignore_index, label_smoothing, out_dtype
        return run(EagerCrossEntropy, CrossEntropy, _forward, (input, target), args)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _explain_bad_option(ignore_index, label_smoothing)
        explain_bad_input("cross_entropy", input=input, target=target, weight=weight)
        raise


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
    _, index_target = _row_shape("cross_entropy", input, target, weight)
    if index_target:
        if weight.requires_grad:
            raise RuntimeError(_NO_WEIGHT_DERIVATIVE)
        return target, weight, label_smoothing
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(
            f"cross_entropy: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )
    classes = input.size(_class_dim(input))
    t = _per_class(weight, input) * ((1 - label_smoothing) * target + label_smoothing / max(classes, 1))
    return t, None, 0.0


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on the fused kernels: same constructor, buffers and state.

    Shapes, dtypes, options and errors are those of :func:`lossops.functional.cross_entropy`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
