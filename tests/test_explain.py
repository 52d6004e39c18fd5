"""What lossops.explain says of a call, and that it leaves the call's tensors alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import CPU, cpu_only, cuda_kernels
from torch import Tensor

import lossops
from lossops import Explanation, explain

pytestmark = pytest.mark.usefixtures("device")


def arguments(shape: tuple[int, ...] = (64, 3000)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randint(0, shape[1], (shape[0], *shape[2:]))


def ops(explanation: Explanation) -> list[str]:
    return [kernel.op for kernel in explanation.kernels]


def test_kernels_forward_and_backward(device: str) -> None:
    found = explain(lossops.cross_entropy, *arguments())
    assert ops(found) == ["cross_entropy_forward", "cross_entropy_backward"]
    here = lossops._C.cpu_isa() if device == CPU else "cuda"
    assert {kernel.device for kernel in found.kernels} == {here}
    usual = "later steps", "without the dispatcher"  # see test_ahead.py, test_direct.py
    assert not found.copies and all(any(words in note for words in usual) for note in found.notes)
    x, y = torch.randn(2, 1000, 70).unbind()
    assert ops(explain(lossops.mse_loss, x.requires_grad_(), y)) == ["mse_forward", "mse_backward"]


def test_no_backward_without_a_gradient() -> None:
    logits, target = arguments()
    assert ops(explain(lossops.cross_entropy, logits.detach(), target)) == ["cross_entropy_forward"]
    with torch.no_grad():
        assert ops(explain(lossops.cross_entropy, logits, target)) == ["cross_entropy_forward"]


@cpu_only
@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((64, 3000), "along each row", "along each row"),
        ((4, 100_000), "rows cut into 4 pieces", "rows cut into 4 pieces"),
        ((20_000, 10), "across tiles of neighbouring rows", "short rows as they lie"),
        ((2, 21, 50, 100), "across tiles of neighbouring rows", "across tiles of neighbouring rows"),
    ],
)
def test_ways_through_the_logits(shape: tuple[int, ...], forward: str, backward: str) -> None:
    found = explain(lossops.cross_entropy, *arguments(shape), label_smoothing=0.1)
    assert [kernel.way for kernel in found.kernels] == [forward, backward]


@cuda_kernels
def test_ways_on_a_gpu() -> None:
    ways = {
        (64, 3000): "a block to each row",
        (64, 100): "a few lanes of a warp to each row",
        (64, 1000): "a warp to each row",
        (64, 10): "a thread to each row, from shared memory",
        (2, 21, 8, 8): "tiles of neighbouring rows",
        (4, 100_000): "rows cut into 24 slices",
    }
    for shape, way in ways.items():
        found = explain(lossops.cross_entropy, *arguments(shape))
        assert [kernel.way for kernel in found.kernels] == [way, way]
        assert all(kernel.parallel >= 1 for kernel in found.kernels)


@cpu_only
def test_threads(restore_threads: None) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = explain(lossops.cross_entropy, *arguments((1000, 3000)))
        assert [kernel.parallel for kernel in found.kernels] == [threads, threads]
    assert explain(lossops.cross_entropy, *arguments((4, 60))).kernels[0].parallel == 1


@cpu_only
def test_the_instruction_set_is_the_one_in_use() -> None:
    before = lossops._C.cpu_isa()
    try:
        for isa in lossops._C.available_cpu_isas():
            lossops._C.set_cpu_isa(isa)
            assert {k.device for k in explain(lossops.cross_entropy, *arguments()).kernels} == {isa}
    finally:
        lossops._C.set_cpu_isa(before)


def test_options_run_the_row_functions() -> None:
    found = explain(lossops.cross_entropy, *arguments(), softcap=3.0, z_loss=0.1)
    assert ops(found) == ["cross_entropy_rows_forward", "cross_entropy_rows_backward"]
    metrics = explain(lossops.functional.cross_entropy_with_metrics, *arguments())
    assert ops(metrics) == ops(found)


def test_copies() -> None:
    weight = torch.rand(3000, dtype=torch.float16)
    found = explain(lossops.cross_entropy, *arguments(), weight=weight)
    assert {(c.what, c.bytes) for c in found.copies} == {("class weight", 6000)}
    assert not explain(lossops.cross_entropy, *arguments(), weight=weight.float()).copies
    assert len(explain(lossops.cross_entropy, *arguments(), weight=torch.rand(6000)[::2]).copies) == 2


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("weighted copy of the target", "weight"),
        ("second pass", "metrics"),
        ("torch's own product and sum", "mse weight"),
        ("once for each of 5 samples", "vmap"),
        ("goes through the reference", "third"),
        ("to torch: cross_entropy", "routed"),
    ],
)
def test_notes_where_a_call_leaves_the_shortest_way(text: str, call: str) -> None:
    logits, target = arguments((6, 9))
    probabilities = torch.rand(6, 9)
    weight = torch.rand(9, requires_grad=True)

    def derivative(z: Tensor, order: int) -> Tensor:
        loss = lossops.cross_entropy(z, target)
        for _ in range(order):
            loss = torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()
        return loss

    class Mine(Tensor):
        pass

    def routed(z: Tensor) -> Tensor:
        with lossops.fused_losses():
            return F.cross_entropy(z.as_subclass(Mine), target).as_subclass(Tensor)

    calls: dict[str, Any] = {
        "weight": lambda: explain(lossops.cross_entropy, logits, probabilities, weight=weight),
        "metrics": lambda: explain(
            lossops.functional.cross_entropy_with_metrics, logits, probabilities, label_smoothing=0.1
        ),
        "mse weight": lambda: explain(
            lossops.mse_loss, logits, probabilities, weight=torch.rand(6, 9, requires_grad=True)
        ),
        "vmap": lambda: explain(
            lambda w: torch.func.vmap(lambda w: lossops.cross_entropy(logits, target, weight=w))(w),
            torch.rand(5, 9),
        ),
        "third": lambda: explain(derivative, logits, 2),
        "routed": lambda: explain(routed, logits),
    }
    assert any(text in note for note in calls[call]().notes)


@cpu_only
def test_the_way_round_the_dispatcher_says_so() -> None:
    assert "without the dispatcher" in str(explain(lossops.cross_entropy, *arguments((32, 10))))
    assert "without the dispatcher" in str(
        explain(lossops.mse_loss, torch.rand(9, requires_grad=True), torch.rand(9))
    )


def test_nothing_of_the_callers_changes() -> None:
    logits, target = arguments()
    produced = logits * 2
    before = produced.detach().clone()
    explain(lossops.cross_entropy, logits, target)
    explain(lossops.cross_entropy, produced, target, inplace_backward=True)
    explain(lossops.CrossEntropyLoss(inplace_backward=True), produced, target)
    assert logits.grad is None
    assert torch.equal(produced, before)
    produced.sum().backward()
    assert torch.equal(logits.grad, torch.full_like(logits, 2))


OWN_MEMORY = "the gradient has memory of its own"


@pytest.mark.parametrize("way", ["in place", "hooks", "checkpoint", "negated view"])
def test_whether_the_gradient_takes_the_logits_memory(way: str) -> None:
    logits, target = arguments((6, 9))
    gradients: list[Tensor] = []

    def loss(z: Tensor) -> Tensor:
        return lossops.cross_entropy(z, target, inplace_backward=True)

    def produced(x: Tensor) -> Tensor:
        z = torch._neg_view(x * 1) if way == "negated view" else x * 1
        z.register_hook(lambda gradient: gradients.extend([z.detach(), gradient]))
        if way == "checkpoint":
            return torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False)
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            if way == "hooks"
            else nullcontext()
        ):
            return loss(z)

    found = explain(produced, logits)
    shares = way == "in place"
    assert any(OWN_MEMORY in note for note in found.notes) != shares
    z, gradient = gradients
    assert (gradient.data_ptr() == z.data_ptr()) == shares


@cpu_only
def test_a_compiled_gradient_has_memory_of_its_own() -> None:
    torch._dynamo.reset()
    logits, target = arguments((6, 9))
    compiled = torch.compile(
        lambda z: lossops.cross_entropy(z * 1, target, inplace_backward=True),
        fullgraph=True,
        backend="aot_eager",
    )
    found = explain(compiled, logits)
    assert any(OWN_MEMORY in note for note in found.notes)


def test_a_model_and_torchs_own_loss() -> None:
    layer, (_, target) = torch.nn.Linear(20, 3000), arguments()
    found = explain(lambda x: lossops.cross_entropy(layer(x), target), torch.randn(64, 20))
    assert ops(found)[0] == "cross_entropy_forward"
    none = explain(F.cross_entropy, *arguments())
    assert not none.kernels and str(none) == "no kernel of lossops ran"
    with lossops.fused_losses():
        assert ops(explain(F.cross_entropy, *arguments())) == ops(
            explain(lossops.cross_entropy, *arguments())
        )


def test_an_error_ends_the_recording() -> None:
    logits, target = arguments()
    with pytest.raises(RuntimeError, match="expected target of shape"):
        explain(lossops.cross_entropy, logits[:, :, None], target)
    assert lossops._C.stop_trace() == []
    assert ops(explain(lossops.cross_entropy, logits, target)) == [
        "cross_entropy_forward",
        "cross_entropy_backward",
    ]


@cpu_only
def test_printed() -> None:
    isa = lossops._C.cpu_isa()
    weight = torch.rand(3000, dtype=torch.float16)
    logits, target = arguments((4, 3000))
    assert str(explain(lossops.cross_entropy, logits.detach(), target, weight=weight)) == (
        f"cross_entropy_forward: {isa}, along each row, 1 thread\n"
        "copy of class weight, 6000 bytes: in the type that the kernels compute in"
    )
