"""torch's own losses on the fused kernels, in code that nobody can edit: the calls are redirected.

A :class:`torch.overrides.TorchFunctionMode` sees every call of torch's Python API in its scope. This one
takes three of them, ``torch.nn.functional.cross_entropy``, ``mse_loss`` and, where torch has it,
``linear_cross_entropy`` (and with them the modules of ``torch.nn``, which call these), and lets the others
through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from . import _C
from ._autograd import KERNEL_DTYPES
from ._explain import note
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .mse import mse_loss

_torch_cross_entropy = torch.nn.functional.cross_entropy
_torch_mse_loss = torch.nn.functional.mse_loss
_torch_linear = getattr(torch.nn.functional, "linear_cross_entropy", None)  # torch 2.13 has it

# They run Python of the caller's: hooks, recomputation of what was checkpointed.
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_redispatch = getattr(torch.overrides, "redispatch_function", None)  # torch 2.13 has it

# Other subclasses may give any function a meaning of their own, and know none of lossops' ops.
_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_DEVICES = ("cpu", "meta") if _C.cuda_build_info() is None else ("cpu", "meta", "cuda")
_TARGET_DTYPES = (*KERNEL_DTYPES, torch.int64, torch.int32, torch.uint8)
_INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MSE_DTYPES = KERNEL_DTYPES + _INTEGER_DTYPES


class FusedLosses(TorchFunctionMode):
    """The mode of :func:`fused_losses`, which makes it, and of :func:`enable`.

    Attributes:
        strict: whether a call that would go to torch raises instead.
        routed: how many calls went to lossops, by function: ``{"cross_entropy": 50}``.
        passed_on: how many went to torch, by function and reason:
            ``{"cross_entropy: input is on mps": 50}``.
    """

    # __enter__ and __exit__ are the base class's: Dynamo traces no mode that has its own.

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.routed: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Every call of torch comes through here. Not a dict: a function need not be hashable.
        if func is _torch_cross_entropy:
            return self._route(func, cross_entropy, _why_not_cross_entropy(*args, **kwargs), args, kwargs)
        if func is _torch_mse_loss:
            return self._route(func, mse_loss, _why_not_mse_loss(*args, **kwargs), args, kwargs)
        if func is _torch_linear:
            return self._route(func, linear_cross_entropy, _why_not_linear(*args, **kwargs), args, kwargs)
        if func in _BACKWARD and _redispatch is not None:
            with self:  # the handler of a mode runs without it
                return _redispatch(func, types, args, kwargs)
        return func(*args, **kwargs)

    def _route(
        self,
        theirs: Callable[..., Tensor],
        ours: Callable[..., Tensor],
        why_not: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        # Counts are Python numbers: a graph that depended on them would be compiled anew with every call.
        counts = not torch.compiler.is_compiling()
        if why_not is None and counts and torch.jit.is_tracing():
            why_not = "torch.jit.trace is at work"  # it records no autograd.Function that it could save
        if why_not is None:
            if counts:
                self.routed[ours.__name__] += 1
            return ours(*args, **kwargs)
        reason = f"{ours.__name__}: {why_not}"
        if self.strict:
            raise NotImplementedError(
                f"{reason}, which lossops does not take; without strict=True the call goes to torch"
            )
        if counts:
            self.passed_on[reason] += 1
            note(f"to torch: {reason}")
        return theirs(*args, **kwargs)


class _Enabled(FusedLosses):
    """The mode of `enable`, which `disable` finds by its type."""


def fused_losses(strict: bool = False) -> FusedLosses:
    """A context in which torch's own losses run on the fused kernels, whoever calls them.

    ::

        with lossops.fused_losses() as mode:
            trainer.train()  # code that calls torch.nn.functional.cross_entropy, or a module that does
        print(mode.routed, mode.passed_on)

    Within it ``torch.nn.functional.cross_entropy``, ``mse_loss`` and ``linear_cross_entropy`` are
    :func:`lossops.cross_entropy`, :func:`lossops.mse_loss` and :func:`lossops.linear_cross_entropy`, with
    their results and errors: an error that torch raises is raised with the same type, and what only torch
    refuses (such as int32 targets) is computed. On a GPU a class index out of range is one for
    :func:`lossops.check_async_errors`.

    What no kernel of lossops takes goes to torch unchanged: other devices (mps, ..., and a GPU where lossops
    was built without CUDA), dtypes (complex, 8-bit, integer logits) and layouts (sparse, nested), subclasses
    of Tensor (DTensor, ...; not ``nn.Parameter`` and the tensors of torch's tracers), ``torch.jit.trace``.
    The mode counts those calls with the reason, or raises.

    Not seen, and so left to torch: calls of ``torch.ops.aten``, code compiled by ``torch.jit.script``, and
    ``nll_loss(log_softmax(...))``. Modes are the thread's that entered them: a thread that is started within
    the context is outside of it (a loss computed in ``nn.DataParallel``'s threads, say), except autograd's.
    A checkpointed region that computes the loss (``torch.utils.checkpoint``) computes it once more in the
    backward pass: that has to be within the context too, and torch has to have
    ``torch.overrides.redispatch_function`` (2.13 has), without which no mode holds in a backward pass.
    Otherwise the CheckpointError of two losses that save different tensors is raised.

    ``torch.compile`` and ``torch.export`` trace the mode, entered outside or inside the compiled function,
    with ``fullgraph=True`` too; compiled calls are not counted, and a strict mode raises while they are
    traced.

    Every call of torch's Python API within the context pays for being looked at, nearly all of it the price
    of any mode. On an EPYC with torch 2.13, in microseconds without and with: ``a.add(a)`` 1.0 and 2.3,
    ``a.shape`` 0.1 and 1.2, ``F.relu(a)`` 1.2 and 5.0; a routed loss takes some 8 more than lossops' own.

    Args:
        strict: raise for a call that would go to torch.

    Returns:
        The mode, to be entered with ``with``, more than once if need be. Nested, the inner mode routes, and a
        call that it passes on meets the outer one, which counts it, or raises, in its turn.

    Raises:
        NotImplementedError: within the context, for a call that goes to torch, if ``strict``.
    """
    return FusedLosses(strict)


def enable(strict: bool = False) -> FusedLosses:
    """:func:`fused_losses` for the rest of this thread, or until :func:`disable`.

    Python's other threads, later ones included, are not affected: each enables for itself. It works
    wherever in the thread it is called, inside of other modes too, except in a function that is compiled.

    Args:
        strict: raise for a call that would go to torch.

    Returns:
        The mode, with its counts. Where it is enabled already, the same mode once more, now with this
        ``strict``.
    """
    stack = _pop_all()
    mode = next((mode for mode in stack if type(mode) is _Enabled), None)
    if mode is None:
        mode = _Enabled()
        # Outermost: a `with` around this call pops the innermost mode when it ends, which must be its own.
        # Only the default device's stays further out, where torch looks for it.
        stack.insert(1 if stack and isinstance(stack[0], DeviceContext) else 0, mode)
    mode.strict = strict
    _push_all(stack)
    return mode


def disable() -> None:
    """Ends what :func:`enable` began in this thread; without it, does nothing.

    A ``with fused_losses()`` around the call goes on.
    """
    _push_all([mode for mode in _pop_all() if type(mode) is not _Enabled])


def _pop_all() -> list[TorchFunctionMode]:
    """The modes of this thread, outermost first, taken off."""
    length = torch._C._len_torch_function_stack()
    return [torch._C._pop_torch_function_stack() for _ in range(length)][::-1]


def _push_all(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


# --------------------------------------------------------------------------------------------------
# What lossops does not take. None for no Tensor at all, which is an error that lossops raises.


def _why_not_cross_entropy(
    input: Any, target: Any, weight: Any = None, *_args: Any, **_kwargs: Any
) -> str | None:
    return (
        _why_not("input", input, KERNEL_DTYPES)
        or _why_not("target", target, _TARGET_DTYPES)
        or _why_not("weight", weight, KERNEL_DTYPES)
    )


def _why_not_linear(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, **_kwargs: Any
) -> str | None:
    return (
        _why_not_cross_entropy(input, target, weight)
        or _why_not("linear_weight", linear_weight, KERNEL_DTYPES)
        or _why_not("linear_bias", linear_bias, KERNEL_DTYPES)
    )


def _why_not_mse_loss(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: Any = "mean",
    weight: Any = None,
) -> str | None:
    # Of input and target one may be an integer: it takes the other's dtype.
    integer = isinstance(target, Tensor) and target.dtype in _INTEGER_DTYPES
    return (
        _why_not("input", input, KERNEL_DTYPES if integer else _MSE_DTYPES)
        or _why_not("target", target, _MSE_DTYPES)
        or _why_not("weight", weight, _MSE_DTYPES)
    )


def _why_not(name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if type(x) not in _TYPES:
        other = isinstance(x, Tensor) or hasattr(x, "__torch_function__")
        return f"{name} is a {type(x).__name__}" if other else None
    if x.layout is not torch.strided:
        return f"{name} has layout {x.layout}"
    if x.is_nested:
        return f"{name} is nested"
    if x.device.type not in _DEVICES:
        return f"{name} is on {x.device.type}"
    if x.dtype not in dtypes:
        return f"{name} has dtype {x.dtype}"
    return None
