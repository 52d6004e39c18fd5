"""What a call does: which kernels run, on what, which way through the memory, and what is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _C

_notes: list[str] | None = None


def note(text: str) -> None:
    """Says, where `explain` listens, that a call leaves the shortest way."""
    if _notes is not None and text not in _notes:
        _notes.append(text)


def is_explaining() -> bool:
    return _notes is not None


class Kernel(NamedTuple):
    """One launch."""

    op: str
    """``cross_entropy_forward`` and so on."""
    device: str
    """The CPU's instruction set (``avx512``, ``avx2``, ``baseline``), or ``cuda``."""
    way: str
    """The way through the logits or elements."""
    parallel: int
    """Threads on the CPU, blocks on a GPU."""


class Copy(NamedTuple):
    """A tensor that is copied before a kernel reads it."""

    what: str
    why: str
    bytes: int


class Explanation(NamedTuple):
    """What :func:`explain` found; printable."""

    kernels: tuple[Kernel, ...]
    copies: tuple[Copy, ...]
    notes: tuple[str, ...]
    """Where the call left the shortest way, and for what: torch's own ops, a loop, the reference."""

    def __str__(self) -> str:
        lines = []
        for k, times in Counter(self.kernels).items():
            unit = "block" if k.device == "cuda" else "thread"
            line = f"{k.op}: {k.device}, {k.way}, {k.parallel} {unit}{'s' * (k.parallel != 1)}"
            lines.append(line + f", {times} times" * (times > 1))
        if not self.kernels:
            lines.append("no kernel of lossops ran")
        lines += [f"copy of {c.what}, {c.bytes} bytes: {c.why}" for c in self.copies]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which kernels a call of ``function(*args, **kwargs)`` uses, forward and backward.

    The call is made, on copies of nothing: its tensors share memory with those given but have a graph of
    their own, so that no ``grad`` changes (with ``inplace_backward=True`` they are copies, for it would
    change the logits). Where the result requires grad, its backward pass runs too.

    Args:
        function: one of this package's losses, a module, or any function that calls them, such as a model's
            training loss; :func:`fused_losses` may be active.
        *args, **kwargs: its arguments.

    Returns:
        An :class:`Explanation`: kernels, copies and notes. Copies are those of the ops; notes say where the
        call goes by other means than one kernel forward and one backward.

    Raises:
        Whatever the call raises.

    >>> print(lossops.explain(lossops.cross_entropy, logits, target))
    cross_entropy_forward: avx512, along each row, 2 threads
    cross_entropy_backward: avx512, along each row, 2 threads
    note: cross_entropy: a loop's later steps compute this gradient in the forward pass, with the loss
    """
    global _notes
    in_place = bool(kwargs.get("inplace_backward") or getattr(function, "inplace_backward", False))

    def apart(t: Tensor) -> Tensor:
        leaf = t.detach().requires_grad_(t.requires_grad)
        return leaf.clone() if in_place and t.requires_grad else leaf

    args, kwargs = tree_map_only(Tensor, apart, (args, kwargs))
    _notes = []
    _C.start_trace()
    try:
        results = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
        differentiable = [t for t in results if t.requires_grad]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if differentiable and inputs:
            ones = [torch.ones_like(t) for t in differentiable]
            torch.autograd.grad(differentiable, inputs, ones, allow_unused=True)
        notes = tuple(_notes)
    finally:
        _notes = None
        entries = _C.stop_trace()
    threads = torch.get_num_threads()
    kernels, copies = [], []
    for what, how, device, amount in entries:
        if device == "copy":
            copies.append(Copy(what, how, amount))
        else:
            kernels.append(Kernel(what, device, how, amount if device == "cuda" else min(amount, threads)))
    return Explanation(tuple(kernels), tuple(copies), notes)
