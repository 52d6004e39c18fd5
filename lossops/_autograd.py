"""What the losses share on the Python side: reductions, autograd, transforms, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import _reduction

NONE, MEAN, SUM = 0, 1, 2
_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}

_transforms_active = torch._C._are_functorch_transforms_active
_is_dead_wrapper = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]


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
    general: type[Function],
    op: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    args: Any,
) -> Tensor:
    """A loss by the shortest way that the surroundings allow; `args` are those of all three ways.

    `general` serves torch.func and forward-mode AD. `eager` is enough for everything else: one
    output, no `setup_context` (whose signature binding costs 30 us), and Dynamo traces it, as it
    does no Function with a `jvp` or `vmap` of its own. Without a gradient to record, the op itself.
    """
    if torch.compiler.is_compiling():
        return eager.apply(*args)
    if _transforms_active() or forward_ad._current_level >= 0:
        return general.apply(*args)[0]
    for tensor in tensors:
        if tensor.requires_grad and torch.is_grad_enabled():
            if any(map(_is_dead_wrapper, tensors)):  # as Function.apply does; rare
                return eager.apply(*args)
            return super(Function, eager).apply(*args)  # type: ignore[misc]
    return op(*args)[0]


def may_be_differentiated(weight: Tensor) -> bool:
    """Whether a weight may need a derivative: forward mode does not show in `requires_grad`."""
    return weight.requires_grad or _transforms_active() or forward_ad._current_level >= 0


def differentiates_backward() -> bool:
    """Whether a backward pass is itself to be differentiated, or runs under a transform."""
    if torch.compiler.is_compiling():
        return False  # torch.compile has no second derivatives
    return torch.is_grad_enabled() or _transforms_active()


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """float32 where autocast, which lists both losses as float32 ops, is on for 16-bit input."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(input.device.type):
        return None
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else None


def explain_bad_input(op: str, **tensors: Any) -> None:
    """Raises the TypeError or NotImplementedError that torch raises for what no kernel takes."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(tensor).__name__}")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise NotImplementedError(
                f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}; "
                f"call {name}.to_dense() first"
            )
    dtype = next(iter(tensors.values())).dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise NotImplementedError(
            f"{op}: not implemented for input of dtype {dtype}; expected float16, bfloat16, "
            f"float32 or float64"
        )


def vmap_by_loop(function: type[Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The batching rule for arguments that cannot be folded into the rows: one call a sample."""
    results = []
    for i in range(info.batch_size):
        results.append(
            function.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        )
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
