"""Cross-entropy over several processes: every rank against the unsharded float64 reference.

Four processes serve all tests; those of two and three ranks are some of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, subgroup
from tolerances import assert_near
from torch import Tensor

import lossops
from lossops._distributed import _talks_of
from lossops.cross_entropy import cross_entropy_reference
from lossops.functional import (
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_with_metrics,
)

SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(4, limit=8)
    yield group
    group.close()


def member(size: int) -> dist.ProcessGroup | None:
    """The group of the first `size` ranks, None on the others."""
    group = subgroup(range(size))
    return group if dist.get_rank() < size else None


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


def run_examples(size: int, seeds: range, check: Any) -> list[str]:
    """What is wrong, one line for each configuration; every rank goes through all of them."""
    group = member(size)
    if group is None:
        return []
    wrong = []
    for seed in seeds:
        example = Example(seed, group)
        # Or a rank that knows its part of a call would not hear of another partition.
        _talks_of(group.group_name).agreed.clear()
        try:
            check(example)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            wrong.append(f"rank {example.rank}, seed {seed}: {text} [{example}]")
    return wrong


def assert_none_wrong(results: list[list[str]]) -> None:
    wrong = [line for lines in results for line in lines]
    assert not wrong, f"{len(wrong)} configurations:\n" + "\n".join(wrong[:12])


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
    assert_none_wrong(ranks(run_examples, size, seeds, check_second_derivatives_in_double))


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
    assert_none_wrong(ranks(run_examples, size, range(2000 * size, 2000 * size + 40), check_metrics))


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_those_of_the_unsharded_reference(ranks: Ranks, size: int) -> None:
    assert_none_wrong(ranks(run_examples, size, range(100 * size, 100 * size + 100), check_example))
