"""What the losses share on the Python side: reductions, autograd, transforms, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn import _reduction

from ._explain import note

NONE, MEAN, SUM = 0, 1, 2
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}

_autocasts = torch._C._is_any_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_is_dead_wrapper = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped

# torch.autograd.grad(is_grads_batched=True) batches without a functorch transform.
is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


def reduction_code(reduction: str, size_average: bool | None, reduce: bool | None) -> int:
    """The op's number of a reduction; the deprecated arguments win, as in torch."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    code = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    return code


def run(
    eager: type[Function],
    general: Callable[..., Tensor],
    op: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    args: Any,
) -> Tensor:
    """A loss by the shortest way that the surroundings allow; `args` are those of all three ways.

    `general` serves torch.func and forward-mode AD. `eager` is enough for everything else: one
    output, no `setup_context` (whose signature binding costs 30 us), and Dynamo traces it, as it
    does no Function with a `jvp` or `vmap` of its own. Without a gradient to record, the op itself.
    """
    if is_compiling():
        return eager.apply(*args)
    if _transforms_active() or forward_ad._current_level >= 0:
        return general(*args)
    if is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                if any(map(_is_dead_wrapper, tensors)):  # as Function.apply does; rare
                    return eager.apply(*args)
                return bare_apply(eager)(*args)
    return op(*args)[0]


def bare_apply(function: type[Function]) -> Callable[..., Any]:
    """What `function.apply` comes to where no transform is at work and no wrapper left from one."""
    return super(Function, function).apply  # type: ignore[misc]


def may_be_differentiated(weight: Tensor) -> bool:
    """Whether a weight may need a derivative: forward mode does not show in `requires_grad`."""
    return (
        (weight.requires_grad and torch.is_grad_enabled())
        or _transforms_active()
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return _transforms_active() or forward_ad._current_level >= 0


def is_compiled_under_vmap() -> bool:
    """Whether torch.compile traces a call under vmap: there a tensor does not show whether it needs a
    gradient, and torch has no autograd.Function."""
    return torch.compiler.is_compiling() and _under_vmap()


def _under_vmap() -> bool:
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return any(transform.key() == torch._C._functorch.TransformType.Vmap for transform in transforms)


# What torch.compiler.assume_constant_result does, which would import Dynamo for it.
_under_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiates_backward() -> bool:
    """Whether a backward pass is itself to be differentiated, or runs under a transform."""
    if torch.compiler.is_compiling():
        return False  # torch.compile has no second derivatives
    return torch.is_grad_enabled() or _transforms_active()


def promote(*tensors: Tensor | None) -> torch.dtype:
    """The result dtype of floating tensors, as torch promotes them."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def accumulation(*tensors: Tensor | None) -> torch.dtype:
    """What the kernels compute in: float64 where an operand is float64, else float32."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def autocast_dtype(input: Tensor, target: Tensor) -> torch.dtype | None:
    """float32 where autocast, which lists both losses as float32 ops, is on for 16-bit input."""
    if not _autocasts():
        return None
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    if input.dtype not in (torch.float16, torch.bfloat16) or target.dtype == torch.float64:
        return None
    return torch.float32


def check_devices(op: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """For the meta implementations: a meta tensor among real ones would choose them for all."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise RuntimeError(f"{op}: expected {name} on {reference.device}, got {tensor.device}")


def is_dtensor(x: Any) -> bool:
    """Slow to import: not to be asked of a plain Tensor."""
    if type(x) is torch.nn.Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def transformed_dtensor(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: expected no DTensor under torch.func and forward-mode AD; transform a function of its local "
        "part, x.to_local(), with a loss that takes a group (vocab_parallel_cross_entropy, "
        "linear_cross_entropy)"
    )


def explain_bad_input(op: str, **tensors: Any) -> None:
    """Raises the TypeError or NotImplementedError that torch raises for what no kernel takes."""
    given = {name: t for name, t in tensors.items() if t is not None or name not in ("weight", "mask")}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(tensor).__name__}")
        while _is_wrapped(tensor):
            tensor = _unwrapped(tensor)
        if _transforms_active() and type(tensor) is not Tensor and is_dtensor(tensor):
            raise transformed_dtensor(op)
    for name, tensor in given.items():
        if tensor.layout is not torch.strided:
            raise NotImplementedError(
                f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}; "
                f"call {name}.to_dense() first"
            )
    for name, tensor in given.items():
        if name == "input" and tensor.dtype not in KERNEL_DTYPES:
            raise unsupported_dtype(op, name, tensor)


def unsupported_dtype(op: str, name: str, tensor: Tensor) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: not implemented for {name} of dtype {tensor.dtype}; "
        f"expected float16, bfloat16, float32 or float64"
    )


def divide(x: Tensor, normalizer: Tensor | None) -> Tensor:
    """A sum over the float64 divisor of its mean, or the sum as it is."""
    return x if normalizer is None else (x.double() / normalizer).to(x.dtype)


def ordered_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of all elements, the same bits for every number of threads: torch shares one long sum out over
    its threads, but of many short ones it gives each to one thread."""
    x = x.reshape(-1)
    block, longest = 4096, 32768  # torch's own grain is the longest sum that one thread does alone
    if torch.compiler.is_compiling() or x.numel() <= longest:
        return x.sum(dtype=dtype)
    whole = x.numel() // block * block
    blocks = x[:whole].view(-1, block).sum(1, dtype=dtype)
    return ordered_sum(blocks, dtype) + x[whole:].sum(dtype=dtype)


class Combine(Function):
    """``scale * sum(terms)``, summed over all elements if asked, over `normalizer`, in `dtype`.

    The linear arithmetic of the `jvp`s: torch switches forward mode off while it runs a `jvp`, and
    only a Function keeps an outer level's tangents there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale, reduce, normalizer, dtype, *terms):
        total = scale * sum(terms[1:], terms[0])
        if reduce:
            total = total.sum()
        if normalizer is not None:
            total = total.double() / normalizer
        return total.to(dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale, ctx.reduce, normalizer, ctx.dtype, *terms = inputs
        ctx.set_materialize_grads(False)
        ctx.like = [(term.shape, term.dtype) for term in terms]
        ctx.save_for_backward(normalizer)
        ctx.save_for_forward(normalizer)

    @staticmethod
    def backward(ctx, grad):
        (normalizer,) = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(ctx.like))
        if normalizer is not None:
            grad = grad.double() / normalizer
        grads = ((ctx.scale * grad).to(dtype).expand(shape) for shape, dtype in ctx.like)
        return None, None, None, None, *grads

    @staticmethod
    def jvp(ctx, _scale, _reduce, _normalizer, _dtype, *tangents):
        (normalizer,) = ctx.saved_tensors
        moving = [t for t in tangents if t is not None]
        return Combine.apply(ctx.scale, ctx.reduce, normalizer, ctx.dtype, *moving) if moving else None


def vmap_by_loop(function: type[Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The batching rule for arguments that cannot be folded into the rows: one call a sample."""
    note(f"vmap calls {function.__name__} once for each of {info.batch_size} samples")
    results = []
    for i in range(info.batch_size):
        results.append(
            function.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        )
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
