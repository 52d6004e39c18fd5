"""Cross-entropy over several processes: every rank against the unsharded float64 reference.

Four processes serve all tests; those of two and three ranks are some of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from devices import BACKENDS, CPU, EMULATED, on, using
from ranks import Collectives, Ranks, assert_none_wrong, forget_agreements, member, run_examples
from tolerances import assert_near
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils._pytree import tree_map

import lossops
from lossops._distributed import _talks_of
from lossops.cross_entropy import cross_entropy_reference
from lossops.functional import (
    cross_entropy,
    cross_entropy_with_metrics,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_with_metrics,
)
from lossops.vocab_parallel import _NUMBERS, _RADIX, best_classes

SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(4, limit=30)
    yield group
    group.close()


# --------------------------------------------------------------------------------------------------
# Random configurations


class Example:
    """One call, drawn alike on every rank: whole tensors, and what this rank is given of them."""

    def __init__(self, seed: int, group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
        self.group, self.rank, size = group, dist.get_rank(group), dist.get_world_size(group)
        self.seed, self.draw = seed, random.Random(seed)
        draw = self.draw
        torch.manual_seed(seed)
        self.dtype = dtype or draw.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
        self.classes = [draw.choice([0, 1, 2, 3, 7, 40]) for _ in range(size)]
        if not sum(self.classes):
            self.classes[draw.randrange(size)] = 5
        self.total = sum(self.classes)
        order = list(range(size))
        self.vocab_start: int | None = None
        if draw.random() < 0.3:  # in an order of its own
            draw.shuffle(order)
        self.starts = [0] * size
        for k, rank in enumerate(order):
            self.starts[rank] = sum(self.classes[r] for r in order[:k])
        if order != list(range(size)) or draw.random() < 0.3:
            self.vocab_start = self.starts[self.rank]
        rows = draw.choice([(), (1,), (5,), (3,), (2, 3), (0,)])
        self.rows = rows
        self.shape = (*rows[:1], self.total, *rows[1:])
        self.dim = 1 if rows else 0
        self.logits = (3 * torch.randn(self.shape)).to(self.dtype)
        self.probabilities = draw.random() < 0.4
        self.options: dict[str, Any] = {"reduction": draw.choice(["none", "mean", "sum"])}
        if self.probabilities:
            self.target = torch.randn(self.shape).softmax(self.dim).to(self.dtype)
        else:
            self._draw_indices()
        self._draw_options()

    def _draw_indices(self) -> None:
        draw = self.draw
        self.target = torch.randint(0, self.total, self.rows)
        if draw.random() < 0.5:
            ignored = torch.rand(self.rows) < 0.3
            self.options["ignore_index"] = draw.choice([-7, 0, 255])
            self.target = self.target.masked_fill(ignored, self.options["ignore_index"])
        if self.target.numel() == 0 or self.target.min() >= 0:
            self.target = self.target.to(draw.choice([torch.int64, torch.int32, torch.uint8]))

    def _draw_options(self) -> None:
        draw, options = self.draw, self.options
        if draw.random() < 0.5:
            options["label_smoothing"] = draw.choice([0.1, 0.5, 1.0])
        self.weight = None
        if draw.random() < 0.4:
            self.weight = (torch.rand(self.total) + 0.5).to(self.dtype)
            self.weight[draw.randrange(self.total)] = 0
        self.whole_weight = draw.random() < 0.5
        self.scale = None
        if draw.random() < 0.3:
            self.scale = torch.tensor(0.75, dtype=self.dtype)
        elif draw.random() < 0.3:
            options["logit_scale"] = 1.25
        if draw.random() < 0.3:
            options["softcap"] = 4.0
        if draw.random() < 0.3:
            options["z_loss"] = 0.05
        self.row_weight = (torch.rand(self.rows) + 0.5).to(self.dtype) if draw.random() < 0.3 else None
        if draw.random() < 0.3:
            options["normalizer"] = draw.choice([6.5, torch.tensor(3.5)])
        if draw.random() < 0.3:
            options["empty"] = "zero"

    def mine(self, whole: Tensor, dim: int | None = None) -> Tensor:
        start, classes = self.starts[self.rank], self.classes[self.rank]
        return whole.narrow(self.dim if dim is None else dim, start, classes)

    def leaves(self, mine: bool) -> dict[str, Tensor]:
        """The tensors that get a gradient: this rank's, or all of them in float64."""

        def leaf(whole: Tensor, sharded: bool) -> Tensor:
            given = (self.mine(whole) if sharded else whole) if mine else whole.double()
            return given.detach().clone().requires_grad_()

        leaves = {"logits": leaf(self.logits, True)}
        if self.probabilities:
            leaves["target"] = leaf(self.target, True)
        if self.scale is not None:
            leaves["logit_scale"] = leaf(self.scale, False)
        if self.row_weight is not None:
            leaves["row_weight"] = leaf(self.row_weight, False)
        return leaves

    def loss(self, leaves: dict[str, Tensor], function: Any = None) -> Tensor:
        """The loss of this rank's leaves, or of the whole ones."""
        given = {"target": self.target, **leaves}
        logits, target = given.pop("logits"), given.pop("target")
        options = {**self.options, **given}
        if function is None:
            weight = None if self.weight is None else self.weight.double()
            return cross_entropy_reference(logits, target, weight, **options)
        if self.weight is not None:
            options["weight"] = self.weight if self.whole_weight else self.mine(self.weight, 0)
        return function(logits, target, group=self.group, vocab_start=self.vocab_start, **options)

    def part(self, name: str, whole: Tensor) -> Tensor:
        return self.mine(whole) if name == "logits" or (name == "target" and self.probabilities) else whole

    def __str__(self) -> str:
        kind = "probabilities" if self.probabilities else str(self.target.dtype)
        return (
            f"{self.shape} {self.dtype} {kind} classes {self.classes} starts {self.starts} {self.options} "
            f"weight {self.weight is not None} whole {self.whole_weight} scale {self.scale is not None} "
            f"row_weight {self.row_weight is not None}"
        )


def check_example(example: Example, function: Any = vocab_parallel_cross_entropy) -> None:
    """Loss and gradients, for a random upstream gradient."""
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    loss, expected = example.loss(leaves, function), example.loss(exact)
    upstream = torch.randn(expected.shape).to(loss.dtype)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    assert loss.dtype == example.dtype
    size = max(1.0, *(t.detach().abs().max().item() if t.numel() else 0 for t in exact.values()))
    size *= max(1, expected.numel() if example.options["reduction"] == "sum" else 1)
    assert_near(loss.detach(), expected.detach(), scale=size, message="loss")
    if expected.isinf().any():
        return  # a z-loss over a divisor of 0: its gradient is infinities, and differences of them
    rows = max(1, example.logits.numel() // example.total)
    for name, grad, exact_grad in zip(leaves, grads, exact_grads, strict=True):
        assert grad.dtype == example.dtype
        # A scale's gradient is a sum over all logits.
        scale = size * (example.logits.numel() * rows if name == "logit_scale" else 1)
        assert_near(grad, example.part(name, exact_grad), scale=scale, message=f"gradient of {name}")


def check_second_derivatives(example: Example) -> None:
    """Of a function of the gradients: each rank's own parts, and once what every rank holds alike."""
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    loss, expected = example.loss(leaves, vocab_parallel_cross_entropy), example.loss(exact)
    if not expected.isfinite().all():
        return
    # Zeros: what a second derivative along the upstream gradient finds must not depend on it.
    upstream = torch.randn(expected.shape).double() * example.draw.choice([1, 0])
    results = []
    for value, given, mine in ((loss, leaves, True), (expected, exact, False)):
        torch.manual_seed(1)
        direction = upstream.to(value.dtype).requires_grad_()
        grads = torch.autograd.grad(value, list(given.values()), direction, create_graph=True)
        along = [torch.randn(leaf.shape).double() for leaf in exact.values()]
        if mine:
            along = [example.part(n, v).to(example.dtype) for n, v in zip(given, along, strict=True)]
        tangent = sum((g * v).sum() for g, v in zip(grads, along, strict=True))
        sources = [direction, *given.values()]
        results.append(torch.autograd.grad(tangent, sources, materialize_grads=True))
    size = max(1.0, *(t.detach().abs().max().item() if t.numel() else 0 for t in exact.values()))
    size *= 10 * max(1, example.logits.numel())  # sums of products of two gradients, over all rows
    for name, a, e in zip(("upstream", *leaves), *results, strict=True):
        if not e.isfinite().all():
            continue  # a mean over nothing, of which the reference divides by 0
        assert_near(a, example.part(name, e), scale=size, message=f"second gradient to {name}")


def check_second_derivatives_in_double(example: Example) -> None:
    check_second_derivatives(Example(example.seed, example.group, torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_second_derivatives_are_those_of_the_unsharded_reference(ranks: Ranks, size: int) -> None:
    seeds = range(1000 * size, 1000 * size + 60)
    assert_none_wrong(ranks(run_examples, size, seeds, check_second_derivatives_in_double, Example))


def check_metrics(example: Example) -> None:
    """Those of the unsharded function of the same logits in float64."""
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    _, metrics = example.loss(leaves, vocab_parallel_cross_entropy_with_metrics)
    weight = None if example.weight is None else example.weight.double()
    given = {"target": example.target, **exact}
    logits, target = given.pop("logits"), given.pop("target")
    _, expected = lossops.functional.cross_entropy_with_metrics(
        logits, target, weight, **{**example.options, **given}
    )
    for name, a, e in zip(metrics._fields, metrics, expected, strict=True):
        if e.is_floating_point():
            assert_near(a.detach(), e.detach(), scale=20, message=name)
        else:
            assert torch.equal(a, e), (name, a, e)
    if example.dtype in (torch.float16, torch.bfloat16):
        return  # of two passes, each gradient is rounded before they are added
    differentiable = [k for k in range(3) if metrics[k].requires_grad]
    upstream = [torch.randn(metrics[k].shape) for k in differentiable]
    (grad,) = torch.autograd.grad(
        [metrics[k] for k in differentiable],
        [leaves["logits"]],
        [u.to(metrics[k].dtype) for u, k in zip(upstream, differentiable, strict=True)],
    )
    (exact_grad,) = torch.autograd.grad(
        [expected[k] for k in differentiable], [logits], [u.double() for u in upstream]
    )
    assert_near(grad, example.mine(exact_grad), scale=20, message="gradient of the metrics")


@pytest.mark.parametrize("size", SIZES)
def test_metrics_are_those_of_the_unsharded_function(ranks: Ranks, size: int) -> None:
    assert_none_wrong(ranks(run_examples, size, range(2000 * size, 2000 * size + 40), check_metrics, Example))


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_those_of_the_unsharded_reference(ranks: Ranks, size: int) -> None:
    assert_none_wrong(ranks(run_examples, size, range(100 * size, 100 * size + 100), check_example, Example))


# --------------------------------------------------------------------------------------------------
# Hard rows


def sharded(whole: Tensor, size: int = 4, dim: int = 1) -> Tensor:
    """This rank's part, as torch.chunk divides; a leaf of its own."""
    parts = whole.tensor_split(size, dim)
    return parts[dist.get_rank()].detach().clone().requires_grad_()


INF = torch.inf
HARD_ROWS = {
    "largest logits of 1e30 on one rank": [1e30, 0, 1, -5, 1e30, 2, 3, 1],
    "a rank of nothing but -inf": [-INF, -INF, 0.5, 2, 1, -INF, 3, 1],
    "one finite logit": [-INF, -INF, -INF, -INF, -INF, 2, -INF, -INF],
    "all -inf": [-INF] * 8,
    "an infinity": [0, 1, 2, INF, 1, 1, 1, 1],
    "infinities on two ranks": [INF, 1, 2, INF, 1, 1, 1, 1],
    "a NaN": [0, 1, torch.nan, 3, 1, 1, 1, 1],
    "equal logits": [2] * 8,
}


def check_hard_rows(options: dict[str, Any]) -> None:
    logits = torch.tensor(list(HARD_ROWS.values()), dtype=torch.float32)
    # The class lies where the logit is finite: an infinite loss has a gradient of differences of infinities.
    target = torch.tensor([0, 3, 5, 1, 0, 1, 0, 6])
    mine = sharded(logits)
    loss, metrics = vocab_parallel_cross_entropy_with_metrics(mine, target, reduction="none", **options)
    whole = logits.clone().requires_grad_()
    expected, expected_metrics = lossops.functional.cross_entropy_with_metrics(
        whole, target, reduction="none", **options
    )
    assert_near(loss.detach(), expected.detach())
    for name, a, e in zip(metrics._fields, metrics, expected_metrics, strict=True):
        assert torch.allclose(a.double(), e.double(), 1e-5, 1e-6, equal_nan=True), (name, a, e)
    # The gradients of what has a loss.
    finite = expected.detach().isfinite().float()
    weight = {"row_weight": finite, **options}
    vocab_parallel_cross_entropy(mine, target, reduction="sum", **weight).backward()
    lossops.cross_entropy(whole, target, reduction="sum", **weight).backward()
    assert_near(mine.grad, whole.grad.tensor_split(4, 1)[dist.get_rank()], message="gradient")
    assert mine.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"logit_scale": 0.5}], ids=str)
def test_infinities_and_nans_across_shards(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks(check_hard_rows, options)


def lost_shards() -> tuple[Tensor, Tensor]:
    """Logits of four shards of two classes, some of nothing but -inf, and targets in these and elsewhere."""
    logits = torch.randn(9, 8, dtype=torch.float64)
    target = torch.tensor([0, 5, 7, 2, 4, 3, 1, 6, -100])
    logits[:2, :2] = -INF
    logits[2, 6:] = -INF
    logits[3:5, [0, 1, 4, 5, 6, 7]] = -INF
    logits[5, 3] = -INF
    logits[6] = -INF
    logits[8, 2:4] = -INF
    return logits, target


LOST_SHARDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": torch.arange(8.0) + 0.5, "z_loss": 0.1},
    "both": {"weight": torch.arange(8.0), "label_smoothing": 0.1},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 3.0, "label_smoothing": 0.1},
    "probabilities": {"z_loss": 0.1},
    "weighted probabilities": {"weight": torch.arange(8.0) + 0.5, "label_smoothing": 0.1},
}


def loss_and_derivatives(function: Any, leaves: list[Tensor], along: list[Tensor]) -> dict[str, Tensor]:
    """Of a loss and metrics of every row; `along` the gradients, the second ones."""
    results: dict[str, Tensor] = {}
    for name in ("loss", "entropy", "lse"):
        loss, metrics = function(*leaves)
        results |= {"loss": loss, **metrics._asdict()}
        upstream = (torch.arange(loss.numel()).reshape(loss.shape) + 1.0).to(loss.dtype).requires_grad_()
        given = leaves if name == "loss" else leaves[:1]  # of probabilities only the loss is a function
        grads = torch.autograd.grad(results[name], given, upstream, create_graph=True)
        tangent = sum((g * v).sum() for g, v in zip(grads, along, strict=False))
        seconds = torch.autograd.grad(tangent, [*given, upstream], allow_unused=True, materialize_grads=True)
        assert name == "loss" or grads[0][:6].isfinite().all()
        results |= {f"gradient of {name} to {k}": g for k, g in enumerate(grads)}
        results |= {f"second derivative of {name} to {k}": g for k, g in enumerate(seconds)}
    return {name: result.detach() for name, result in results.items()}


def check_lost_shards(name: str, dtype: torch.dtype, tiles: bool, backend: str) -> None:
    logits, target = lost_shards()
    options = dict(LOST_SHARDS[name])
    if "probabilities" in name:  # a probability of 0 at a logit of -inf, and one that is not
        target = torch.rand(9, 8, dtype=torch.float64).masked_fill(logits.isinf(), 0)
        target[0, 0] = target[2, 6] = target[4, 5] = 0.5
    directions = [torch.randn(9, 8, dtype=torch.float64) for _ in range(2)]
    tensors = [logits, *([target] if target.is_floating_point() else []), *directions]
    if tiles:  # (N, C, d)
        tensors = [x.unsqueeze(2).expand(-1, -1, 3) for x in tensors]
        target = target.unsqueeze(1).expand(-1, 3) if target.dim() == 1 else target
    whole, tangents = [x.to(dtype) for x in tensors[:-2]], [x.to(dtype) for x in tensors[-2:]]
    rank = dist.get_rank()

    def loss(function: Any, **weight: Any) -> Any:
        def of(logits: Tensor, given: Tensor = target) -> Any:
            return function(logits, given, reduction="none", **{**options, **weight})

        return of

    with using(backend):
        expected = loss_and_derivatives(
            loss(lossops.functional.cross_entropy_with_metrics),
            [x.clone().requires_grad_() for x in whole],
            tangents[: len(whole)],
        )
        actual = loss_and_derivatives(
            loss(vocab_parallel_cross_entropy_with_metrics),
            [sharded(x) for x in whole],
            [x.tensor_split(4, 1)[rank] for x in tangents[: len(whole)]],
        )
    for key, value in expected.items():
        if value.shape == whole[0].shape:
            value = value.tensor_split(4, 1)[rank]
        if not value.is_floating_point():
            assert torch.equal(actual[key], value), key
            continue
        assert_near(actual[key], value.double(), scale=100, message=key)


@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("name", LOST_SHARDS)
@on(CPU, EMULATED)
def test_a_shard_of_nothing_but_minus_infinity_is_as_unsharded(
    ranks: Ranks, name: str, tiles: bool, device: str
) -> None:
    backends = [device] if device != CPU else [b for b in BACKENDS if b.startswith("cpu-")]
    for backend in backends:
        for dtype in (torch.float64, torch.float32):
            ranks(check_lost_shards, name, dtype, tiles, backend)


def check_zero_targets_at_minus_infinity() -> None:
    """A weight of 0, or a probability of 0, at a logit of -inf adds nothing, on whichever rank it lies."""
    logits = torch.randn(3, 8)
    logits[:, 5] = -INF
    weight = torch.ones(8)
    weight[5] = 0
    target = torch.tensor([0, 3, 7])
    probabilities = torch.rand(3, 8)
    probabilities[:, 5] = 0
    for t, options in ((target, {"weight": weight, "label_smoothing": 0.1}), (probabilities, {})):
        mine, whole = sharded(logits), logits.double().requires_grad_()
        given = sharded(t).detach() if t.is_floating_point() else t
        loss = vocab_parallel_cross_entropy(mine, given, **options)
        expected = cross_entropy_reference(whole, t.double() if t.is_floating_point() else t, **options)
        assert expected.isfinite()
        assert_near(loss.detach(), expected.detach())
        loss.backward()
        expected.backward()
        assert_near(mine.grad, whole.grad.tensor_split(4, 1)[dist.get_rank()])


def check_distances_that_overflow() -> None:
    """From the largest logit to those of a rank whose classes have no part in the target."""
    logits = torch.tensor([[3e38, 3e38, 0, 0, 0, 0, -3e38, -3e38]])
    probabilities = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]])
    mine = sharded(logits)
    loss = vocab_parallel_cross_entropy(mine, sharded(probabilities).detach())
    assert_near(loss.detach(), torch.tensor(2.0).log().double())
    loss.backward()
    assert torch.equal(mine.grad, torch.zeros_like(mine))


def test_distances_that_overflow(ranks: Ranks) -> None:
    ranks(check_distances_that_overflow)


def test_zero_targets_at_minus_infinity(ranks: Ranks) -> None:
    ranks(check_zero_targets_at_minus_infinity)


def check_nothing_counts() -> None:
    target = torch.full((3,), -100)
    for dtype in (torch.float16, torch.float32):
        mine = sharded(torch.full((3, 8), torch.nan, dtype=dtype))
        assert vocab_parallel_cross_entropy(mine, target).isnan()
        loss, metrics = vocab_parallel_cross_entropy_with_metrics(mine, target, empty="zero", z_loss=0.1)
        assert loss == 0
        loss.backward()
        assert torch.equal(mine.grad, torch.zeros_like(mine))
        assert metrics.predicted.tolist() == [-1] * 3 and not metrics.correct.any()
        assert all((plane == 0).all() for plane in metrics[:4])
    no_rows = torch.empty(0, 2, requires_grad=True)
    assert vocab_parallel_cross_entropy(no_rows, target[:0]).isnan()
    assert vocab_parallel_cross_entropy(no_rows, target[:0], reduction="sum") == 0
    # No classes at all: as unsharded.
    probabilities = torch.empty(2, 0)
    expected = lossops.cross_entropy(probabilities, probabilities, reduction="none")
    loss = vocab_parallel_cross_entropy(probabilities, probabilities, reduction="none")
    assert torch.equal(loss.isnan(), expected.isnan())


def test_nothing_counts(ranks: Ranks) -> None:
    ranks(check_nothing_counts)


def check_predicted() -> None:
    """The lowest class of the largest logit, whichever ranks hold it; beyond what float32 can count."""
    logits = torch.zeros(3, 8)
    logits[0, [3, 6]] = 1
    logits[1, [1, 2, 7]] = 5
    _, metrics = vocab_parallel_cross_entropy_with_metrics(sharded(logits), torch.tensor([3, 7, 0]))
    assert metrics.predicted.tolist() == [3, 1, 0]
    assert metrics.correct.tolist() == [True, False, True]
    # The same shards in the other order.
    rank = dist.get_rank()
    _, metrics = vocab_parallel_cross_entropy_with_metrics(
        sharded(logits), torch.tensor([3, 7, 0]), vocab_start=6 - 2 * rank
    )
    assert metrics.predicted.tolist() == [0, 1, 0]


def test_predicted_is_the_lowest_class_across_ranks(ranks: Ranks) -> None:
    ranks(check_predicted)
    index = torch.tensor([[[2**24 + 1, 2**40 + 3]], [[2**24 + 2, 2**40 + 5]]])
    value = torch.tensor([[[1.0, 1.0]], [[1.0, 2.0]]])
    candidates = torch.stack([value, (index // _RADIX).float(), (index % _RADIX).float()], 2)
    assert best_classes(candidates).tolist() == [[2**24 + 1, 2**40 + 5]]


def check_one_rank_has_all_classes() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    target = torch.tensor([0, 5, 2, -100])
    parts = logits.split([0, 0, 6, 0], 1)
    mine, whole = parts[dist.get_rank()].clone().requires_grad_(), logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, target, label_smoothing=0.2, z_loss=0.1)
    expected = cross_entropy_reference(whole, target, label_smoothing=0.2, z_loss=0.1)
    assert_near(loss.detach(), expected.detach())
    loss.backward()
    expected.backward()
    assert_near(mine.grad, whole.grad if mine.numel() else mine.detach())


def test_one_rank_has_all_classes(ranks: Ranks) -> None:
    ranks(check_one_rank_has_all_classes)


def check_without_gradients() -> None:
    logits, target = torch.randn(4, 8), torch.randint(0, 8, (4,))
    expected = lossops.cross_entropy(logits, target)
    loss = vocab_parallel_cross_entropy(sharded(logits).detach(), target)
    assert not loss.requires_grad
    assert_near(loss, expected.double())
    with torch.no_grad():
        assert torch.equal(vocab_parallel_cross_entropy(sharded(logits), target), loss)
    with torch.inference_mode():
        assert torch.equal(vocab_parallel_cross_entropy(sharded(logits), target), loss)


def test_without_gradients(ranks: Ranks) -> None:
    ranks(check_without_gradients)


def check_in_place() -> None:
    """The gradient takes the logits' memory, and is the same."""
    logits, target = torch.randn(4, 8), torch.randint(0, 8, (4,))
    mine = sharded(logits)
    vocab_parallel_cross_entropy(mine, target, label_smoothing=0.1).backward()
    leaf = sharded(logits)
    given = leaf * 1
    vocab_parallel_cross_entropy(given, target, label_smoothing=0.1, inplace_backward=True).backward()
    assert torch.equal(leaf.grad, mine.grad)
    assert torch.equal(given.detach(), mine.grad)


def test_in_place(ranks: Ranks) -> None:
    ranks(check_in_place)


def check_dtypes_of_the_loss() -> None:
    """Of 16-bit logits, asked for or under autocast."""
    logits, target = torch.randn(4, 8).bfloat16(), torch.randint(0, 8, (4,))
    mine, whole = sharded(logits), logits.clone().requires_grad_()
    for options in ({"out_dtype": torch.float32}, {"out_dtype": torch.float64}, {}):
        with torch.autocast("cpu", torch.bfloat16, enabled=not options):
            loss = vocab_parallel_cross_entropy(mine, target, **options)
            expected = cross_entropy(whole, target, **options)
        assert loss.dtype == expected.dtype == options.get("out_dtype", torch.float32)
        assert_near(loss.detach(), expected.detach(), torch.float32)
        (grad,), (whole_grad,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, whole)
        assert_near(grad, whole_grad.tensor_split(4, 1)[dist.get_rank()])


def test_dtypes_of_the_loss(ranks: Ranks) -> None:
    ranks(check_dtypes_of_the_loss)


def check_weight_gradient() -> None:
    """Of class weights with probabilities: each rank's own, or those of all classes on every rank."""
    logits, target = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, 8, dtype=torch.float64)
    weight = torch.rand(8, dtype=torch.float64)
    whole = weight.clone().requires_grad_()
    cross_entropy_reference(logits, target, whole, label_smoothing=0.2).backward()
    options = {"label_smoothing": 0.2}
    mine, t = sharded(logits).detach(), sharded(target).detach()
    everywhere = weight.clone().requires_grad_()
    vocab_parallel_cross_entropy(mine, t, weight=everywhere, **options).backward()
    assert_near(everywhere.grad, whole.grad)
    own = sharded(weight, dim=0)
    vocab_parallel_cross_entropy(mine, t, weight=own, **options).backward()
    assert_near(own.grad, sharded(whole.grad, dim=0).detach())


def test_weight_gradient(ranks: Ranks) -> None:
    ranks(check_weight_gradient)


# --------------------------------------------------------------------------------------------------
# Errors


def check_out_of_range(value: int, classes: list[int], dtype: torch.dtype) -> None:
    mine = torch.randn(3, classes[dist.get_rank()])
    target = torch.tensor([0, 1, value], dtype=dtype)
    message = rf"Target {value} is out of bounds: row 2 .* C = {sum(classes)},.* or ignore_index \(1\)$"
    with pytest.raises(IndexError, match=message) as eager:
        vocab_parallel_cross_entropy(mine, target, ignore_index=1)
    with pytest.raises(IndexError, match=re.escape(str(eager.value))):
        targets = torch.stack([torch.zeros_like(target), target])
        torch.vmap(lambda target: vocab_parallel_cross_entropy(mine, target, ignore_index=1))(targets)
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(vocab_parallel_cross_entropy, fullgraph=True, backend=backend)
        with pytest.raises(IndexError) as error:
            compiled(mine, target, ignore_index=1)
        assert str(error.value) == str(eager.value)
    assert vocab_parallel_cross_entropy(mine, target, ignore_index=value).isfinite()  # all go on


@pytest.mark.parametrize(
    ("value", "dtype"), [(8, torch.int64), (-1, torch.int32), (200, torch.uint8), (-100, torch.int64)]
)
def test_a_target_out_of_range_is_an_index_error_on_every_rank(
    ranks: Ranks, value: int, dtype: torch.dtype
) -> None:
    ranks(check_out_of_range, value, [4, 0, 3, 1], dtype)


def check_recorded(value: int, classes: list[int], dtype: torch.dtype) -> None:
    """Of CUDA: the CPU's words, once somebody asks for them."""
    mine = torch.randn(3, classes[dist.get_rank()])
    target = torch.tensor([0, value, 1], dtype=dtype)

    def loss(target: Tensor = target) -> Tensor:
        return vocab_parallel_cross_entropy(mine, target, ignore_index=1, reduction="none")

    with pytest.raises(IndexError) as on_the_cpu:
        loss()

    def recorded() -> str:
        with pytest.raises(IndexError) as error:
            lossops.check_async_errors()
        lossops.check_async_errors()  # raised once
        return str(error.value)

    said = str(on_the_cpu.value)
    with using(EMULATED):
        with torch.inference_mode():
            loss()
        assert recorded() == said
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            assert function(target).isnan().tolist() == [False, True, False]
            assert recorded() == said
        torch.vmap(loss)(torch.stack([torch.zeros_like(target), target]))
        assert recorded() == said
        loss()
        loss(target.flip(0).roll(-1))
        assert recorded() == said  # the first one
        lossops.cross_entropy(mine, torch.tensor([99, 0, 0]))
        assert "C = " + str(classes[dist.get_rank()]) in recorded()  # no shard's
        assert vocab_parallel_cross_entropy(mine, target, ignore_index=value).isfinite()
        assert vocab_parallel_cross_entropy(mine[:0], target[:0], reduction="sum") == 0


@pytest.mark.parametrize(
    ("value", "dtype"), [(8, torch.int64), (-1, torch.int32), (200, torch.uint8), (-(2**63), torch.int64)]
)
@on(EMULATED)
def test_cuda_records_a_target_out_of_range_among_all_classes(
    ranks: Ranks, value: int, dtype: torch.dtype, device: str
) -> None:
    ranks(check_recorded, value, [4, 0, 3, 1], dtype)


def raised_in_the_call() -> list[str]:
    said = []
    for backend in (CPU, EMULATED):
        with using(backend), pytest.raises(IndexError) as error:
            vocab_parallel_cross_entropy(torch.randn(2, 3, 2), torch.tensor([[0, 1], [2, 9]]))
        said.append(str(error.value))
    return said


@on(EMULATED)
def test_synchronous_checks_raise_in_the_call(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOSSOPS_SYNC_CHECKS is read once a process."""
    monkeypatch.setenv("LOSSOPS_SYNC_CHECKS", "1")
    pair = Ranks(2, limit=30)
    try:
        for on_the_cpu, emulated in pair(raised_in_the_call):
            assert emulated == on_the_cpu
            assert "Target 9 is out of bounds: row (1, 1) " in emulated and "C = 6," in emulated
    finally:
        pair.close()


def odd_one_out(op: Any, usual: dict[str, Any], odd: dict[str, Any]) -> str:
    """The error of a call in which rank 1 gives something else."""
    given = {**usual, **(odd if dist.get_rank() == 1 else {})}
    forget_agreements()
    try:
        op(given.pop("logits"), given.pop("target"), **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _usual() -> dict[str, Any]:
    return {"logits": torch.randn(3, 2), "target": torch.tensor([0, 1, 7])}


DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"logits": torch.randn(2, 2), "target": torch.tensor([0, 1])}, r"rows \(3,\) .* rows \(2,\)"),
    "dtype": ({"logits": torch.randn(3, 2).double()}, "torch.float32.* torch.float64"),
    "kind": ({"target": torch.rand(3, 2)}, "class indices .* probabilities"),
    "smoothing": ({"label_smoothing": 0.1}, "label_smoothing absent on rank 0 and label_smoothing given"),
    "z-loss": ({"z_loss": 0.5}, r"z_loss \[0.0, 0.5, 0.0, 0.0\]"),
    "softcap": ({"softcap": 5.0}, "softcap absent on rank 0 and softcap given on rank 1"),
    "ignore_index": ({"ignore_index": 1}, r"ignore_index \[-100.0, 1.0"),
    "reduction": ({"reduction": "sum"}, "reduction mean on rank 0 and reduction sum on rank 1"),
    "scale": ({"logit_scale": torch.tensor(1.0)}, "a number .* a tensor"),
    "weight": ({"weight": torch.rand(2)}, "weight absent .* weight given"),
    "weights": ({"weight": torch.rand(3)}, "weight absent .* weight given"),
    "start": ({"vocab_start": 3}, r"shards to follow each other from class 0 on, got vocab_start \[None, 3"),
    "size": ({"vocab_size": 9}, "vocab_size None on rank 0 and vocab_size 9 on rank 1"),
    "failure": ({"z_loss": "high"}, "TypeError: .*expected z_loss to be a float, got 'high'"),
    "bad shape": ({"target": torch.tensor([0, 1])}, r"ValueError: .*expected target of shape \(3,\)"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_told_so_on_every_rank(ranks: Ranks, name: str) -> None:
    odd, message = DISAGREEMENTS[name]
    for error in ranks(odd_one_out, vocab_parallel_cross_entropy, _usual(), odd):
        assert re.search(message, error), error
    for error in ranks(odd_one_out, vocab_parallel_cross_entropy, _usual(), {}):
        assert error == "no error"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.rand(3)}, r"weight tensors for each rank's classes, \[2, 2, 2, 2\], or for all 8"),
        ({"vocab_size": 9}, r"shards of 9 classes in all, got \[2, 2, 2, 2\]"),
        ({"vocab_start": 0}, r"follow each other from class 0 on, got vocab_start \[0, 0, 0, 0\]"),
        ({"label_smoothing": 2.0}, "label_smoothing must be between"),
        ({"reduction": "median"}, "median is not a valid value for reduction"),
        ({"logits": torch.randn(3, 2).long()}, "not implemented for input of dtype torch.int64"),
        ({"logits": [1.0]}, "expected input to be a Tensor, got list"),
        ({"target": torch.tensor([0, 1, 7], dtype=torch.int16)}, "target dtype to be Long, Int or Byte"),
        ({"out_dtype": torch.int64}, "expected out_dtype"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, "group to be one that this process belongs to"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_what_is_wrong_on_every_rank_is_said_on_every_rank(
    ranks: Ranks, given: dict[str, Any], message: str
) -> None:
    for error in ranks(odd_one_out, vocab_parallel_cross_entropy, {**_usual(), **given}, {}):
        assert re.search(message, error), error


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch.distributed.init_process_group"):
        vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))


def check_two_vocabularies() -> None:
    """In one group, of which rank 0 has as many classes of each: vocab_size tells them apart."""
    talks = _talks_of(dist.group.WORLD.group_name)
    rounds = []
    for classes in ([2, 3, 1, 1], [2, 1, 1, 1], [2, 3, 1, 1], [2, 1, 1, 1]):
        logits = torch.randn(3, sum(classes))
        mine = logits.split(classes, 1)[dist.get_rank()]
        target = torch.tensor([0, 4, 3])
        loss = vocab_parallel_cross_entropy(mine, target, label_smoothing=0.1, vocab_size=sum(classes))
        assert_near(loss, cross_entropy_reference(logits.double(), target, label_smoothing=0.1))
        rounds.append(talks.rounds)
    assert rounds[0] + 1 == rounds[1] == rounds[2] == rounds[3]  # each was agreed on once


def test_two_vocabularies_in_one_group(ranks: Ranks) -> None:
    ranks(check_two_vocabularies)


def agreed_calls_that_meet(compiled: bool) -> str | None:
    """Two calls that both ranks know, of which rank 1 then makes the other one."""
    if (group := member(2)) is None:
        return None
    calls = [{"softcap": 5.0}, {"softcap": 3.0}, {"reduction": "sum"}, {"reduction": "mean"}]
    calls = calls[:2] if compiled else calls
    function = vocab_parallel_cross_entropy
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(3, 2), torch.tensor([0, 1, 3])
    for options in calls:
        assert function(logits, target, group=group, **options).isfinite()
    results = []
    for here, there in zip(calls[::2], calls[1::2], strict=True):
        try:
            options = there if dist.get_rank() == 1 else here
            results.append(str(function(logits, target, group=group, **options).item()))
        except RuntimeError as error:
            results.append(str(error))
    return " ".join(results)


def test_known_calls_that_do_not_belong_together_give_no_number(ranks: Ranks) -> None:
    for text in ranks(agreed_calls_that_meet, False)[:2]:
        assert re.search(r"got softcap \[5.0, 3.0\].*got configuration \[", text), text
    assert ranks(agreed_calls_that_meet, True) == ["nan", "nan", None, None]


def loss_while_rank_1(action: str) -> str:
    hurry = timedelta(seconds=3)  # now that both are there
    dist.distributed_c10d._set_pg_timeout(hurry)
    _talks_of(dist.group.WORLD.group_name).store.set_timeout(hurry)
    logits, target = torch.randn(3, 2), torch.tensor([0, 1, 3])
    if action != "dies early":
        vocab_parallel_cross_entropy(logits, target)
    if dist.get_rank() == 1:
        if action.startswith("dies"):
            os._exit(7)
        logits, target = logits[:2], target[:2]  # a call that rank 0 does not make
    try:
        return f"no error, but {vocab_parallel_cross_entropy(logits, target)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("dies early", "rank 0 has waited in vain for ranks [1] of the group"),
        ("dies", "Error"),  # torch.distributed's own
        ("differs", "Error"),
    ],
)
def test_a_rank_that_does_not_come_is_an_error_in_time(action: str, message: str) -> None:
    pair = Ranks(2, limit=30)
    try:
        pair(dist.barrier)  # processes that start take their time
        start = time.monotonic()
        first, second = pair.outcomes(loss_while_rank_1, action)
        assert message in first and "no error" not in first, first
        if action == "differs":
            assert "rank 1 has waited in vain for ranks [0] of the group" in second
        else:
            assert second == "exit code 7"
        assert time.monotonic() - start < 20
    finally:
        pair.close()
    assert not any(process.is_alive() for process in pair.processes)


# --------------------------------------------------------------------------------------------------
# torch.func and forward mode

TRANSFORMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "family": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0},
    "weight": {"weight": torch.arange(9).double() + 0.5, "ignore_index": 1},
    "none": {"reduction": "none"},
    "probabilities": {"weight": torch.arange(9).double() + 0.5, "label_smoothing": 0.1},
}


def derivatives(loss: Any, values: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> dict[str, Any]:
    """By every transform, along tangents of which each rank has its own values' part."""
    places = tuple(range(len(values)))

    def total(*values: Tensor) -> Tensor:
        return loss(*values).square().sum()

    def grad(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(total, places)(*values)

    def slope(*values: Tensor) -> Tensor:
        return torch.func.jvp(total, values, along)[1]

    def dual(*values: Tensor) -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, t) for v, t in zip(values, along, strict=True)]
            return forward_ad.unpack_dual(total(*duals)).tangent

    return {
        "grad": grad(*values),
        "jvp": torch.func.jvp(loss, values, along),
        "forward mode": dual(*values),
        "jvp of grad": torch.func.jvp(grad, values, along)[1],
        "grad of jvp": torch.func.grad(slope, places)(*values),
        "jvp of jvp": torch.func.jvp(slope, values, along)[1],
        "jacrev": torch.func.jacrev(loss, places)(*values),
    }


def check_transforms(name: str) -> None:
    """Those of the whole logits, and this rank's part of them."""
    options, rank = dict(TRANSFORMED[name]), dist.get_rank()
    probabilities = name == "probabilities"
    logits, *along = (torch.randn(4, 9, dtype=torch.float64) for _ in range(3))
    target = torch.rand(4, 9, dtype=torch.float64) if probabilities else torch.tensor([0, 8, 4, 1])
    values = (logits, target) if probabilities else (logits,)

    def mine(x: Any) -> Any:
        return tree_map(lambda t: t.tensor_split(4, -1)[rank] if t.shape[-1:] == (9,) else t, x)

    def loss(function: Any) -> Any:
        def of(logits: Tensor, given: Tensor = target) -> Tensor:
            loss, metrics = function(logits, given, **options)
            return loss + metrics.entropy.sum()

        return of

    whole, parts = (
        loss(lossops.functional.cross_entropy_with_metrics),
        loss(vocab_parallel_cross_entropy_with_metrics),
    )
    expected = derivatives(whole, values, tuple(along[: len(values)]))
    actual = derivatives(parts, mine(values), mine(tuple(along[: len(values)])))
    assert_close(actual, mine(expected))

    def of_each(loss: Any, *values: Tensor) -> Any:
        """Gradients of each of three batches, of which the last holds other logits alone."""
        grad = torch.func.grad(lambda *values: loss(*values).square().sum(), tuple(range(len(values))))
        return torch.vmap(grad)(*values)

    batched = tuple(torch.stack([v, v.flip(0), v + 1]) for v in values)
    assert_close(of_each(parts, *mine(batched)), mine(of_each(whole, *batched)))
    if not probabilities:
        targets = torch.stack([target, target.flip(0), target])
        assert_close(
            torch.vmap(torch.func.grad(lambda z, t: parts(z, t).sum()))(mine(batched[0]), targets),
            mine(torch.vmap(torch.func.grad(lambda z, t: whole(z, t).sum()))(batched[0], targets)),
        )


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def check_transforms_of_what_is_alike() -> None:
    """With respect to which there are jacfwd and hessian, too."""
    logits, target = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 8, 4, 1])
    mine, scale = logits.tensor_split(4, 1)[dist.get_rank()], torch.tensor(0.7, dtype=torch.float64)

    def loss(function: Any, logits: Tensor) -> Any:
        return lambda scale: function(logits, target, logit_scale=scale, z_loss=0.1)

    for transform in (torch.func.jacfwd, torch.func.hessian, torch.func.jacrev):
        actual = transform(loss(vocab_parallel_cross_entropy, mine))(scale)
        assert_close(actual, transform(loss(cross_entropy, logits))(scale))


def test_transforms_of_what_is_alike(ranks: Ranks) -> None:
    ranks(check_transforms_of_what_is_alike)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms(ranks: Ranks, name: str) -> None:
    ranks(check_transforms, name)


# --------------------------------------------------------------------------------------------------
# torch.compile


def check_compile(
    size: int, backend: str, dynamic: bool | None, options: dict[str, Any], metrics: bool
) -> None:
    if (group := member(size)) is None:
        return

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if metrics:
            loss, rows = vocab_parallel_cross_entropy_with_metrics(logits, target, group=group, **options)
            return loss + rows.entropy.sum() + rows.predicted.sum() + rows.logprob.sum()
        return vocab_parallel_cross_entropy(logits, target, group=group, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (6, 5) if dynamic else (6,):
        logits = torch.randn(rows, 9)
        target = torch.randint(0, 9, (rows,))
        mine, eager = sharded(logits, size), sharded(logits, size)
        result, expected = compiled(mine, target), loss(eager, target)
        assert_near(result.detach(), expected.detach().double(), scale=10)
        result.backward()
        expected.backward()
        assert_near(mine.grad, eager.grad.double(), scale=10)


@pytest.mark.parametrize(
    ("size", "backend", "dynamic", "options", "metrics"),
    [
        (2, "inductor", None, {"z_loss": 0.1}, False),
        (3, "aot_eager", True, {"weight": torch.rand(9), "logit_scale": torch.tensor(0.7)}, False),
        (2, "aot_eager", True, {"softcap": 5.0, "ignore_index": 3}, True),
    ],
    ids=["inductor", "dynamic", "metrics"],
)
def test_compile(
    ranks: Ranks, size: int, backend: str, dynamic: bool | None, options: dict[str, Any], metrics: bool
) -> None:
    ranks(check_compile, size, backend, dynamic, options, metrics)


# --------------------------------------------------------------------------------------------------
# Messages


def messages(
    options: dict[str, Any], probabilities: bool, metrics: bool
) -> tuple[list[tuple[str, int]], list[str]]:
    """The collectives of one step, with the bytes that this rank gives to each, and the kernels."""
    logits = sharded(torch.randn(16, 8))
    target = torch.rand(16, 2) if probabilities else torch.randint(0, 8, (16,))

    def loss() -> Tensor:
        if not metrics:
            return vocab_parallel_cross_entropy(logits, target, **options)
        loss, rows = vocab_parallel_cross_entropy_with_metrics(logits, target, **options)
        return loss + rows.entropy.sum()

    loss()  # agreed
    with Collectives() as collectives:
        loss().backward()
    return collectives.seen, collectives.kernels


@pytest.mark.parametrize(
    ("options", "probabilities", "metrics", "numbers"),
    [
        ({}, False, False, 3),
        ({"label_smoothing": 0.1, "z_loss": 0.1}, False, False, 4),
        ({"weight": torch.rand(8)}, False, False, 4),
        ({"softcap": 3.0}, True, False, 4),
        ({}, False, True, 7),
        ({"z_loss": 0.1}, True, True, 11),
    ],
    ids=["plain", "smoothing", "weight", "probabilities", "metrics", "metrics of probabilities"],
)
def test_one_collective_forward_and_none_backward(
    ranks: Ranks, options: dict[str, Any], probabilities: bool, metrics: bool, numbers: int
) -> None:
    """`numbers` a row, beside the same kernels as the unsharded loss's."""
    for seen, kernels in ranks(messages, options, probabilities, metrics):
        ((name, size),) = seen
        assert name == "all_gather_into_tensor"
        assert size == 4 * (16 * numbers + len(_NUMBERS))
        assert [k for k in kernels if k != "class_indices"] == [
            "cross_entropy_rows_forward",
            "cross_entropy_rows_backward",
        ]


def test_a_learnable_scale_is_one_number_more(ranks: Ranks) -> None:
    options = {"logit_scale": torch.tensor(1.0, requires_grad=True)}
    for seen, _ in ranks(messages, options, False, False):
        assert [name for name, _ in seen] == ["all_gather_into_tensor", "all_reduce"]
        assert seen[1][1] == 4


# --------------------------------------------------------------------------------------------------
# DTensors


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    if shape not in _meshes:
        names = ("data", "classes")[-len(shape) :]
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[shape]


S, R = Shard, Replicate()
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = {
    # logits' shape, mesh, placements: 7 rows and 10 classes are uneven in each
    "classes": ((7, 10), (4,), [S(1)]),
    "rows": ((7, 10), (4,), [S(0)]),
    "replicated": ((7, 10), (4,), [R]),
    "rows, classes": ((7, 10), (2, 2), [S(0), S(1)]),
    "classes, rows": ((7, 10), (2, 2), [S(1), S(0)]),
    "replicated, classes": ((7, 10), (2, 2), [R, S(1)]),
    "rows, replicated": ((7, 10), (2, 2), [S(0), R]),
    "rows, rows": ((7, 10), (2, 2), [S(0), S(0)]),
    "positions, classes": ((2, 10, 3), (2, 2), [S(2), S(1)]),
    "one row": ((10,), (4,), [S(0)]),
    "fewer classes than ranks": ((5, 3), (4,), [S(1)]),
    "fewer rows than ranks": ((2, 5), (4,), [S(0)]),
}
DTENSOR_OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "z_loss": 0.1, "softcap": 5.0},
    {"weight": True, "ignore_index": 1},
    {"label_smoothing": 0.2, "logit_scale": 0.8, "row_weight": True},
    {"normalizer": 3.5, "empty": "zero"},
]


def check_dtensor(name: str, probabilities: bool) -> None:
    shape, mesh_shape, placements = PLACEMENTS[name]
    mesh, dim = mesh_of(*mesh_shape), 1 if len(shape) > 1 else 0
    rows = [*shape[:dim], *shape[dim + 1 :]]
    torch.manual_seed(5)
    for k, options in enumerate(DTENSOR_OPTIONS):
        logits = torch.randn(shape, dtype=torch.float64)
        target = torch.rand(shape).double() if probabilities else torch.randint(0, shape[dim], rows)
        options = dict(options)
        tensors = {"logits": logits}
        if probabilities:
            options.pop("ignore_index", None)
            tensors["target"] = target
        if options.pop("weight", False):
            options["weight"] = torch.rand(shape[dim]).double()
        if "logit_scale" in options:
            tensors["logit_scale"] = torch.tensor(options.pop("logit_scale")).double()
        if options.pop("row_weight", False):
            tensors["row_weight"] = torch.rand(rows).double()
        whole = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        mine = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        mine["logits"] = distribute_tensor(logits, mesh, placements).requires_grad_()
        if probabilities and k % 2:  # else a replicated Tensor
            mine["target"] = distribute_tensor(target, mesh, placements).requires_grad_()
        expected = cross_entropy_reference(whole["logits"], **{"target": target, **rest(whole)}, **options)
        loss = lossops.cross_entropy(mine["logits"], **{"target": target, **rest(mine)}, **options)
        assert isinstance(loss, DTensor)
        if options.get("reduction") != "none":
            assert loss.placements == (R,) * mesh.ndim
        assert loss.shape == expected.shape
        assert_near(loss.full_tensor().detach(), expected.detach(), scale=10, message=f"loss {options}")
        loss.sum().backward()
        expected.sum().backward()
        assert mine["logits"].grad.placements == tuple(placements)
        for n in tensors:
            grad = mine[n].grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert_near(grad, whole[n].grad, scale=100, message=f"gradient of {n} {options}")


def rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "logits"}


@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_dtensors_are_as_their_whole_tensors(ranks: Ranks, name: str, probabilities: bool) -> None:
    ranks(check_dtensor, name, probabilities)


def check_dtensor_metrics() -> None:
    logits, target = torch.randn(7, 10), torch.randint(0, 10, (7,))
    expected_loss, expected = lossops.functional.cross_entropy_with_metrics(logits, target)
    for mesh, placements in (((4,), [S(1)]), ((4,), [S(0)]), ((2, 2), [S(0), S(1)])):
        given = distribute_tensor(logits, mesh_of(*mesh), placements)
        loss, metrics = lossops.functional.cross_entropy_with_metrics(given, target)
        assert_near(loss.full_tensor(), expected_loss.double())
        for name, a, e in zip(metrics._fields, metrics, expected, strict=True):
            assert torch.allclose(a.full_tensor().double(), e.double(), 1e-5, 1e-5), name


def test_dtensor_metrics(ranks: Ranks) -> None:
    ranks(check_dtensor_metrics)


def check_dtensor_modules() -> None:
    """In 16 bit, with the module; and it is what torch's loss_parallel returns."""
    logits, target = torch.randn(8, 12), torch.randint(0, 12, (8,))
    given = distribute_tensor(logits, mesh_of(4), [S(1)]).requires_grad_()
    with loss_parallel():
        torchs = torch.nn.functional.cross_entropy(given, target)
        torchs.backward()
    grad, given.grad = given.grad, None
    loss = lossops.CrossEntropyLoss()(given, target)
    loss.backward()
    assert (type(loss), loss.placements, loss.dtype) == (type(torchs), torchs.placements, torchs.dtype)
    assert_near(loss.full_tensor().detach(), torchs.full_tensor().detach().double())
    assert given.grad.placements == grad.placements
    assert_near(given.grad.to_local(), grad.to_local().double())
    half = distribute_tensor(logits.bfloat16(), mesh_of(4), [S(0)])
    exact = cross_entropy_reference(logits.bfloat16().double(), target)
    loss = lossops.cross_entropy(half, target)
    assert loss.dtype == torch.bfloat16
    assert_near(loss.full_tensor(), exact)  # rounded once, not on every rank
    assert lossops.cross_entropy(half, target, out_dtype=torch.float32).dtype == torch.float32


def test_dtensor_is_as_in_torchs_loss_parallel(ranks: Ranks) -> None:
    ranks(check_dtensor_modules)


def check_dtensor_second_derivative() -> None:
    logits, target = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 8, (6,))
    for mesh, placements in (((4,), [S(1)]), ((2, 2), [S(0), S(1)])):
        given = distribute_tensor(logits, mesh_of(*mesh), placements).requires_grad_()
        whole = logits.clone().requires_grad_()
        seconds = []
        for x, function in ((given, lossops.cross_entropy), (whole, cross_entropy_reference)):
            (grad,) = torch.autograd.grad(function(x, target, z_loss=0.1), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.pow(3).sum(), x)
            seconds.append(second)
        assert_near(seconds[0].full_tensor(), seconds[1])


def test_dtensor_second_derivative(ranks: Ranks) -> None:
    ranks(check_dtensor_second_derivative)


def check_refused_placements() -> None:
    target = torch.tensor([0, 1, 2, 3])
    for mesh, placements in (((4,), [Partial()]), ((2, 2), [S(1), S(1)])):
        given = DTensor.from_local(torch.randn(4, 5), mesh_of(*mesh), placements, run_check=False)
        with pytest.raises(NotImplementedError, match=r"expected a DTensor .* redistribute it first"):
            lossops.cross_entropy(given, target)
    given = distribute_tensor(torch.randn(4, 8), mesh_of(4), [S(1)])
    with pytest.raises(ValueError, match="expected DTensors of one mesh"):
        lossops.cross_entropy(given, distribute_tensor(target, mesh_of(2, 2), [R, R]))
    with pytest.raises(IndexError, match=r"Target 8 is out of bounds: row 3 .* C = 8,"):
        lossops.cross_entropy(given, torch.tensor([0, 1, 2, 8]))


def test_placements_that_are_refused(ranks: Ranks) -> None:
    ranks(check_refused_placements)


def check_transformed_dtensors(placement: Any, function: Any, scattered: bool) -> None:
    """Those that a transform hides, and those that its function holds; torch makes no dual DTensor."""
    logits, target = torch.randn(4, 8), torch.tensor([0, 7, 2, 1])
    given, two = distribute_tensor(logits, mesh_of(4), [placement]), torch.tensor(2.0)
    targets = distribute_tensor(target, mesh_of(4), [R]) if scattered else target

    def loss(x: Any, scale: Any = 1.0) -> Any:
        result = function(x, targets, logit_scale=scale)
        return result[0] if isinstance(result, tuple) else result

    calls = (
        lambda: torch.func.grad(loss)(given),
        lambda: torch.func.vjp(loss, given),
        lambda: torch.func.jacrev(loss)(given),
        lambda: torch.vmap(loss)(given.reshape(1, 4, 8)),
        lambda: torch.func.grad(torch.func.grad(loss))(given),
        lambda: torch.func.grad(lambda scale: loss(given, scale))(two),
        lambda: torch.func.jvp(lambda scale: loss(given, scale), (two,), (two,)),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="cross_entropy: expected no DTensor under"):
            call()
    if placement == S(1):  # what the sentence says instead
        grad = torch.func.grad(lambda x: vocab_parallel_cross_entropy(x, target))(given.to_local())
        expected = torch.func.grad(lambda x: cross_entropy(x, target))(logits)
        assert_near(grad, sharded(expected).detach().double())


@pytest.mark.parametrize("scattered", [False, True], ids=["target", "DTensor target"])
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_with_metrics])
@pytest.mark.parametrize("placement", [S(1), S(0), R], ids=str)
def test_dtensors_under_torch_func_are_refused(
    ranks: Ranks, placement: Any, function: Any, scattered: bool
) -> None:
    ranks(check_transformed_dtensors, placement, function, scattered)


def check_dtensor_compile() -> None:
    logits, target = torch.randn(8, 12), torch.randint(0, 12, (8,))
    torch._dynamo.reset()
    compiled = torch.compile(lossops.cross_entropy, fullgraph=True, backend="aot_eager")
    given = distribute_tensor(logits, mesh_of(2, 2), [S(0), S(1)]).requires_grad_()
    whole = logits.clone().requires_grad_()
    loss, expected = compiled(given, target), lossops.cross_entropy(whole, target)
    assert_near(loss.full_tensor().detach(), expected.detach().double())
    loss.backward()
    expected.backward()
    assert_near(given.grad.full_tensor(), whole.grad.double())


def test_dtensor_compile(ranks: Ranks) -> None:
    ranks(check_dtensor_compile)


def head() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))


def check_parallelized_module() -> None:
    x, target = torch.randn(5, 6), torch.randint(0, 10, (5,))
    single, parallel = head(), head()
    parallelize_module(
        parallel,
        mesh_of(4),
        {"2": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
    )
    loss = lossops.cross_entropy(parallel(x), target, label_smoothing=0.1)
    expected = lossops.cross_entropy(single(x), target, label_smoothing=0.1)
    assert_near(loss.full_tensor().detach(), expected.detach().double())
    loss.backward()
    expected.backward()
    for name, parameter in parallel.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert_near(grad, single.get_parameter(name).grad.double(), scale=10, message=name)


def test_parallelize_module(ranks: Ranks) -> None:
    ranks(check_parallelized_module)


def check_parallelized_and_fully_sharded_module() -> None:
    """Classes over one dimension of the mesh, rows and parameters (FSDP2) over the other."""
    mesh, rows = mesh_of(2, 2), [5, 2]
    inputs, targets = torch.randn(7, 6).split(rows), torch.randint(0, 10, (7,)).split(rows)
    single, model = head(), head()
    styles = {"2": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(model, mesh["classes"], styles)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data"])
    mine, data = mesh["data"].get_local_rank(), mesh["data"].get_group()
    normalizer = lossops.global_normalizer(targets[mine], data)
    loss = cross_entropy(model(inputs[mine]), targets[mine], label_smoothing=0.1, normalizer=normalizer)
    expected = cross_entropy(single(torch.cat(inputs)), torch.cat(targets), label_smoothing=0.1)
    loss.backward()
    expected.backward()
    total = loss.full_tensor().detach()
    dist.all_reduce(total, group=data)
    assert_near(total / 2, expected.detach().double())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor()
        assert_near(grad, single.get_parameter(name).grad.double(), scale=10, message=name)


def test_parallelize_module_and_fully_shard(ranks: Ranks) -> None:
    ranks(check_parallelized_and_fully_sharded_module)


# --------------------------------------------------------------------------------------------------
# Data parallelism and gradient accumulation

ROWS = {  # of each rank's micro-batches, of which FSDP wants as many on every rank
    "ddp": [[5, 2], [1], [0], [7, 3]],
    "fsdp": [[5, 2], [1, 0], [0, 3], [7, 3]],
}


def batches(rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor], slice]:
    """The micro-batches of all ranks, and which are this one's."""
    rank, sizes = dist.get_rank(), [size for sizes in rows for size in sizes]
    torch.manual_seed(4)
    inputs = [torch.randn(size, 6) for size in sizes]
    targets = [torch.randint(0, 10, (size,)).masked_fill(torch.rand(size) < 0.3, -100) for size in sizes]
    first = sum(map(len, rows[:rank]))
    return inputs, targets, slice(first, first + len(rows[rank]))


def check_global_normalizer(kind: str, options: dict[str, Any]) -> None:
    inputs, targets, mine = batches(ROWS[kind])
    single, model = head(), head()
    expected = lossops.cross_entropy(single(torch.cat(inputs)), torch.cat(targets), **options)
    expected.backward()
    counted = {name: value for name, value in options.items() if name == "weight"}
    normalizer = lossops.global_normalizer(targets[mine], **counted)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh_of(4))
    total = torch.zeros(())
    inputs, targets = inputs[mine], targets[mine]
    for k, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        last = k == len(inputs) - 1
        if kind == "fsdp":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if kind == "ddp" and not last else contextlib.nullcontext():
            loss = lossops.cross_entropy(model(x), target, normalizer=normalizer, **options)
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    assert_near(total / 4, expected.detach().double(), scale=10)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        reference = single.get_parameter(name.removeprefix("module.")).grad
        assert_near(grad, reference.double(), scale=10, message=name)


@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(10), "z_loss": 0.1}], ids=["plain", "weight"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_global_normalizer_makes_one_batch_of_many(ranks: Ranks, kind: str, options: dict[str, Any]) -> None:
    ranks(check_global_normalizer, kind, options)


def check_compiled_normalizer() -> None:
    rank = dist.get_rank()
    logits, target = torch.randn(rank + 2, 5), torch.randint(0, 5, (rank + 2,))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, normalizer=lossops.global_normalizer(target))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_near(compiled(logits, target), loss(logits, target).double())


def test_compiled_global_normalizer(ranks: Ranks) -> None:
    ranks(check_compiled_normalizer)


def check_normalizer_of_groups() -> None:
    group = member(2)
    if group is not None:
        target = torch.tensor([1, -100, 2]) if dist.get_rank() else torch.tensor([1, 1, 1], dtype=torch.uint8)
        assert lossops.global_normalizer(target, group) == 2.5
        assert lossops.global_normalizer(torch.rand(dist.get_rank() + 1, 5), group) == 1.5
        assert lossops.global_normalizer(target, group, weight=torch.arange(3.0)) == 3


def test_global_normalizer_of_a_group(ranks: Ranks) -> None:
    ranks(check_normalizer_of_groups)


def test_global_normalizer_of_one_process() -> None:
    targets = [torch.tensor([1, -100]), torch.tensor([], dtype=torch.int64), torch.tensor([[2, 0]])]
    normalizer = lossops.global_normalizer(targets)
    assert normalizer == 3 and normalizer.dtype == torch.float64 and normalizer.dim() == 0
    assert lossops.global_normalizer(targets[2], ignore_index=0, weight=torch.tensor([9.0, 9.0, 0.5])) == 0.5
    assert lossops.global_normalizer(torch.full((3,), -100)) == 0
    for bad in ([], 3, ["a"]):
        with pytest.raises(TypeError, match="expected target to be a Tensor or a sequence"):
            lossops.global_normalizer(bad)
