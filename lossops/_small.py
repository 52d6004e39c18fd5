"""Small batches without the dispatcher, whose calls would cost more than the loss itself.

The same kernels as the ops', for the plainest of inputs only: contiguous float32 tensors on the CPU of at
most LIMIT elements, the mean, a gradient to the input alone, and nothing watching (a transform, a dispatch
mode, a profiler, a tracer). Anything else is the ops' business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import is_transformed

LIMIT = 1 << 17  # elements: beyond, what is saved no longer shows

_TYPES = (Tensor, torch.nn.Parameter)
_CPU = torch.device("cpu")
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled
_is_dead_wrapper = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]

# torch.autograd.grad(is_grads_batched=True) batches without a functorch transform.
is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


def plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the address of a tensor says all about it. Saved tensors are asked again: hooks may have
    put others in their place."""
    return (
        type(x) in _TYPES
        and x.dtype is dtype
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_neg()
        and not x._is_zerotensor()
        and not _is_dead_wrapper(x)
        and not is_batched(x)
    )


def unwatched() -> bool:
    """Whether nothing is at work that has to see the ops."""
    return not is_transformed() and _dispatch_modes() == 0


def is_small(input: Tensor, target: Tensor, target_dtype: torch.dtype) -> bool:
    """Whether a loss of these arguments may go round the dispatcher."""
    return (
        not torch.compiler.is_compiling()
        and input.requires_grad
        and torch.is_grad_enabled()
        and not target.requires_grad
        and plain(input, torch.float32)
        and plain(target, target_dtype)
        and 0 < input.numel() <= LIMIT
        and unwatched()
        and _tracing() is None
        and not _profiling()
    )


def takes_small_gradient(grad_loss: Tensor, input: Tensor, target: Tensor, target_dtype: torch.dtype) -> bool:
    """Whether the backward is as plain as the forward was, and is not itself to be differentiated."""
    return (
        not torch.is_grad_enabled()
        and grad_loss.dim() == 0
        and plain(grad_loss, torch.float32)
        and plain(input, torch.float32)
        and plain(target, target_dtype)
        and unwatched()
    )


def empty_scalar() -> Tensor:
    """A 0-d float32 tensor on the CPU, whatever torch's defaults are set to."""
    return torch.empty_strided((), (), dtype=torch.float32, device=_CPU)
