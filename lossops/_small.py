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
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


def is_small(input: Tensor, target: Tensor, target_dtype: torch.dtype) -> bool:
    """Whether these arguments may go round the dispatcher. One expression: each call counts here."""
    return (
        not torch.compiler.is_compiling()
        and input.requires_grad
        and torch.is_grad_enabled()
        and type(input) in _TYPES
        and type(target) in _TYPES
        and input.dtype is torch.float32
        and target.dtype is target_dtype
        and not target.requires_grad
        and input.is_cpu
        and target.is_cpu
        and input.is_contiguous()
        and target.is_contiguous()
        and 0 < input.numel() <= LIMIT
        and not is_transformed()
        and not _is_dead_wrapper(input)
        and not _is_dead_wrapper(target)
        and _dispatch_modes() == 0
        and _tracing() is None
        and not _profiling()
    )


def empty_scalar() -> Tensor:
    """A 0-d float32 tensor on the CPU, whatever torch's defaults are set to."""
    return torch.empty_strided((), (), dtype=torch.float32, device=_CPU)


def takes_small_gradient(grad_loss: Tensor) -> bool:
    """Whether the backward is as plain as the forward was: nothing differentiates or watches it."""
    return (
        not torch.is_grad_enabled()
        and type(grad_loss) is Tensor
        and grad_loss.dtype is torch.float32
        and grad_loss.is_cpu
        and grad_loss.dim() == 0
        and not is_transformed()
        and _dispatch_modes() == 0
        and not _is_dead_wrapper(grad_loss)
        and not _is_batched(grad_loss)
    )
