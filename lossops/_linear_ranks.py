"""A linear head whose classes are spread over ranks: what they exchange of a chunk.

Each rank has the logits of its own classes for the chunk, and the planes of those; one all-gather makes the
planes of all classes of them (``vocab_parallel.py``), and their gradients give each rank those of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from . import _rows
from ._distributed import Shard, all_gather, all_reduce
from .vocab_parallel import (
    LocalTarget,
    best_classes,
    candidate,
    global_planes,
    local_target,
    most_probable,
    own_gradients,
    sharded_rows,
)

if TYPE_CHECKING:
    from ._linear_rows import Head


def shard_of(head: Head) -> Shard:
    size, start, total, digest = head.shard
    return Shard(head.group, size, start, head.classes, total, False, digest)


class Ranks:
    """This rank's part of a head, and how its planes are made into everyone's."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.shard = shard_of(head)
        self.local = local_target(self.shard, head.target, head.ignore_index, head.label_smoothing)

    def own(self) -> Head:
        """The head of this rank's classes alone, as the ops take it."""
        local = self.local
        return self.head._replace(
            target=local.target, ignore_index=local.ignore_index, label_smoothing=local.label_smoothing
        )

    def _rows_of(self, rows: slice | Tensor) -> LocalTarget:
        local = self.local
        if local.owned is None or local.counted is None:
            return local._replace(target=local.target[rows])
        return local._replace(target=local.target[rows], owned=local.owned[rows], counted=local.counted[rows])

    def combine(
        self, rows: slice | Tensor, own: Tensor, predicted: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The planes of all classes of these rows, their best classes, and what turns the planes' gradients
        into those of this rank's own."""
        head = self.head
        local = self._rows_of(rows)
        candidates = candidate(self.shard, own[_rows.MAX], predicted).unsqueeze(0) if head.predicted else None
        numbers = head.ignore_index, head.label_smoothing, head.scale, head.softcap, 0.0
        weighted = head.class_weight is not None
        planes, best = global_planes(
            self.shard, own, local, head.label_smoothing, numbers, weighted, candidates
        )

        def pull(g: Tensor) -> Tensor:
            return own_gradients(self.shard, own, planes, local, head.label_smoothing, weighted, g)

        if head.predicted:
            predicted = best[0] if local.counted is None else best[0].masked_fill(~local.counted, -1)
        return planes, predicted, pull

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the ranks' parts of what all of them hold alike."""
        return all_reduce(x, self.shard.group)


def chunk_of_all(head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """(planes, best classes) of all classes from this rank's logits, differentiable to every order."""
    shard = shard_of(head)
    args = shard, z, head.target, head.class_weight, head.scale_tensor, head.options, 0.0
    planes, best = sharded_rows(*args, metrics=head.entropy)
    return planes, best[0].masked_fill(~head.counted, -1) if head.predicted else best


def most_probable_of_all(shard: Shard, probabilities: Tensor, like: Tensor) -> Tensor:
    """Each row's most probable class of all ranks; `like` has the rows' shape and the planes' dtype."""
    mine = most_probable(shard, probabilities, like).unsqueeze(0)
    return best_classes(all_gather(mine, shard.group, shard.size))[0]
