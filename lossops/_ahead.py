"""Gradients ahead of the backward pass: computed with the loss, while its operands are in the caches.

A scalar loss that ends a graph gets an upstream gradient of 1, and its own gradient can be had in the pass
over the operands that gives the loss: a third of the memory traffic of a float32 cross-entropy is saved, two
fifths of a mean squared error's. Whether it will be asked for cannot be known, only guessed: each backward
pass with an upstream gradient of 1 lets one later forward pass go ahead. So a training loop goes ahead from
its second step on, and a loss that is scaled, or never differentiated, does not; nor do two losses whose
gradients would wait at the same time. A wrong guess costs time, and never changes a bit: two passes give the
gradient that one gives. With LOSSOPS_AHEAD=0 in the environment there are always two.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling

from . import _C
from ._autograd import is_batched
from ._explain import is_explaining, note

ENABLED = os.environ.get("LOSSOPS_AHEAD") != "0"

_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


class Ahead:
    """Of one loss: whether its last backward passes wanted what could have been computed ahead."""

    def __init__(self, name: str) -> None:
        self._note = f"{name}: a loop's later steps compute this gradient in the forward pass, with the loss"
        self._wanted = False

    def is_asked(self, ctx: Any, has_op: bool, input: Tensor, target: Tensor) -> bool:
        """Whether this forward pass shall compute the gradient of `input` for an upstream gradient of 1.

        `has_op`: one gives both, for the loss is a scalar and the divisor of its mean known beforehand. Never
        on a GPU, where asking for the upstream gradient's value would wait for it; nor where saved tensors go
        through hooks, which save memory or change what the backward pass sees.
        """
        ctx.may_go_ahead, ctx.gradient = False, None
        return (
            has_op
            and not is_compiling()
            and type(input) in _TYPES
            and input.is_cpu
            and input.is_contiguous()  # and so is the gradient: the rows are met in the same order
            and input.requires_grad
            and not target.requires_grad
            and _dispatch_modes() == 0
            and _saving_hooks(True) is None
            and self.is_asked_of_plain(ctx, True)
        )

    def is_asked_of_plain(self, ctx: Any, on_cpu: bool) -> bool:
        """The same of tensors that `_direct.py` has found plain."""
        ctx.may_go_ahead = on_cpu and ENABLED
        if not self._wanted or not ctx.may_go_ahead or is_explaining():
            return False
        self._wanted = False
        return True

    def gradient(self, ctx: Any, grad_loss: Tensor) -> Tensor | None:
        """The gradient that was computed ahead, once, where it is the one to be returned."""
        gradient, ctx.gradient = ctx.gradient, None
        if (
            not ctx.may_go_ahead
            or is_dynamo_compiling()
            or is_grad_enabled()
            or _transforms_active()
            or _dispatch_modes() != 0
            or is_batched(grad_loss)
            or not _C.is_one(grad_loss)
        ):
            return None
        self._wanted = True
        note(self._note)
        return gradient
