"""The linear head with its loss: every promise of linear_cross_entropy, against logits and all."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import REDUCTIONS, value_and_gradients
from devices import cpu_only, not_emulated, raises_index_error
from tolerances import assert_near
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import lossops
from lossops import LinearCrossEntropyLoss, _linear_rows, _products, linear_cross_entropy
from lossops._linear_rows import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, default_chunk
from lossops.functional import cross_entropy_with_metrics, linear_cross_entropy_with_metrics
from lossops.linear_cross_entropy import linear_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("device")

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

H, C = 5, 11


class Problem:
    """A head's tensors, its target, and options of which floating tensors get a gradient."""

    def __init__(
        self,
        batch: tuple[int, ...] = (7,),
        out: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
        probabilities: bool = False,
        ignore: bool = False,
        lora: bool = False,
        row_weight: bool = False,
        learnable: bool = False,
        classes: int = C,
        hidden: int = H,
        **options: Any,
    ) -> None:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

        self.leaves = {"input": drawn(*batch, hidden), "weight": drawn(classes, *out, hidden)}
        self.leaves["bias"] = drawn(classes, *out)
        self.options = options
        self.lora = lora
        if lora:
            self.leaves |= {"a": drawn(3, hidden), "b": drawn(classes, *out, 3)}
        if row_weight:
            self.leaves["row_weight"] = torch.rand((*batch, *out), dtype=dtype).requires_grad_()
        if learnable:
            self.leaves["logit_scale"] = torch.tensor(1.25, dtype=dtype, requires_grad=True)
        if probabilities:
            self.target = torch.rand((*batch, classes, *out), dtype=dtype)
            self.leaves["target"] = self.target.requires_grad_()
        else:
            self.target = torch.randint(0, classes, (*batch, *out))
            if ignore:
                self.target[torch.rand(self.target.shape) < 0.4] = -100

    def call(self, function: Callable[..., Any], **overrides: Any) -> Callable[..., Any]:
        """`function` of the leaves' values."""

        def of(*values: Tensor) -> Any:
            given = dict(zip(self.leaves, values, strict=True))
            options = {**self.options, **overrides}
            if self.lora:
                options["lora"] = given["a"], given["b"], 0.5
            for name in ("row_weight", "logit_scale"):
                if name in given:
                    options[name] = given[name]
            target = given.get("target", self.target)
            return function(given["input"], given["weight"], target, linear_bias=given["bias"], **options)

        return of

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves.values())

    def exact(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().double().requires_grad_() for t in self.leaves.values())


def check(problem: Problem, reduction: str, chunk_size: int | None = 3, **overrides: Any) -> None:
    """Value and all gradients for a random upstream gradient, against float64 with all logits."""
    ours = problem.call(linear_cross_entropy, reduction=reduction, chunk_size=chunk_size, **overrides)
    reference = problem.call(linear_cross_entropy_reference, reduction=reduction, **overrides)
    upstream = torch.randn_like(reference(*problem.exact()))
    actual = value_and_gradients(ours, problem.values(), upstream)
    expected = value_and_gradients(reference, problem.exact(), upstream)
    for name, a, e in zip(("loss", *problem.leaves), actual, expected, strict=True):
        # Products are sums of up to 77 terms of size 3, in torch's own order.
        assert_near(a, e, scale=100, message=name)
        assert a.is_contiguous() or name == "loss"


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignore": True},
    "family": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "row_weight": True, "learnable": True},
    "lora": {"lora": True, "z_loss": 0.1},
    "shift": {"shift": True},
    "shift, ignored, weighted": {"shift": True, "ignore": True, "row_weight": True},
    "normalizer": {"normalizer": 3.5, "empty": "zero"},
}


# --------------------------------------------------------------------------------------------------
# Values and first derivatives


@each_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("given", OPTIONS)
def test_values_and_gradients(given: str, probabilities: bool, reduction: str) -> None:
    if probabilities and OPTIONS[given].get("ignore"):
        pytest.skip("probabilities have no ignored rows")
    for batch, out in itertools.product([(7,), (2, 4), (1,)], [(), (2,), (2, 3)]):
        for chunk_size in (None, 1, 3):
            problem = Problem(batch, out, probabilities=probabilities, **OPTIONS[given])
            check(problem, reduction, chunk_size)


@each_reduction
def test_float32(reduction: str) -> None:
    for out, given in itertools.product([(), (2,)], OPTIONS.values()):
        check(Problem((2, 9), out, torch.float32, **given), reduction)


@each_reduction
def test_unbatched(reduction: str) -> None:
    for probabilities in (False, True):
        check(Problem((), probabilities=probabilities, row_weight=True), reduction)


@each_reduction
def test_class_weight(reduction: str) -> None:
    weight = torch.rand(C, dtype=torch.float64) + 0.5
    for probabilities in (False, True):
        check(Problem(probabilities=probabilities, label_smoothing=0.2), reduction, weight=weight)
    with_gradient = weight.clone().requires_grad_()
    problem = Problem(probabilities=True, label_smoothing=0.2)
    expected = problem.call(linear_cross_entropy_reference, weight=with_gradient)(*problem.values())
    actual = problem.call(linear_cross_entropy, weight=with_gradient)(*problem.values())
    leaves = with_gradient, *problem.values()
    for a, e in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_near(a, e, scale=100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_narrow_targets(dtype: torch.dtype) -> None:
    for shift in (False, True):
        problem = Problem((2, 4), shift=shift)
        problem.target = problem.target.to(dtype)
        check(problem, "mean")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none of its own before 2.13")
@each_reduction
@not_emulated
def test_agrees_with_torch(reduction: str) -> None:
    for out, probabilities in itertools.product([(), (2, 3)], [False, True]):
        problem = Problem(out=out, probabilities=probabilities, label_smoothing=0.1, reduction=reduction)
        ours, torchs = problem.call(linear_cross_entropy), problem.call(F.linear_cross_entropy)
        upstream = torch.randn_like(torchs(*problem.values()))
        actual = value_and_gradients(ours, problem.values(), upstream)
        expected = value_and_gradients(torchs, problem.values(), upstream)
        for a, e in zip(actual, expected, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
            assert_near(a, e, scale=100)


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", ["index", "few classes", "large logits", "smoothing", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@not_emulated
def test_16_bit_gradients_are_no_less_accurate_than_with_logits(dtype: torch.dtype, kind: str) -> None:
    problem = Problem((300,), dtype=dtype, classes=1000, hidden=64, probabilities=kind == "probabilities")
    with torch.no_grad():
        problem.leaves["weight"] *= 1.0 if kind == "large logits" else 0.2
    if kind == "few classes":
        problem.target = problem.target % 3
    if kind == "probabilities":
        with torch.no_grad():
            problem.target.copy_((8 * problem.target.double()).softmax(1))
    smoothing = 0.1 if kind == "smoothing" else 0.0

    def unchunked(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, weight, linear_bias), target, label_smoothing=smoothing)

    exact = _gradients(problem.call(unchunked), problem.exact())
    torchs = _gradients(problem.call(unchunked), problem.values())
    ours = _gradients(
        problem.call(linear_cross_entropy, chunk_size=64, label_smoothing=smoothing), problem.values()
    )
    for name, a, t, e in zip(problem.leaves, ours, torchs, exact, strict=True):
        assert a.dtype == dtype
        assert error(a, e) <= 1.02 * error(t, e) + 1e-6, name  # 2 %: roundings are a matter of luck


def _gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves), leaves)


@cpu_only
def test_ways_without_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has none, products are float32's: closer to the truth than 16 bits can be."""
    monkeypatch.setattr(_products, "_CPU_HAS_BFLOAT16", False)
    problem = Problem((40,), dtype=torch.bfloat16, classes=4100, hidden=8, lora=True)
    exact = _gradients(problem.call(linear_cross_entropy_reference), problem.exact())
    ours = _gradients(problem.call(linear_cross_entropy, chunk_size=16), problem.values())
    for name, a, e in zip(problem.leaves, ours, exact, strict=True):
        assert error(a, e) < 2**-8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@not_emulated
def test_16_bit_layers_of_a_low_rank(dtype: torch.dtype) -> None:
    """Rows of very different weights, for which float16 needs factors of its own on a GPU."""
    problem = Problem((40,), dtype=dtype, classes=410, hidden=8, lora=True, row_weight=True)
    with torch.no_grad():
        problem.leaves["row_weight"][::3] *= 2**-10
        problem.leaves["row_weight"][5] = 0
    exact = _gradients(problem.call(linear_cross_entropy_reference), problem.exact())
    ours = _gradients(problem.call(linear_cross_entropy, chunk_size=16), problem.values())
    for name, a, e in zip(problem.leaves, ours, exact, strict=True):
        assert error(a, e) < (2**-6 if dtype == torch.bfloat16 else 2**-9), name
        if name == "input":
            for row in range(0, 40, 3):
                assert error(a[row], e[row]) < 2**-6, row


@not_emulated
def test_rows_of_float16_keep_their_range() -> None:
    """What a GPU multiplies in place of float32 gradients."""
    grad = torch.randn(5, 300) * torch.tensor([2.0**-90, 2.0**-20, 1.0, 2.0**20, 0.0])[:, None]
    wild = torch.randn(2, 300)
    wild[0, 7], wild[1, 11] = float("inf"), float("nan")
    values, factor = _products.as_operand(torch.cat([grad, wild]), torch.float16)
    assert values.dtype == torch.float16
    for row in range(4):
        assert error(values[row].double() * factor[row], grad[row].double()) < 2**-11, row
        assert 2**14 <= values[row].abs().max() <= 2**15
    assert not values[4].any() and factor[4] < factor[:4].min()
    assert values[5].isinf().sum() == 1 and values[5, 7] == float("inf") and not values[5].isnan().any()
    assert values[6].isnan().sum() == 1 and values[6, 11].isnan()


def test_float16_gradients_under_a_loss_scale() -> None:
    problem = Problem((64,), dtype=torch.float16, classes=500, hidden=16)
    exact = _gradients(problem.call(linear_cross_entropy_reference), problem.exact())
    loss = problem.call(linear_cross_entropy)(*problem.values())
    scaled = torch.autograd.grad(loss, problem.values(), torch.tensor(1024.0, dtype=torch.float16))
    for name, a, e in zip(problem.leaves, scaled, exact, strict=True):
        assert error(a.double() / 1024, e) < 2**-9, name


@each_reduction
def test_nothing_to_average(reduction: str) -> None:
    for batch, ignored in (((4,), True), ((0,), False)):
        for empty in ("nan", "zero"):
            problem = Problem(batch, reduction=reduction, empty=empty)
            if ignored:
                problem.target.fill_(-100)
            loss = problem.call(linear_cross_entropy)(*problem.values())
            grads = torch.autograd.grad(loss.sum(), problem.values())
            nan = reduction == "mean" and empty == "nan"
            assert loss.isnan().all() if nan else (loss == 0).all()
            assert all((g == 0).all() for g in grads) or nan


def test_empty_zero_of_infinite_logits() -> None:
    problem = Problem(empty="zero", normalizer=torch.tensor(0.0))
    with torch.no_grad():
        problem.leaves["bias"][3] = torch.inf
    for loss, *grads in [value_and_gradients(problem.call(linear_cross_entropy), problem.values())]:
        assert loss == 0
        assert all((g == 0).all() for g in grads)


@each_reduction
def test_ignored_rows_may_hold_anything(reduction: str) -> None:
    problem = Problem(reduction=reduction)
    problem.target[[1, 4]] = -100
    expected = value_and_gradients(problem.call(linear_cross_entropy), problem.values())
    with torch.no_grad():
        problem.leaves["input"][[1, 4]] = torch.nan
    actual = value_and_gradients(problem.call(linear_cross_entropy, chunk_size=2), problem.values())
    if torch.get_default_device().type == "cpu":  # where such rows enter no product
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, scale=10)


def test_bitwise_the_same_from_run_to_run() -> None:
    problem = Problem((64,), dtype=torch.float32, classes=700, hidden=32)
    function = problem.call(linear_cross_entropy, chunk_size=24)
    first, second = (value_and_gradients(function, problem.values()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@not_emulated
def test_memory_layouts() -> None:
    problem = Problem((6, 4), dtype=torch.float64)
    expected = value_and_gradients(problem.call(linear_cross_entropy), problem.values())
    leaves = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in problem.values()]
    leaves = [t.requires_grad_() for t in leaves]
    problem.target = problem.target.t().contiguous().t()
    actual = value_and_gradients(problem.call(linear_cross_entropy), tuple(leaves))
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, scale=10)


# --------------------------------------------------------------------------------------------------
# Any backward


def test_every_backward_is_right() -> None:
    problem = Problem(z_loss=0.1, chunk_size=3)
    loss = problem.call(linear_cross_entropy)(*problem.values())
    first = torch.autograd.grad(loss, problem.values(), retain_graph=True)
    kept = [g.clone() for g in first]
    third = torch.autograd.grad(loss, problem.values(), torch.tensor(-3.0), retain_graph=True)
    again = torch.autograd.grad(loss, problem.values())
    for a, b, c, k in zip(first, third, again, kept, strict=True):
        assert torch.equal(a, k)  # no later backward writes to what an earlier one gave
        assert_near(b, -3 * k, scale=10)
        assert torch.equal(c, k)


def test_a_second_backward_has_to_be_asked_for_as_ever() -> None:
    problem = Problem(dtype=torch.float32)
    loss = problem.call(linear_cross_entropy)(*problem.values())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@cpu_only
def test_grad_scaler() -> None:
    """float16 gradients are the loss scale's multiples, and a step in which they overflow is left out."""
    problem = Problem((64,), dtype=torch.float16, classes=500, hidden=16)
    exact = _gradients(problem.call(linear_cross_entropy_reference), problem.exact())
    masters = [leaf.detach().float().requires_grad_() for leaf in problem.values()]
    optimizer = torch.optim.SGD(masters, lr=1.0)
    for scale, steps in ((2.0**10, True), (2.0**40, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = [m.detach().clone() for m in masters]
        loss = problem.call(linear_cross_entropy, out_dtype=torch.float32)(*(m.half() for m in masters))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale if steps else scale / 2)
        for m, b, e in zip(masters, before, exact, strict=True):
            assert error(b - m.detach(), e) < 2**-8 if steps else torch.equal(b, m)


def test_accumulates_into_grad() -> None:
    problem = Problem()
    for _ in range(2):
        problem.call(linear_cross_entropy)(*problem.values()).backward()
    expected = _gradients(problem.call(linear_cross_entropy_reference), problem.values())
    for leaf, e in zip(problem.values(), expected, strict=True):
        assert_near(leaf.grad, 2 * e, scale=10)


def test_changed_operands_are_noticed() -> None:
    for name in ("input", "weight"):
        problem = Problem()
        values = {k: v * 1 for k, v in problem.leaves.items()}
        loss = problem.call(linear_cross_entropy)(*values.values())
        with torch.no_grad():
            values[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_reduction
def test_tied_weight(reduction: str) -> None:
    """The input is made of the head's own weight, as with tied embeddings, to second order."""
    tokens, mix = torch.randint(0, C, (7,)), torch.randn(H, H, dtype=torch.float64)
    weight = torch.randn(C, H, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (7,))
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = function(weight[tokens] @ mix, weight, target, reduction=reduction).square().sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        results.append((first, torch.autograd.grad(first.square().sum(), weight)[0]))
    for a, e in zip(*results, strict=True):
        assert_near(a, e, scale=1000)


@pytest.mark.parametrize("use_reentrant", [True, False])
@not_emulated
def test_checkpoint_and_hooks(use_reentrant: bool) -> None:
    problem = Problem(z_loss=0.1)
    function = problem.call(linear_cross_entropy)
    expected = _gradients(function, problem.values())
    checkpoint(function, *problem.values(), use_reentrant=use_reentrant).backward()
    for leaf, e in zip(problem.values(), expected, strict=True):
        assert torch.equal(leaf.grad, e)
    with torch.autograd.graph.save_on_cpu():
        loss = function(*problem.values())
    for a, e in zip(torch.autograd.grad(loss, problem.values()), expected, strict=True):
        assert torch.equal(a, e)


# --------------------------------------------------------------------------------------------------
# The least work


def products(function: Callable[[], Any]) -> int:
    """Matrix products that a call makes."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "lossops::multiply_")
    return sum(event.count for event in seen.key_averages() if event.key in names)


def needing(problem: Problem, *names: str) -> Problem:
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(name in names)
    return problem


@cpu_only
def test_products() -> None:
    def steps(*names: str, ignored: int = 0, reduction: str = "mean") -> int:
        problem = needing(Problem((8,), dtype=torch.float32), *names)
        problem.target[:ignored] = -100

        def step() -> None:
            loss = problem.call(linear_cross_entropy, chunk_size=2, reduction=reduction)(*problem.values())
            if names:
                loss.sum().backward()

        return products(step)

    chunks = 4
    assert steps("input", "weight", "bias") == 3 * chunks
    assert steps("input") == 2 * chunks
    assert steps("weight") == 2 * chunks
    assert steps("bias") == chunks
    assert steps() == chunks
    assert steps("input", "weight", ignored=5) == 3 * 2
    assert steps("input", "weight", ignored=8) == 0
    assert steps("input", "weight", reduction="none") == 4 * chunks
    assert steps("input", reduction="none") == 3 * chunks


@cpu_only
def test_products_of_compiled_code() -> None:
    """No backward that computes logits once more, as it would for metrics."""
    problem = Problem((8,), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(problem.call(linear_cross_entropy, chunk_size=2), fullgraph=True)
    compiled(*problem.values()).backward()
    assert products(lambda: compiled(*problem.values()).backward()) == 3 * 4


@cpu_only
def test_frozen_base_of_lora() -> None:
    problem = needing(Problem((8,), dtype=torch.float32, lora=True), "a", "b")
    problem.call(linear_cross_entropy)(*problem.values()).backward()
    assert problem.leaves["weight"].grad is None
    a, b = problem.leaves["a"], problem.leaves["b"]
    merged = problem.leaves["weight"] + 0.5 * b @ a
    loss = F.cross_entropy(F.linear(problem.leaves["input"], merged, problem.leaves["bias"]), problem.target)
    for leaf, expected in zip((a, b), torch.autograd.grad(loss, (a, b)), strict=True):
        assert_near(leaf.grad, expected, scale=100)


def largest_block(function: Callable[[], Any]) -> int:
    """Bytes of the largest allocation of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    return max(event.self_cpu_memory_usage for event in seen.events())


@each_reduction
@cpu_only
def test_a_merged_weight_is_never_built(reduction: str) -> None:
    problem = needing(Problem((8,), dtype=torch.float32, lora=True, classes=1000, hidden=200), "a", "b")
    function = problem.call(linear_cross_entropy, chunk_size=2, reduction=reduction)
    weight = problem.leaves["weight"].nbytes
    assert 8000 <= largest_block(lambda: function(*problem.values()).sum().backward()) < weight / 10
    merged = problem.call(linear_cross_entropy_reference, reduction=reduction)
    assert largest_block(lambda: merged(*problem.values())) >= weight  # or this test shows nothing


@cpu_only
def test_shift_copies_no_input() -> None:
    problem = needing(Problem((2, 512), dtype=torch.float32, shift=True, classes=3, hidden=64), "weight")
    function = problem.call(linear_cross_entropy, chunk_size=16)
    step = largest_block(lambda: function(*problem.values()).backward())
    assert step < problem.leaves["input"].nbytes / 4


def test_default_chunk() -> None:
    assert default_chunk(4096, 32000, 512, gpu=False) == 512
    assert default_chunk(4096, 32000, 512, gpu=True) == 4096
    assert default_chunk(8192, 128256, 4096, gpu=True) == 4096
    assert default_chunk(10, 7, 5, gpu=False) == 16
    assert default_chunk(1000, 2 * CHUNK_ELEMENTS, 1, gpu=False) == 1
    for rows, width, features in itertools.product((1, 17, 1000, 12345), (1, 1000, 128256, 10**6), (1, 999)):
        chunk = default_chunk(rows, width, features, gpu=False)
        assert chunk >= 1 and (chunk * width <= CHUNK_ELEMENTS or chunk in (1, 16))
        chunk = default_chunk(rows, width, features, gpu=True)
        assert chunk >= 1 and (chunk * width <= max(GPU_CHUNK_ELEMENTS, width * features) or chunk in (1, 16))


@cpu_only
def test_saves_nothing_of_the_logits_size() -> None:
    problem = Problem((64,), dtype=torch.float32, classes=512, hidden=4)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        for reduction in REDUCTIONS:
            problem.call(linear_cross_entropy, reduction=reduction)(*problem.values())
    assert 0 < max(saved) <= 512 * 4


PEAK = """
import sys, torch
from _measure import Cpu
from lossops import linear_cross_entropy

way, rows, classes, features, dtype = sys.argv[1], 2048, 16384, 16, torch.float32
if way == "bfloat16":
    rows, classes, features, dtype = 1024, 1024, 8192, torch.bfloat16
meter = Cpu()
meter.map_each_block(True)
x, weight = (torch.randn(n, features, dtype=dtype, requires_grad=True) for n in (rows, classes))
target = torch.randint(0, classes, (rows,))

def loss(x, weight):
    reduction = "none" if way == "none" else "mean"
    return linear_cross_entropy(x, weight, target, reduction=reduction, chunk_size=64)

def step():
    if way == "jvp":
        torch.func.jvp(loss, (x.detach(), weight.detach()), (x.detach(), weight.detach()))
        return
    grads = torch.autograd.grad(loss(x, weight).sum(), (x, weight), create_graph=way == "create_graph")
    if way == "create_graph":
        torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight))

step()  # imports what it needs
print(meter.peak(step, [x, weight], kept=0))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="wants Linux's /proc")
@pytest.mark.parametrize("way", ["mean", "none", "create_graph", "jvp", "bfloat16"])
@cpu_only
def test_peak_memory(way: str) -> None:
    """A chunk and what is of the size of operands and gradients, in every way to a derivative.

    In a process of its own: one that has profiled keeps more.
    """
    bench = Path(__file__).parents[1] / "bench"
    command = [sys.executable, "-c", PEAK, way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(bench), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    logits = 4 * 2048 * 16384  # 134 MB; a chunk is 4 MB
    # Of bfloat16 the gradients' sums in float32, which go back as the gradients come.
    sums = 2 * 4 * 1024 * 8192
    assert int(done.stdout) < (1.2 * sums if way == "bfloat16" else logits / 2)


@cpu_only
def test_sums_in_the_place_of_gradients() -> None:
    """Sums of 16-bit gradients, large enough to go back block by block, are there for a second backward."""
    x = torch.randn(40, 257).bfloat16().requires_grad_()
    weight = torch.randn(3 * 2**13 + 5, 257).mul(0.1).bfloat16().requires_grad_()
    target = torch.randint(len(weight), (40,))

    def grads(retain_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=retain_graph)

    loss = linear_cross_entropy(x, weight, target)
    twice = grads(True), grads(False)
    loss = linear_cross_entropy(x, weight, target)
    once = grads(False)
    for kept, kept_again, rounded in zip(*twice, once, strict=True):
        assert kept.any()
        assert torch.equal(kept, kept_again)
        assert torch.equal(kept, rounded)


# --------------------------------------------------------------------------------------------------
# Derivatives of every order and kind


@each_reduction
@pytest.mark.parametrize("given", ["plain", "family", "lora"])
@not_emulated
def test_gradcheck(given: str, reduction: str) -> None:
    for out in ((), (2,)):
        problem = Problem((4,), out, classes=5, hidden=3, reduction=reduction, **OPTIONS[given])
        function = problem.call(linear_cross_entropy, chunk_size=3)
        torch.autograd.gradcheck(
            function, problem.values(), check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )
        torch.autograd.gradgradcheck(function, problem.values(), fast_mode=True)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
@not_emulated
def test_transforms(transform: Callable[..., Any]) -> None:
    for probabilities in (False, True):
        problem = Problem((4,), probabilities=probabilities, classes=5, hidden=3, **OPTIONS["family"])
        values = tuple(v.detach() for v in problem.values())
        which = tuple(range(len(values)))
        actual = transform(problem.call(linear_cross_entropy, chunk_size=3), which)(*values)
        expected = transform(problem.call(linear_cross_entropy_reference), which)(*values)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@not_emulated
def test_vmap_of_grad() -> None:
    """Gradients of each sample, and of each of several batches."""
    problem = Problem((6,))
    x, weight = problem.leaves["input"].detach(), problem.leaves["weight"].detach()

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, target: function(x, weight, target, z_loss=0.1)

    each = vmap(grad(loss(linear_cross_entropy), 1), (0, None, 0))(x, weight, problem.target)
    for k in range(6):
        one = loss(linear_cross_entropy_reference)
        expected = grad(one, 1)(x[k : k + 1], weight, problem.target[k : k + 1])
        assert_near(each[k], expected, scale=100)
    several = torch.randn(3, 6, H, dtype=torch.float64)
    batched = vmap(grad(loss(linear_cross_entropy), (0, 1)), (0, None, None))(several, weight, problem.target)
    for k in range(3):
        expected = grad(loss(linear_cross_entropy_reference), (0, 1))(several[k], weight, problem.target)
        for a, e in zip(batched, expected, strict=True):
            assert_near(a[k], e, scale=100)


@not_emulated
def test_third_order() -> None:
    problem = Problem((3,), classes=4, hidden=2, z_loss=0.1)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        value = problem.call(function)(*problem.values())
        for _ in range(3):
            grads = torch.autograd.grad(value, problem.values(), create_graph=True)
            value = sum((g.square() * g).sum() for g in grads)
        results.append(value)
    assert_near(*results, scale=100)


# --------------------------------------------------------------------------------------------------
# Compilers and fake tensors


@each_reduction
@not_emulated
def test_compile(reduction: str) -> None:
    def model(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        loss = linear_cross_entropy(
            torch.tanh(x), weight, target, linear_bias=bias, reduction=reduction, z_loss=0.1, chunk_size=3
        )
        return 2 * loss

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 9):
        problem = Problem((rows,))
        leaves, target = problem.values(), problem.target
        upstream = torch.randn_like(model(*leaves, target))
        actual = value_and_gradients(lambda *v, t=target: compiled(*v, t), leaves, upstream)
        expected = value_and_gradients(lambda *v, t=target: model(*v, t), leaves, upstream)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, scale=10)


VMAPPED: dict[str, Callable[..., Any]] = {
    "loss": lambda loss: vmap(loss, (0, None, 0)),
    "gradient": lambda loss: vmap(grad(loss, (0, 1)), (0, None, 0)),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("way", VMAPPED)
@each_reduction
@not_emulated
def test_vmap_in_compiled_code(reduction: str, way: str, needs_grad: bool) -> None:
    """The graph breaks, and the call runs uncompiled; fullgraph=True says why not."""

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result = linear_cross_entropy(x, weight, target, reduction=reduction, chunk_size=3)
        return result if way == "loss" else result.sum()

    function = VMAPPED[way](loss)
    x, weight = torch.randn(3, 7, H, requires_grad=needs_grad), torch.randn(C, H)
    target = torch.randint(0, C, (3, 7))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    actual, expected = compiled(x, weight, target), function(x, weight, target)
    torch.testing.assert_close(actual, expected)
    if needs_grad and way == "loss":
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="linear_cross_entropy is not traced under vmap"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight, target)


@cpu_only
def test_compile_with_inductor_and_metrics() -> None:
    def model(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss, metrics = linear_cross_entropy_with_metrics(x, weight, target, chunk_size=3)
        return loss + 0.1 * metrics.entropy.mean() + metrics.correct.double().mean()

    torch._dynamo.reset()
    problem = Problem()
    leaves = problem.values()[:2]
    compiled = torch.compile(model, fullgraph=True)
    actual = value_and_gradients(lambda *v: compiled(*v, problem.target), leaves)
    expected = value_and_gradients(lambda *v: model(*v, problem.target), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, scale=10)


@each_reduction
@not_emulated
def test_meta(reduction: str) -> None:
    problem = Problem((2, 4), (3,), shift=True, reduction=reduction)
    values = value_and_gradients(problem.call(linear_cross_entropy), problem.values())
    problem.target = problem.target.to("meta")
    leaves = tuple(v.detach().to("meta").requires_grad_() for v in problem.values())
    metas = value_and_gradients(problem.call(linear_cross_entropy), leaves)
    for meta, value in zip(metas, values, strict=True):
        assert (meta.shape, meta.dtype) == (value.shape, value.dtype)


def ops() -> list[tuple[Any, ...]]:
    x, weight, target = torch.randn(7, H), torch.randn(C, H), torch.randint(0, C, (7,))
    tensors = x, weight, torch.randn(C), target, None, torch.tensor(1.5), torch.randn(2, H), torch.randn(C, 2)
    options = 0.5, C, 1.0, 3.0, -100, 0.1, True, True, 3, 0.0, "", []
    needs = [True, False, True, False, True, True, False]
    forward = torch.ops.lossops.linear_rows_forward.default
    planes = forward(*tensors, *options)[0]
    backward = torch.ops.lossops.linear_rows_backward.default
    total = torch.ops.lossops.linear_total.default
    return [
        (forward, tensors, options),
        (backward, (torch.randn_like(planes), planes, *tensors), (*options, needs)),
        (total, (torch.rand(7), 0.1, *tensors), (*options, needs)),
    ]


@pytest.mark.parametrize("which", range(3))
@cpu_only
def test_opcheck(which: int) -> None:
    op, tensors, options = ops()[which]
    torch.library.opcheck(op, (*tensors, *options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@cpu_only
def test_a_gpu_is_not_waited_for(dtype: torch.dtype) -> None:
    """Every pass on meta tensors, of which nobody can read a value: so a CUDA graph captures them."""
    _, tensors, options = ops()[0]
    named = dict(zip(_linear_rows.Head._fields, tensors, strict=False))
    for name, tensor in named.items():
        if tensor is not None:
            cast = name in ("x", "weight", "bias", "lora_a", "lora_b")
            named[name] = tensor.to("meta", dtype if cast else tensor.dtype)
    needs = [True] * 3 + [False] + [True] * 3
    given = (*named.values(), *options)
    planes, *_ = _linear_rows._rows_forward_impl(*given)
    grads = _linear_rows._rows_backward_impl(planes, planes, *given, needs)
    _, _, _, *sums = _linear_rows._total_impl(planes[0], 0.1, *given, needs)
    assert grads[1].shape == sums[1].shape == named["weight"].shape
    assert (grads[1].dtype, sums[1].dtype) == (dtype, torch.float32)


# --------------------------------------------------------------------------------------------------
# Metrics, shift, filter, autocast


@each_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_metrics(probabilities: bool, reduction: str) -> None:
    problem = Problem((7,), probabilities=probabilities, softcap=5.0, z_loss=0.1, label_smoothing=0.1)

    def with_logits(x: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor, **options: Any) -> Any:
        return cross_entropy_with_metrics(F.linear(x, weight, linear_bias), target, **options)

    results = []
    for function in (linear_cross_entropy_with_metrics, with_logits):
        options = {"chunk_size": 3} if function is linear_cross_entropy_with_metrics else {}
        call = problem.call(function, reduction=reduction, **options)
        loss, metrics = call(*problem.values())
        mixed = loss.sum() + (metrics.lse * metrics.entropy + metrics.logprob - metrics.z_loss).sum()
        alone = (metrics.lse * metrics.entropy).sum()
        grads = torch.autograd.grad(mixed, problem.values(), retain_graph=True)
        grads += torch.autograd.grad(alone, problem.values(), allow_unused=True, materialize_grads=True)
        results.append([loss, *metrics[:6], *grads])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_shift_in_rows() -> None:
    problem = Problem((2, 4), (3,), shift=True, ignore=True)
    call = problem.call(linear_cross_entropy_with_metrics, reduction="none")
    loss, metrics = call(*problem.values())
    assert loss.shape == metrics.predicted.shape == metrics.filtered.shape == (2, 3, 3)
    expected = problem.call(linear_cross_entropy_reference, reduction="none")(*problem.values())
    assert_near(loss, expected, scale=10)


def test_shift_of_one_position() -> None:
    problem = Problem((3, 1), shift=True)
    assert problem.call(linear_cross_entropy, reduction="none")(*problem.values()).shape == (3, 0)
    assert problem.call(linear_cross_entropy)(*problem.values()).isnan()


@each_reduction
@cpu_only
def test_gradient_filter(reduction: str) -> None:
    bound = 2**-6
    problem = Problem((40,), dtype=torch.float64, classes=200, reduction=reduction, ignore=True)
    with torch.no_grad():
        problem.leaves["weight"] *= 3
    options = {"gradient_filter": bound, "chunk_size": 8}
    loss, metrics = problem.call(linear_cross_entropy_with_metrics, **options)(*problem.values())
    exact = problem.call(linear_cross_entropy_reference)(*problem.values())
    assert_near(loss, exact, scale=10)
    upstream = torch.ones_like(loss)
    actual = torch.autograd.grad(loss, problem.values(), upstream)
    expected = torch.autograd.grad(exact, problem.values(), upstream)
    p = F.linear(*problem.values()).softmax(1)
    dropped = torch.zeros_like(p, dtype=torch.bool)
    counted = problem.target != -100
    for rows in counted.nonzero().squeeze(1).split(8):
        least = p[rows].amax(0) < bound
        least[problem.target[rows]] = least[0] = False  # one class is always left
        dropped[rows] = least
    assert 0.01 < (p * dropped)[counted].sum(1).mean() < 0.5  # or this test shows nothing
    assert_near(metrics.filtered, (p * dropped).sum(1) * counted, scale=10)
    # What is missing in the gradients is exactly what was dropped.
    missing = p * dropped / (counted.sum() if reduction == "mean" else 1)
    x, weight = problem.leaves["input"], problem.leaves["weight"]
    for a, e, m in zip(actual, expected, (missing @ weight, missing.t() @ x, missing.sum(0)), strict=True):
        assert_near(a, e - m, scale=100)


@pytest.mark.parametrize("given", [{"label_smoothing": 0.1}, {"probabilities": True}, {"out": (2,)}])
def test_gradient_filter_where_it_has_no_effect(given: dict[str, Any]) -> None:
    problem = Problem(**given)
    function = problem.call(linear_cross_entropy, gradient_filter=0.9)
    for a, e in zip(
        value_and_gradients(function, problem.values()),
        value_and_gradients(problem.call(linear_cross_entropy), problem.values()),
        strict=True,
    ):
        assert torch.equal(a, e)
    assert any("gradient_filter" in text for text in lossops.explain(function, *problem.values()).notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cpu_only
def test_autocast(dtype: torch.dtype) -> None:
    problem = Problem((16,), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        loss = problem.call(linear_cross_entropy)(*problem.values())
        torchs = F.cross_entropy(F.linear(*problem.values()), problem.target)
    assert loss.dtype == torchs.dtype == torch.float32
    exact = _gradients(problem.call(linear_cross_entropy_reference), problem.exact())
    for a, e in zip(torch.autograd.grad(loss, problem.values()), exact, strict=True):
        assert a.dtype == torch.float32
        assert error(a, e) < 2**-6


def test_modes_without_gradients() -> None:
    problem = Problem()
    expected = problem.call(linear_cross_entropy_reference)(*problem.values()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = problem.call(linear_cross_entropy)(*problem.values())
        assert not loss.requires_grad
        assert_near(loss, expected, scale=10)


@not_emulated
def test_explain() -> None:
    problem = Problem((7,), dtype=torch.float32)
    explanation = lossops.explain(problem.call(linear_cross_entropy, chunk_size=3), *problem.values())
    assert any("3 chunks of at most 3 rows, products in torch.float32" in n for n in explanation.notes)
    ops = [k.op for k in explanation.kernels if k.op != "multiply"]
    assert ops[:2] == ["cross_entropy_rows_forward", "cross_entropy_rows_backward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_products", [False, True])
@cpu_only
def test_explain_names_the_products_dtype(
    dtype: torch.dtype, has_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 goes by float32 everywhere, bfloat16 where the processor has no products of it."""
    monkeypatch.setattr(_products, "_CPU_HAS_BFLOAT16", has_products)
    problem = Problem(dtype=dtype)
    (text,) = lossops.explain(problem.call(linear_cross_entropy), *problem.values()).notes
    widened = dtype == torch.float16 or not has_products
    assert text.endswith(f"products of {dtype} in torch.float32" if widened else f"products in {dtype}")


@not_emulated
def test_explain_says_that_a_gpu_multiplies_ignored_rows() -> None:
    x, weight, target = torch.randn(7, H), torch.randn(C, H), torch.randint(0, C, (7,))
    on_cpu, elsewhere = (
        lossops.explain(linear_cross_entropy, *(t.to(device) for t in (x, weight, target))).notes
        for device in ("cpu", "meta")
    )
    assert elsewhere == (f"{on_cpu[0]}; ignored rows enter them",)


# --------------------------------------------------------------------------------------------------
# Errors and the module


WRONG: dict[str, tuple[type[Exception], str, Callable[[Tensor, Tensor, Tensor], Any]]] = {
    "0-d input": (
        RuntimeError,
        "input with dimensionality at least 1",
        lambda x, w, t: linear_cross_entropy(x[0, 0], w, t),
    ),
    "1-d weight": (
        RuntimeError,
        "expected linear_weight with dimensionality at least 2, got 1",
        lambda x, w, t: linear_cross_entropy(x, w[0], t),
    ),
    "features": (
        RuntimeError,
        "expected equal input and linear_weight last dimensions",
        lambda x, w, t: linear_cross_entropy(x, w[:, 1:], t),
    ),
    "bias": (
        RuntimeError,
        re.escape("expected linear_bias shape (11,), got (10,)"),
        lambda x, w, t: linear_cross_entropy(x, w, t, linear_bias=w[1:, 0]),
    ),
    "unbatched positions": (
        RuntimeError,
        "requires batched input",
        lambda x, w, t: linear_cross_entropy(x[0], w.view(C, 1, H), t[:1]),
    ),
    "dtypes": (
        RuntimeError,
        "to have the same dtype, but got: torch.float32 != torch.float64",
        lambda x, w, t: linear_cross_entropy(x, w.double(), t),
    ),
    "batch": (
        ValueError,
        re.escape("expected target of shape (7,)"),
        lambda x, w, t: linear_cross_entropy(x, w, t[1:]),
    ),
    "float target": (
        RuntimeError,
        "expected target dtype to be Long, Int or Byte",
        lambda x, w, t: linear_cross_entropy(x, w, t.float()),
    ),
    "integer probabilities": (
        RuntimeError,
        "Expected floating point type for target with class probabilities",
        lambda x, w, t: linear_cross_entropy(x, w, torch.ones(7, C, dtype=torch.int64)),
    ),
    "ignored probabilities": (
        RuntimeError,
        "ignore_index cannot be specified when target contains probabilities",
        lambda x, w, t: linear_cross_entropy(x, w, torch.ones(7, C), ignore_index=-100),
    ),
    "class weight": (
        RuntimeError,
        "weight tensor should be defined either for all 11 classes",
        lambda x, w, t: linear_cross_entropy(x, w, t, weight=w[1:, 0]),
    ),
    "class weight with a gradient": (
        RuntimeError,
        "not differentiable with respect to argument 'weight'",
        lambda x, w, t: linear_cross_entropy(x, w, t, weight=w[:, 0].detach().requires_grad_()),
    ),
    "smoothing": (
        RuntimeError,
        "label_smoothing must be between 0.0 and 1.0",
        lambda x, w, t: linear_cross_entropy(x, w, t, label_smoothing=1.5),
    ),
    "reduction": (
        ValueError,
        "is not a valid value for reduction",
        lambda x, w, t: linear_cross_entropy(x, w, t, reduction="avg"),
    ),
    "chunk": (
        ValueError,
        "expected chunk_size to be a positive int or None, got 0",
        lambda x, w, t: linear_cross_entropy(x, w, t, chunk_size=0),
    ),
    "filter": (
        ValueError,
        "expected gradient_filter to be a float between 0 and 1",
        lambda x, w, t: linear_cross_entropy(x, w, t, gradient_filter=2.0),
    ),
    "shift of one row": (
        ValueError,
        "shift=True wants input of shape",
        lambda x, w, t: linear_cross_entropy(x[0], w, t[0], shift=True),
    ),
    "row weight": (
        ValueError,
        "expected row_weight of shape",
        lambda x, w, t: linear_cross_entropy(x, w, t, row_weight=x[:, 1:]),
    ),
    "lora": (
        TypeError,
        "expected lora to be",
        lambda x, w, t: linear_cross_entropy(x, w, t, lora=(x, w)),
    ),
    "lora's shapes": (
        RuntimeError,
        re.escape("expected lora to be A of shape (r, 5) and B of shape (11, 'r')"),
        lambda x, w, t: linear_cross_entropy(x, w, t, lora=(x[:2], w[:, :3], 1.0)),
    ),
    "integers": (
        NotImplementedError,
        "not implemented for input of dtype torch.int64",
        lambda x, w, t: linear_cross_entropy(x.long(), w.long(), t),
    ),
    "no tensor": (
        TypeError,
        "expected input to be a Tensor, got list",
        lambda x, w, t: linear_cross_entropy([1.0], w, t),
    ),
    "out_dtype": (
        TypeError,
        "expected out_dtype to be",
        lambda x, w, t: linear_cross_entropy(x, w, t, out_dtype=torch.int64),
    ),
}


@pytest.mark.parametrize("name", WRONG)
@cpu_only
def test_errors_are_sentences(name: str) -> None:
    kind, text, call = WRONG[name]
    x, weight, target = torch.randn(7, H), torch.randn(C, H), torch.randint(0, C, (7,))
    with pytest.raises(kind, match=text) as raised:
        call(x, weight, target)
    assert "linear_cross_entropy: " in str(raised.value) or name == "reduction"


def test_class_index_out_of_range(device: str) -> None:
    problem = Problem((9,))
    problem.target[7] = C
    for needs_grad in (True, False):
        leaves = tuple(v.detach().requires_grad_(needs_grad) for v in problem.values())
        with raises_index_error(device, match="11"):
            problem.call(linear_cross_entropy, chunk_size=4)(*leaves)


MODULES: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True, "weight": torch.rand(C) + 0.5, "ignore_index": 3},
    {"out_features": (2, 3), "bias": True, "reduction": "none", "label_smoothing": 0.1},
)


@pytest.mark.parametrize("given", range(len(MODULES)))
@cpu_only
def test_module(given: int) -> None:
    arguments = copy.deepcopy(MODULES[given])
    module = LinearCrossEntropyLoss(H, C, **arguments)
    x = torch.randn(7, H)
    target = torch.randint(0, C, (7, *arguments.get("out_features", ())))
    expected = module(x, target)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(H, C, **copy.deepcopy(arguments))
        theirs.load_state_dict(module.state_dict())
        assert_near(expected, theirs(x, target).double(), scale=10)
        for name in ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"):
            assert getattr(module, name) == getattr(theirs, name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, target), expected)
    expected.sum().backward()
    assert module.linear.weight.grad is not None


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none of its own before 2.13")
@cpu_only
def test_signatures_are_torchs_and_more() -> None:
    pairs = (
        (linear_cross_entropy, F.linear_cross_entropy),
        (LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss),
    )
    for ours, torchs in pairs:
        taken = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(torchs).parameters.items():
            assert (taken[name].kind, taken[name].default) == (parameter.kind, parameter.default), name
    x, weight, target = torch.randn(7, H), torch.randn(C, H), torch.randint(0, C, (7,))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    assert "4 chunks of at most 2 rows" in str(
        lossops.explain(linear_cross_entropy, x, weight, target, options=options)
    )


@cpu_only
def test_module_refuses_what_torchs_does() -> None:
    with pytest.raises(RuntimeError, match="expected weight shape to be"):
        LinearCrossEntropyLoss(H, C, weight=torch.ones(C + 1))
    with pytest.raises(RuntimeError, match="expected label_smoothing to be in range"):
        LinearCrossEntropyLoss(H, C, label_smoothing=2.0)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none of its own before 2.13")
@cpu_only
def test_fused_losses_routes_torchs() -> None:
    module = torch.nn.LinearCrossEntropyLoss(H, C, bias=True)
    x, target = torch.randn(7, H), torch.randint(0, C, (7,))
    expected = module(x, target)
    with lossops.fused_losses(strict=True) as mode:
        assert_near(module(x, target), expected.double())
        with pytest.raises(NotImplementedError, match="linear_weight has dtype"):
            F.linear_cross_entropy(x, torch.ones(C, H, dtype=torch.complex64), target)
    assert mode.routed == {"linear_cross_entropy": 1}
