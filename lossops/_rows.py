"""The row functions of softmax cross-entropy: reference, meta implementations, autograd.

One pass over the logits gives for every row, in planes of one tensor, what all options of the family are
put together from by O(N) arithmetic (``csrc/cross_entropy.h`` has the formulas): the largest logit ``m``,
``log sum exp(u - m)``, ``S``, ``sum t*(u - m)``, ``u_y - m``, the target's weight and, on demand, the
softmax's entropy, for ``u = scale*z`` or ``u = cap*tanh(scale*z/cap)``. Everything but ``m`` and the
target's weight is differentiable, to every order, in the logits, the scale and a probability target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._autograd import (
    Combine,
    accumulation,
    check_devices,
    differentiates_backward,
    is_transformed,
    ordered_sum,
    vmap_by_loop,
)
from ._explain import note

MAX, LOG_SUM, TARGET_SUM, DOT, PICKED, TARGET_WEIGHT, ENTROPY = range(7)

_forward = torch.ops.lossops.cross_entropy_rows_forward.default
_backward = torch.ops.lossops.cross_entropy_rows_backward.default
_backward_in_place = torch.ops.lossops.cross_entropy_rows_backward_.default
_backward_backward = torch.ops.lossops.cross_entropy_rows_backward_backward.default

# Class probabilities have no ignored rows; the ops want an ignore_index that says so.
_NO_IGNORE = -100

NO_WEIGHT_DERIVATIVE = (
    "cross_entropy: is not differentiable with respect to argument 'weight' for class indices. "
    "This input cannot have requires_grad True."
)


_Options = tuple[float, float, int, float]  # scale, softcap, ignore_index, label_smoothing


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def per_class(weight: Tensor, logits: Tensor) -> Tensor:
    shape = [1] * logits.dim()
    shape[class_dim(logits)] = -1
    return weight.view(shape)


def weighted_probabilities(target: Tensor, weight: Tensor, label_smoothing: float, classes: int) -> Tensor:
    """Probabilities with class weights and smoothing over `classes` in them, where a class weight may need a
    derivative: a target gets one."""
    note("the class weight may need a derivative: a weighted copy of the target is made")
    mixed = (1 - label_smoothing) * target + label_smoothing / max(classes, 1)
    return per_class(weight, target) * mixed


# --------------------------------------------------------------------------------------------------
# Reference


def transform_reference(logits: Tensor, scale: float | Tensor, softcap: float) -> Tensor:
    """u of the logits: scaled, then capped as in Gemma 2."""
    u = logits * scale
    return softcap * torch.tanh(u / softcap) if softcap else u


def target_weights_reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """t_c in the shape of the logits, and the weight of each row's target class (0 if ignored)."""
    dim = class_dim(logits)
    classes = logits.size(dim)
    w = torch.ones(classes, dtype=logits.dtype, device=logits.device) if weight is None else weight
    w = w.to(logits.dtype)
    if target.shape == logits.shape:
        rows = torch.ones_like(logits.select(dim, 0)) if classes else logits.sum(dim)
        t = per_class(w, logits) * ((1 - label_smoothing) * target + label_smoothing / classes)
        return t, rows
    if logits.dim() == 1:
        target = target.reshape(())
    target = target.long()  # or a narrow target would meet ignore_index modulo its own range
    counted = target != ignore_index
    index = target.where(counted, 0)
    onehot = torch.zeros_like(logits).scatter(dim, index.unsqueeze(dim), 1.0)
    t = per_class(w, logits) * ((1 - label_smoothing) * onehot + label_smoothing / classes)
    return t * counted.unsqueeze(dim), w[index] * counted


def rows_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: float | Tensor = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    entropy: bool = False,
) -> Tensor:
    """The planes that ``cross_entropy_rows_forward`` computes, in plain PyTorch."""
    dim = class_dim(logits)
    dtype = accumulation(logits, target, weight)
    u = transform_reference(logits.to(dtype), scale, softcap)
    t, target_weight = target_weights_reference(u, target, weight, ignore_index, label_smoothing)
    if target.shape == logits.shape:
        counted = torch.ones_like(target_weight, dtype=torch.bool)
        picked = torch.zeros_like(target_weight)
    else:
        index = (target.reshape(()) if logits.dim() == 1 else target).long()
        counted = index != ignore_index
    largest = u.detach().amax(dim)
    distance = u - largest.masked_fill(largest == -torch.inf, 0).unsqueeze(dim)
    if target.shape != logits.shape:
        picked = distance.gather(dim, index.where(counted, 0).unsqueeze(dim)).squeeze(dim)
    log_sum = distance.exp().sum(dim).log()
    planes = [
        largest,
        log_sum,
        t.sum(dim),
        (t * distance.masked_fill(t == 0, 0)).sum(dim),  # a weight 0 adds 0, even at a logit of -inf
        picked,
        target_weight.detach(),
    ]
    if entropy:
        log_p = distance - log_sum.unsqueeze(dim)
        p = log_p.exp()
        planes.append(-(p * log_p.masked_fill(p == 0, 0)).sum(dim))
    return torch.stack([plane.masked_fill(~counted, 0) for plane in planes])


# --------------------------------------------------------------------------------------------------
# Meta implementations: shapes and dtypes, for fake tensors, torch.compile and the meta device


def check_class_weight(op: str, weight: Tensor | None, classes: Any) -> None:
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != classes):
        raise RuntimeError(
            f"{op}: weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {tuple(weight.shape)}"
        )


def check_smoothing(op: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{op}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")


def row_shape(op: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[list[Any], bool]:
    """The rows' shape, and whether the target holds class indices; the ops' own checks in short."""
    if logits.dim() == 0:
        raise RuntimeError(f"{op}: expected logits of shape (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    check_devices(op, logits, target=target, weight=weight)
    dim = class_dim(logits)
    classes = logits.shape[dim]
    check_class_weight(op, weight, classes)
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


@torch.library.register_fake("lossops::cross_entropy_rows_forward")
def _(
    logits,
    target,
    weight,
    scale_tensor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    entropy,
    predicted,
):
    shape, _ = row_shape("cross_entropy", logits, target, weight)
    check_devices("cross_entropy", logits, scale_tensor=scale_tensor)
    planes = 7 if entropy else 6
    rows = logits.new_empty((planes, *shape), dtype=accumulation(logits, target, weight))
    return rows, logits.new_empty(shape if predicted else (0,), dtype=torch.int64)


def _fake_gradients(rows, logits, target, need_logits, need_target, need_scale):
    grad_logits = torch.empty_like(logits) if need_logits else logits.new_empty((0,))
    grad_target = torch.empty_like(target) if need_target else logits.new_empty((0,))
    return grad_logits, grad_target, rows.new_empty(rows.shape[1:] if need_scale else (0,))


@torch.library.register_fake("lossops::cross_entropy_rows_backward")
def _(
    grad_rows,
    rows,
    logits,
    target,
    weight,
    scale_tensor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    need_logits,
    need_target,
    need_scale,
):
    op = "cross_entropy_rows_backward"
    row_shape(op, logits, target, weight)
    check_devices(op, logits, grad_rows=grad_rows, rows=rows, scale_tensor=scale_tensor)
    return _fake_gradients(rows, logits, target, need_logits, need_target, need_scale)


@torch.library.register_fake("lossops::cross_entropy_rows_backward_")
def _(
    grad_rows,
    rows,
    logits,
    target,
    weight,
    scale_tensor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    need_target,
    need_scale,
):
    op = "cross_entropy_rows_backward_"
    row_shape(op, logits, target, weight)
    check_devices(op, logits, grad_rows=grad_rows, rows=rows, scale_tensor=scale_tensor)
    return _fake_gradients(rows, logits, target, False, need_target, need_scale)[1:]


@torch.library.register_fake("lossops::cross_entropy_rows_backward_backward")
def _(
    tangent,
    scale_tangent,
    grad_rows,
    rows,
    logits,
    target,
    weight,
    scale_tensor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    need_logits,
    need_target,
    need_scale,
):
    op = "cross_entropy_rows_backward_backward"
    row_shape(op, logits, target, weight)
    check_devices(
        op,
        logits,
        tangent=tangent,
        scale_tangent=scale_tangent,
        grad_rows=grad_rows,
        rows=rows,
        scale_tensor=scale_tensor,
    )
    grads = _fake_gradients(rows, logits, target, need_logits, need_target, need_scale)
    return torch.empty_like(rows, memory_format=torch.contiguous_format), *grads


def _count_the_write(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """What autograd must know of the op that writes over the logits: their version."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        results = _backward_in_place.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
    torch.autograd.graph.increment_version(args[2])
    return results


_library = torch.library.Library("lossops", "FRAGMENT")
_library.impl("cross_entropy_rows_backward_", _count_the_write, "ADInplaceOrView", with_keyset=True)


# --------------------------------------------------------------------------------------------------
# Autograd. Three Functions, each the derivative of the one before; the third is differentiated
# through the reference. The planes are linear in a probability target, so that derivatives along a
# target are planes and their gradients again, with the direction in the target's place.


def row_functions(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale_tensor: Tensor | None,
    options: _Options,
    entropy: bool = False,
    predicted: bool = False,
    inplace_backward: bool = False,
    part: bool = False,
) -> tuple[Tensor, Tensor]:
    """(planes, argmax) by the shortest way that the surroundings allow; see `_autograd.run`.

    `part`: the logits are some of more, as `within_softmax` has it.
    """
    args = logits, target, weight, scale_tensor, *options, entropy, predicted, part
    if torch.compiler.is_compiling():
        return EagerRows.apply(*args, inplace_backward)
    if is_transformed():
        if inplace_backward:
            raise RuntimeError(
                "cross_entropy: inplace_backward=True writes over the logits, which torch.func and "
                "forward-mode AD may still need; leave it out there"
            )
        return Rows.apply(*args)
    return EagerRows.apply(*args, inplace_backward)


def within_softmax(rows: Tensor, grad_rows: Tensor) -> Tensor:
    """Planes of some classes as the derivatives take them, where the softmax is that of more: of logits that
    are all -inf it is not 0/0 but 0.

    Where the logits of all classes are -inf, so that it is NaN after all, the gradient of LOG_SUM is.
    """
    nothing = (rows[MAX] == -torch.inf) & ~grad_rows[LOG_SUM].isnan()
    return torch.cat([rows[:TARGET_SUM].masked_fill(nothing, 0), rows[TARGET_SUM:]])


def _rows_gradients(needs, options, grad_rows, rows, logits, target, weight, scale_tensor):
    if differentiates_backward():
        return RowsBackward.apply(grad_rows, rows, logits, target, weight, scale_tensor, *options, *needs)
    grads = _backward(grad_rows, rows, logits, target, weight, scale_tensor, *options, *needs)
    return *grads[:2], _over_rows(grads[2], needs[2])


def _over_rows(grad_scale: Tensor, need: bool) -> Tensor:
    """The gradient of the one scale from its rows'."""
    return ordered_sum(grad_scale, grad_scale.dtype) if need else grad_scale


def _wanted(needs, grads):
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=True))


def _needs(ctx: Any, first: int) -> tuple[bool, bool, bool]:
    """Which of logits, target and scale_tensor need a gradient; logits are argument `first`."""
    needs = ctx.needs_input_grad
    return needs[first], needs[first + 1], needs[first + 3]


class EagerRows(Function):
    """(planes, argmax) of logits, target, weight, scale_tensor and options, outside torch.func."""

    @staticmethod
    def forward(
        ctx,
        logits,
        target,
        weight,
        scale_tensor,
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        entropy,
        predicted,
        part,
        inplace_backward,
    ):
        ctx.options = scale, softcap, ignore_index, label_smoothing
        ctx.part, ctx.inplace_backward = part, inplace_backward
        tensors = logits, target, weight, scale_tensor
        rows, largest = _forward(*tensors, *ctx.options, entropy, predicted)
        ctx.mark_non_differentiable(largest)
        ctx.save_for_backward(rows, *tensors)
        return rows, largest

    @staticmethod
    def backward(ctx, grad_rows, _largest):
        needs = _needs(ctx, 0)
        rows, logits, target, weight, scale_tensor = ctx.saved_tensors
        if ctx.part:
            rows = within_softmax(rows, grad_rows)
        tensors = rows, logits, target, weight, scale_tensor
        # Compiled autograd, too, compares no versions.
        if ctx.inplace_backward and needs[0] and not torch.compiler.is_compiling():
            if differentiates_backward():
                raise RuntimeError(
                    "cross_entropy: inplace_backward=True writes the gradient over the logits, which a "
                    "second derivative needs; leave it out where create_graph=True"
                )
            grad_target, grad_scale = _backward_in_place(grad_rows, *tensors, *ctx.options, *needs[1:])
            grads = logits.detach(), grad_target, _over_rows(grad_scale, needs[2])
        else:
            grads = _rows_gradients(needs, ctx.options, grad_rows, *tensors)
        grad_logits, grad_target, grad_scale = _wanted(needs, grads)
        return grad_logits, grad_target, None, grad_scale, *(None,) * 8


class Rows(Function):
    """The same for every transform."""

    @staticmethod
    def forward(
        logits,
        target,
        weight,
        scale_tensor,
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        entropy,
        predicted,
        part,
    ):
        options = scale, softcap, ignore_index, label_smoothing, entropy, predicted
        return _forward(logits, target, weight, scale_tensor, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, _, _, ctx.entropy, _, ctx.part = inputs
        ctx.options = inputs[4:8]
        rows, largest = output
        ctx.mark_non_differentiable(largest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, *tensors)
        ctx.save_for_forward(rows, *tensors)

    @staticmethod
    def backward(ctx, grad_rows, _largest):
        if grad_rows is None:
            return (None,) * 11
        needs = _needs(ctx, 0)
        rows, *tensors = ctx.saved_tensors
        if ctx.part:
            rows = within_softmax(rows, grad_rows)
        grads = _rows_gradients(needs, ctx.options, grad_rows, rows, *tensors)
        grad_logits, grad_target, grad_scale = _wanted(needs, grads)
        return grad_logits, grad_target, None, grad_scale, *(None,) * 7

    @staticmethod
    def jvp(ctx, logits_t, target_t, weight_t, scale_t, *_):
        if weight_t is not None:
            raise RuntimeError(NO_WEIGHT_DERIVATIVE)
        rows, *tensors = ctx.saved_tensors
        terms = []
        if logits_t is not None or scale_t is not None:
            zeros = torch.zeros_like(rows)
            if ctx.part:
                rows = within_softmax(rows, zeros)
            args = logits_t, scale_t, zeros, rows, *tensors, *ctx.options, False, False, False
            terms.append(RowsBackwardBackward.apply(*args)[0])
        if target_t is not None:
            logits, _, weight, scale_tensor = tensors
            planes = _along_target(target_t, ctx.options, logits, weight, scale_tensor)
            terms.append(LinearPlanes.apply(planes, 1 - ctx.options[3], rows.shape[0]))
        return Combine.apply(1, False, None, rows.dtype, *terms) if terms else None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, scale_tensor, *options):
        fold = Fold.of(info, in_dims[:4], logits, target, weight)
        if fold is None:
            args = logits, target, weight, scale_tensor, *options
            return unbatch_absent(vmap_by_loop(Rows, info, in_dims, args), (True, options[5]))
        rows, largest = Rows.apply(fold.logits, fold.target, weight, scale_tensor, *options)
        return (rows, largest), (rows.dim() - 1, largest.dim() - 1 if options[5] else None)


def _along_target(
    direction: Tensor, options: _Options, logits: Tensor, weight: Tensor | None, scale_tensor: Tensor | None
) -> Tensor:
    """The planes with a direction of the target's space as their target."""
    scale, softcap, _, _ = options
    linear = scale, softcap, _NO_IGNORE, 0.0
    return Rows.apply(logits, direction, weight, scale_tensor, *linear, False, False, False)[0]


class LinearPlanes(Function):
    """`keep` times the planes that are linear in the target, zeros in the others, `count` in all.

    A Function for the same reason as `Combine`: it is part of a `jvp`. It is its own adjoint.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(planes, keep, count):
        kept = planes.new_zeros((count, *planes.shape[1:]))
        kept[TARGET_SUM] = keep * planes[TARGET_SUM]
        kept[DOT] = keep * planes[DOT]
        return kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        planes, ctx.keep, ctx.count = inputs
        ctx.given = planes.shape[0]

    @staticmethod
    def backward(ctx, grad):
        return LinearPlanes.apply(grad, ctx.keep, ctx.given), None, None

    @staticmethod
    def jvp(ctx, planes_t, *_):
        return LinearPlanes.apply(planes_t, ctx.keep, ctx.count)


def _gradients_along(direction, options, grad_rows, logits, weight, scale_tensor, need_logits, need_scale):
    """(grad_logits, grad_scale) of what a direction of the target adds to grad_rows * planes."""
    scale, softcap, _, label_smoothing = options
    planes = _along_target(direction, options, logits, weight, scale_tensor)
    upstream = LinearPlanes.apply(grad_rows, 1 - label_smoothing, planes.shape[0])
    linear = scale, softcap, _NO_IGNORE, 0.0
    # No softmax is part of them, nor must it be one of 0/0.
    tensors = within_softmax(planes, upstream), logits, direction, weight, scale_tensor
    grads = RowsBackward.apply(upstream, *tensors, *linear, need_logits, False, need_scale)
    return planes, grads[0], grads[2]


def _sum_of(terms: list[Tensor]) -> Tensor | None:
    return Combine.apply(1, False, None, terms[0].dtype, *terms) if terms else None


class RowsBackward(Function):
    """(grad_logits, grad_target, grad_scale) of the planes' gradients and the arguments of Rows."""

    @staticmethod
    def forward(
        grad_rows,
        rows,
        logits,
        target,
        weight,
        scale_tensor,
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        need_logits,
        need_target,
        need_scale,
    ):
        needs = need_logits, need_target, need_scale
        options = scale, softcap, ignore_index, label_smoothing
        tensors = grad_rows, rows, logits, target, weight, scale_tensor
        grad_logits, grad_target, grad_scale = _backward(*tensors, *options, *needs)
        return grad_logits, grad_target, _over_rows(grad_scale, need_scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.needs = inputs[6:10], inputs[10:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def backward(ctx, logits_v, target_v, scale_v):
        grad_rows, rows, logits, _, weight, scale_tensor = ctx.saved_tensors
        need_logits, need_target, need_scale = _needs(ctx, 2)
        to_rows, to_logits, to_scale = [], [], []
        to_target = None
        if logits_v is not None or scale_v is not None:
            args = logits_v, scale_v, *ctx.saved_tensors, *ctx.options, need_logits, need_target, need_scale
            row_dots, grad_logits, to_target, grad_scale = RowsBackwardBackward.apply(*args)
            to_rows.append(row_dots)
            to_logits.append(grad_logits)
            to_scale.append(grad_scale)
        if target_v is not None:
            planes, grad_logits, grad_scale = _gradients_along(
                target_v, ctx.options, grad_rows, logits, weight, scale_tensor, need_logits, need_scale
            )
            to_rows.append(LinearPlanes.apply(planes, 1 - ctx.options[3], rows.shape[0]))
            to_logits.append(grad_logits)
            to_scale.append(grad_scale)
        return (
            _sum_of(to_rows),
            None,
            _sum_of(to_logits) if need_logits else None,
            to_target if need_target else None,
            None,
            _sum_of(to_scale) if need_scale else None,
            *(None,) * 7,
        )

    @staticmethod
    def jvp(ctx, grad_rows_t, _rows_t, logits_t, target_t, _weight_t, scale_t, *_):
        grad_rows, rows, logits, target, weight, scale_tensor = ctx.saved_tensors
        terms: list[tuple[Any, ...]] = []
        if grad_rows_t is not None:
            tensors = rows, logits, target, weight, scale_tensor
            terms.append(RowsBackward.apply(grad_rows_t, *tensors, *ctx.options, *ctx.needs))
        if logits_t is not None or scale_t is not None:
            args = logits_t, scale_t, *ctx.saved_tensors, *ctx.options, *ctx.needs
            terms.append(RowsBackwardBackward.apply(*args)[1:])
        if target_t is not None and (ctx.needs[0] or ctx.needs[2]):
            _, grad_logits, grad_scale = _gradients_along(
                target_t, ctx.options, grad_rows, logits, weight, scale_tensor, ctx.needs[0], ctx.needs[2]
            )
            terms.append((grad_logits, None, grad_scale))
        return tuple(
            _sum_of([term[k] for term in terms if term[k] is not None]) if need else None
            for k, need in enumerate(ctx.needs)
        )

    @staticmethod
    def vmap(info, in_dims, grad_rows, rows, logits, target, weight, scale_tensor, *options):
        needs = options[4:]
        fold = None if needs[2] else Fold.of(info, in_dims[2:6], logits, target, weight)
        if fold is None:
            args = grad_rows, rows, logits, target, weight, scale_tensor, *options
            return unbatch_absent(vmap_by_loop(RowsBackward, info, in_dims, args), needs)
        grad_rows, rows = fold.last(grad_rows, in_dims[0]), fold.last(rows, in_dims[1])
        tensors = grad_rows, rows, fold.logits, fold.target, weight, scale_tensor
        return RowsBackward.apply(*tensors, *options), (*fold.gradient_dims(*needs[:2]), None)


def unbatch_absent(batched, needs):
    """Of a loop over a batch: what was not asked for has no batch."""
    results, dims = batched
    return (
        tuple(r if need else r[0] for r, need in zip(results, needs, strict=True)),
        tuple(d if need else None for d, need in zip(dims, needs, strict=True)),
    )


class RowsBackwardBackward(Function):
    """(row_dots, grad_logits, grad_target, grad_scale) along tangents of logits and scale."""

    @staticmethod
    def forward(
        tangent,
        scale_tangent,
        grad_rows,
        rows,
        logits,
        target,
        weight,
        scale_tensor,
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        need_logits,
        need_target,
        need_scale,
    ):
        tensors = tangent, scale_tangent, grad_rows, rows, logits, target, weight, scale_tensor
        options = scale, softcap, ignore_index, label_smoothing, need_logits, need_target, need_scale
        *results, grad_scale = _backward_backward(*tensors, *options)
        return *results, _over_rows(grad_scale, need_scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, needs = inputs[8:12], inputs[12:]
        ctx.set_materialize_grads(False)
        ctx.kept = [0, *(k for k, need in enumerate(needs, start=1) if need)]  # which outputs are real
        ctx.mark_non_differentiable(*(t for k, t in enumerate(output) if k not in ctx.kept))
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def _reference(ctx):
        """The same through the reference: a function, its arguments, their places among the inputs."""
        note("the third derivative goes through the reference, in torch's own ops")
        tangent, scale_tangent, grad_rows, rows, logits, target, weight, scale_tensor = ctx.saved_tensors
        scale, softcap, ignore_index, label_smoothing = ctx.options
        entropy, kept, dtype = rows.shape[0] > ENTROPY, ctx.kept, rows.dtype
        places = {"v": 0, "tau": 1, "g": 2, "z": 4, "t": 5, "w": 6, "s": 7}
        named = {"v": tangent, "tau": scale_tangent, "g": grad_rows, "z": logits, "t": target}
        named |= {"w": weight, "s": scale_tensor}
        names = [name for name in places if named[name] is not None]
        probabilities = target.is_floating_point()

        def function(*values):
            given = dict(zip(names, values, strict=True))
            v, tau, g, z, t = given.get("v"), given.get("tau"), given["g"], given["z"], given["t"]
            s_primal = given.get("s", torch.full((), scale, dtype=dtype, device=z.device))

            def directional(g, z, s, t):
                def planes(z, s):
                    w = given.get("w")
                    return rows_reference(z, t, w, s, softcap, ignore_index, label_smoothing, entropy)

                # By the pullback: torch.func.jvp does not nest in torch.autograd.forward_ad.
                to_z, to_s = torch.func.vjp(planes, z.to(dtype), s)[1](g)
                total = to_z.new_zeros(())
                if v is not None:
                    total = total + (v.to(dtype) * to_z).sum()
                return total if tau is None else total + tau * to_s

            argnums = (0, 1, 2, 3) if probabilities else (0, 1, 2)
            along, *grads = torch.func.grad(directional, argnums)(g, z, s_primal, t)
            results = along, grads[0], grads[2] if probabilities else None, grads[1]
            return tuple(results[k] for k in kept)

        return function, [named[name] for name in names], [places[name] for name in names]

    @staticmethod
    def backward(ctx, *grads):
        function, tensors, places = RowsBackwardBackward._reference(ctx)
        needs = [ctx.needs_input_grad[place] for place in places]
        results = _plain_vjp(function, tensors, needs, [grads[k] for k in ctx.kept])
        by_place = dict(zip(places, results, strict=True))
        return tuple(by_place.get(place) for place in range(15))

    @staticmethod
    def jvp(ctx, *tangents):
        function, tensors, places = RowsBackwardBackward._reference(ctx)
        results = _plain_jvp(function, tensors, [tangents[place] for place in places])
        by_output = dict(zip(ctx.kept, results, strict=True))
        return tuple(by_output.get(k) for k in range(4))

    @staticmethod
    def vmap(
        info, in_dims, tangent, scale_tangent, grad_rows, rows, logits, target, weight, scale_tensor, *options
    ):
        needs = True, *options[4:]
        one_scale = in_dims[1] is None and not needs[3]
        fold = Fold.of(info, in_dims[4:8], logits, target, weight) if one_scale else None
        if fold is None:
            args = tangent, scale_tangent, grad_rows, rows, logits, target, weight, scale_tensor, *options
            return unbatch_absent(vmap_by_loop(RowsBackwardBackward, info, in_dims, args), needs)
        results = RowsBackwardBackward.apply(
            None if tangent is None else fold.classes(tangent, in_dims[0]),
            scale_tangent,
            fold.last(grad_rows, in_dims[2]),
            fold.last(rows, in_dims[3]),
            fold.logits,
            fold.target,
            weight,
            scale_tensor,
            *options,
        )
        return results, (results[0].dim() - 1, *fold.gradient_dims(*needs[1:3]), None)


def with_values(tensors, places, values):
    """The tensors, with other values at some places."""
    given = dict(zip(places, values, strict=True))
    return [given.get(k, t) for k, t in enumerate(tensors)]


def _plain_vjp(function, tensors, needs, grads):
    """The gradient to each tensor that needs one, of a function in plain PyTorch."""
    places = [k for k, need in enumerate(needs) if need]
    primals = [tensors[k] for k in places]
    outputs, vjp, *_ = torch.func.vjp(
        lambda *values: function(*with_values(tensors, places, values)), *primals
    )
    grads = tuple(
        torch.zeros_like(out) if grad is None else grad.to(out.dtype)
        for grad, out in zip(grads, outputs, strict=True)
    )
    return with_values([None] * len(tensors), places, vjp(grads))


def _plain_jvp(function, tensors, tangents):
    """The derivative along tangents, some of them None, of a function in plain PyTorch."""
    places = [k for k, tangent in enumerate(tangents) if tangent is not None]
    count = len(tensors)

    def along(*values):
        def of_moving(*moving):
            return function(*with_values(values[:count], places, moving))

        return torch.func.jvp(of_moving, tuple(values[k].clone() for k in places), values[count:])[1]

    return PlainPyTorch.apply(along, *tensors, *(tangents[k] for k in places))


class PlainPyTorch(Function):
    """`function(*tensors)`, a tuple, in plain PyTorch: a Function for the same reason as `Combine`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_plain_vjp(ctx.function, ctx.saved_tensors, ctx.needs_input_grad[1:], grads)

    @staticmethod
    def jvp(ctx, _, *tangents):
        return _plain_jvp(ctx.function, ctx.saved_tensors, tangents)


class Fold:
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
    ) -> Fold | None:
        """None where the batch cannot be rows: a weight or scale for each sample, or a target of shape (1,).

        `in_dims` are those of logits, target, weight and scale_tensor.
        """
        target_dims = target.dim() - (in_dims[1] is not None)
        logits_dims = logits.dim() - (in_dims[0] is not None)
        single = not target.is_floating_point() and logits_dims == 1 and target_dims == 1
        apart = in_dims[2] is not None or in_dims[3] is not None
        return None if apart or single else cls(info, in_dims, logits, target)

    def last(self, x: Tensor, dim: int | None) -> Tensor:
        return x.unsqueeze(-1).expand(*x.shape, self.size) if dim is None else x.movedim(dim, -1)

    def classes(self, x: Tensor, dim: int | None) -> Tensor:
        x = self.last(x, dim)
        return x.movedim(-1, 0) if self.one_row else x

    def gradient_dims(self, need_logits: bool, need_target: bool) -> tuple[int | None, int | None]:
        dim = 0 if self.one_row else self.logits.dim() - 1
        return dim if need_logits else None, dim if need_target else None
