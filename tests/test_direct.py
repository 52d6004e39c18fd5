"""The way round the dispatcher: the ops' bits, for plain tensors alone, and only where nobody watches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from devices import cpu_only, gpu_only, not_emulated
from tolerances import DTYPES
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lossops
from lossops import _ahead, _direct


def cross_entropy_inputs(rows: int = 13, classes: int = 7, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, classes, (rows,))
    target[0] = -100
    return torch.randn(rows, classes, dtype=dtype, requires_grad=True), target


def mse_inputs(rows: int = 13, columns: int = 7, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, rows, columns, dtype=dtype)
    return x.clone().requires_grad_(), y.clone()


LOSSES = pytest.mark.parametrize(
    ("loss", "inputs", "node"),
    [
        (lossops.cross_entropy, cross_entropy_inputs, "DirectCrossEntropy"),
        (lossops.mse_loss, mse_inputs, "DirectMSE"),
    ],
    ids=["cross_entropy", "mse"],
)


def step(loss, x: Tensor, y: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value, x, torch.full_like(value, upstream))
    return value.detach(), gradient


def goes_direct(loss, x: Tensor, y: Tensor) -> bool:
    return "without the dispatcher" in str(lossops.explain(loss, x, y))


@not_emulated
@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (33, 1), (13, 7), (60, 2000)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_same_bits_as_the_ops(loss, inputs, node, dtype, shape, upstream, device, monkeypatch) -> None:
    x, y = inputs(*shape, dtype=dtype)
    assert node in type(loss(x, y).grad_fn).__name__
    direct = [*step(loss, x, y, upstream), *step(loss, x, y, upstream), loss(x.detach(), y)]
    monkeypatch.setattr(_direct, "ENABLED", False)
    assert node not in type(loss(x, y).grad_fn).__name__
    for a, b in zip(direct, [*step(loss, x, y, upstream) * 2, loss(x.detach(), y)], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@not_emulated
@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(loss, inputs, node, dtype, device, monkeypatch) -> None:
    x, y = inputs(dtype=dtype)
    with torch.autocast(x.device.type, torch.bfloat16):
        value = loss(x, y)
        assert node in type(value.grad_fn).__name__
        direct = *step(loss, x, y), loss(x.detach(), y)
        monkeypatch.setattr(_direct, "ENABLED", False)
        for a, b in zip(direct, (*step(loss, x, y), loss(x.detach(), y)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert value.dtype == max(dtype, torch.float32, key=lambda t: t.itemsize)


class Own(Tensor):
    pass


def not_plain(loss, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    x = x.detach()
    cases = {
        "transposed": (x.T.contiguous().T, y),
        "sliced": (torch.cat([x, x], 1)[:, : x.size(1)], y),
        "negated": (torch._neg_view(x), y),
        "a subclass": (x.as_subclass(Own), y),
        "empty": (x[:0], y[:0]),
        "another dtype": (x, y.double() if y.is_floating_point() else y.int()),
    }
    if y.is_floating_point():
        cases["a negated target"] = x, torch._neg_view(y)
        cases["a target with a gradient"] = x, y.clone().requires_grad_()
        cases["a broadcast target"] = x, y[:1].expand_as(x)
        cases["integers"] = x.long(), y
    else:
        cases["one row"] = x[0], y[0]
        cases["images"] = x.unsqueeze(-1), y.unsqueeze(-1)
        cases["probabilities"] = x, x.softmax(1)
        cases["an expanded target"] = x, y[:1].expand(len(x))
    return cases


@not_emulated
@LOSSES
def test_what_is_not_plain_goes_to_the_ops(loss, inputs, node, device) -> None:
    x, y = inputs()
    assert goes_direct(loss, x, y)
    y = y.clamp_min(0)
    for name, arguments in not_plain(loss, x, y).items():
        assert not goes_direct(loss, *arguments), name


@cpu_only
@LOSSES
def test_what_no_tensor_is_goes_to_the_ops(loss, inputs, node, device) -> None:
    x, y = inputs()
    for bad in (3, None, "x", [1.0]):
        with pytest.raises(TypeError, match="expected input to be a Tensor"):
            loss(bad, y)
        with pytest.raises(TypeError, match="expected target to be a Tensor"):
            loss(x, bad)
    for sparse in (x.detach().to_sparse(), x.detach().to_mkldnn()):
        with pytest.raises(NotImplementedError, match="dense"):
            loss(sparse, y)
    assert not goes_direct(loss, x.to("meta"), y.to("meta"))


def others(x: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """What a hook might put in a saved tensor's place."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.double(),
        lambda t: t[:1],
        lambda t: t.transpose(0, -1),
        lambda t: t.flatten(),
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.cat([t, t]),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
    ]
    return [*changes, lambda t: t.cpu()] if x.is_cuda else changes


@not_emulated
@LOSSES
def test_saved_tensors_that_come_back_as_others(loss, inputs, node, device) -> None:
    """Nothing is read or written at the old length, or on the old device: an error, or the same gradient."""
    x, y = inputs()
    (expected,) = torch.autograd.grad(loss(x, y), x)
    for change in others(x):
        for replaced in (x, y):

            def unpack(t: Tensor, replaced=replaced, change=change) -> Tensor:
                return change(t) if t.dtype == replaced.dtype and t.shape == replaced.shape else t

            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                value = loss(x, y)
            try:
                (gradient,) = torch.autograd.grad(value, x)
            except (RuntimeError, ValueError, NotImplementedError, IndexError):
                continue
            torch.testing.assert_close(gradient, expected)


@gpu_only
@LOSSES
def test_large_batches_of_a_gpu(loss, inputs, node, device) -> None:
    assert goes_direct(loss, *inputs(5000, 1000))


@LOSSES
def test_sizes_and_limit(loss, inputs, node) -> None:
    for shape in ((1, 1), (1, 5), (33, 1), (256, 512)):
        x, y = inputs(*shape)
        assert node in type(loss(x, y).grad_fn).__name__
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
def test_a_tracer_sees_the_ops(loss, inputs, node) -> None:
    x, y = inputs()
    for pre_dispatch in (False, True):
        traced = make_fx(lambda x, y: loss(x, y), pre_dispatch=pre_dispatch)(x.detach(), y)
        assert torch.equal(traced(x.detach(), y), loss(x, y))
        assert "lossops" in traced.code


@LOSSES
def test_a_checkpoint_recomputes_on_the_same_way(loss, inputs, node) -> None:
    x, y = inputs()
    with torch.profiler.profile():  # of the forward alone
        value = checkpoint(loss, x, y, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.equal(gradient, torch.autograd.grad(loss(x, y), x)[0])


@not_emulated
@LOSSES
def test_what_is_kept_goes_with_the_graph(loss, inputs, node, device, monkeypatch) -> None:
    monkeypatch.setattr(_ahead, "ENABLED", False)
    value = loss(*inputs())
    value.backward(retain_graph=True)
    assert value.grad_fn.kept is not None
    value.backward()
    assert value.grad_fn.kept is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


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


@pytest.mark.parametrize("enabled", [True, False])
def test_ignore_index_must_be_an_integer(enabled, monkeypatch) -> None:
    monkeypatch.setattr(_direct, "ENABLED", enabled)
    x, y = cross_entropy_inputs()
    for bad, error in ((1.5, TypeError), (2**63, ValueError)):
        with pytest.raises(error, match="ignore_index"):
            lossops.cross_entropy(x, y, ignore_index=bad)
