"""Softmax cross-entropy of logits whose classes are spread over the ranks of a process group.

Each rank computes the planes of its own classes with the kernels of the unsharded loss (``_rows.py``), the
ranks exchange them in one all-gather, and O(N) arithmetic makes the planes of all classes of them. With
rank r's planes relative to its own largest logit ``m_r``, and ``m = max_r m_r``::

    log_sum = log sum_r exp(log_sum_r + m_r - m)         S   = sum_r S_r
    u_y - m = that of the owner of y, + m_r - m          dot = sum_r dot_r + S_r*(m_r - m)
    P_r     = exp(log_sum_r + m_r - m - log_sum)         H   = sum_r P_r*(H_r - log P_r)

Every rank then has the loss and the gradients of these planes, and from them the gradients of its own planes
without asking anyone: the convention of Megatron-LM (https://arxiv.org/abs/1909.08053) and of torch's
``loss_parallel``, by which all ranks call backward with the same upstream gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _rows
from ._autograd import (
    KERNEL_DTYPES,
    accumulation,
    autocast_dtype,
    check_devices,
    differentiates_backward,
    explain_bad_input,
    is_transformed,
    may_be_differentiated,
    reduction_code,
    unsupported_dtype,
)
from ._class_indices import class_indices
from ._distributed import (
    Shard,
    agree,
    all_gather,
    announce_failure,
    group_name,
    replicated,
    summed,
)
from ._explain import note
from ._family import (
    CrossEntropyMetrics,
    Family,
    checked_dtype,
    explain_bad_option,
    logprobs,
    loss_dtype,
    metrics_of,
    reduced,
)
from ._rows import (
    DOT,
    ENTROPY,
    LOG_SUM,
    MAX,
    PICKED,
    TARGET_SUM,
    TARGET_WEIGHT,
    class_dim,
    weighted_probabilities,
)
from .cross_entropy import _may_write_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The class index that the op ignores on a shard: no target has it.
_IGNORED = -(2**63)


# --------------------------------------------------------------------------------------------------
# From the planes of the shards to those of all classes


def _base(largest: Tensor) -> Tensor:
    """What a row's planes are relative to."""
    return largest.masked_fill(largest == -torch.inf, 0)


def combine(shards: Tensor, sent: Sequence[int]) -> Tensor:
    """The planes of all classes, from those of each shard: ``(ranks, planes, ...)`` to ``(planes, ...)``.

    `sent` says which planes these are. Where a row's class lies elsewhere, a shard's PICKED is -inf.
    """
    each = dict(zip(sent, shards.unbind(1), strict=True))
    largest = each[MAX].amax(0)
    shift = _base(each[MAX]) - _base(largest)
    exponent = each[LOG_SUM] + shift
    log_sum = exponent.exp().sum(0).log()
    whole = {MAX: largest, LOG_SUM: log_sum}
    if DOT in each:
        moved = (each[TARGET_SUM] * shift).masked_fill(each[TARGET_SUM] == 0, 0)
        whole[TARGET_SUM] = each[TARGET_SUM].sum(0)
        whole[DOT] = (each[DOT] + moved).sum(0)
    if PICKED in each:
        whole[PICKED] = (each[PICKED] + shift).amax(0)
    if TARGET_WEIGHT in each:
        whole[TARGET_WEIGHT] = each[TARGET_WEIGHT].sum(0)
    if ENTROPY in each:
        log_p = exponent - log_sum
        p = log_p.exp()
        whole[ENTROPY] = (p * (each[ENTROPY] - log_p)).masked_fill(p == 0, 0).sum(0)
    return torch.stack([whole[k] for k in sent])


def local_gradients(grad: Tensor, planes: Tensor, local: Tensor, sent: Sequence[int]) -> Tensor:
    """The gradients of a shard's planes, from those of `planes`, which it is part of."""
    grads, whole, mine = (dict(zip(sent, x.unbind(0), strict=True)) for x in (grad, planes, local))
    # A row without a gradient gets none, whatever its logits are.
    unused = (grad == 0).all(0) & ~whole[LOG_SUM].isfinite()
    shift = (_base(mine[MAX]) - _base(whole[MAX])).masked_fill(unused, 0)
    log_p = (mine[LOG_SUM] + shift - whole[LOG_SUM]).masked_fill(unused, -torch.inf)
    p = log_p.exp()
    grads[MAX] = torch.zeros_like(p)
    grads[LOG_SUM] = grads[LOG_SUM] * p
    if DOT in grads:
        grads[TARGET_SUM] = grads[TARGET_SUM] + grads[DOT] * shift
    if ENTROPY in grads:
        distance = (mine[ENTROPY] - log_p - whole[ENTROPY]).masked_fill(p == 0, 0)
        grads[LOG_SUM] = grads[LOG_SUM] + grads[ENTROPY] * p * distance
        grads[ENTROPY] = grads[ENTROPY] * p
    return torch.stack([grads[k] for k in sent])


def global_tangents(tangent: Tensor, planes: Tensor, local: Tensor, sent: Sequence[int]) -> Tensor:
    """This rank's part of the tangents of all classes' planes, from those of its own: the adjoint of
    `local_gradients`."""
    along, whole, mine = (dict(zip(sent, x.unbind(0), strict=True)) for x in (tangent, planes, local))
    shift = _base(mine[MAX]) - _base(whole[MAX])
    log_p = mine[LOG_SUM] + shift - whole[LOG_SUM]
    p = log_p.exp()
    if ENTROPY in along:
        distance = (mine[ENTROPY] - log_p - whole[ENTROPY]).masked_fill(p == 0, 0)
        along[ENTROPY] = p * (along[ENTROPY] + along[LOG_SUM] * distance)
    if DOT in along:
        along[DOT] = along[DOT] + along[TARGET_SUM] * shift
    along[LOG_SUM] = p * along[LOG_SUM]
    along[MAX] = torch.zeros_like(p)
    return torch.stack([along[k] for k in sent])


def exchange(
    local: Tensor, candidates: Tensor, shard: Shard, sent: Sequence[int], numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """(planes of all classes, best classes) of this rank's planes and candidates.

    `candidates`: of each kind a value, and a class index in two numbers. `numbers`: what `_NUMBERS` names.
    """
    function = ExchangeForward if is_transformed() else Exchange
    return function.apply(local, candidates, shard, sent, numbers)


class Exchange(Function):
    @staticmethod
    def forward(local, candidates, shard, sent, numbers):
        header = torch.cat([local.new_full((1,), number) for number in (shard.digest, *numbers)])
        parts = header, local.flatten(), candidates.flatten()
        gathered = all_gather(torch.cat(parts), shard.group, shard.size)
        headers, planes, candidates_of_all = gathered.split([part.numel() for part in parts], 1)
        planes = combine(planes.reshape(shard.size, *local.shape), sent)
        alike = (headers == header).all()
        if torch.compiler.is_compiling() or local.device.type != "cpu":
            planes = planes.where(alike, torch.nan)  # asking would break the graph, or wait for the device
        elif not alike:
            raise _disagreement(headers)
        return planes, best_classes(candidates_of_all.reshape(shard.size, *candidates.shape))

    @staticmethod
    def setup_context(ctx, inputs, output):
        local, _, shard, ctx.sent, _ = inputs
        planes, best = output
        ctx.group = shard.group
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(local, planes)
        ctx.save_for_forward(local, planes)

    @staticmethod
    def backward(ctx, grad, _best):
        local, planes = ctx.saved_tensors
        if differentiates_backward():
            # What comes back along them is this rank's part, and there is one collective for both.
            grad, planes = replicated(torch.stack([grad, planes]), ctx.group)
        return local_gradients(grad, planes, local, ctx.sent), *(None,) * 4

    @staticmethod
    def vmap(info, in_dims, local, candidates, *args):
        def last(x, dim):
            return x.unsqueeze(-1).expand(*x.shape, info.batch_size) if dim is None else x.movedim(dim, -1)

        planes, best = exchange(last(local, in_dims[0]), last(candidates, in_dims[1]), *args)
        return (planes, best), (planes.dim() - 1, best.dim() - 1)


class ExchangeForward(Exchange):
    @staticmethod
    def jvp(ctx, tangent, *_):
        local, planes = ctx.saved_tensors

        def part(tangent, planes, local):
            return (global_tangents(tangent, planes, local, ctx.sent),)

        (mine,) = _rows.PlainPyTorch.apply(part, tangent, replicated(planes, ctx.group), local)
        return summed(mine, ctx.group), None


_NUMBERS = ("configuration", "rows", "ignore_index", "label_smoothing", "logit_scale", "softcap", "z_loss")


def _disagreement(headers: Tensor) -> RuntimeError:
    differing = [k for k in range(len(_NUMBERS)) if not (headers[:, k] == headers[0, k]).all()]
    got = ", ".join(f"{_NUMBERS[k]} {headers[:, k].tolist()}" for k in differing)
    return RuntimeError(f"vocab_parallel: expected the same call on every rank of the group, got {got}")


_RADIX = 2**20  # class indices travel in two digits: float32 has no integers of their own beyond 2^24


def candidate(shard: Shard, value: Tensor, index: Tensor) -> Tensor:
    """The shard's best class and its value, as `best_classes` compares them."""
    if shard.classes:
        index = index.clamp(min=0) + shard.start
    else:
        value, index = torch.full_like(value, -torch.inf), torch.full_like(index, shard.total)
    return torch.stack([value, (index // _RADIX).to(value.dtype), (index % _RADIX).to(value.dtype)])


def best_classes(candidates: Tensor) -> Tensor:
    """The class of the largest value, the lowest where several have it; NaN is the largest, as in argmax."""
    values, high, low = candidates.unbind(2)
    index = high.long() * _RADIX + low.long()
    best = (values == values.amax(0)) | values.isnan()
    return index.masked_fill(~best, torch.iinfo(torch.int64).max).amin(0)


# --------------------------------------------------------------------------------------------------
# What the op is given on one rank, and what its planes mean to all


class LocalTarget(NamedTuple):
    """A target as the op takes it on a shard.

    For class indices, rows whose class lies elsewhere are given a class of the shard's, and with label
    smoothing the op is asked for the uniform part alone: either is put right in the planes. For
    probabilities it is the op's smoothing that differs, which spreads what the shard's classes are due.
    """

    target: Tensor
    ignore_index: int
    label_smoothing: float
    owned: Tensor | None = None
    """Rows whose class is one of the shard's; None for probabilities."""
    counted: Tensor | None = None
    """Rows that are not ignored."""
    scale: float = 1.0
    """Of TARGET_SUM and DOT, for probabilities."""


def local_target(shard: Shard, target: Tensor, ignore_index: int, label_smoothing: float) -> LocalTarget:
    spread = label_smoothing * shard.classes / max(shard.total, 1)
    if target.is_floating_point():
        scale = (1 - label_smoothing) + spread or 1.0
        return LocalTarget(target, ignore_index, spread / scale, scale=scale)
    counted = target != ignore_index
    index = target - shard.start
    owned = (index >= 0) & (index < shard.classes) & counted
    elsewhere = 0 if shard.classes else _IGNORED
    # What is out of range here and everywhere stays so, for the op to find.
    known = (target >= 0) & (target < shard.total)
    index = index.where(owned, target.clamp(min=-1).masked_fill(known, elsewhere))
    index = index.masked_fill(~counted, _IGNORED)
    return LocalTarget(index, _IGNORED, 1.0 if label_smoothing else 0.0, owned, counted)


def planes_to_send(local: LocalTarget, label_smoothing: float, weighted: bool, metrics: bool) -> list[int]:
    """The planes that the loss is made of, or all that the metrics are."""
    index_target = local.owned is not None
    soft = label_smoothing != 0 or not index_target
    sent = [MAX, LOG_SUM]
    if soft:
        sent += [TARGET_SUM, DOT]
    if index_target and (metrics or not soft):
        sent.append(PICKED)  # of which, where the target is hard, the two above are made
    if index_target and weighted:
        sent.append(TARGET_WEIGHT)
    return [*sent, ENTROPY] if metrics else sent


def local_planes(shard: Shard, rows: Tensor, local: LocalTarget, label_smoothing: float) -> list[Tensor]:
    """The op's planes with the meaning that `combine` gives them."""
    largest, log_sum, target_sum, dot, picked, target_weight, *entropy = rows.unbind(0)
    if shard.classes < min(shard.total, 1):  # none here, of some
        largest = log_sum = torch.full_like(largest, -torch.inf)
    if local.owned is None:
        target_sum, dot = target_sum * local.scale, dot * local.scale
    else:
        # Detached, as all planes share a gradient: that to a weight of 1 at a logit of -inf is infinite.
        target_weight = target_weight.detach().masked_fill(~local.owned, 0)
        if label_smoothing:
            hard = (1 - label_smoothing) * target_weight
            spread = label_smoothing * shard.classes / max(shard.total, 1)
            target_sum = spread * target_sum + hard
            dot = spread * dot + (hard * picked).masked_fill(hard == 0, 0)
        picked = picked.masked_fill(~local.owned, -torch.inf)
    return [largest, log_sum, target_sum, dot, picked, target_weight, *entropy]


def global_planes(
    shard: Shard,
    rows: Tensor,
    local: LocalTarget,
    label_smoothing: float,
    numbers: tuple[float, ...],
    weighted: bool = False,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(planes, best classes) of all classes, from this rank's planes as the op gives them.

    `numbers` are the caller's, for `_NUMBERS` after the rows. With label smoothing PICKED needs the entropy's
    plane; it is 0 without.
    """
    sent = tuple(planes_to_send(local, label_smoothing, weighted, rows.shape[0] > ENTROPY))
    mine = local_planes(shard, rows, local, label_smoothing)
    if candidates is None:
        candidates = rows.new_empty((0, 3, *rows.shape[1:]))
    numbers = rows[0].numel(), *numbers
    stacked = torch.stack([mine[k] for k in sent])
    planes, best = exchange(stacked, candidates.detach(), shard, sent, numbers)
    whole = dict(zip(sent, planes.unbind(0), strict=True))
    zeros = torch.zeros_like(whole[MAX])
    ones = zeros + (shard.total > 0)
    target_weight, picked = whole.get(TARGET_WEIGHT, ones).detach(), whole.get(PICKED, zeros)
    if DOT not in whole:
        whole[TARGET_SUM] = target_weight
        whole[DOT] = (target_weight * picked).masked_fill(target_weight == 0, 0) if weighted else picked
    first = [whole[MAX], whole[LOG_SUM], whole[TARGET_SUM], whole[DOT], picked, target_weight]
    planes = torch.stack([*first, whole[ENTROPY]] if ENTROPY in whole else first)
    return planes if local.counted is None else planes.masked_fill(~local.counted, 0), best


def own_gradients(
    shard: Shard,
    own: Tensor,
    planes: Tensor,
    local: LocalTarget,
    label_smoothing: float,
    weighted: bool,
    grad: Tensor,
) -> Tensor:
    """The gradients of this rank's planes as the op gives them, from those of `global_planes`' result.

    What autograd makes of that function, written out for where autograd does not come: inside of an op.
    """
    sent = planes_to_send(local, label_smoothing, weighted, own.shape[0] > ENTROPY)
    mine = local_planes(shard, own, local, label_smoothing)
    grads = list(grad.unbind(0))
    if DOT not in sent:  # made of PICKED
        grads[PICKED] = grads[PICKED] + grads[DOT] * planes[TARGET_WEIGHT]
    parts = [torch.stack([x[k] for k in sent]) for x in (grads, planes.unbind(0), mine)]
    given = dict(zip(sent, local_gradients(parts[0], parts[1], parts[2], sent).unbind(0), strict=True))
    zeros = torch.zeros_like(own[MAX])
    result = [zeros] * own.shape[0]
    result[LOG_SUM] = given[LOG_SUM]
    if ENTROPY in given:
        result[ENTROPY] = given[ENTROPY]
    dot = given.get(DOT, zeros)
    if local.owned is None:
        result[TARGET_SUM], result[DOT] = given[TARGET_SUM] * local.scale, dot * local.scale
    else:
        hard = (1 - label_smoothing) * own[TARGET_WEIGHT]
        picked = given.get(PICKED, zeros) + (hard * dot).masked_fill(hard == 0, 0)
        result[DOT] = label_smoothing * shard.classes / max(shard.total, 1) * dot
        result[PICKED] = picked.masked_fill(~local.owned, 0)
    stacked = torch.stack(result)
    return stacked if local.counted is None else stacked.masked_fill(~local.counted, 0)


def sharded_rows(
    shard: Shard,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale_tensor: Tensor | None,
    options: tuple[float, float, int, float],
    z_loss: float,
    metrics: bool = False,
    probabilities: Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`lossops._rows.row_functions`, of the classes of all ranks; one collective.

    With `metrics` the second result holds the classes of the largest logits, and those of the largest
    `probabilities` where they are given.
    """
    scale, softcap, ignore_index, label_smoothing = options
    local = local_target(shard, target, ignore_index, label_smoothing)
    rows, predicted = _rows.row_functions(
        logits,
        local.target,
        weight,
        scale_tensor,
        (scale, softcap, local.ignore_index, local.label_smoothing),
        entropy=metrics,
        predicted=metrics,
        inplace_backward=inplace_backward,
        part=True,
    )
    candidates = None
    if metrics:
        found = [candidate(shard, rows[MAX], predicted)]
        if probabilities is not None:
            found.append(most_probable(shard, probabilities, rows[MAX]))
        candidates = torch.stack(found)
    numbers = ignore_index, label_smoothing, scale, softcap, z_loss
    return global_planes(shard, rows, local, label_smoothing, numbers, weight is not None, candidates)


def weight_of(shard: Shard, weight: Tensor) -> Tensor:
    """The class weights of this rank's classes, of theirs or of all."""
    if not shard.whole_weight:
        return weight
    whole = replicated(weight, shard.group) if may_be_differentiated(weight) else weight
    return whole[shard.start : shard.start + shard.classes]


def most_probable(shard: Shard, probabilities: Tensor, like: Tensor) -> Tensor:
    """The candidates that are each row's most probable class here."""
    if not shard.classes:
        return candidate(shard, like, like)
    value, index = probabilities.detach().max(class_dim(probabilities))
    return candidate(shard, value.to(like.dtype), index)


# --------------------------------------------------------------------------------------------------
# Functions


class Arguments(NamedTuple):
    """Those of a loss but for logits and target."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    out_dtype: torch.dtype | None
    inplace_backward: bool
    family: Family


Description = tuple[tuple[str, str], ...]


def _described(op: str, logits: Tensor, target: Tensor, given: Arguments, metrics: bool) -> Description:
    """What all ranks must have alike; raises what is wrong with this one's arguments."""
    rows, index_target = _rows.row_shape(op, logits, target, None)
    if logits.dtype not in KERNEL_DTYPES:
        raise unsupported_dtype(op, "input", logits)
    if index_target and target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(
            f"{op}: expected target dtype to be Long, Int or Byte for class indices, got {target.dtype}"
        )
    weight, family = given.weight, given.family
    family.check(op, logits, rows)
    reduction_code(given.reduction, None, None)
    if weight is not None:
        check_devices(op, logits, weight=weight)
        if weight.dim() != 1 or not weight.is_floating_point():
            raise RuntimeError(
                f"{op}: expected weight of one dimension and a floating dtype, got shape "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        if index_target and weight.requires_grad:
            raise RuntimeError(_rows.NO_WEIGHT_DERIVATIVE)
    _rows.check_smoothing(op, given.label_smoothing)
    optional = {
        "weight": weight,
        "softcap": family.softcap,
        "row_weight": family.row_weight,
        "normalizer": family.normalizer,
    }
    description = {
        # Traced sizes may be symbols; the number of rows is in each message beside.
        "rows": "traced" if torch.compiler.is_compiling() else str(tuple(rows)),
        "target": "of class indices" if index_target else "of probabilities",
        "accumulation": str(accumulation(logits, target, weight)),
        "loss": str(loss_dtype(logits, target, weight, given.out_dtype)),
        "reduction": given.reduction,
        "label_smoothing": "given" if given.label_smoothing else "absent",  # other planes are sent
        "empty": family.empty,
        "logit_scale": "a tensor" if isinstance(family.logit_scale, Tensor) else "a number",
        "metrics": str(metrics),
        **{name: "absent" if option is None else "given" for name, option in optional.items()},
    }
    return tuple(description.items())


def _checked(
    op: str, logits: Tensor, target: Tensor, given: Arguments, metrics: bool
) -> tuple[Tensor, Arguments, Description]:
    """Target and arguments as they are used, and their description."""
    try:
        if logits.dim() == target.dim() == 1 and not target.is_floating_point():
            target = target.reshape(())  # where one class is here it has the shape of probabilities
        out_dtype = checked_dtype(op, given.out_dtype) or autocast_dtype(logits, target)
        given = given._replace(out_dtype=out_dtype)
        return target, given, _described(op, logits, target, given, metrics)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        explain_bad_option(op, given.ignore_index, given.label_smoothing)
        explain_bad_input(op, input=logits, target=target, weight=given.weight)
        raise


def sharded_loss(
    op: str,
    logits: Tensor,
    target: Tensor,
    given: Arguments,
    group: ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
    metrics: bool = False,
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    """The loss of all classes, once the ranks have agreed on what they are about to do."""
    name = group_name(op, group)
    try:
        target, given, description = _checked(op, logits, target, given, metrics)
    except Exception as error:
        if not torch.compiler.is_compiling():
            announce_failure(name, error)
        raise
    # Numbers, where Dynamo may have symbols: of one it makes no range.
    classes = len(range(logits.shape[class_dim(logits)]))
    weights = None if given.weight is None else len(range(given.weight.shape[0]))
    description = *description, ("vocab_size", str(vocab_size))
    shard = agree(op, name, description, classes, vocab_start, weights)
    if not target.is_floating_point():
        target = class_indices(target, op, given.ignore_index, shard.total)
    return _loss_of_shard(shard, logits, target, given, metrics)


def _loss_of_shard(
    shard: Shard, logits: Tensor, target: Tensor, given: Arguments, metrics: bool
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    weight, ignore_index, reduction, label_smoothing, out_dtype, inplace_backward, family = given
    index_target = not target.is_floating_point()
    in_place = inplace_backward and _may_write_over(logits, target, weight, family.logit_scale)
    dtype = loss_dtype(logits, target, weight, out_dtype)
    plain_target = index_target or (weight is None and label_smoothing == 0)
    probabilities = None if index_target else target
    if weight is not None:
        differentiated = may_be_differentiated(weight)
        weight = weight_of(shard, weight)
        if differentiated and not index_target:
            target = weighted_probabilities(target, weight, label_smoothing, shard.total)
            weight, label_smoothing = None, 0.0
    scale_tensor, scale = family.scale(accumulation(logits, target, weight), logits.device)
    if scale_tensor is not None:
        scale_tensor = replicated(scale_tensor, shard.group)
    options = scale, float(family.softcap or 0.0), ignore_index, label_smoothing
    planes, best = sharded_rows(
        shard,
        logits,
        target,
        weight,
        scale_tensor,
        options,
        family.z_loss,
        metrics,
        probabilities,
        in_place,
    )
    loss = reduced(planes, reduction_code(reduction, None, None), dtype, family)
    if not metrics:
        return loss, None
    logprob = logprobs(planes, index_target)
    if probabilities is not None and not plain_target:
        note("logprob of probabilities with class weight or smoothing takes a second pass and collective")
        plain = *options[:3], 0.0
        args = shard, logits, probabilities, None, scale_tensor, plain, family.z_loss
        logprob = logprobs(sharded_rows(*args)[0], False)
    predicted = best[0] if shard.total else torch.full_like(best[0], -1)
    if probabilities is not None:
        return loss, metrics_of(planes, logprob, family.z_loss, predicted, best[1])
    ignored = target == ignore_index
    return loss, metrics_of(planes, logprob, family.z_loss, predicted.masked_fill(ignored, -1), target)


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """:func:`lossops.cross_entropy` of logits whose classes are spread over the ranks of a group.

    Each rank holds the logits of some classes that follow each other, for the same rows. All ranks get the
    loss of all classes, and each the gradient of its own logits. One all-gather forward and no communication
    backward; every rank has to call backward, with the same upstream gradient. For the second derivative
    too, each rank differentiates its own gradients: one all-reduce. Under torch.func and in forward mode all
    ranks apply the same transforms, and a rank's tangent is its part of one tangent. The numbers and methods
    are those of ``cross_entropy``; the convention is that of `Megatron-LM
    <https://arxiv.org/abs/1909.08053>`_.

    Do not take ``jacfwd`` or ``hessian`` with respect to what is sharded (logits, probabilities): each rank
    would take directions of its own for one of all classes, and nothing can tell, so that the numbers are
    wrong without an error. With respect to what all ranks hold alike they are right; so are ``jacrev`` of the
    loss, and products with vectors (``jvp`` of ``grad``).

    >>> logits = hidden @ my_rows_of_the_head.T  # (N, C / ranks)
    >>> lossops.vocab_parallel_cross_entropy(logits, target, group=tensor_parallel).backward()

    Args:
        local_logits: this rank's classes, ``(C_r)``, ``(N, C_r)`` or ``(N, C_r, d1, ..., dk)``. Ranks may
            have different numbers of classes, some of them none.
        target: class indices among the classes of all ranks, the same on every rank; or this rank's part of
            class probabilities, of the shape of ``local_logits``.
        group: the ranks that hold the classes; by default all.
        vocab_start: the index of this rank's first class. By default the ranks follow each other in the
            group's order.
        vocab_size: the number of classes of all ranks. To be given, on every rank, where losses of several
            vocabularies go over one group and a rank has as many classes of one as of another: it could not
            tell that the other ranks have to talk about the second.
        weight: class weights of this rank's classes, or of all classes on every rank. Where the latter need
            a gradient (with probabilities), it is summed over the ranks: an all-reduce in the backward pass.
        logit_scale: as in ``cross_entropy``; of a tensor, the same on every rank, the gradient is summed over
            the ranks: an all-reduce of one number in the backward pass.
        ignore_index, reduction, label_smoothing, softcap, z_loss, row_weight, normalizer, empty, out_dtype,
            inplace_backward: as in ``cross_entropy``, the same on every rank. Smoothing is over all classes.

    Returns:
        The loss of all classes, the same on every rank, as ``cross_entropy`` returns it.

    Raises:
        IndexError: a class index outside [0, C) for the classes of all ranks; on every rank. On a GPU, as of
            ``cross_entropy``, by ``check_async_errors``.
        RuntimeError, ValueError: ranks that call this with other shapes, dtypes or options, or whose shards
            do not follow each other, on all of them; torch.distributed that is not initialized. The first
            call of each configuration compares them through the process group's store, every call by a few
            numbers in its message: where those differ on a GPU or under ``torch.compile``, which cannot
            raise, the loss is NaN.
        Others: as ``cross_entropy``, on the rank that is concerned, and a RuntimeError on those that ask.
    """
    family = Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty)
    given = Arguments(weight, ignore_index, reduction, label_smoothing, out_dtype, inplace_backward, family)
    op = "vocab_parallel_cross_entropy"
    return sharded_loss(op, local_logits, target, given, group, vocab_start, vocab_size)[0]


def vocab_parallel_cross_entropy_with_metrics(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, CrossEntropyMetrics]:
    """The loss of :func:`vocab_parallel_cross_entropy`, and what the same pass says of every row.

    Arguments and errors are those of that function; :class:`CrossEntropyMetrics` names the results, of the
    classes of all ranks and the same on each. With probabilities *and* a class weight or smoothing,
    ``logprob`` costs a second pass and a second collective.
    """
    family = Family(logit_scale, softcap, z_loss, row_weight, normalizer, empty)
    given = Arguments(weight, ignore_index, reduction, label_smoothing, out_dtype, inplace_backward, family)
    op = "vocab_parallel_cross_entropy"
    loss, metrics = sharded_loss(op, local_logits, target, given, group, vocab_start, vocab_size, True)
    assert metrics is not None
    return loss, metrics
