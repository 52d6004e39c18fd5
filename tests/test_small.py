"""The way round the dispatcher for small batches: the ops' bits, and only where nobody watches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossops
from lossops import _ahead, _small


def cross_entropy_inputs(rows: int = 13, classes: int = 7) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, classes, (rows,))
    target[0] = -100
    return torch.randn(rows, classes, requires_grad=True), target


def mse_inputs(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*(shape or (13, 7)), requires_grad=True), torch.randn(*(shape or (13, 7)))


LOSSES = pytest.mark.parametrize(
    ("loss", "inputs", "node"),
    [
        (lossops.cross_entropy, cross_entropy_inputs, "SmallCrossEntropy"),
        (lossops.mse_loss, mse_inputs, "SmallMSE"),
    ],
    ids=["cross_entropy", "mse"],
)


def step(loss, x: Tensor, y: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value, x, torch.tensor(upstream))
    return value.detach(), gradient


@LOSSES
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_same_bits_as_the_ops(loss, inputs, node, upstream, monkeypatch) -> None:
    x, y = inputs()
    assert node in type(loss(x, y).grad_fn).__name__
    small = step(loss, x, y, upstream)
    monkeypatch.setattr(_small, "LIMIT", 0)
    assert node not in type(loss(x, y).grad_fn).__name__
    for a, b in zip(small, step(loss, x, y, upstream), strict=True):
        assert torch.equal(a, b)


@LOSSES
def test_sizes_and_limit(loss, inputs, node) -> None:
    for shape in ((1, 1), (1, 5), (33, 1), (256, 512)):
        x, y = inputs(*shape)
        value, gradient = step(loss, x, y)
        torch_loss = F.cross_entropy if loss is lossops.cross_entropy else F.mse_loss
        expected, expected_gradient = step(torch_loss, x, y)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7, equal_nan=True)
    x, y = inputs(257, 512)
    assert node not in type(loss(x, y).grad_fn).__name__


@LOSSES
def test_second_derivative_and_retain_graph(loss, inputs, node) -> None:
    x, y = inputs()
    value = loss(x, y)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(first, again)
    (second,) = torch.autograd.grad((again**2).sum(), x)
    reference_loss = F.cross_entropy if loss is lossops.cross_entropy else F.mse_loss
    (expected,) = torch.autograd.grad(reference_loss(x, y), x, create_graph=True)
    (expected,) = torch.autograd.grad((expected**2).sum(), x)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-7)


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@LOSSES
def test_a_watcher_sees_the_ops(loss, inputs, node) -> None:
    x, y = inputs()
    with Record() as record:
        loss(x, y).backward()
    assert sum("lossops" in op for op in record.ops) == 2
    value = loss(x, y)
    with Record() as record:
        value.backward()
    assert any("lossops" in op for op in record.ops)
    with torch.profiler.profile() as profile:
        loss(x, y)
    assert any("lossops::" in event.key for event in profile.key_averages())


@LOSSES
def test_batched_gradients(loss, inputs, node) -> None:
    x, y = inputs()
    value = loss(x, y)
    upstream = torch.tensor([1.0, 2.0, -3.0])
    (batched,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(batched, upstream.view(3, 1, 1) * one)


@LOSSES
def test_torch_defaults_do_not_matter(loss, inputs, node) -> None:
    x, y = inputs()
    expected = step(loss, x, y)
    torch.set_default_dtype(torch.float64)
    try:
        value = loss(x, y)
        (gradient,) = torch.autograd.grad(value, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == gradient.dtype == torch.float32
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])
    with torch.device("meta"):
        assert loss(x, y).device.type == "cpu"


def test_out_of_range_targets() -> None:
    x, y = cross_entropy_inputs()
    y[3] = 7
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds.*row 3"):
        lossops.cross_entropy(x, y)
    y[3] = 1
    value = lossops.cross_entropy(x, y)
    y.data[3] = 9  # behind autograd's back
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        value.backward()


@LOSSES
def test_a_changed_input_is_refused(loss, inputs, node) -> None:
    x, y = inputs()
    z = x * 1
    value = loss(z, y)
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@LOSSES
@pytest.mark.parametrize("replaced", ["input", "target"])
def test_tensors_that_shrink_behind_autograds_back(loss, inputs, node, replaced, monkeypatch) -> None:
    """Their addresses must not be read, nor a gradient of their size be written, at the old length."""
    monkeypatch.setattr(_ahead, "ENABLED", False)  # a gradient computed with the loss reads nothing again
    x, y = inputs(1000, 100)
    value = loss(x, y)
    tensor = x if replaced == "input" else y
    tensor.data = tensor.detach()[:2].clone()
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        value.backward()


@LOSSES
def test_what_a_transform_leaves_behind(loss, inputs, node) -> None:
    x, y = inputs()
    left: list[Tensor] = []
    torch.func.functionalize(lambda z: left.append(z) or z.clone())(x)
    assert node not in type(loss(left[0].requires_grad_(), y).grad_fn).__name__  # it has no address


@pytest.mark.parametrize("limit", [0, 1 << 17])
def test_ignore_index_must_be_an_integer(limit, monkeypatch) -> None:
    monkeypatch.setattr(_small, "LIMIT", limit)
    x, y = cross_entropy_inputs()
    for bad, error in ((1.5, TypeError), (2**63, ValueError)):
        with pytest.raises(error, match="ignore_index"):
            lossops.cross_entropy(x, y, ignore_index=bad)
