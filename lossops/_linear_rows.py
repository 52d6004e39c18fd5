"""The row functions of a linear head, a chunk of rows at a time: products, ops, autograd.

The planes of :mod:`lossops._rows` for the logits ``z = x W^T + b`` (with an optional low-rank addition
``scaling * (x A^T) B^T``), holding only a chunk of ``z``. Three ways lead to gradients:

- ``linear_total``: a sum over all rows, whose gradients are computed in the forward, three matrix products
  in all, and kept for a backward that only multiplies;
- ``linear_rows_forward`` and ``linear_rows_backward``: any function of the planes; the backward computes
  the chunks of logits once more;
- ``Chunked``: derivatives of every order and kind, by torch.func on a chunk at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _C, _rows
from ._autograd import accumulation, differentiates_backward, is_batched, is_transformed, ordered_sum
from ._distributed import replicated
from ._explain import note
from ._family import Family, row_losses, unused_rows, upstream, weighted_losses, without_unused
from ._linear_ranks import Ranks, chunk_of_all
from ._products import (
    BLOCK_ELEMENTS,
    Layer,
    add_product,
    as_operand,
    multiply,
    operand_dtype,
    product_dtype,
    set_product,
)
from ._rows import row_functions, transform_reference, with_values

# A chunk's logits: 63 MiB in float32, 31 in bfloat16, 512 rows of 32000 classes. Enough to keep the products
# near their full speed, in which each chunk reads and writes the weight's gradient once more, and little
# beside the weight of such a head.
CHUNK_ELEMENTS = 125 << 17
# A GPU multiplies so much faster than it reads that it wants some thousand rows; and as many logits as the
# weight has elements where those are more: its 16-bit gradient will take as much beside the sums.
GPU_CHUNK_ELEMENTS = 1 << 27


class Head(NamedTuple):
    """What all ops take, first the tensors."""

    x: Tensor
    """(N, H)"""
    weight: Tensor
    """(C*D, H): D positions for each class, 1 for a plain head"""
    bias: Tensor | None
    """(C*D)"""
    target: Tensor
    """int64 (N), or (N, D); probabilities (N, C), or (N, C, D)"""
    class_weight: Tensor | None
    scale_tensor: Tensor | None
    lora_a: Tensor | None
    """(r, H)"""
    lora_b: Tensor | None
    """(C*D, r)"""
    lora_scaling: float
    classes: int
    scale: float
    softcap: float
    ignore_index: int
    label_smoothing: float
    entropy: bool
    predicted: bool
    chunk: int
    gradient_filter: float
    """0: none"""
    group: str = ""
    """The ranks over which the classes are spread, if they are."""
    shard: Sequence[int] = ()
    """Of those: their number, this rank's first class, the number of all classes, a digest of the call."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """In the order of _GRADIENTS."""
        return tuple(self[place] for place in _PLACES)

    @property
    def sum_dtypes(self) -> list[torch.dtype]:
        """What the gradients are summed in, in the order of _GRADIENTS: those of products in the type of
        theirs, whatever that of a low-rank addition is."""
        own: dict[str, Tensor | None] = {"target": self.target, "scale_tensor": self.scale_tensor}
        like = [own.get(name) for name in _GRADIENTS]
        return [torch.promote_types((self.x if t is None else t).dtype, torch.float32) for t in like]

    @property
    def options(self) -> tuple[float, float, int, float]:
        return self.scale, self.softcap, self.ignore_index, self.label_smoothing

    @property
    def index_target(self) -> bool:
        return not self.target.is_floating_point()

    @property
    def row_shape(self) -> list[Any]:
        """Of the planes but their first dimension."""
        plain = 1 if self.index_target else 2
        return [self.x.shape[0], *self.target.shape[plain:]]

    @property
    def counted(self) -> Tensor:
        """Which rows are not ignored, as bool of shape (N), or (N, D)."""
        if self.index_target:
            return self.target != self.ignore_index
        return torch.ones(self.row_shape, dtype=torch.bool, device=self.target.device)

    @property
    def accumulator(self) -> torch.dtype:
        return accumulation(self.x, self.target, self.class_weight)

    def shaped(self, z: Tensor) -> Tensor:
        """A chunk's logits (n, C*D) as the kernels take them."""
        return z.view(z.shape[0], self.classes, *self.row_shape[1:])


_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? scale_tensor, "
    "Tensor? lora_a, Tensor? lora_b"
)
_OPTIONS = (
    "float lora_scaling, SymInt classes, float scale, float softcap, SymInt ignore_index, "
    "float label_smoothing, bool entropy, bool predicted, SymInt chunk, float gradient_filter, "
    "str group, SymInt[] shard"
)

# Which gradients are wanted, in this order everywhere.
_GRADIENTS = ("x", "weight", "bias", "target", "scale_tensor", "lora_a", "lora_b")
_PLACES = tuple(Head._fields.index(name) for name in _GRADIENTS)


def _held_alike(head: Head) -> list[tuple[str, Tensor]]:
    """What has a gradient and is the same on every rank, with its name."""
    given = ("x", head.x), ("scale_tensor", head.scale_tensor), ("lora_a", head.lora_a)
    return [(name, t) for name, t in given if t is not None]


def default_chunk(rows: int, logits_a_row: int, features: int, gpu: bool) -> int:
    """Rows a chunk: as many as there is memory meant for, shared out evenly, in multiples of 16."""
    elements = max(GPU_CHUNK_ELEMENTS, logits_a_row * features) if gpu else CHUNK_ELEMENTS
    most = max(1, elements // max(1, logits_a_row))
    chunks = max(1, -(-rows // most))
    even = max(1, -(-rows // chunks))
    return min(most // 16 * 16, -(-even // 16) * 16) if most >= 16 else most


# --------------------------------------------------------------------------------------------------
# Passes over the chunks


class _Chunk(NamedTuple):
    """Some rows of a head and their logits."""

    rows: slice | Tensor
    x: Tensor
    """As the products take it."""
    low: Tensor | None
    """``scaling * x A^T``"""
    z: Tensor
    target: Tensor


def _check_target(head: Head) -> None:
    """What the kernels raise, who see a chunk's rows and know no others."""
    bad = head.counted & ~_known(head.target, head.classes)
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"linear_cross_entropy: Target {int(head.target.flatten()[row])} is out of bounds: row {row} of "
            f"the target needs a class index from 0 to C-1 for C = {head.classes} or "
            f"ignore_index ({head.ignore_index})"
        )


def _chunk_buffer(like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Memory of (rows, width) that goes back to the system when it is freed.

    glibc keeps blocks of up to 32 MiB once a program has freed one of their size: it is asked for more, and
    what nobody touches takes no memory.
    """
    elements = rows * width
    most_kept = 2**25 // dtype.itemsize
    if like.device.type == "cpu" and most_kept // 4 <= elements <= most_kept:
        return like.new_empty(most_kept + 1, dtype=dtype)[:elements].view(rows, width)
    return like.new_empty((rows, width), dtype=dtype)


def _chunks(head: Head, own: Head) -> Iterator[_Chunk]:
    """The chunks of all rows that count, in one buffer of logits, with the targets of `own`.

    Ignored rows are left out where no device has to be waited for: on the CPU.
    """
    dtype, operand = product_dtype(head.x), operand_dtype(head.x)
    count, width = head.x.shape[0], head.weight.shape[0]
    picked = None
    if head.index_target and head.x.device.type == "cpu":
        if not head.group:  # else it has been asked for all ranks' classes
            _check_target(head)
        counted = head.counted if head.target.dim() == 1 else head.counted.any(1)
        if not counted.all():
            picked = counted.nonzero().squeeze(1)
            count = picked.shape[0]
    buffer = _chunk_buffer(head.x, min(head.chunk, count), width, dtype)
    base = Layer(head.weight, operand)
    bias = None if head.bias is None else head.bias.to(dtype)
    for start in range(0, count, head.chunk):
        part: slice | Tensor = slice(start, min(start + head.chunk, count))
        rows = part if picked is None else picked[part]
        x = head.x[rows].to(operand)
        z = buffer[: x.shape[0]]
        base.logits(x, bias, z)
        low = None
        if head.lora_a is not None and head.lora_b is not None:
            low = x.new_empty(x.shape[0], head.lora_a.shape[0])
            multiply(x, head.lora_a.to(operand).t(), low).mul_(head.lora_scaling)
            add_product(z, low, head.lora_b.to(operand).t())
        yield _Chunk(rows, x, low, z, own.target[rows])


class _Planes(NamedTuple):
    """Of a chunk."""

    own: Tensor
    """Of the logits that are here."""
    whole: Tensor
    """Of those of all classes."""
    pull: Callable[[Tensor], Tensor] | None
    """From the gradients of `whole` to those of `own`, where these are others."""
    classes: Tensor | None
    """Those that the gradients are made of, if not all."""


class _Results:
    """What a forward leaves of every row; zeros (and no class) for ignored ones."""

    def __init__(self, head: Head) -> None:
        self.head = self.own = head
        self.ranks = None
        if head.group:
            self.ranks = Ranks(head)
            self.own = self.ranks.own()
        shape = head.row_shape
        self.planes = head.x.new_zeros((7 if head.entropy else 6, *shape), dtype=head.accumulator)
        self.predicted = head.x.new_full(shape if head.predicted else (0,), -1, dtype=torch.int64)
        self.filtered = self.planes.new_zeros(shape if head.gradient_filter else (0,))

    def chunks(self) -> Iterator[_Chunk]:
        return _chunks(self.head, self.own)

    def add(self, chunk: _Chunk) -> _Planes:
        head, own = self.head, self.own
        tensors = chunk.target, own.class_weight, own.scale_tensor
        planes, predicted = _rows._forward(
            own.shaped(chunk.z), *tensors, *own.options, own.entropy, own.predicted
        )
        whole, pull = planes, None
        if self.ranks is not None:
            whole, predicted, pull = self.ranks.combine(chunk.rows, planes, predicted)
        self.planes[:, chunk.rows] = whole
        if head.predicted:
            self.predicted[chunk.rows] = predicted
        classes = _likely_classes(own, chunk, planes)
        if classes is not None:
            self.filtered[chunk.rows] = 1 - _mass(own, chunk, planes, classes)
        return _Planes(planes, whole, pull, classes)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.planes, self.predicted, self.filtered


def _likely_classes(head: Head, chunk: _Chunk, planes: Tensor) -> Tensor | None:
    """Those that are a row's target, or whose softmax reaches `gradient_filter` in some row of the chunk; the
    first one too, so that there is one. On a GPU the rows may be ignored ones, or have no such class."""
    if not head.gradient_filter:
        return None
    scale = head.scale if head.scale_tensor is None else head.scale_tensor
    counted = chunk.target != head.ignore_index
    least = planes[_rows.MAX] + planes[_rows.LOG_SUM] + math.log(head.gradient_filter)
    least = least.masked_fill(~counted, math.inf)
    above = planes.new_full(head.weight.shape[:1], -math.inf)
    for start in range(0, chunk.z.shape[0], 16):  # a few rows at a time: in the cache
        rows = slice(start, start + 16)
        u = transform_reference(chunk.z[rows].to(planes.dtype), scale, head.softcap)
        above = torch.maximum(above, (u - least[rows, None]).amax(0))  # NaN: kept
    keep = ~(above < 0)
    keep[:1] = True
    keep[chunk.target.where(counted & _known(chunk.target, head.classes), 0)] = True
    return keep.nonzero().squeeze(1)


def _mass(head: Head, chunk: _Chunk, planes: Tensor, classes: Tensor) -> Tensor:
    """Of each row's softmax, that of these classes."""
    some = chunk.z.index_select(1, classes)
    zeros = chunk.target.new_zeros(chunk.target.shape)
    kept, _ = _rows._forward(
        some, zeros, None, head.scale_tensor, head.scale, head.softcap, -1, 0.0, False, False
    )
    lse = planes[_rows.MAX] + planes[_rows.LOG_SUM]
    mass = (kept[_rows.MAX] + kept[_rows.LOG_SUM] - lse).exp().clamp(max=1)
    return mass.masked_fill(chunk.target == head.ignore_index, 1)


def _known(target: Tensor, classes: int) -> Tensor:
    """Which targets are classes: on a GPU nothing has stopped the others."""
    return (target >= 0) & (target < classes)


def _own_terms(head: Head, planes: Tensor, g: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(class, own, rest) of each row: the gradient of the logit of its class is ``own + rest``, where the
    target's term, by far a row's largest, is `own`."""
    p = (planes[_rows.PICKED] - planes[_rows.LOG_SUM]).exp()
    weighted = g[_rows.DOT] * planes[_rows.TARGET_WEIGHT]
    own = (1 - head.label_smoothing) * weighted + g[_rows.PICKED]
    rest = p * g[_rows.LOG_SUM] + head.label_smoothing / head.classes * weighted
    if head.entropy:
        surprise = planes[_rows.PICKED] - planes[_rows.LOG_SUM] + planes[_rows.ENTROPY]
        rest = rest - g[_rows.ENTROPY] * (p * surprise).masked_fill(p == 0, 0)
    slope = head.scale if head.scale_tensor is None else head.scale_tensor
    if head.softcap:
        slope = slope * (1 - ((planes[_rows.PICKED] + planes[_rows.MAX]) / head.softcap).square())
    nothing = (target == head.ignore_index) | (g == 0).all(0)
    y = target.where(_known(target, head.classes), 0)
    return y, (slope * own).masked_fill(nothing, 0), (slope * rest).masked_fill(nothing, 0)


class _Gradients:
    """Sums over the chunks of the gradients that are wanted, at least in float32."""

    def __init__(self, results: _Results, needs: Sequence[bool]) -> None:
        self.head = head = results.own
        self.ranks = results.ranks
        self.needs = dict(zip(_GRADIENTS, needs, strict=True))
        dtype = operand_dtype(head.x)
        self.base = Layer(head.weight, dtype)
        self.added = None if head.lora_b is None else Layer(head.lora_b.to(dtype), dtype)
        # Where a chunk's product is rounded to 16 bits, as a CPU's is, an error is as large as the product's
        # largest terms make it: those of the rows' own classes are added apart, unrounded.
        rounded = dtype == torch.bfloat16 and not head.x.is_cuda
        self.apart = rounded and head.index_target and head.target.dim() == 1
        self.sums: dict[str, Tensor] = {}
        self.unwritten = {name for name in ("weight", "lora_b") if self.needs[name]}
        for name, like, dtype in zip(_GRADIENTS, head.differentiable, head.sum_dtypes, strict=True):
            if self.needs[name]:
                make = like.new_empty if name in self.unwritten else like.new_zeros
                self.sums[name] = make(like.shape, dtype=dtype)

    def add(self, chunk: _Chunk, of: _Planes, g: Tensor) -> None:
        """Writes the gradient of a chunk's logits over them, and adds what follows from it.

        `g`: the gradients of the planes of all classes.
        """
        head, needs = self.head, self.needs
        planes, classes = of.own, of.classes
        if of.pull is not None:
            g = of.pull(g)
            planes = _rows.within_softmax(planes, g)
        z = head.shaped(chunk.z)
        target, class_weight, options = chunk.target, head.class_weight, head.options
        position = None
        if classes is not None:
            position = target.new_full((head.classes,), -1, dtype=torch.int64)
            position[classes] = torch.arange(len(classes), device=position.device)
            known = _known(target, head.classes)
            place = position[target.where(known, 0)].where(known, len(classes))  # that class is unknown, too
            target = place.where(target != head.ignore_index, -1)
            z = z.index_select(1, classes)
            class_weight = None if class_weight is None else class_weight[classes]
            options = head.scale, head.softcap, -1, 0.0
        tensors = target, class_weight, head.scale_tensor
        wanted = needs["target"], needs["scale_tensor"]
        to_target, to_scale = _rows._backward_in_place(g, planes, z, *tensors, *options, *wanted)
        if needs["target"]:
            self.sums["target"][chunk.rows] = to_target.to(self.sums["target"].dtype)
        if needs["scale_tensor"]:
            self.sums["scale_tensor"] += ordered_sum(to_scale, to_scale.dtype)
        own = None
        grad = z.reshape(z.shape[0], -1)
        if self.apart:
            y, own_term, rest = _own_terms(head, planes, g, chunk.target)
            own = y, own_term.to(self.base.total).unsqueeze(1)
            column = y if position is None else position[y].clamp(min=0)
            rows = torch.arange(grad.shape[0], device=grad.device)
            grad[rows, column] = rest.to(grad.dtype)  # scatter_ would copy the whole of it
        self._add_products(chunk, grad, classes, own)

    def _add_products(
        self, chunk: _Chunk, grad: Tensor, classes: Tensor | None, own: tuple[Tensor, Tensor] | None
    ) -> None:
        head, needs = self.head, self.needs
        if needs["bias"]:
            columns = grad.sum(0, dtype=self.base.total)
            self._scatter("bias", columns, classes)
            if own is not None:
                self.sums["bias"].index_add_(0, own[0], own[1].squeeze(1))
        grad, factor = as_operand(grad, self.base.dtype)
        given = grad, factor, classes, own
        to_x = self._through(self.base, "weight", chunk.x, *given, needs["x"])
        if chunk.low is not None and self.added is not None and head.lora_a is not None:
            need_low = needs["x"] or needs["lora_a"]
            to_low = self._through(self.added, "lora_b", chunk.low, *given, need_low)
            if to_low is not None:
                to_low *= head.lora_scaling
                if needs["lora_a"]:
                    add_product(self.sums["lora_a"], to_low.t(), chunk.x.to(to_low.dtype))
                if to_x is not None:
                    add_product(to_x, to_low, head.lora_a.to(to_low.dtype))
        if to_x is not None:
            self.sums["x"][chunk.rows] = to_x

    def _scatter(self, name: str, part: Tensor, classes: Tensor | None) -> None:
        if classes is None:
            self.sums[name] += part
        else:
            self.sums[name].index_add_(0, classes, part)

    def _through(
        self,
        layer: Layer,
        name: str,
        x: Tensor,
        grad: Tensor,
        factor: Tensor | None,
        classes: Tensor | None,
        own: tuple[Tensor, Tensor] | None,
        need_input: bool,
    ) -> Tensor | None:
        """Adds to the gradient of a layer's weight; gives that of its input `x`.

        `factor`: of each row of `grad`.
        """
        some = layer if classes is None else Layer(layer.weight[classes], layer.dtype)
        if self.needs[name]:
            total = self.sums[name]
            largest = None
            if factor is not None:
                largest = factor.amax()
                x = x * (factor / largest).to(x.dtype)
            if classes is None:
                put = set_product if name in self.unwritten else add_product
                self.unwritten.discard(name)
                put(total, grad.t(), x, largest)
            else:
                part = total.new_empty(len(classes), x.shape[1])
                set_product(part, grad.t(), x, largest)
                self._zero_unwritten(name)
                total.index_add_(0, classes, part)
            if own is not None:
                total.index_add_(0, own[0], own[1] * x)
        if not need_input:
            return None
        to_input = some.to_input(grad)
        if factor is not None:
            to_input *= factor
        return to_input if own is None else to_input.addcmul_(own[1], layer.weight[own[0]])

    def _zero_unwritten(self, *names: str) -> None:
        for name in self.unwritten.intersection(names):
            self.sums[name].zero_()
            self.unwritten.remove(name)

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of _GRADIENTS, empty where not wanted."""
        self._zero_unwritten(*self.sums)  # there was no chunk
        if self.ranks is not None:  # every rank holds these, and has a part of their gradients
            for name, _ in _held_alike(self.head):
                if self.needs[name]:
                    self.sums[name] = self.ranks.summed(self.sums[name])
        return tuple(self.sums.get(name, self.head.x.new_empty((0,))) for name in _GRADIENTS)


# --------------------------------------------------------------------------------------------------
# Ops: one node of a graph each, for torch.compile and for whoever looks on


_library = torch.library.Library("lossops", "FRAGMENT")
_RESULTS = "Tensor planes, Tensor predicted, Tensor filtered"
_WANTED = ", ".join(f"Tensor {name}_grad" for name in _GRADIENTS)  # empty where not wanted
_library.define(f"linear_rows_forward({_TENSORS}, {_OPTIONS}) -> ({_RESULTS})")
_library.define(
    f"linear_rows_backward(Tensor grad_rows, Tensor rows, {_TENSORS}, {_OPTIONS}, bool[] needs) "
    f"-> ({_WANTED})"
)
_library.define(
    f"linear_total(Tensor? row_weight, float z_loss, {_TENSORS}, {_OPTIONS}, bool[] needs) "
    f"-> ({_RESULTS}, {_WANTED})"
)


def _rows_forward_impl(*args: Any) -> tuple[Tensor, ...]:
    results = _Results(Head(*args))
    for chunk in results.chunks():
        results.add(chunk)
    return results.tensors()


def _rows_backward_impl(grad_rows: Tensor, rows: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The gradients of the planes' gradients, in the dtypes of what they belong to."""
    head, needs = Head(*args[:-1]), args[-1]
    results = _Results(head)
    gradients = _Gradients(results, needs)
    for chunk in results.chunks():
        if head.group:  # a shard's own planes are not kept
            planes = results.add(chunk)
        else:
            kept = rows[:, chunk.rows]
            planes = _Planes(kept, kept, None, _likely_classes(head, chunk, kept))
        gradients.add(chunk, planes, grad_rows[:, chunk.rows])
    return tuple(
        grad.to(x.dtype) if need else grad
        for grad, x, need in zip(gradients.tensors(), head.differentiable, needs, strict=True)
    )


def _total_impl(row_weight: Tensor | None, z_loss: float, *args: Any) -> tuple[Tensor, ...]:
    """The results of a forward, and of the sum of all losses the gradients, in float32 of what is 16-bit."""
    head, needs = Head(*args[:-1]), args[-1]
    results = _Results(head)
    gradients = _Gradients(results, needs)
    for chunk in results.chunks():
        planes = results.add(chunk)
        weight = None if row_weight is None else row_weight[chunk.rows]
        gradients.add(chunk, planes, _upstream_of_total(planes.whole, weight, z_loss))
    return results.tensors() + gradients.tensors()


def _upstream_of_total(
    planes: Tensor, row_weight: Tensor | None, z_loss: float, factor: Tensor | None = None
) -> Tensor:
    """The gradients of the planes in the sum of all losses, or in `factor` times that."""
    g = planes.new_ones(planes.shape[1:]) if row_weight is None else row_weight.to(planes.dtype)
    g = g.reshape(planes.shape[1:])
    if factor is not None:
        g = g * factor.to(planes.dtype)
    unused = unused_rows(planes, Family(z_loss=z_loss, row_weight=row_weight))
    if unused is None:
        return upstream(planes, g, z_loss)
    # Once more: what comes back along a row's 0 may be NaN.
    return upstream(planes.masked_fill(unused, 0), g, z_loss).masked_fill(unused, 0)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)  # it is not for the meta device
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _plainly(impl: Callable[..., tuple[Tensor, ...]], first: int) -> Callable[..., tuple[Tensor, ...]]:
    """Products in the dtypes chosen here, whatever autocast says; nothing recorded.

    `first`: where x stands among the arguments.
    """

    @torch.no_grad()
    def run(*args: Any) -> tuple[Tensor, ...]:
        with _without_autocast(args[first].device.type):
            return impl(*args)

    return run


for _name, _impl, _first in (
    ("linear_rows_forward", _rows_forward_impl, 0),
    ("linear_rows_backward", _rows_backward_impl, 2),
    ("linear_total", _total_impl, 2),
):
    _library.impl(_name, _plainly(_impl, _first), "CompositeExplicitAutograd")

_rows_forward = torch.ops.lossops.linear_rows_forward.default
_rows_backward = torch.ops.lossops.linear_rows_backward.default
_total = torch.ops.lossops.linear_total.default


def _fake_gradients(head: Head, needs: Sequence[bool], kept: bool) -> tuple[Tensor, ...]:
    gradients = []
    for x, dtype, need in zip(head.differentiable, head.sum_dtypes, needs, strict=True):
        if need:
            gradients.append(x.new_empty(x.shape, dtype=dtype if kept else x.dtype))
        else:
            gradients.append(head.x.new_empty((0,)))
    return tuple(gradients)


@torch.library.register_fake("lossops::linear_rows_forward")
def _(*args):
    return _Results(Head(*args)).tensors()


@torch.library.register_fake("lossops::linear_rows_backward")
def _(grad_rows, rows, *args):
    return _fake_gradients(Head(*args[:-1]), args[-1], kept=False)


@torch.library.register_fake("lossops::linear_total")
def _(row_weight, z_loss, *args):
    head = Head(*args[:-1])
    return _Results(head).tensors() + _fake_gradients(head, args[-1], kept=True)


# --------------------------------------------------------------------------------------------------
# Autograd: first derivatives by the ops


def linear_rows(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """(planes, predicted, filtered) by the shortest way that the surroundings allow."""
    if is_transformed() and not torch.compiler.is_compiling():
        planes, predicted = general_rows(head)
        return planes, predicted, planes.new_zeros((0,))
    if _needs_gradient(head):
        return LinearRows.apply(*head)
    planes, predicted, filtered = _rows_forward(*head)
    return planes, predicted, filtered


def linear_total(head: Head, row_weight: Tensor | None, family: Family, metrics: bool) -> tuple[Tensor, ...]:
    """(total, planes, predicted, filtered): the sum of all rows' losses in float64, with its gradients.

    `row_weight` takes the place of the family's, for rows that it does not know of.
    """
    needs = tuple(x is not None and x.requires_grad for x in head.differentiable)
    return LinearTotal.apply(row_weight, family.z_loss, family.empty == "zero", metrics, needs, *head)


def wants_total(head: Head) -> bool:
    """Whether a sum's gradients are to be computed with it: something here needs one."""
    if is_transformed() and not torch.compiler.is_compiling():
        return False
    return _needs_gradient(head)


def _needs_gradient(head: Head) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head.tensors)


def _by_place(needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that were wanted, at their places among a head's arguments."""
    result: list[Tensor | None] = [None] * len(Head._fields)
    for place, need, grad in zip(_PLACES, needs, grads, strict=True):
        result[place] = grad if need else None
    return result


class LinearRows(Function):
    """(planes, predicted, filtered) of a head, outside torch.func."""

    @staticmethod
    def forward(ctx, *head):
        planes, predicted, filtered = _rows_forward(*head)
        ctx.mark_non_differentiable(predicted, filtered)
        ctx.save_for_backward(planes, *head[:8])
        ctx.options = head[8:]
        return planes, predicted, filtered

    @staticmethod
    def backward(ctx, grad_planes, _predicted, _filtered):
        planes, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[place] for place in _PLACES]
        head = Head(*tensors, *ctx.options)
        if differentiates_backward():
            grads = general_gradients(head, needs, grad_planes)
        else:
            grads = _rows_backward(grad_planes, planes, *head, needs)
        return tuple(_by_place(needs, grads))


class LinearTotal(Function):
    """(total, planes, predicted, filtered); the planes are differentiable where metrics are wanted."""

    @staticmethod
    def forward(ctx, row_weight, z_loss, zero, metrics, needs, *head):
        planes, predicted, filtered, *grads = _total(row_weight, z_loss, *head, needs)
        losses = weighted_losses(planes, Family(z_loss=z_loss, row_weight=row_weight))
        ctx.mark_non_differentiable(predicted, filtered, *(() if metrics else (planes,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(planes, row_weight, *head[:8], *grads)
        ctx.options = z_loss, zero, metrics, needs, head[8:]
        return ordered_sum(losses, torch.float64), planes, predicted, filtered

    @staticmethod
    def backward(ctx, grad_total, grad_planes, _predicted, _filtered):
        planes, row_weight, *rest = ctx.saved_tensors
        z_loss, zero, metrics, needs, options = ctx.options
        if not metrics:
            grad_planes = None  # compiled code passes zeros
        head, sums = Head(*rest[:8], *options), list(rest[8:])  # which torch.compile of 2.11 has as a tuple
        del rest
        if grad_total is None and grad_planes is None:
            return (None,) * (5 + len(head))
        if grad_total is not None:  # that of a mean of no rows is infinite, and their gradients are 0
            grad_total = grad_total.masked_fill(~head.counted.any(), 0)
        if grad_planes is not None or differentiates_backward():
            to_weight, grads = _of_total(head, planes, row_weight, z_loss, needs, grad_total, grad_planes)
        else:
            to_weight = _to_row_weight(planes, row_weight, z_loss, grad_total)
            again = _may_be_called_again(grad_total)
            if not again:  # or all sums and all gradients at once would be the step's peak
                ctx.maybe_clear_saved_tensors()
            grads = []
            for x, need in zip(head.differentiable, needs, strict=True):
                kept = sums.pop(0)
                grads.append(_times(kept, grad_total, x.dtype, again, zero) if need else None)
        to_weight = to_weight if ctx.needs_input_grad[0] else None
        return to_weight, None, None, None, None, *_by_place(needs, grads)


def _of_total(head, planes, row_weight, z_loss, needs, grad_total, grad_planes):
    """The gradients to row weight and head by a second pass, differentiable where they may have to be."""
    differentiable = differentiates_backward()
    if differentiable:
        planes = general_rows(head)[0]
    g, to_weight = grad_planes, None
    if grad_total is not None:
        of_total = _upstream_of_total(planes, row_weight, z_loss, grad_total)
        g = of_total if g is None else g + of_total
        to_weight = _to_row_weight(planes, row_weight, z_loss, grad_total)
    if differentiable:
        return to_weight, general_gradients(head, needs, g)
    return to_weight, _rows_backward(g, planes, *head, needs)


def _to_row_weight(planes, row_weight, z_loss, grad_total):
    if row_weight is None:
        return None
    losses = row_losses(without_unused(planes, Family(z_loss=z_loss, row_weight=row_weight)), z_loss)
    return (grad_total * losses).to(row_weight.dtype).reshape(row_weight.shape)


def _may_be_called_again(grad: Tensor) -> bool:
    """Whether what a backward has saved may be needed for another one, or by another sample of a batch."""
    if torch.compiler.is_compiling() or is_batched(grad):
        return True
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # from torch 2.6 on
    return keeps is None or keeps()


def _times(grad: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool, zero: bool) -> Tensor:
    """`zero`: a factor 0 stands for an empty batch and gives 0, whatever it is to multiply."""
    factor = factor.to(grad.dtype)
    if grad.is_cuda and not keep and grad.dtype != dtype:  # in one pass
        result = torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    else:
        result = grad * factor if keep else grad.mul_(factor)
    if zero:
        result.masked_fill_(factor == 0, 0)
    return result.to(dtype) if keep else _rounded(result, dtype)


def _rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """`sums` in `dtype`, which nobody needs afterwards: large ones go back to the system block by block.

    Or the sums of a large weight and its gradient at once would be the step's peak.
    """
    if sums.dtype == dtype or sums.numel() < 2 * BLOCK_ELEMENTS or not _is_memory(sums):
        return sums.to(dtype)
    result = torch.empty_like(sums, dtype=dtype)
    for part, rounded in zip(*(x.flatten().split(BLOCK_ELEMENTS) for x in (sums, result)), strict=True):
        rounded.copy_(part)
        _C.drop_pages(part.data_ptr(), part.nbytes)
    return result


def _is_memory(x: Tensor) -> bool:
    """Whether `x` is elements one behind the other in this process, not somebody's idea of them."""
    plain = type(x) is Tensor and torch._C._len_torch_dispatch_stack() == 0
    return plain and x.device.type == "cpu" and x.is_contiguous()


# --------------------------------------------------------------------------------------------------
# Autograd: derivatives of every order and kind. What is done chunk by chunk, with results that are rows or
# sums over all rows, has derivatives of the same form: one Function is its own derivative.


@dataclasses.dataclass(frozen=True)  # a tuple would be taken apart by vmap
class _Plan:
    """`function` on `chunk` of `rows` rows at a time."""

    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[int | None, ...]
    """Along which dimension an argument is rows; None: each chunk gets it whole."""
    outputs: tuple[int | None, ...]
    """Along which dimension a result is rows; None: the results of all chunks are summed."""
    rows: int
    chunk: int

    def vjp(self, wanted: tuple[int, ...], given: tuple[int, ...]) -> _Plan:
        """Of (inputs, gradients of the `given` outputs): the gradients of the `wanted` inputs."""
        count = len(self.inputs)

        def function(*args):
            def of_wanted(*values):
                outputs = self.function(*with_values(args[:count], wanted, values))
                return tuple(outputs[k] for k in given)

            pull = torch.func.vjp(of_wanted, *(args[k] for k in wanted))[1]
            return pull(tuple(args[count:]))

        inputs = (*self.inputs, *(self.outputs[k] for k in given))
        return _Plan(function, inputs, tuple(self.inputs[k] for k in wanted), self.rows, self.chunk)

    def jvp(self, moving: tuple[int, ...]) -> _Plan:
        """Of (inputs, tangents of the `moving` ones): the tangents of all outputs."""
        count = len(self.inputs)

        def function(*args):
            def of_moving(*values):
                return self.function(*with_values(args[:count], moving, values))

            # The pullback is linear, and its own pullback the derivative along tangents. torch.func.jvp would
            # be shorter, and does not nest in torch.autograd.forward_ad.
            primals = [args[k] for k in moving]
            outputs = of_moving(*primals)

            def pull(*gradients):
                return torch.func.vjp(of_moving, *primals)[1](gradients)

            push = torch.func.vjp(pull, *(torch.zeros_like(x) for x in outputs))[1]
            return push(tuple(args[count:]))

        inputs = (*self.inputs, *(self.inputs[k] for k in moving))
        return _Plan(function, inputs, self.outputs, self.rows, self.chunk)


class Chunked(Function):
    """The outputs of a plan, differentiable to every order; 16-bit sums are kept in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan, *tensors):
        # Without tangents (a vmapped tensor has none): torch.func switches forward mode on again.
        primals = [x if is_batched(x) else x.detach() for x in tensors]
        parts: list[list[Tensor]] = [[] for _ in plan.outputs]
        dtypes: list[torch.dtype] = []
        for start in range(0, max(1, plan.rows), plan.chunk):
            size = min(plan.chunk, plan.rows - start)
            pieces = [
                x if dim is None else x.narrow(dim, start, size)
                for x, dim in zip(primals, plan.inputs, strict=True)
            ]
            results = plan.function(*pieces)
            dtypes = [result.dtype for result in results]
            for part, dim, result in zip(parts, plan.outputs, results, strict=True):
                if dim is None:
                    result = result.to(torch.promote_types(result.dtype, torch.float32))
                    part[:] = [part[0] + result if part else result]
                else:
                    part.append(result)
        joined = [
            part[0] if dim is None or len(part) == 1 else torch.cat(part, dim)
            for part, dim in zip(parts, plan.outputs, strict=True)
        ]
        return tuple(x.to(dtype) for x, dtype in zip(joined, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        given = tuple(k for k, grad in enumerate(grads) if grad is not None)
        wanted = tuple(k for k, need in enumerate(ctx.needs_input_grad[1:]) if need)
        if not given:
            return None, *(None for _ in ctx.plan.inputs)
        plan = ctx.plan.vjp(wanted, given)
        results = Chunked.apply(plan, *ctx.saved_tensors, *(grads[k] for k in given))
        return None, *with_values([None] * len(ctx.plan.inputs), wanted, results)

    @staticmethod
    def jvp(ctx, _, *tangents):
        moving = tuple(k for k, tangent in enumerate(tangents) if tangent is not None)
        if not moving:
            return tuple(None for _ in ctx.plan.outputs)
        plan = ctx.plan.jvp(moving)
        return Chunked.apply(plan, *ctx.saved_tensors, *(tangents[k] for k in moving))


def _general_plan(head: Head) -> tuple[_Plan, tuple[int, ...]]:
    """The planes of a head as a plan, and the places of its arguments; the argmax is a plane more."""
    note("linear head: derivatives by torch.func, a chunk at a time; every row and class enters the products")
    places = tuple(place for place, tensor in enumerate(head.tensors) if tensor is not None)
    dtype = product_dtype(head.x)

    def function(*tensors):
        with _without_autocast(tensors[0].device.type):
            return (planes(*tensors),)

    def planes(*tensors):
        part = head._replace(**{Head._fields[p]: t for p, t in zip(places, tensors, strict=True)})
        if head.group:
            alike: dict[str, Any] = {name: replicated(t, head.group) for name, t in _held_alike(part)}
            part = part._replace(**alike)
        bias = None if part.bias is None else part.bias.to(dtype)
        z = torch.nn.functional.linear(part.x.to(dtype), part.weight.to(dtype), bias)
        if part.lora_a is not None and part.lora_b is not None:
            low = torch.nn.functional.linear(part.x.to(dtype), part.lora_a.to(dtype)) * part.lora_scaling
            z = z + torch.nn.functional.linear(low, part.lora_b.to(dtype))
        z = z.reshape(z.shape[0], part.classes, *part.row_shape[1:])
        if head.group:
            rows, predicted = chunk_of_all(part, z)
        else:
            tensors = z, part.target, part.class_weight, part.scale_tensor
            rows, predicted = row_functions(*tensors, part.options, part.entropy, part.predicted)
        return torch.cat([rows, predicted.to(rows.dtype).unsqueeze(0)]) if part.predicted else rows

    by_rows = {Head._fields.index("x"): 0, Head._fields.index("target"): 0}
    plan = _Plan(function, tuple(by_rows.get(p) for p in places), (1,), head.x.shape[0], head.chunk)
    return plan, places


def general_rows(head: Head) -> tuple[Tensor, Tensor]:
    """(planes, predicted), differentiable to every order."""
    plan, places = _general_plan(head)
    (planes,) = Chunked.apply(plan, *(head[place] for place in places))
    if not head.predicted:
        return planes, planes.new_zeros((0,), dtype=torch.int64)
    return planes[:-1], planes[-1].detach().to(torch.int64)


def general_gradients(head: Head, needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """The gradients that are wanted, of the planes' gradients, differentiable to every order."""
    plan, places = _general_plan(head._replace(predicted=False))
    wanted = [place for place, need in zip(_PLACES, needs, strict=True) if need]
    plan = plan.vjp(tuple(places.index(place) for place in wanted), (0,))
    results = Chunked.apply(plan, *(head[place] for place in places), g)
    given = dict(zip(wanted, results, strict=True))
    return [given.get(place) for place in _PLACES]
