"""The shortest way to a loss, round the dispatcher, which costs more than a small one does.

The same kernels as the ops', for the plainest of calls only: contiguous tensors of one floating dtype (and
class indices), the mean, a gradient to the input alone, and nothing watching (a transform, a dispatch mode, a
profiler, a tracer, hooks on saved tensors). On a GPU, which computes while the host goes on, of any size; on
the CPU, small batches. Anything else is the ops' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, empty_like
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling

from ._autograd import bare_apply, is_batched

ENABLED = True
FLOAT_ON_CPU, ON_CPU, ON_GPU = 1, 2, 3  # where a call's tensors are; 0: they are not plain

_SCALAR = torch.empty_strided((), (), dtype=torch.float32, device="cpu")
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # type: ignore[attr-defined]
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # whose modes are on a stack of their own


# The questions are written out, not shared: here a call costs as much as what it asks.


def place(finds: Callable[[Tensor, Tensor], int], input: Tensor, target: Tensor) -> int:
    """Where a loss may be computed this way, as the extension's function for it `finds`; 0: it may not."""
    if (
        not is_dynamo_compiling()
        and ENABLED
        and not target.requires_grad
        and not _transforms_active()
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and _saving_hooks(True) is None  # a recomputed forward, of a checkpoint, has to take the same way
        and _tracing() is None
        and not _profiling()
        and not _is_included(_PRE_DISPATCH)
        and not input.is_meta
        and (found := finds(input, target))  # last: what is no plain memory at all takes it a millisecond
    ):
        return found
    return 0


def is_unwatched(grad_loss: Tensor) -> bool:
    """Whether a backward may go on this way: nothing differentiates, batches or traces it."""
    return (
        not is_dynamo_compiling()  # compiled autograd
        and not torch.is_grad_enabled()
        and not _transforms_active()
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and not is_batched(grad_loss)
        and not _is_included(_PRE_DISPATCH)
    )


def forget(ctx: Any) -> None:
    """Drops what the forward kept, where no second backward may come, as torch does saved tensors."""
    if not _keeps_graph():
        ctx.kept = None


def empty_loss(input: Tensor, where: int, dtype: torch.dtype | None) -> Tensor:
    """Memory for a loss of the input's dtype, or of another that was asked for."""
    if where == FLOAT_ON_CPU and dtype is None:
        return empty_like(_SCALAR)  # a third of a microsecond less
    return input.new_empty((), dtype=dtype)


def short_apply(function: type[Function]) -> Callable[..., Any]:
    """`bare_apply`; and the engine calls the function's `backward` without torch's way of finding it."""
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return bare_apply(function)
