"""Cross-entropy of DTensors: which dimensions of the mesh hold classes, which rows, and what they sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ._autograd import MEAN, NONE, autocast_dtype, is_transformed, reduction_code, transformed_dtensor
from ._distributed import all_reduce, replicated, summed, target_weight_sum
from ._explain import note
from ._family import CrossEntropyMetrics, checked_dtype, loss_dtype
from ._rows import class_dim
from .vocab_parallel import Arguments, sharded_loss


def _local(op: str, mesh: DeviceMesh, x: Any, placements: Sequence[Placement]) -> Any:
    """This rank's part of a tensor, of which one that is no DTensor is replicated; numbers and None as they
    are."""
    if not isinstance(x, Tensor):
        return x
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif x.device_mesh != mesh:
        raise ValueError(f"{op}: expected DTensors of one mesh, got {mesh} and {x.device_mesh}")
    return x.redistribute(placements=placements).to_local()


class _Layout:
    """How the mesh holds the logits, and with it everything else.

    A Tensor among the DTensors is taken as replicated. What has another placement is moved.
    """

    def __init__(self, op: str, input: DTensor) -> None:
        self.op, self.input, self.mesh = op, input, input.device_mesh
        self.class_dim = class_dim(input)
        self.over_classes: list[int] = []
        self.over_rows: list[int] = []
        self.replicated: list[Placement] = [Replicate()] * self.mesh.ndim
        self.rows = list(self.replicated)
        """The placements of a tensor of the rows' shape."""
        for k, placement in enumerate(input.placements):
            if placement.is_replicate():
                continue
            if type(placement) is not Shard:
                raise NotImplementedError(
                    f"{op}: expected a DTensor whose placements are Shard or Replicate, got "
                    f"{input.placements}; redistribute it first"
                )
            if placement.dim == self.class_dim:
                self.over_classes.append(k)
            else:
                self.over_rows.append(k)
                self.rows[k] = Shard(placement.dim - (placement.dim > self.class_dim))
        if len(self.over_classes) > 1:
            raise NotImplementedError(
                f"{op}: expected a DTensor whose classes (dimension {self.class_dim}) are sharded over one "
                f"dimension of the mesh, got {input.placements}; redistribute it first"
            )
        self.row_groups = [self.mesh.get_group(k).group_name for k in self.over_rows]

    def local(self, x: Any, placements: Sequence[Placement]) -> Any:
        return _local(self.op, self.mesh, x, placements)

    def shared(self, x: Any) -> Any:
        """The whole of a tensor, whose gradient is summed over the rows of all ranks."""
        x = self.local(x, self.replicated)
        for group in self.row_groups if isinstance(x, Tensor) else ():
            x = replicated(x, group)
        return x

    def divisor(self, target: Tensor, ignore_index: int, weight: Tensor | None) -> float | Tensor:
        """Of the mean over the rows of all ranks; `target` is this rank's."""
        if target.is_floating_point():
            return math.prod(size for k, size in enumerate(self.input.shape) if k != self.class_dim)
        total = target_weight_sum(target, ignore_index, weight)
        for group in self.row_groups:
            total = all_reduce(total, group)
        return total

    def of_rows(self, x: Tensor) -> DTensor:
        """The values of all rows, from this rank's."""
        shape = [size for k, size in enumerate(self.input.shape) if k != self.class_dim]
        stride = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        args = x.contiguous(), self.mesh, self.rows
        # Its shape is not that of every rank's part times their number.
        return DTensor.from_local(*args, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def loss_of_dtensor(
    op: str, input: DTensor, target: Tensor, given: Arguments, metrics: bool = False
) -> tuple[DTensor, CrossEntropyMetrics | None]:
    """The loss of the whole tensors, replicated; unreduced, as the metrics, it lies as the rows do."""
    if is_transformed():
        raise transformed_dtensor(op)
    layout = _Layout(op, input)
    code = reduction_code(given.reduction, None, None)
    weight = layout.shared(given.weight)
    out_dtype = checked_dtype(op, given.out_dtype) or autocast_dtype(input, target)
    dtype = loss_dtype(input, target, weight, out_dtype)
    target = layout.local(target, input.placements if target.is_floating_point() else layout.rows)
    family = given.family._replace(
        logit_scale=layout.shared(given.family.logit_scale),
        row_weight=layout.local(given.family.row_weight, layout.rows),
        normalizer=layout.local(given.family.normalizer, layout.replicated),
    )
    parts = layout.row_groups if code != NONE else []
    if parts and code == MEAN and family.normalizer is None:
        family = family._replace(normalizer=layout.divisor(target, given.ignore_index, weight))
    if given.inplace_backward:
        note("inplace_backward: the gradient of a DTensor has memory of its own")
    given = given._replace(
        weight=weight,
        inplace_backward=False,
        out_dtype=torch.float64 if parts else dtype,  # a sum of parts is rounded once
        family=family,
    )
    loss, of_rows = _local_loss(layout, input.to_local(), target, given, metrics)
    for group in parts:
        loss = summed(loss, group)
    if of_rows is not None:
        of_rows = CrossEntropyMetrics(*map(layout.of_rows, of_rows))
    if code == NONE:
        return layout.of_rows(loss), of_rows
    return DTensor.from_local(loss.to(dtype), layout.mesh, layout.replicated, run_check=False), of_rows


def _local_loss(
    layout: _Layout, logits: Tensor, target: Tensor, given: Arguments, metrics: bool
) -> tuple[Tensor, CrossEntropyMetrics | None]:
    """Of this rank's rows, and of all their classes."""
    from .cross_entropy import cross_entropy, cross_entropy_with_metrics

    if layout.over_classes:
        group = layout.mesh.get_group(layout.over_classes[0])
        classes = len(range(layout.input.shape[layout.class_dim]))
        return sharded_loss(layout.op, logits, target, given, group, None, classes, metrics)
    options = {**given._asdict(), **given.family._asdict()}
    del options["family"]
    if metrics:
        return cross_entropy_with_metrics(logits, target, **options)
    return cross_entropy(logits, target, **options), None


def linear_loss_of_dtensor(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: dict[str, Any], metrics: bool = False
) -> tuple[DTensor, Any]:
    """The linear head whose weight is sharded over its classes (dimension 0) or replicated; the results are
    replicated, and so are input and target. What has another placement is moved."""
    from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_metrics

    op = "linear_cross_entropy"
    if is_transformed():
        raise transformed_dtensor(op)
    if not isinstance(linear_weight, DTensor):
        raise NotImplementedError(f"{op}: expected linear_weight to be a DTensor where input is one")
    mesh = linear_weight.device_mesh
    over = [k for k, placement in enumerate(linear_weight.placements) if not placement.is_replicate()]
    if len(over) > 1 or any(linear_weight.placements[k] != Shard(0) for k in over):
        raise NotImplementedError(
            f"{op}: expected a DTensor linear_weight whose classes (dimension 0) are sharded over one "
            f"dimension of the mesh, or that is replicated, got {linear_weight.placements}; redistribute it "
            "first"
        )
    replicated: list[Placement] = [Replicate()] * mesh.ndim

    def local(x: Any, placements: Sequence[Placement]) -> Any:
        return _local(op, mesh, x, placements)

    def of_classes(x: Any, dim: int = 0) -> Any:
        return local(x, [Shard(dim) if k in over else Replicate() for k in range(mesh.ndim)])

    lora = options["lora"]
    if isinstance(lora, (tuple, list)) and len(lora) == 3:
        lora = local(lora[0], replicated), of_classes(lora[1]), lora[2]
    names = "weight", "logit_scale", "row_weight", "normalizer"
    given = {**options, **{name: local(options[name], replicated) for name in names}}
    given |= {"lora": lora, "linear_bias": of_classes(options["linear_bias"])}
    if over:
        given |= {"group": mesh.get_group(over[0]), "vocab_size": len(range(linear_weight.shape[0]))}
    probabilities = target.is_floating_point()
    target = of_classes(target, input.dim() - 1) if probabilities else local(target, replicated)
    args = local(input, replicated), of_classes(linear_weight), target
    if metrics:
        loss, rows = linear_cross_entropy_with_metrics(*args, **given)
        rows = type(rows)(*(DTensor.from_local(x, mesh, replicated, run_check=False) for x in rows))
    else:
        loss, rows = linear_cross_entropy(*args, **given), None
    return DTensor.from_local(loss, mesh, replicated, run_check=False), rows
