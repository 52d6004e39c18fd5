"""Mean squared error: reference, ops' meta implementations, autograd, function, module.

``loss_i = w_i * (x_i - y_i)^2``, its mean (divided by the sum of the weights, if any) or its sum. Where
a mask is False an element is left out of everything.
The kernels are in ``csrc/cpu/mse.inl``; ``csrc/mse.h`` says what they compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _C
from ._ahead import Ahead
from ._autograd import (
    MEAN,
    NONE,
    SUM,
    Combine,
    accumulation,
    autocast_dtype,
    check_devices,
    differentiates_backward,
    divide,
    explain_bad_input,
    may_be_differentiated,
    promote,
    reduction_code,
    run,
    unsupported_dtype,
)
from ._direct import FLOAT_ON_CPU, ON_GPU, empty_loss, forget, is_unwatched, place, short_apply
from ._explain import note

_forward = torch.ops.lossops.mse_forward.default
_jvp = torch.ops.lossops.mse_jvp.default
_backward = torch.ops.lossops.mse_backward.default
_forward_backward = torch.ops.lossops.mse_forward_backward.default


def mse_reference(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error in plain PyTorch: what the kernels compute, written to be read."""
    if mask is not None:
        # Before the arithmetic: 0 times NaN is NaN, in the loss and in what autograd makes of it.
        weight = torch.ones_like(input - target) if weight is None else weight
        input, target, weight = (torch.where(mask, tensor, 0) for tensor in (input, target, weight))
    squared = (input - target) ** 2
    loss = squared if weight is None else weight * squared
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weight is None else loss.sum() / weight.sum()


# --------------------------------------------------------------------------------------------------
# Meta implementations


def _check_like_input(op: str, input: Tensor, **tensors: Tensor | None) -> None:
    check_devices(op, input, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != input.shape:
            raise RuntimeError(
                f"{op}: expected {name} of shape {tuple(input.shape)} like input, got {tuple(tensor.shape)}"
            )


def _check_mask(op: str, input: Tensor, mask: Tensor | None) -> None:
    _check_like_input(op, input, mask=mask)
    if mask is not None and mask.dtype != torch.bool:
        raise RuntimeError(f"{op}: expected mask of dtype Bool, got {mask.dtype}")


def _fake_loss(input: Tensor, reduction: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    loss = torch.empty_like(input, dtype=dtype) if reduction == NONE else input.new_empty((), dtype=dtype)
    return loss, input.new_empty((), dtype=torch.float64)


@torch.library.register_fake("lossops::mse_forward")
def _(input, target, weight, mask, reduction, out_dtype):
    _check_like_input("mse_loss", input, target=target, weight=weight)
    _check_mask("mse_loss", input, mask)
    return _fake_loss(input, reduction, out_dtype or promote(input, target, weight))


@torch.library.register_fake("lossops::mse_forward_backward")
def _(input, target, reduction, out_dtype):
    return *_forward(input, target, None, None, reduction, out_dtype), torch.empty_like(input)


@torch.library.register_fake("lossops::mse_jvp")
def _(input, target, weight, mask, input_tangent, target_tangent, reduction, out_dtype):
    tangents = {"input_tangent": input_tangent, "target_tangent": target_tangent}
    _check_like_input("mse_jvp", input, target=target, weight=weight, **tangents)
    _check_mask("mse_jvp", input, mask)
    return _fake_loss(input, reduction, out_dtype or promote(input, target))


@torch.library.register_fake("lossops::mse_backward")
def _(grad_loss, input, target, weight, mask, normalizer, need_input, need_target):
    _check_like_input("mse_backward", input, target=target, weight=weight)
    _check_mask("mse_backward", input, mask)
    check_devices("mse_backward", input, grad_loss=grad_loss, normalizer=normalizer)
    grad_input = torch.empty_like(input) if need_input else input.new_empty((0,))
    grad_target = torch.empty_like(target) if need_target else target.new_empty((0,))
    return grad_input, grad_target


# --------------------------------------------------------------------------------------------------
# Autograd. The gradient 2*w*(x - y) is linear in x - y, so that each Function's derivatives are the
# others with a direction in the place of x and y: every order stays on the fused kernels, and so does
# the mask.


def _loss_backward(needs, grad_loss, input, target, weight, mask, normalizer):
    if differentiates_backward():
        grad = divide(grad_loss.to(accumulation(input, target, weight)), normalizer)
        grads = MSEBackward.apply(grad, input, target, weight, mask, *needs)
    else:
        grads = _backward(grad_loss, input, target, weight, mask, normalizer, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_ahead = Ahead("mse_loss")


class EagerMSE(Function):
    """The loss of input, target, weight and mask, all of one shape, outside torch.func."""

    @staticmethod
    def forward(ctx, input, target, weight, mask, reduction, out_dtype):
        has_op = weight is None and mask is None and reduction != NONE
        if _ahead.is_asked(ctx, has_op, input, target):
            loss, normalizer, ctx.gradient = _forward_backward(input, target, reduction, out_dtype)
        else:
            loss, normalizer = _forward(input, target, weight, mask, reduction, out_dtype)
        ctx.save_for_backward(input, target, weight, mask, normalizer if reduction == MEAN else None)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        tensors = ctx.saved_tensors
        gradient = _ahead.gradient(ctx, grad_loss)
        if gradient is not None:
            return gradient, None, None, None, None, None
        grads = _loss_backward(ctx.needs_input_grad[:2], grad_loss, *tensors)
        return *grads, None, None, None, None


class DirectMSE(Function):
    """The mean over contiguous tensors of one dtype, without weight or mask."""

    @staticmethod
    def forward(ctx, input, target, where, loss_dtype):
        ctx.gradient = empty_like(input) if _ahead.is_asked_of_plain(ctx, where != ON_GPU) else None
        loss = empty_loss(input, where, loss_dtype)
        ctx.kept = _C.direct_mse_forward(input, target, loss, ctx.gradient)
        ctx.save_for_backward(input, target)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        input, target = ctx.saved_tensors
        gradient = _ahead.gradient(ctx, grad_loss)
        if gradient is not None:
            return gradient, None, None, None
        if is_unwatched(grad_loss):
            grad = empty_like(input)
            if _C.direct_mse_backward(grad_loss, input, target, grad, ctx.kept):
                forget(ctx)
                return grad, None, None, None
        divisor = torch.full((), input.numel(), dtype=torch.float64, device=input.device)
        args = grad_loss, input, target, None, None, divisor
        return _loss_backward((True, False), *args)[0], None, None, None


_apply_direct = short_apply(DirectMSE)


class MSE(Function):
    """(loss, normalizer) of input, target, weight and mask, all of one shape, for every transform."""

    @staticmethod
    def forward(input, target, weight, mask, reduction, out_dtype):
        return _forward(input, target, weight, mask, reduction, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reduction, ctx.out_dtype = inputs
        _, normalizer = output
        ctx.mark_non_differentiable(normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, normalizer)
        ctx.save_for_forward(*tensors, normalizer)

    @staticmethod
    def backward(ctx, grad_loss, _normalizer):
        if grad_loss is None:
            return (None,) * 6
        input, target, weight, mask, normalizer = ctx.saved_tensors
        if ctx.reduction != MEAN:
            normalizer = None
        grads = _loss_backward(ctx.needs_input_grad[:2], grad_loss, input, target, weight, mask, normalizer)
        return *grads, None, None, None, None

    @staticmethod
    def jvp(ctx, input_t, target_t, *_):
        input, target, weight, mask, normalizer = ctx.saved_tensors
        if input_t is None and target_t is None:
            return None, None
        reduction = NONE if ctx.reduction == NONE else SUM
        loss = _along(input, target, weight, mask, input_t, target_t, reduction)
        dtype = ctx.out_dtype or promote(input, target, weight)
        return Combine.apply(1, False, normalizer if ctx.reduction == MEAN else None, dtype, loss), None

    @staticmethod
    def vmap(info, in_dims, input, target, weight, mask, reduction, out_dtype):
        input, target, weight, mask = _batch_first(info, in_dims, input, target, weight, mask)
        dtype = out_dtype or promote(input, target, weight)
        row_dtype = dtype if reduction == NONE else accumulation(input, target, weight)
        loss, normalizer = MSE.apply(input, target, weight, mask, NONE, row_dtype)
        if reduction == NONE:
            return (loss, normalizer), (0, None)
        loss = loss.flatten(1).sum(1) if loss.dim() > 1 else loss
        if weight is None and mask is None:
            samples = torch.full_like(loss, input[0].numel(), dtype=torch.float64)
        else:
            counts = mask if weight is None else _where(mask, weight)
            samples = counts.double().reshape(info.batch_size, -1).sum(1)
        if reduction == MEAN:
            loss = loss.double() / samples
        return (loss.to(dtype), samples), (0, 0)


def _for_transforms(*args: Any) -> Tensor:
    return MSE.apply(*args)[0]


class MSEBackward(Function):
    """(2*g*w*(x - y), its negative), g a gradient for all elements (0-d) or for each."""

    @staticmethod
    def forward(grad_loss, input, target, weight, mask, need_input, need_target):
        return _backward(grad_loss, input, target, weight, mask, None, need_input, need_target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, need_input, need_target = inputs
        ctx.needs = need_input, need_target
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, input_v, target_v):
        if input_v is None and target_v is None:
            return (None,) * 7
        grad_loss, input, target, weight, mask = ctx.saved_tensors
        need_grad, need_input, need_target = ctx.needs_input_grad[:3]
        to_grad_loss = None
        if need_grad:
            reduction = SUM if grad_loss.dim() == 0 else NONE
            along = _along(input, target, weight, mask, input_v, target_v, reduction)
            to_grad_loss = along.to(grad_loss.dtype)
        v, u = _directions(input, target, input_v, target_v)
        grads = MSEBackward.apply(grad_loss, v, u, weight, mask, need_input, need_target)
        return (
            to_grad_loss,
            grads[0] if need_input else None,
            grads[1] if need_target else None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_loss_t, input_t, target_t, *_):
        grad_loss, input, target, weight, mask = ctx.saved_tensors
        terms = []
        if grad_loss_t is not None:
            terms.append(MSEBackward.apply(grad_loss_t, input, target, weight, mask, *ctx.needs))
        if input_t is not None or target_t is not None:
            v, u = _directions(input, target, input_t, target_t)
            terms.append(MSEBackward.apply(grad_loss, v, u, weight, mask, *ctx.needs))
        return tuple(
            Combine.apply(1, False, None, terms[0][k].dtype, *(term[k] for term in terms))
            if need and terms
            else None
            for k, need in enumerate(ctx.needs)
        )

    @staticmethod
    def vmap(info, in_dims, grad_loss, input, target, weight, mask, need_input, need_target):
        if grad_loss.dim() - (in_dims[0] is not None) == 0 and in_dims[0] is not None:
            shape = input.shape if in_dims[1] is None else input.movedim(in_dims[1], 0).shape[1:]
            grad_loss = grad_loss.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        elif grad_loss.dim() > 0 or in_dims[0] is not None:
            (grad_loss,) = _batch_first(info, in_dims[:1], grad_loss)
        tensors = _batch_first(info, in_dims[1:], input, target, weight, mask)
        grads = MSEBackward.apply(grad_loss, *tensors, need_input, need_target)
        return grads, (0 if need_input else None, 0 if need_target else None)


class MSEJvp(Function):
    """2*w*(x - y)*(v - u), for each element or summed."""

    @staticmethod
    def forward(input, target, weight, mask, input_t, target_t, reduction):
        dtype = accumulation(input, target, weight)
        return _jvp(input, target, weight, mask, input_t, target_t, reduction, dtype)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        input, target, weight, mask, v, u = ctx.saved_tensors
        by_position = MSEBackward.apply(grad, v, u, weight, mask, True, True)
        by_direction = MSEBackward.apply(grad, input, target, weight, mask, True, True)
        return *by_position, None, None, *by_direction, None

    @staticmethod
    def jvp(ctx, input_t, target_t, weight_t, mask_t, v_t, u_t, _):
        input, target, weight, mask, v, u = ctx.saved_tensors
        terms = []
        if input_t is not None or target_t is not None:
            terms.append(_along(v, u, weight, mask, input_t, target_t, ctx.reduction))
        if v_t is not None or u_t is not None:
            terms.append(_along(input, target, weight, mask, v_t, u_t, ctx.reduction))
        return Combine.apply(1, False, None, terms[0].dtype, *terms) if terms else None

    @staticmethod
    def vmap(info, in_dims, input, target, weight, mask, v, u, reduction):
        tensors = _batch_first(info, in_dims, input, target, weight, mask, v, u)
        result = MSEJvp.apply(*tensors, NONE)
        return (result.flatten(1).sum(1) if reduction == SUM and result.dim() > 1 else result), 0


def _directions(input: Tensor, target: Tensor, v: Tensor | None, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """Directions of input and target, an absent one as a zero without memory of its own."""
    if v is None:
        v = torch.zeros((), dtype=input.dtype, device=input.device).expand(input.shape)
    if u is None:
        u = torch.zeros((), dtype=target.dtype, device=target.device).expand(target.shape)
    return v, u


def _along(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    v: Tensor | None,
    u: Tensor | None,
    reduction: int,
) -> Tensor:
    return MSEJvp.apply(input, target, weight, mask, *_directions(input, target, v, u), reduction)


def _where(mask: Tensor | None, weight: Tensor) -> Tensor:
    """The weights of the elements that count, and 0, with a derivative of 0, for the others."""
    return weight if mask is None else torch.where(mask, weight, 0)


def _batch_first(info: Any, in_dims: Sequence[int | None], *tensors: Tensor | None) -> list[Any]:
    """The tensors with the vmapped dimension first, expanded where they have none."""
    moved: list[Any] = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            moved.append(None)
        elif dim is None:
            moved.append(tensor.expand(info.batch_size, *tensor.shape))
        else:
            moved.append(tensor.movedim(dim, 0))
    return moved


# --------------------------------------------------------------------------------------------------
# Function and module


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error, as :func:`torch.nn.functional.mse_loss`.

    Args:
        input, target: any shapes that broadcast (with torch's warning where they differ), any
            strides; float16, bfloat16, float32 or float64. One of the two may be of any integer
            dtype or bool: the loss has the dtype of the floating one, as torch's promotion has it,
            and the gradient goes to that one alone.
        size_average, reduce: deprecated, as in torch; given, they override ``reduction``.
        reduction: ``"none"``, ``"mean"`` (over the number of elements that count, or over the sum
            of their weights) or ``"sum"``.
        weight: a weight for each element, of the input's shape. One that may need a derivative
            (it requires grad, or torch.func or forward-mode AD is at work) multiplies the
            unreduced loss, with torch's own product and sum.
        mask: which elements count (True), bool, of the input's shape or one that broadcasts to it,
            such as (N, T, 1) for an input of (N, T, H). Whatever input, target, weight or the
            upstream gradient hold where it is False, NaN and infinity included, reaches nothing:
            there the unreduced loss and every gradient are 0. None (the default): all count.

    Returns:
        The loss in the promoted dtype (float32 under autocast): 0-d, or of the broadcast shape for
        ``reduction="none"``. Computed in float32 (float64 where an operand is float64) and
        rounded once. A mean over no element is NaN.

    Raises:
        ValueError: an unknown reduction, a weight whose shape is not the input's, or a mask whose
            shape does not broadcast to it.
        RuntimeError: shapes that do not broadcast, tensors on different devices.
        NotImplementedError: input and target both integer, or complex, sparse or of another kind
            that no kernel takes.
        TypeError: not a tensor, or a mask whose dtype is not bool.

    Example:
        >>> prediction = torch.randn(8, 100, 3, requires_grad=True)  # padded sequences
        >>> lengths = torch.randint(1, 101, (8, 1))
        >>> mask = (torch.arange(100) < lengths).unsqueeze(-1)  # (8, 100, 1)
        >>> lossops.mse_loss(prediction, torch.randn(8, 100, 3), mask=mask).backward()
    """
    if has_torch_function_variadic(input, target, weight, mask):
        return handle_torch_function(
            mse_loss,
            (input, target, weight, mask),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            weight=weight,
            mask=mask,
        )
    code = reduction_code(reduction, size_average, reduce)
    try:
        if (  # first, for here each further question would show
            weight is None
            and mask is None
            and code == MEAN
            and (where := place(_C.direct_mse, input, target))
        ):
            note("the kernels are called without the dispatcher")
            out_dtype = None if where == FLOAT_ON_CPU else autocast_dtype(input, target)
            if input.requires_grad and is_grad_enabled():
                return _apply_direct(input, target, where, out_dtype)
            loss = empty_loss(input, where, out_dtype)
            _C.direct_mse_forward(input, target, loss, None)
            return loss
        shape = input.shape
        if target.shape != shape:
            warnings.warn(
                f"Using a target size ({target.size()}) that is different to the input size "
                f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
                "Please ensure they have the same size.",
                stacklevel=2,
            )
            input, target = torch.broadcast_tensors(input, target)
        if mask is not None:
            _check_mask_of_call(mask, shape)
        if (
            input.is_floating_point()
            and target.is_floating_point()
            and (weight is None or weight.is_floating_point())
        ):
            out_dtype = autocast_dtype(input, target)
        else:
            input, target, weight, out_dtype = _without_integers(input, target, weight)
        if weight is not None:
            if weight.shape != shape:
                raise ValueError(
                    f"mse_loss: Weights and input must have the same size. Expected weight of shape "
                    f"{tuple(shape)}, got {tuple(weight.shape)}"
                )
            if may_be_differentiated(weight) or (code == MEAN and input.shape != shape):
                return _composed_weighted_mse(input, target, weight, mask, code, out_dtype)
            weight = weight.expand(input.shape)
        if mask is not None:
            mask = mask.expand(input.shape)
        args = input, target, weight, mask, code, out_dtype
        return run(EagerMSE, _for_transforms, _forward, (input, target), args)
    except (AttributeError, TypeError, RuntimeError):
        explain_bad_input("mse_loss", input=input, target=target, weight=weight, mask=mask)
        raise


def _without_integers(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """The operands in floating dtypes, and the loss's dtype where these do not promote to it.

    It is torch's promotion, in which integers yield to floating dtypes. But an integer that 16 bits
    might round comes in float32, in which the kernels compute.
    """
    for operand in (input, target, weight):
        if operand is not None and operand.is_complex():
            raise unsupported_dtype("mse_loss", "a tensor", operand)
    floating = [t for t in (input, target) if t.is_floating_point()]
    if not floating:
        raise unsupported_dtype("mse_loss", f"input of dtype {input.dtype} and target", target)
    dtype = promote(*floating, weight if weight is not None and weight.is_floating_point() else None)

    def convert(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t
        return t.to(dtype if t.dtype.itemsize == 1 else torch.promote_types(dtype, torch.float32))

    out_dtype = autocast_dtype(floating[0], floating[-1])
    input, target, weight = convert(input), convert(target), None if weight is None else convert(weight)
    if out_dtype is None and promote(input, target, weight) != dtype:
        out_dtype = dtype
    return input, target, weight, out_dtype


def _check_mask_of_call(mask: Tensor, shape: torch.Size) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mse_loss: expected mask of dtype torch.bool, True where an element counts, got {mask.dtype}; "
            "call mask.bool() if it is not 0 there"
        )
    missing = len(shape) - len(mask.shape)
    if missing < 0 or any(m not in (1, s) for m, s in zip(mask.shape, shape[missing:], strict=True)):
        raise ValueError(
            f"mse_loss: expected mask of a shape that broadcasts to the input's, {tuple(shape)}, got "
            f"{tuple(mask.shape)}"
        )


def _composed_weighted_mse(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    reduction: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """A weight that gets a gradient, or a weighted mean over a broadcast input, whose divisor is
    the sum of the weights as given: the unreduced loss, then torch's own product and sum."""
    note("the weight needs a derivative, or the input is broadcast: torch's own product and sum follow")
    dtype = out_dtype or promote(input, target, weight)
    weight = _where(mask, weight)
    mask = None if mask is None else mask.expand(input.shape)
    args = input, target, None, mask, NONE, accumulation(input, target, weight)
    loss = weight * run(EagerMSE, _for_transforms, _forward, (input, target), args)
    if reduction != NONE:
        loss = loss.sum()
    if reduction == MEAN:
        loss = loss / weight.sum(dtype=loss.dtype)
    return loss.to(dtype)


class MSELoss(torch.nn.MSELoss):
    """:class:`torch.nn.MSELoss` on the fused kernels: same constructor and state.

    Shapes, dtypes and errors are those of :func:`lossops.functional.mse_loss`, and so are `weight`
    and `mask`, which ``forward`` takes besides torch's arguments.
    """

    def forward(
        self, input: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction, weight=weight, mask=mask)
