"""What the losses ask of torch.distributed: agreement among ranks, collectives that autograd knows, counts.

Everything goes through the functional collectives, which torch.compile traces. A number that every rank holds
alike ("replicated") counts once in what is differentiated, whatever holds it; of a tensor that each rank has
a part of, each part counts as that rank's own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ._autograd import is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store


# --------------------------------------------------------------------------------------------------
# Collectives


def all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """The tensors of all ranks, in a new first dimension."""
    ops = torch.ops._c10d_functional
    gathered = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), size, group))
    return gathered.view(size, *x.shape)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))


# torch.compile traces no Function with a jvp: forward mode has Functions of its own.


def replicated(x: Tensor, group: str) -> Tensor:
    """A replicated tensor on its way into what each rank computes of its own part: the gradient is summed."""
    return (ReplicatedForward if is_transformed() else Replicated).apply(x, group)


def summed(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks' parts, a replicated tensor: each part's gradient is the sum's."""
    return (SummedForward if is_transformed() else Summed).apply(x, group)


class Replicated(Function):
    @staticmethod
    def forward(x, group):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return summed(grad, ctx.group), None

    @staticmethod
    def vmap(info, in_dims, x, group):
        return replicated(x, group), in_dims[0]


class ReplicatedForward(Replicated):
    @staticmethod
    def jvp(ctx, tangent, _):
        return replicated(tangent, ctx.group)


class Summed(Function):
    @staticmethod
    def forward(x, group):
        return all_reduce(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return replicated(grad, ctx.group), None

    @staticmethod
    def vmap(info, in_dims, x, group):
        return summed(x, group), in_dims[0]


class SummedForward(Summed):
    @staticmethod
    def jvp(ctx, tangent, _):
        return summed(tangent, ctx.group)


def group_name(op: str, group: ProcessGroup | None) -> str:
    """The name by which the collectives know a group, by default that of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{op}: expected torch.distributed.init_process_group to have been called")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: expected group to be one that this process belongs to")
    return (dist.group.WORLD if group is None else group).group_name  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------
# Agreement. It goes through the store in which the processes met, not through a collective: a rank that has
# no need to ask, because it knows the call, would answer a collective with another one. The store waits with
# a time limit, and whoever gets past it knows that every rank has once meant the same call.


class Shard(NamedTuple):
    """Which of a group's classes this rank holds: `classes` from `start` on, of `total`."""

    group: str
    size: int
    start: int
    classes: int
    total: int
    whole_weight: bool
    """Whether every rank gives the class weights of all ranks."""
    digest: int
    """Of what the ranks have agreed on; small enough for every dtype that a collective sends it in."""


@dataclass
class _Talks:
    """What the ranks of one group have told each other."""

    store: Store
    rank: int
    size: int
    agreed: dict[Any, Shard] = field(default_factory=dict)
    rounds: int = 0

    def _key(self, turn: int, rank: int) -> str:
        return f"lossops/{turn}/{rank}"

    def say(self, value: Any) -> None:
        self.rounds += 1
        self.store.set(self._key(self.rounds, self.rank), json.dumps(value))

    def hear(self, op: str) -> list[Any]:
        """What every rank says in this round."""
        keys = [self._key(self.rounds, rank) for rank in range(self.size)]
        try:
            values = self.store.multi_get(keys)
        except RuntimeError as error:
            absent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise RuntimeError(
                f"{op}: rank {self.rank} has waited in vain for ranks {absent} of the group to begin the "
                "same call; they have died, or are in another one (other shapes, dtypes or options, or a "
                "vocabulary that only vocab_size tells from this one)"
            ) from error
        # Whoever has spoken in this round has read the last one.
        self.store.delete_key(self._key(self.rounds - 1, self.rank))
        return [json.loads(value) for value in values]


_talks: WeakKeyDictionary[ProcessGroup, _Talks] = WeakKeyDictionary()
_LONGEST = 1024  # agreements that are remembered: every rank makes the same ones, and forgets them together


def _talks_of(group: str) -> _Talks:
    from torch.distributed.distributed_c10d import _get_process_group_store, _resolve_process_group

    process_group = _resolve_process_group(group)  # type: ignore[arg-type]
    if process_group not in _talks:
        store = _get_process_group_store(process_group)
        _talks[process_group] = _Talks(store, process_group.rank(), process_group.size())
    return _talks[process_group]


def announce_failure(group: str, error: Exception) -> None:
    """Tells ranks that are going to ask what has become of this one."""
    _talks_of(group).say({"failure": f"{type(error).__name__}: {error}"})


def agree(
    op: str,
    group: str,
    call: tuple[tuple[str, str], ...],
    classes: int,
    start: int | None,
    weights: int | None,
) -> Shard:
    """This rank's shard, when all ranks mean the same `call` and their classes make up one vocabulary.

    `weights`: the number of class weights that this rank is given.

    The ranks talk once for each configuration; a disagreement is the same error on all of them. A rank cannot
    know that another's classes have changed: `call` has to name what tells one vocabulary from another.
    """
    talks = _talks_of(group)
    mine = classes, start, weights
    key = op, call, mine
    if key not in talks.agreed:
        talks.say({"call": [["function", op], *map(list, call)], "mine": mine})
        said = talks.hear(op)
        for rank, other in enumerate(said):
            if "failure" in other:
                raise RuntimeError(f"{op}: rank {rank} of the group has failed with {other['failure']}")
        _compare(op, [dict(map(tuple, other["call"])) for other in said])
        shard = _shard(op, group, talks.rank, call, [other["mine"] for other in said])
        if len(talks.agreed) >= _LONGEST:
            talks.agreed.clear()
        talks.agreed[key] = shard
    return talks.agreed[key]


# torch.compile runs it while it traces. (The decorator torch.compiler.assume_constant_result sets the same
# attribute, and imports the compiler for it.)
agree._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compare(op: str, calls: list[dict[str, str]]) -> None:
    for rank, call in enumerate(calls):
        names = [name for name in {**calls[0], **call} if calls[0].get(name) != call.get(name)]
        if names:
            first, other = (", ".join(f"{n} {c.get(n)}" for n in names) for c in (calls[0], call))
            raise RuntimeError(
                f"{op}: expected the same call on every rank of the group, got {first} on rank 0 and {other} "
                f"on rank {rank}"
            )


def _shard(op: str, group: str, mine: int, call: tuple[tuple[str, str], ...], ranks: list[Any]) -> Shard:
    classes, starts, weights = map(list, zip(*ranks, strict=True))
    total = sum(classes)
    if dict(call)["vocab_size"] not in ("None", str(total)):
        raise ValueError(f"{op}: expected shards of {dict(call)['vocab_size']} classes in all, got {classes}")
    if all(start is None for start in starts):
        starts = [sum(classes[:rank]) for rank in range(len(ranks))]
    reach = 0
    for start, size in sorted((-1 if s is None else s, c) for s, c in zip(starts, classes, strict=True) if c):
        if start != reach:
            raise ValueError(
                f"{op}: expected the ranks' shards to follow each other from class 0 on, got vocab_start "
                f"{starts} for {classes} classes"
            )
        reach += size
    whole = weights == [total] * len(ranks)
    if weights != [None] * len(ranks) and weights != classes and not whole:
        raise RuntimeError(
            f"{op}: expected weight tensors for each rank's classes, {classes}, or for all {total} on every "
            f"rank, got {weights}"
        )
    digest = zlib.crc32(repr((op, call, ranks)).encode()) % 2**24
    return Shard(group, len(ranks), starts[mine] or 0, classes[mine], total, whole, digest)


# --------------------------------------------------------------------------------------------------
# Counting the targets of a whole batch


def global_normalizer(
    target: Tensor | Sequence[Tensor],
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
) -> Tensor:
    """The ``normalizer`` that makes losses on several ranks and micro-batches one mean over the whole batch.

    Data parallelism (DDP, FSDP) *averages* the ranks' gradients, and a mean of means is not the mean where
    the ranks count different numbers of targets; nor is it over the micro-batches of gradient accumulation.
    Divide every micro-batch's sum by this number instead, and call backward on each without a factor of your
    own:

    >>> targets = [batch.target for batch in micro_batches]  # all of this rank's until the optimizer's step
    >>> normalizer = lossops.global_normalizer(targets)
    >>> for batch in micro_batches:
    ...     loss = lossops.cross_entropy(model(batch.input), batch.target, normalizer=normalizer)
    ...     loss.backward()

    Of two ranks with 30 and 10 counted targets it is 20: rank 0 has loss ``total_0 / 20``, rank 1
    ``total_1 / 20``, and their average is ``(total_0 + total_1) / 40``. Ranks may differ in their number of
    targets and (under DDP) of micro-batches; a rank with none still takes part, with an empty tensor.

    Args:
        target: class indices of any shape, or class probabilities ``(N, C, ...)`` (every row counts one):
            this rank's, or a sequence of its micro-batches'.
        group: the ranks over which gradients are averaged; by default all, or this process alone where
            torch.distributed is not initialized.
        ignore_index, weight: as given to the loss.

    Returns:
        A 0-d float64 tensor on the target's device, the same on every rank: the sum of the targets' weights,
        over the number of ranks. One all-reduce of one number; no wait for a GPU. 0 where nothing counts:
        there ``empty="zero"`` helps.
    """
    op = "global_normalizer"
    targets = list(target) if isinstance(target, Sequence) else [target]
    if not targets or not all(isinstance(t, Tensor) for t in targets):
        raise TypeError(f"{op}: expected target to be a Tensor or a sequence of at least one, got {target!r}")
    total = torch.stack([target_weight_sum(t, ignore_index, weight) for t in targets]).sum()
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return total
    return all_reduce(total, group_name(op, group)) / dist.get_world_size(group)


def target_weight_sum(target: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """What the mean over these targets alone divides by, in float64."""
    if target.is_floating_point():
        classes = target.shape[0 if target.dim() == 1 else 1]
        rows = target.numel() // classes if classes else 0
        return torch.full((), rows, dtype=torch.float64, device=target.device)
    target = target.long()  # or a narrow target would meet ignore_index modulo its own range
    counted = target != ignore_index
    if weight is None:
        return counted.sum(dtype=torch.float64)
    return (weight.detach().double()[target.where(counted, 0)] * counted).sum()
