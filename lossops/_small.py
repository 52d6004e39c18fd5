"""Small batches without the dispatcher, whose calls would cost more than the loss itself.

The same kernels as the ops', for the plainest of inputs only: contiguous float32 tensors on the CPU of at
most LIMIT elements, the mean, a gradient to the input alone, and nothing watching (a transform, a dispatch
mode, a profiler, a tracer). Anything else is the ops' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from ._autograd import bare_apply

LIMIT = 1 << 17  # elements: beyond, what is saved no longer shows

_TYPES = (Tensor, torch.nn.Parameter)
SCALAR = torch.empty_strided((), (), dtype=torch.float32, device="cpu")
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled


def address(x: Tensor, dtype: torch.dtype) -> int:
    """Of the elements, where that and their number say all about a tensor; 0 otherwise."""
    if (
        type(x) in _TYPES
        and x.dtype is dtype
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_neg()  # whose memory holds the opposite sign
    ):
        # 0 for a tensor without elements and one whose zeros have no memory; an error for what wraps a tensor
        # in a transform, or did when one was at work, or batches it (is_grads_batched=True).
        try:
            return x.data_ptr()
        except RuntimeError:
            pass
    return 0


# The questions are written out, not shared: here a call costs as much as what it asks.


def addresses(input: Tensor, target: Tensor, target_dtype: torch.dtype) -> tuple[int, int, int] | None:
    """Of the arguments of a loss that may go round the dispatcher; and the input's elements."""
    if (
        input.requires_grad
        and is_grad_enabled()
        and not is_compiling()
        and not target.requires_grad
        and (x := address(input, torch.float32))
        and (y := address(target, target_dtype))
        and (elements := input.numel()) <= LIMIT
        and not _transforms_active()
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and _tracing() is None
        and not _profiling()
    ):
        return x, y, elements
    return None


def gradient_addresses(
    grad_loss: Tensor, input: Tensor, target: Tensor, target_dtype: torch.dtype
) -> tuple[int, int, int] | None:
    """The same in the backward, which is not itself to be differentiated.

    Saved tensors are asked again: hooks may have put others in their place. Their shapes the caller compares:
    whoever sets `x.data` changes them unnoticed.
    """
    if (
        not is_compiling()  # compiled autograd
        and not is_grad_enabled()
        and not _transforms_active()
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and grad_loss.dim() == 0
        and (g := address(grad_loss, torch.float32))
        and (x := address(input, torch.float32))
        and (y := address(target, target_dtype))
    ):
        return g, x, y
    return None


def short_apply(function: type[Function]) -> Callable[..., Any]:
    """`bare_apply`; and the engine calls the function's `backward` without torch's way of finding it."""
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return bare_apply(function)
