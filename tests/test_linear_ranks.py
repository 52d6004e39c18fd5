"""The linear head over several processes: every rank against the unsharded float64 reference."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from devices import CPU, EMULATED, on, using
from ranks import Ranks, assert_none_wrong, forget_agreements, run_examples
from tolerances import assert_near
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as DShard
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

import lossops
from lossops.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from lossops.linear_cross_entropy import linear_cross_entropy_reference

SIZES = (2, 3, 4)
HIDDEN = 5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(4, limit=30)
    yield group
    group.close()


class Example:
    """One call, drawn alike on every rank: whole tensors, and what this rank is given of them."""

    SHARDED = ("weight", "bias", "lora_b")

    def __init__(self, seed: int, group: dist.ProcessGroup) -> None:
        self.group, self.rank, size = group, dist.get_rank(group), dist.get_world_size(group)
        draw = random.Random(seed)
        torch.manual_seed(seed)
        classes = [draw.choice([0, 1, 3, 7]) for _ in range(size)]
        classes[draw.randrange(size)] += 2
        self.start, self.classes, total = sum(classes[: self.rank]), classes[self.rank], sum(classes)
        batch = draw.choice([(7,), (2, 4), ()])
        out = draw.choice([(), (2,)]) if batch else ()
        self.dim = len(batch)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        self.values = {"input": drawn(*batch, HIDDEN), "weight": drawn(total, *out, HIDDEN)}
        if draw.random() < 0.5:
            self.values["bias"] = drawn(total, *out)
        if draw.random() < 0.3:
            self.values |= {"lora_a": drawn(2, HIDDEN), "lora_b": drawn(total, *out, 2)}
        if draw.random() < 0.4:
            self.values["row_weight"] = torch.rand((*batch, *out), dtype=torch.float64)
        if draw.random() < 0.3:
            self.values["logit_scale"] = torch.tensor(0.75, dtype=torch.float64)
        self.options: dict[str, Any] = {"reduction": draw.choice(["none", "mean", "sum"])}
        self.probabilities = draw.random() < 0.4
        if self.probabilities:
            self.values["target"] = torch.rand((*batch, total, *out), dtype=torch.float64)
        else:
            self.target = torch.randint(0, total, (*batch, *out))
            if draw.random() < 0.5:
                self.target = self.target.masked_fill(torch.rand(self.target.shape) < 0.4, -100)
        for name, value in (
            ("label_smoothing", 0.1),
            ("softcap", 4.0),
            ("z_loss", 0.05),
            ("normalizer", 3.5),
        ):
            if draw.random() < 0.3:
                self.options[name] = value
        if len(batch) == 2 and draw.random() < 0.4:
            self.options["shift"] = True
        if draw.random() < 0.3:
            self.class_weight = torch.rand(total, dtype=torch.float64) + 0.5
            self.options["weight"] = self.class_weight
        self.whole_weight = draw.random() < 0.5

    def __str__(self) -> str:
        return str(self.options)

    def mine(self, name: str, whole: Tensor) -> Tensor:
        if name in self.SHARDED:
            return whole.narrow(0, self.start, self.classes)
        return whole.narrow(self.dim, self.start, self.classes) if name == "target" else whole

    def leaves(self, mine: bool) -> dict[str, Tensor]:
        return {
            name: (self.mine(name, whole) if mine else whole).detach().clone().requires_grad_()
            for name, whole in self.values.items()
        }

    def call(self, function: Any, leaves: dict[str, Tensor], **more: Any) -> Any:
        given = dict(leaves)
        target = given.pop("target") if self.probabilities else self.target
        options = {**self.options, **more}
        if "lora_a" in given:
            options["lora"] = given.pop("lora_a"), given.pop("lora_b"), 0.5
        if "bias" in given:
            options["linear_bias"] = given.pop("bias")
        if function is not linear_cross_entropy_reference:
            options |= {"group": self.group, "chunk_size": 3}
            if self.group is not None and "weight" in self.options and not self.whole_weight:
                options["weight"] = self.class_weight.narrow(0, self.start, self.classes)
        return function(given.pop("input"), given.pop("weight"), target, **options, **given)


def check_gradients(example: Example) -> None:
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    loss = example.call(linear_cross_entropy, leaves)
    expected = example.call(linear_cross_entropy_reference, exact)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    assert_near(loss.detach(), expected.detach(), scale=100, message="loss")
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream, retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()), upstream)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), upstream)
    for name, grad, other, exact_grad in zip(leaves, grads, again, exact_grads, strict=True):
        assert_near(grad, example.mine(name, exact_grad), scale=1000, message=f"gradient of {name}")
        assert torch.equal(grad, other), name


def check_second_derivatives(example: Example) -> None:
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    results = []
    for function, given in ((linear_cross_entropy, leaves), (linear_cross_entropy_reference, exact)):
        loss = example.call(function, given).square().sum()
        grads = torch.autograd.grad(loss, list(given.values()), create_graph=True)
        parts = sum(g.square().sum() for g in grads)  # what all ranks hold alike counts once
        results.append(torch.autograd.grad(parts, list(given.values())))
    for name, grad, exact_grad in zip(leaves, *results, strict=True):
        expected = example.mine(name, exact_grad)
        size = max(1.0, expected.abs().max().item() if expected.numel() else 0)
        assert_near(grad, expected, scale=1000 * size, message=f"second derivative of {name}")


def check_metrics(example: Example) -> None:
    leaves, exact = example.leaves(mine=True), example.leaves(mine=False)
    loss, metrics = example.call(linear_cross_entropy_with_metrics, leaves)
    example.group = None
    expected, exact_metrics = example.call(linear_cross_entropy_with_metrics, exact)
    assert_near(loss.detach(), expected.detach(), scale=100)
    for name in ("lse", "logprob", "entropy", "z_loss"):
        assert_near(getattr(metrics, name), getattr(exact_metrics, name), scale=100, message=name)
    for name in ("predicted", "correct"):
        assert torch.equal(getattr(metrics, name), getattr(exact_metrics, name)), name
    mixed = loss.sum() + (metrics.lse * metrics.entropy).sum()
    exact_mixed = expected.sum() + (exact_metrics.lse * exact_metrics.entropy).sum()
    grads = torch.autograd.grad(mixed, list(leaves.values()))
    exact_grads = torch.autograd.grad(exact_mixed, list(exact.values()))
    for name, g, e in zip(leaves, grads, exact_grads, strict=True):
        assert_near(g, example.mine(name, e), scale=1000, message=f"gradient of {name}")


CHECKS = {
    "gradients": check_gradients,
    "second derivatives": check_second_derivatives,
    "metrics": check_metrics,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", SIZES)
def test_as_the_unsharded_reference(ranks: Ranks, size: int, check: str) -> None:
    seeds = range(1000 * size, 1000 * size + 40)
    assert_none_wrong(ranks(run_examples, size, seeds, CHECKS[check], Example))


def messages(reduction: str, backward: bool) -> list[str]:
    torch.manual_seed(0)
    x = torch.randn(12, HIDDEN, requires_grad=True)
    weight = torch.randn(3, HIDDEN, requires_grad=True)
    group = dist.group.WORLD
    target = torch.randint(0, 12, (12,))
    options: dict[str, Any] = {"reduction": reduction, "group": group, "chunk_size": 4}
    linear_cross_entropy(x, weight, target, **options)  # the ranks agree
    with profile(activities=[ProfilerActivity.CPU]) as seen:  # a mode would not see into the op
        loss = linear_cross_entropy(x, weight, target, **options)
        if backward:
            loss.sum().backward()
    return [event.name for event in seen.events() if event.name.startswith("_c10d_functional::all")]


def test_one_gather_a_chunk(ranks: Ranks) -> None:
    for reduction, again in (("mean", 0), ("none", 3)):
        for seen in ranks(messages, reduction, True):
            assert sum("all_gather" in name for name in seen) == 3 + again
            assert sum("all_reduce" in name for name in seen) == 1


def peak_beyond_a_chunk(way: str) -> int:
    """Bytes of a step of higher order; a process that has profiled keeps more than another one."""
    sys.path.append(str(Path(__file__).parents[1] / "bench"))
    from _measure import Cpu

    rows, classes = 2048, 8192  # of each rank: 67 MB of logits; a chunk is 2 MB
    x, weight = (torch.randn(n, 16, requires_grad=True) for n in (rows, classes))
    target = torch.randint(0, 2 * classes, (rows,))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, chunk_size=64, group=dist.group.WORLD)

    def step() -> None:
        given = x.detach(), weight.detach()
        if way == "jvp":
            torch.func.jvp(loss, given, given)
        else:
            grads = torch.autograd.grad(loss(x, weight), (x, weight), create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight))

    step()  # imports what it needs
    measure = Cpu()
    measure.PEAK_SECONDS = 0  # as many readings on every rank
    return measure.peak(step, [x, weight], kept=0) or 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="wants Linux's /proc")
@pytest.mark.parametrize("way", ["create_graph", "jvp"])
def test_higher_derivatives_hold_a_chunk_of_the_logits(way: str) -> None:
    pair = Ranks(2, limit=30)
    try:
        assert all(peak < 4 * 2048 * 8192 / 2 for peak in pair(peak_beyond_a_chunk, way))
    finally:
        pair.close()


def check_transforms(probabilities: bool) -> tuple[()]:
    """Those of the whole head, and this rank's part of them."""
    rank = dist.get_rank()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x, weight, bias, target = drawn(5, HIDDEN), drawn(9, HIDDEN), drawn(9), torch.tensor([0, 8, 4, -100, 1])
    if probabilities:
        target = drawn(5, 9).softmax(1)
    values, along = (x, weight, bias), (drawn(5, HIDDEN), drawn(9, HIDDEN), drawn(9))

    def mine(x: Any) -> Any:
        def part(t: Tensor) -> Tensor:
            sharded = [dim for dim, size in enumerate(t.shape) if size == 9]
            return t.tensor_split(4, sharded[0])[rank] if sharded else t

        return tree_map(part, x)

    def loss(group: dist.ProcessGroup | None) -> Any:
        given = target if group is None else mine(target)

        def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            options = {"linear_bias": bias, "z_loss": 0.1, "chunk_size": 2, "group": group}
            value, metrics = linear_cross_entropy_with_metrics(x, weight, given, **options)
            assert probabilities or metrics.predicted.shape == (5,)
            return (value + metrics.entropy.sum()).square()

        return of

    def derivatives(loss: Any, values: Any, along: Any) -> dict[str, Any]:
        grad = torch.func.grad(loss, (0, 1, 2))
        several = torch.stack([values[0], values[0].flip(0), values[0] + 1])
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, t) for v, t in zip(values, along, strict=True)]
            tangent = forward_ad.unpack_dual(loss(*duals)).tangent
        return {
            "grad": grad(*values),
            "jvp": torch.func.jvp(loss, values, along),
            "forward mode": tangent,
            "jvp of grad": torch.func.jvp(grad, values, along)[1],
            "vmap of grad": torch.vmap(grad, (0, None, None))(several, *values[1:]),
        }

    def of_hidden(transform: Any, loss: Any, weight: Tensor, bias: Tensor) -> Tensor:
        return transform(lambda x: loss(x, weight, bias))(x)

    for transform in (torch.func.jacfwd, torch.func.hessian, torch.func.jacrev):  # which all ranks hold alike
        actual = of_hidden(transform, loss(dist.group.WORLD), *mine((weight, bias)))
        torch.testing.assert_close(actual, of_hidden(transform, loss(None), weight, bias))
    expected = derivatives(loss(None), values, along)
    actual = derivatives(loss(dist.group.WORLD), mine(values), mine(along))
    torch.testing.assert_close(actual, mine(expected), rtol=1e-9, atol=1e-11)
    return ()


@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_transforms(ranks: Ranks, probabilities: bool) -> None:
    assert ranks(check_transforms, probabilities) == [()] * 4


def compiled(reduction: str) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(1)
    x, whole = torch.randn(9, HIDDEN, dtype=torch.float64), torch.randn(8, HIDDEN, dtype=torch.float64)
    target, rank = torch.randint(0, 8, (9,)), dist.get_rank()
    x.requires_grad_()
    weight = whole[2 * rank : 2 * rank + 2].clone().requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            torch.tanh(x), weight, target, reduction=reduction, group=group, chunk_size=4
        ).sum()

    torch._dynamo.reset()
    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight)
    results = (ours, *torch.autograd.grad(ours, (x, weight)))
    whole.requires_grad_()
    exact = linear_cross_entropy_reference(torch.tanh(x), whole, target, reduction=reduction).sum()
    exact_x, exact_weight = torch.autograd.grad(exact, (x, whole))
    for a, e in zip(results, (exact, exact_x, exact_weight[2 * rank : 2 * rank + 2]), strict=True):
        torch.testing.assert_close(a, e)
    return ()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(ranks: Ranks, reduction: str) -> None:
    assert ranks(compiled, reduction) == [()] * 4


def wrong_call(which: str) -> str:
    group, rank = dist.group.WORLD, dist.get_rank()
    x, weight, target = torch.randn(6, HIDDEN), torch.randn(3, HIDDEN), torch.randint(0, 12, (6,))
    options: dict[str, Any] = {"group": group}
    if which == "reduction":
        options["reduction"] = "sum" if rank == 2 else "mean"
    if which == "gradients" and rank == 1:
        weight.requires_grad_()
    if which == "features" and rank == 3:
        x = x[:, 1:]
    if which == "target":
        target[4] = 12
    if which == "filter":
        options["gradient_filter"] = 0.5
    forget_agreements(group)
    try:
        linear_cross_entropy(x, weight, target, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def target_out_of_range(compiled: bool) -> str:
    """At the second position of the second sequence, of which the first one has no target."""
    x, weight, target = (
        torch.randn(2, 3, HIDDEN),
        torch.randn(3, HIDDEN),
        torch.tensor([[0, 1, 2], [13, 2, 12]]),
    )

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, shift=True, chunk_size=1, group=dist.group.WORLD)

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    errors = []
    for run in (function, torch.func.grad(loss)):
        with pytest.raises(IndexError) as error:
            run(x, weight)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    return errors[0]


def test_a_target_out_of_range_is_named_among_all_classes(ranks: Ranks) -> None:
    said = {text for compiled in (False, True) for text in ranks(target_out_of_range, compiled)}
    assert said == {
        "linear_cross_entropy: Target 12 is out of bounds: row 4 of the target needs a class index from 0 to "
        "C-1 for C = 12, the classes of all ranks, or ignore_index (-100)"
    }


def recorded_target_out_of_range() -> str:
    x, weight, target = torch.randn(7, HIDDEN), torch.randn(3, HIDDEN), torch.arange(7)
    target[5] = 12
    with using(EMULATED):
        options: dict[str, Any] = {"chunk_size": 2, "group": dist.group.WORLD, "reduction": "none"}
        assert linear_cross_entropy(x, weight, target, **options).isnan().nonzero().tolist() == [[5]]
        with pytest.raises(IndexError) as error:
            lossops.check_async_errors()
        lossops.check_async_errors()
    return str(error.value)


@on(EMULATED)
def test_cuda_records_a_row_of_the_whole_target(ranks: Ranks, device: str) -> None:
    assert set(ranks(recorded_target_out_of_range)) == {
        "linear_cross_entropy: Target 12 is out of bounds: row 5 of the target needs a class index from 0 to "
        "C-1 for C = 12, the classes of all ranks, or ignore_index (-100)"
    }


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("reduction", "RuntimeError: linear_cross_entropy: expected the same call on every rank"),
        ("gradients", "RuntimeError: linear_cross_entropy: expected the same call on every rank"),
        ("features", "RuntimeError: linear_cross_entropy: "),
        ("target", "IndexError: linear_cross_entropy: Target 12 is out of bounds: row 4"),
        ("filter", "ValueError: linear_cross_entropy: gradient_filter does not go with group"),
    ],
)
def test_errors_reach_every_rank(ranks: Ranks, which: str, text: str) -> None:
    for said in ranks(wrong_call, which):
        assert said.startswith(text)


def check_dtensor(placement: str) -> tuple[()]:
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (2, 2) if placement == "mesh" else (4,))
    sharded = {
        "mesh": [Replicate(), DShard(0)],
        "sharded": [DShard(0)],
        "replicated": [Replicate()],
    }[placement]
    replicated = [Replicate()] * mesh.ndim
    x, weight = torch.randn(6, HIDDEN, dtype=torch.float64), torch.randn(9, HIDDEN, dtype=torch.float64)
    bias, target = torch.randn(9, dtype=torch.float64), torch.randint(0, 9, (6,))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], z_loss=0.1)
    exact = torch.autograd.grad(expected, leaves)
    given = [
        distribute_tensor(t.clone(), mesh, p).requires_grad_()
        for t, p in ((x, replicated), (weight, sharded), (bias, sharded))
    ]
    loss = linear_cross_entropy(given[0], given[1], target, linear_bias=given[2], z_loss=0.1)
    torch.testing.assert_close(loss.full_tensor(), expected)
    for a, e, leaf in zip(torch.autograd.grad(loss, given), exact, given, strict=True):
        assert a.placements == leaf.placements
        torch.testing.assert_close(a.full_tensor(), e)
    _, metrics = linear_cross_entropy_with_metrics(x, given[1], target)
    assert torch.equal(metrics.predicted.full_tensor(), (x @ weight.t()).argmax(1))
    for k in range(2):

        def function(t: Any, k: int = k) -> Any:
            return linear_cross_entropy(*[t if j == k else given[j] for j in range(2)], target)

        with pytest.raises(NotImplementedError, match="linear_cross_entropy: expected no DTensor under"):
            torch.func.grad(function)(given[k])
    with pytest.raises(NotImplementedError, match="linear_weight whose classes"):
        linear_cross_entropy(given[0], distribute_tensor(weight, mesh, [DShard(1)] * mesh.ndim), target)
    return ()


@pytest.mark.parametrize("placement", ["sharded", "replicated", "mesh"])
def test_dtensors(ranks: Ranks, placement: str) -> None:
    assert ranks(check_dtensor, placement) == [()] * 4


def check_lost_shard(reduction: str, dtype: torch.dtype) -> tuple[()]:
    """A bias of -inf that leaves no class of ranks 1 and 3, with rows whose class is there and elsewhere."""
    x, weight = torch.randn(6, HIDDEN, dtype=dtype), torch.randn(8, HIDDEN, dtype=dtype)
    bias = torch.zeros(8, dtype=dtype)
    bias[2:4] = bias[6:] = -torch.inf
    target, mine = torch.tensor([2, 0, 7, 5, -100, 3]), slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    leaves = [t.clone().requires_grad_() for t in (x, weight[mine], bias[mine])]
    results = []
    for given, options in ((whole, {}), (leaves, {"group": dist.group.WORLD})):
        options |= {"linear_bias": given[2], "reduction": reduction, "chunk_size": 4}
        loss, metrics = linear_cross_entropy_with_metrics(*given[:2], target, **options)
        value = (loss + metrics.entropy).sum()
        grads = torch.autograd.grad(value, given, create_graph=dtype == torch.float64)
        seconds = ()
        if dtype == torch.float64:  # along the bias there are infinities
            parts = sum(g.square().sum() for g in grads[:2])
            seconds = torch.autograd.grad(parts, given[:2])
        results.append((loss.detach(), metrics.entropy.detach(), *grads, *seconds))
    expected, actual = results
    names = ("loss", "entropy", "x", "weight", "bias", "second of x", "second of weight")
    for name, e, a in zip(names, expected, actual, strict=False):
        e = e.detach()[mine] if "weight" in name or name == "bias" else e.detach()
        assert name == "loss" or e.isfinite().all(), name
        # Of 16 bits, both are rounded, and so are the terms of x's gradient.
        assert_near(a.detach(), e.double(), scale=1e5 if dtype == torch.bfloat16 else 1e3, message=name)
    return ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_shard_of_nothing_but_minus_infinity_is_as_unsharded(
    ranks: Ranks, reduction: str, dtype: torch.dtype
) -> None:
    assert ranks(check_lost_shard, reduction, dtype) == [()] * 4


def check_rows_without_a_finite_logit(reduction: str, weighted: bool, backend: str) -> tuple[()]:
    """Two positions a row: of one no rank has a finite logit, of the other two ranks have none."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    values, along = (
        (drawn(5, HIDDEN), drawn(8, 2, HIDDEN), drawn(8, 2)),
        (drawn(5, HIDDEN), drawn(8, 2, HIDDEN)),
    )
    values[2][:, 0] = values[2][2:4, 1] = values[2][6:, 1] = -torch.inf
    target = torch.tensor([[0, 0], [3, 1], [7, 4], [5, 5], [2, -100]])
    row_weight = torch.ones(5, 2, dtype=torch.float64)
    row_weight[:, 0] = 0 if weighted else 1
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)

    def derivatives(leaves: list[Tensor], along: list[Tensor], **options: Any) -> dict[str, Tensor]:
        x, weight, bias = leaves
        options |= {"reduction": reduction, "row_weight": row_weight, "linear_bias": bias, "chunk_size": 2}
        loss, metrics = linear_cross_entropy_with_metrics(x, weight, target, **options)
        results = {"loss": loss}
        for name, value in (("loss", loss), ("entropy", metrics.entropy), ("lse", metrics.lse)):
            upstream = torch.ones_like(value).requires_grad_()
            grads = torch.autograd.grad(value, leaves, upstream, create_graph=True)
            results |= {f"gradient of {name} to {k}": grad for k, grad in enumerate(grads)}
            for k, direction in enumerate(along):
                sources, tangent = [x, weight, upstream], (grads[k] * direction).sum()
                seconds = torch.autograd.grad(tangent, sources, retain_graph=True, materialize_grads=True)
                results |= {f"second of {name} along {k} to {j}": grad for j, grad in enumerate(seconds)}
        return results

    def part(t: Tensor) -> Tensor:
        return t[mine] if t.shape[0] == 8 else t

    parts = [part(t).clone().requires_grad_() for t in values]
    with using(backend):
        expected = derivatives([t.clone().requires_grad_() for t in values], list(along))
        actual = derivatives(parts, [part(t) for t in along], group=dist.group.WORLD)
    for name, e in expected.items():
        assert not (weighted and "loss" in name and e.isnan().any()), name
        e = e if e.dim() == 0 else part(e)
        assert_near(actual[name].detach(), e.detach(), scale=1000, message=name)
    return ()


@pytest.mark.parametrize("weighted", [False, True], ids=["counted", "weight 0"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@on(CPU, EMULATED)
def test_rows_without_a_finite_logit_are_as_unsharded(
    ranks: Ranks, reduction: str, weighted: bool, device: str
) -> None:
    assert ranks(check_rows_without_a_finite_logit, reduction, weighted, device) == [()] * 4
