"""Linear cross-entropy: ``cross_entropy(linear(x, W, b), target)`` without the logits.

The logits of a large vocabulary are the largest tensor of a language model's step. Here only a chunk of their
rows exists at a time (``_linear_rows.py``); the loss and its options are O(N) arithmetic on what a chunk
leaves of every row, as for :func:`cross_entropy`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._autograd import (
    MEAN,
    NONE,
    accumulation,
    check_devices,
    explain_bad_input,
    is_compiled_under_vmap,
    is_dtensor,
    may_be_differentiated,
    reduction_code,
)
from ._class_indices import class_indices
from ._distributed import Shard, agree, announce_failure, group_name
from ._explain import note
from ._family import (
    Family,
    checked_dtype,
    explain_bad_option,
    logprobs,
    loss_dtype,
    mean_divisor,
    mean_of,
    metrics_of,
    options_given,
    reduced,
)
from ._linear_ranks import most_probable_of_all, shard_of
from ._linear_rows import Head, default_chunk, linear_rows, linear_total, wants_total
from ._products import operand_dtype, product_dtype
from ._rows import NO_WEIGHT_DERIVATIVE, check_class_weight, check_smoothing, weighted_probabilities
from .cross_entropy import cross_entropy_reference
from .vocab_parallel import weight_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "linear_cross_entropy"

Lora = tuple[Tensor, Tensor, float]


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    shift: bool = False,
    lora: Lora | None = None,
    **options: Any,
) -> Tensor:
    """Linear cross-entropy in plain PyTorch, logits and all: what :func:`linear_cross_entropy` computes.

    The tests' oracle, differentiable by autograd. `options` are those of `cross_entropy_reference`.
    """
    if lora is not None:
        a, b, scaling = lora
        linear_weight = linear_weight + scaling * torch.tensordot(b, a, 1)
    if shift:
        input, target = input[..., :-1, :], target.narrow(input.dim() - 2, 1, input.shape[-2] - 1)
        if options.get("row_weight") is not None:
            row_weight = options["row_weight"]
            options["row_weight"] = row_weight.narrow(input.dim() - 2, 1, input.shape[-2]).flatten()
    batch, (classes, *out) = input.shape[:-1], linear_weight.shape[:-1]
    logits = input.reshape(math.prod(batch), input.shape[-1]) @ linear_weight.flatten(0, -2).t()
    if linear_bias is not None:
        logits = logits + linear_bias.flatten()
    rows = math.prod(batch), math.prod(out)
    logits = logits.view(rows[0], classes, rows[1])
    target = target.reshape(logits.shape if target.is_floating_point() else rows)
    if options.get("row_weight") is not None:
        options["row_weight"] = options["row_weight"].reshape(rows)
    loss = cross_entropy_reference(logits, target, **options)
    return loss.view((*batch, *out)) if options.get("reduction") == "none" else loss


# --------------------------------------------------------------------------------------------------
# Arguments


@dataclasses.dataclass
class _Ranks:
    """Those over which the classes are spread."""

    group: ProcessGroup
    vocab_start: int | None
    vocab_size: int | None
    asked: bool = False
    """Whether the others know what this rank is going to do."""


class _Shape(NamedTuple):
    """How rows lie in the arguments."""

    batch: tuple[Any, ...]
    classes: Any
    out: tuple[Any, ...]
    shift: bool

    @property
    def rows(self) -> tuple[Any, ...]:
        return (*self.batch, *self.out)

    @property
    def positions(self) -> tuple[Any, ...]:
        """D of the head, if it has positions."""
        return (math.prod(self.out),) if self.out else ()

    def moved(self, x: Tensor, fill: float) -> Tensor:
        """Every position's value replaced by that of the next, and the last one's by `fill`."""
        if not self.shift or not x.numel():
            return x
        dim = len(self.batch) - 1
        last = torch.full_like(x.narrow(dim, 0, 1), fill)
        return torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), last], dim)

    def kept(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rows ``(N)`` or ``(N, D)`` from dimension `dim` on, in their own shape, without the last position
        of a shifted sequence."""
        x = x.reshape((*x.shape[:dim], *self.rows))
        if not self.shift:
            return x
        dim += len(self.batch) - 1
        return x.narrow(dim, 0, max(0, x.shape[dim] - 1))


def _shape(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, shift: bool
) -> tuple[_Shape, bool]:
    """The shapes of a call, and whether the target holds class indices."""
    if input.dim() < 1:
        raise RuntimeError(f"{_OP}: expected input with dimensionality at least 1, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{_OP}: expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    check_devices(_OP, input, linear_weight=linear_weight, target=target, linear_bias=linear_bias)
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"{_OP}: expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    shape = _Shape(tuple(input.shape[:-1]), linear_weight.shape[0], tuple(linear_weight.shape[1:-1]), shift)
    if linear_bias is not None and tuple(linear_bias.shape) != (shape.classes, *shape.out):
        raise RuntimeError(
            f"{_OP}: expected linear_bias shape {(shape.classes, *shape.out)}, got {tuple(linear_bias.shape)}"
        )
    if shape.out and not shape.batch:
        raise RuntimeError(
            f"{_OP}: K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires "
            f"batched input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{_OP}: expected input and {name} to have the same dtype, but got: {input.dtype} != "
                f"{tensor.dtype}"
            )
    if shift and not shape.batch:
        raise ValueError(f"{_OP}: shift=True wants input of shape (..., T, H), got {tuple(input.shape)}")
    return shape, _index_target(shape, target)


def _index_target(shape: _Shape, target: Tensor) -> bool:
    got = tuple(target.shape)
    if got == (*shape.batch, shape.classes, *shape.out):
        if not target.is_floating_point():
            raise RuntimeError(
                f"{_OP}: Expected floating point type for target with class probabilities, got {target.dtype}"
            )
        return False
    if got != shape.rows and not (not shape.rows and got == (1,)):
        by_batch = not got or not shape.batch or got[0] != shape.batch[0]
        raise (ValueError if by_batch else RuntimeError)(
            f"{_OP}: expected target of shape {shape.rows} for input of shape (*, H) = {(*shape.batch, '*')} "
            f"and {shape.classes} classes, got {got}"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(
            f"{_OP}: expected target dtype to be Long, Int or Byte for class indices, got {target.dtype}"
        )
    return True


def _check_lora(input: Tensor, shape: _Shape, lora: Any) -> None:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"{_OP}: expected lora to be (A, B, scaling), got {type(lora).__name__}")
    a, b, scaling = lora
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{_OP}: expected lora to be two Tensors and a float")
    check_devices(_OP, input, lora_a=a, lora_b=b)
    wanted = (shape.classes, *shape.out)
    if a.dim() != 2 or a.shape[1] != input.shape[-1] or tuple(b.shape) != (*wanted, a.shape[0]):
        raise RuntimeError(
            f"{_OP}: expected lora to be A of shape (r, {input.shape[-1]}) and B of shape "
            f"{(*wanted, 'r')}, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _check_numbers(chunk_size: Any, gradient_filter: Any) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{_OP}: expected chunk_size to be a positive int or None, got {chunk_size!r}")
    if gradient_filter is not None and (
        not isinstance(gradient_filter, float) or not 0 < gradient_filter < 1
    ):
        raise ValueError(
            f"{_OP}: expected gradient_filter to be a float between 0 and 1, or None, got {gradient_filter!r}"
        )


def _weighted(
    classes: int, target: Tensor, index_target: bool, weight: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor | None, float]:
    """Class weights that may need a derivative, moved into a probability target to get it there."""
    if index_target:
        if weight.requires_grad:
            raise RuntimeError(NO_WEIGHT_DERIVATIVE.replace("cross_entropy", _OP, 1))
        return target, weight, label_smoothing
    return weighted_probabilities(target, weight, label_smoothing, classes), None, 0.0


# --------------------------------------------------------------------------------------------------
# The loss


class _Call(NamedTuple):
    """The arguments of one loss."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: int
    ignore_index: int | None
    label_smoothing: float
    out_dtype: torch.dtype | None
    family: Family
    chunk_size: int | None
    shift: bool
    gradient_filter: float | None
    lora: Lora | None
    ranks: _Ranks | None
    metrics: bool

    @property
    def ignored(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    @property
    def low_rank(self) -> tuple[Tensor | None, Tensor | None, float]:
        return (None, None, 0.0) if self.lora is None else self.lora

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss."""
        return loss_dtype(self.input, self.target, self.weight, self.out_dtype)


def _under_autocast(call: _Call) -> _Call:
    """As autocast has it: the linear layer in its dtype, the loss in float32."""
    device = call.input.device.type
    enabled = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device)
    if not enabled or not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    a, b, scaling = call.low_rank
    tensors = call.input, call.linear_weight, call.linear_bias, a, b
    cast: list[Any] = [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return call._replace(
        input=cast[0],
        linear_weight=cast[1],
        linear_bias=cast[2],
        lora=None if call.lora is None else (cast[3], cast[4], scaling),
        out_dtype=call.out_dtype or (None if wide else torch.float32),
    )


def _check(call: _Call, shape: _Shape, index_target: bool) -> None:
    _check_numbers(call.chunk_size, call.gradient_filter)
    call.family.check(_OP, call.input, list(shape.rows))
    if not index_target and call.ignore_index is not None:
        raise RuntimeError(f"{_OP}: ignore_index cannot be specified when target contains probabilities")
    check_smoothing(_OP, call.label_smoothing)
    if call.ranks is None:
        check_class_weight(_OP, call.weight, shape.classes)


def _flat(call: _Call, shape: _Shape, index_target: bool) -> tuple[Tensor, Tensor | None, Family]:
    """Target and row weight as the rows of a head have them, and the family with those that are kept."""
    target, family = call.target, call.family
    if index_target:
        target = target.long()  # or a narrow target would meet the ignored class modulo its own range
    target = shape.moved(target, call.ignored if index_target else 0.0)
    flat = shape.positions if index_target else (shape.classes, *shape.positions)
    target = target.reshape(math.prod(shape.batch), *flat)
    row_weight = family.row_weight
    if row_weight is not None:
        row_weight = shape.moved(row_weight.reshape(shape.rows), 0.0)
        family = family._replace(row_weight=shape.kept(row_weight))
    elif call.shift and not index_target:
        row_weight = shape.moved(call.input.new_ones(shape.rows), 0.0)
    if row_weight is not None:
        row_weight = row_weight.reshape(-1, *shape.positions)
    return target, row_weight, family


def _head(call: _Call, shape: _Shape, target: Tensor, index_target: bool, shard: Shard | None) -> Head:
    input, weight, smoothing = call.input, call.weight, call.label_smoothing
    if weight is not None and may_be_differentiated(weight):
        classes = shape.classes if shard is None else shard.total
        target, weight, smoothing = _weighted(classes, target, index_target, weight, smoothing)
    scale_tensor, scale = call.family.scale(accumulation(input, target, weight), input.device)
    width, count = shape.classes * math.prod(shape.out), math.prod(shape.batch)
    filtering = call.gradient_filter is not None and index_target and smoothing == 0 and not shape.out
    if call.gradient_filter is not None and not filtering:
        note("gradient_filter: every class is part of some target here, and none is left out")
    a, b, scaling = call.low_rank
    bias = call.linear_bias
    # Ranks have different numbers of classes, and chunks of the same rows.
    widest = width if shard is None else -(-shard.total // shard.size) * math.prod(shape.out)
    return Head(
        x=input.reshape(count, input.shape[-1]),
        weight=call.linear_weight.reshape(width, input.shape[-1]),
        bias=None if bias is None else bias.reshape(width),
        target=target,
        class_weight=weight,
        scale_tensor=scale_tensor,
        lora_a=a,
        lora_b=None if b is None else b.reshape(width, b.shape[-1]),
        lora_scaling=scaling,
        classes=shape.classes,
        scale=scale,
        softcap=float(call.family.softcap or 0.0),
        ignore_index=call.ignored,
        label_smoothing=smoothing,
        entropy=call.metrics,
        predicted=call.metrics,
        chunk=call.chunk_size or default_chunk(count, widest, input.shape[-1], input.is_cuda),
        gradient_filter=float(call.gradient_filter or 0.0) if filtering else 0.0,
        group="" if shard is None else shard.group,
        shard=() if shard is None else (shard.size, shard.start, shard.total, shard.digest),
    )


def _run(call: _Call) -> tuple[Tensor, LinearCrossEntropyMetrics | None]:
    if is_compiled_under_vmap():
        torch._dynamo.graph_break(
            msg=f"{_OP} is not traced under vmap; without fullgraph=True such a call runs uncompiled"
        )
    call = _under_autocast(call)
    shape, index_target = _shape(call.input, call.linear_weight, call.target, call.linear_bias, call.shift)
    if call.lora is not None:
        _check_lora(call.input, shape, call.lora)
    _check(call, shape, index_target)
    shard = None
    if call.ranks is not None:
        shard = _agree(call, call.ranks, shape, index_target)
        if call.weight is not None:
            call = call._replace(weight=weight_of(shard, call.weight))
    target, row_weight, family = _flat(call, shape, index_target)
    if shard is not None and index_target:
        target = class_indices(target, _OP, call.ignored, shard.total)
    head = _head(call, shape, target, index_target, shard)
    _note_chunks(head)
    nothing = call.shift and call.input.shape[-2] < 2  # no position has a next one
    if call.reduction != NONE and wants_total(head) and not nothing:
        total, planes, predicted, filtered = linear_total(head, row_weight, family, call.metrics)
        rows = shape.kept(planes, 1)
        if call.reduction == MEAN:
            total = mean_of(total, *mean_divisor(rows, family))
        loss = total.to(call.dtype)
    else:
        planes, predicted, filtered = linear_rows(head)
        rows = shape.kept(planes, 1)
        loss = reduced(rows, call.reduction, call.dtype, family)
    if not call.metrics:
        return loss, None
    smoothing = call.label_smoothing
    return loss, _metrics(head, shape, rows, target, smoothing, family, predicted, filtered)


def _agree(call: _Call, ranks: _Ranks, shape: _Shape, index_target: bool) -> Shard:
    """This rank's shard, when all ranks mean the same call."""
    weight, family = call.weight, call.family
    if call.gradient_filter is not None:
        raise ValueError(f"{_OP}: gradient_filter does not go with group: a rank knows its own classes alone")
    if weight is not None and (weight.dim() != 1 or not weight.is_floating_point()):
        raise RuntimeError(
            f"{_OP}: expected weight of one dimension and a floating dtype, got shape {tuple(weight.shape)} "
            f"of {weight.dtype}"
        )
    a, b, _ = call.low_rank
    tensors = call.input, call.linear_weight, call.linear_bias, call.target, a, b, family.logit_scale
    optional = {"weight": weight, "row_weight": family.row_weight, "normalizer": family.normalizer}
    description = {
        # Traced sizes may be symbols; the number of rows is in each message beside.
        "rows": "traced" if torch.compiler.is_compiling() else str(shape.rows),
        "positions": str(shape.out),
        "target": "of class indices" if index_target else "of probabilities",
        "accumulation": str(accumulation(call.input, call.target, weight)),
        "loss": str(call.dtype),
        "reduction": str(call.reduction),
        "empty": family.empty,
        "z_loss": str(family.z_loss),
        "logit_scale": "a tensor" if isinstance(family.logit_scale, Tensor) else "a number",
        "metrics": str(call.metrics),
        "chunk_size": str(call.chunk_size),
        "shift": str(call.shift),
        "gradients": str([isinstance(t, Tensor) and t.requires_grad for t in tensors]),
        "grad mode": str(torch.is_grad_enabled()),
        "vocab_size": str(ranks.vocab_size),
        **{name: "absent" if option is None else "given" for name, option in optional.items()},
    }
    # Numbers, where Dynamo may have symbols: of one it makes no range.
    classes = len(range(shape.classes))
    weights = None if weight is None else len(range(weight.shape[0]))
    ranks.asked = True
    name = group_name(_OP, ranks.group)
    return agree(_OP, name, tuple(description.items()), classes, ranks.vocab_start, weights)


def _note_chunks(head: Head) -> None:
    chunks = -(-head.x.shape[0] // head.chunk)
    dtype = product_dtype(head.x)
    of = "" if dtype == head.x.dtype else f" of {head.x.dtype}"
    into = "in" if operand_dtype(head.x) == dtype else "into"
    ignored = "; ignored rows enter them" if head.index_target and head.x.device.type != "cpu" else ""
    note(f"linear head: {chunks} chunks of at most {head.chunk} rows, products{of} {into} {dtype}{ignored}")


def _metrics(
    head: Head,
    shape: _Shape,
    rows: Tensor,
    target: Tensor,
    label_smoothing: float,
    family: Family,
    predicted: Tensor,
    filtered: Tensor,
) -> LinearCrossEntropyMetrics:
    logprob = logprobs(rows, head.index_target)
    if not head.index_target and (
        head.class_weight is not None or head.target is not target or label_smoothing
    ):
        note("logprob of probabilities with class weight or smoothing takes a second pass")
        plain = head._replace(
            target=target, class_weight=None, label_smoothing=0.0, entropy=False, predicted=False
        )
        logprob = logprobs(shape.kept(linear_rows(plain)[0], 1), False)
    predicted = shape.kept(predicted)
    if head.index_target:
        best = shape.kept(target)
    elif head.group:
        best = shape.kept(most_probable_of_all(shard_of(head), target, rows.new_empty(head.row_shape)))
    else:
        best = shape.kept(target.argmax(1)) if shape.classes else predicted
    filtered = shape.kept(filtered) if filtered.numel() else torch.zeros_like(rows[0])
    plain_metrics = metrics_of(rows, logprob, family.z_loss, predicted, best)
    return LinearCrossEntropyMetrics(*plain_metrics, filtered.detach())


class LinearCrossEntropyMetrics(NamedTuple):
    """:class:`CrossEntropyMetrics` of a linear head's rows, and what `gradient_filter` leaves out."""

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    z_loss: Tensor
    predicted: Tensor
    correct: Tensor
    filtered: Tensor
    """The part of the row's softmax, between 0 and 1, that the gradients leave out."""


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    shift: bool = False,
    gradient_filter: float | None = None,
    lora: Lora | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, holding a chunk of the logits.

    Takes the arguments of torch's ``F.linear_cross_entropy`` and the options of :func:`cross_entropy`. A
    scalar loss computes its gradients with itself, in three matrix products, and keeps them (16-bit ones in
    float32) for a backward that multiplies by its upstream gradient, as often as it is called. For
    ``reduction="none"`` the backward computes the logits once more. Derivatives of higher order, torch.func
    and forward mode go by the same chunks.

    Args:
        input: ``(H)``, ``(N, H)`` or any leading dimensions ``(*, H)``; float16, bfloat16, float32 or
            float64. Products of float16 run in float32, and so do those of bfloat16 on a CPU that has none:
            :func:`explain` says which.
        linear_weight: ``(C, H)``, or ``(C, d1, ..., dk, H)`` for ``k`` dimensions of positions, each with a
            loss of its own; the input's dtype.
        target: class indices (int64, int32 or uint8) of shape ``(*, d1, ..., dk)``, or class probabilities
            of shape ``(*, C, d1, ..., dk)``.
        linear_bias: ``(C, d1, ..., dk)``.
        weight, reduction, label_smoothing: as in :func:`cross_entropy`.
        ignore_index: a class index whose rows add nothing; ``None`` is -100. On the CPU such rows do not
            enter the matrix products. On a GPU they do: how many they are is known only to who waits for it.
        options: torch's ``LinearCrossEntropyOptions``, of which ``batch_chunk_size`` is taken as
            ``chunk_size``; the others have nothing to choose here.
        logit_scale, softcap, z_loss, row_weight, normalizer, empty, out_dtype: as in :func:`cross_entropy`.
        chunk_size: rows of logits that exist at a time. By default as many as hold 125 * 2**17 logits (63 MiB
            in float32), shared out evenly; on a GPU 2**27, or as many as the weight has elements.
        shift: predict the next token: position ``t`` of ``input`` ``(*, T, H)`` is scored against the target
            at ``t + 1``, as ``cross_entropy(logits[..., :-1, :], target[..., 1:])`` would, without a copy of
            the input; ``row_weight`` moves with the target. Rows of a result are then ``(*, T - 1)``.
        gradient_filter: leave out of the gradients, for each chunk, the classes that are nobody's target and
            whose softmax stays below this bound in all its rows, as `Cut Your Losses in Large-Vocabulary
            Language Models <https://arxiv.org/abs/2411.09009>`_ does with 2**-12; the metrics say how much
            was left out. Waits for the device. Without effect where every class is part of some target
            (smoothing, probabilities), for ``k > 0``, and in derivatives by torch.func or of second order.
        group: the ranks over which the classes are spread: ``linear_weight``, ``linear_bias``, ``B`` of
            ``lora`` and probability targets hold this rank's classes, ``weight`` this rank's or all;
            ``input``, index targets and everything else are the same on every rank, and so are their
            gradients, the sums of all ranks'. One all-gather a chunk (and one more where the backward
            computes the logits again), one all-reduce for the input's gradient. Under torch.func and in
            forward mode a rank's tangents are its part of one: no ``jacfwd`` and no ``hessian`` with respect
            to what is sharded, as :func:`vocab_parallel_cross_entropy` has it. Not with ``gradient_filter``.
        vocab_start, vocab_size: as in :func:`vocab_parallel_cross_entropy`, with ``group``.
        lora: ``(A, B, scaling)`` with ``A`` of shape ``(r, H)`` and ``B`` of shape ``(C, r)``: the weight is
            ``linear_weight + scaling * B @ A``, which is never built (`LoRA
            <https://arxiv.org/abs/2106.09685>`_). Gradients go to whatever requires them.

    Returns:
        The loss as of :func:`cross_entropy`, in the input's dtype (float32 under autocast, where the linear
        layer runs in autocast's) or ``out_dtype``; rows have the shape ``(*, d1, ..., dk)``.

    Raises:
        IndexError: a class index outside [0, C) that is not ``ignore_index``.
        RuntimeError: shapes or dtypes that do not go together, ``ignore_index`` with probabilities,
            ``label_smoothing`` outside [0, 1], a class weight that requires grad with class indices.
        ValueError: an unknown reduction, a target whose batch differs from the input's, ``chunk_size`` or
            ``gradient_filter`` out of range, and what :func:`cross_entropy` raises it for.
        NotImplementedError: integer, complex or sparse input.
        TypeError: not a tensor, or an option of a wrong type.
    """
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "row_weight": row_weight,
        "normalizer": normalizer,
        "empty": empty,
        "out_dtype": out_dtype,
        "chunk_size": chunk_size,
        "shift": shift,
        "gradient_filter": gradient_filter,
        "lora": lora,
        "group": group,
        "vocab_start": vocab_start,
        "vocab_size": vocab_size,
    }
    tensors = input, linear_weight, target, linear_bias, weight
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(linear_cross_entropy, tensors, input, linear_weight, target, **given)
    return _loss(input, linear_weight, target, given, metrics=False)[0]


def linear_cross_entropy_with_metrics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    shift: bool = False,
    gradient_filter: float | None = None,
    lora: Lora | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, LinearCrossEntropyMetrics]:
    """The loss of :func:`linear_cross_entropy`, and what the same pass says of every row.

    Arguments and errors are those of :func:`linear_cross_entropy`; :class:`LinearCrossEntropyMetrics` names
    the results. A loss that is made of the metrics too takes a second pass in its backward.
    """
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "row_weight": row_weight,
        "normalizer": normalizer,
        "empty": empty,
        "out_dtype": out_dtype,
        "chunk_size": chunk_size,
        "shift": shift,
        "gradient_filter": gradient_filter,
        "lora": lora,
        "group": group,
        "vocab_start": vocab_start,
        "vocab_size": vocab_size,
    }
    loss, metrics = _loss(input, linear_weight, target, given, metrics=True)
    assert metrics is not None
    return loss, metrics


def _loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, given: dict[str, Any], metrics: bool
) -> tuple[Tensor, Any]:
    """The loss, and the metrics if they are asked for, or the sentence that says why not.

    `given`: the other arguments of :func:`linear_cross_entropy`.
    """
    given = dict(given)
    ranks = tuple(given.pop(name) for name in ("group", "vocab_start", "vocab_size"))
    if any(type(x) is not Tensor and is_dtensor(x) for x in (input, linear_weight)):
        from ._dtensor import linear_loss_of_dtensor  # slow to import

        return linear_loss_of_dtensor(input, linear_weight, target, given, metrics)
    ignore_index, label_smoothing = given["ignore_index"], given["label_smoothing"]
    family = Family(*(given.pop(name) for name in Family._fields))
    options = given.pop("options")
    if given["chunk_size"] is None:
        given["chunk_size"] = getattr(options, "batch_chunk_size", None)
    given["reduction"] = reduction_code(given["reduction"], None, None)
    over = None if ranks[0] is None else _Ranks(*ranks)
    try:
        checked_dtype(_OP, given["out_dtype"])
        return _run(_Call(input, linear_weight, target, family=family, ranks=over, metrics=metrics, **given))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if over is not None and not over.asked and not torch.compiler.is_compiling():
            announce_failure(group_name(_OP, over.group), error)
        explain_bad_option(_OP, -100 if ignore_index is None else ignore_index, label_smoothing)
        explain_bad_input(_OP, input=input, linear_weight=linear_weight, target=target)
        raise


class LinearCrossEntropyLoss(_WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss`` on the fused kernels: same constructor, parameters and state.

    A linear layer, ``self.linear``, and :func:`linear_cross_entropy` of its output, whose options are further
    keyword arguments; what belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call.

    Args:
        in_features: H, the size of each input sample.
        num_classes: C.
        out_features: ``(d1, ..., dk)``, the positions of a K-dimensional loss.
        bias: whether the linear layer adds a bias.
        device, dtype: of the linear layer's parameters.
        weight: a weight for each class, shape ``(C)``.
    """

    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "reduction": "mean",
        "ignore_index": None,
        "label_smoothing": 0.0,
        "logit_scale": 1.0,
        "softcap": None,
        "z_loss": 0.0,
        "empty": "nan",
        "out_dtype": None,
        "chunk_size": None,
        "shift": False,
        "gradient_filter": None,
    }

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        empty: str = "nan",
        out_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        shift: bool = False,
        gradient_filter: float | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"{_OP}: expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"{_OP}: expected label_smoothing to be in range [0, 1], got {label_smoothing}"
            )
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        width = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, width, bias=bias, device=device, dtype=dtype)
        self.options = options
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.empty = empty
        self.out_dtype = out_dtype
        self.chunk_size = chunk_size
        self.shift = shift
        self.gradient_filter = gradient_filter

    def extra_repr(self) -> str:
        return options_given(self, self._DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        shape = self.num_classes, *self.out_features
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, -1),
            target,
            linear_bias=None if bias is None else bias.view(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            row_weight=row_weight,
            normalizer=normalizer,
            empty=self.empty,
            out_dtype=self.out_dtype,
            chunk_size=self.chunk_size,
            shift=self.shift,
            gradient_filter=self.gradient_filter,
        )
