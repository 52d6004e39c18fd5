"""Inputs that are legal and mean: what once crashed, or turned NaN into a number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from devices import cpu_only, every_backend, on_the_cpu
from torch import Tensor

import lossops

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("shape", [(0,), (1, 0), (5, 0), (0, 5), (0, 0), (2, 3, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_elements(shape: tuple[int, ...], reduction: str) -> None:
    rows = shape[:1] * (len(shape) > 1) + shape[2:]
    for target in (torch.full(rows, -100), torch.rand(shape)):
        results = []
        for loss, y in ((lossops.cross_entropy, target), (F.cross_entropy, on_the_cpu(target))):
            x = torch.empty(shape, device=y.device, requires_grad=True)
            value = loss(x, y, reduction=reduction)
            value.sum().backward()
            results.append(on_the_cpu((value, x.grad)))
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 10), (4, 100), (4, 4000), (4, 10, 33)])
@every_backend
def test_a_nan_of_any_payload_stays_nan(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The canonical NaN of an NVIDIA GPU has all payload bits set."""
    integer, quiet, bits = (
        (torch.int32, 0x7FC00000, 22) if dtype == torch.float32 else (torch.int64, 0x7FF8 << 48, 51)
    )
    for payload in (0, 1, 0x1FF, (1 << bits) - 1):
        for negative in (False, True):
            x = torch.randn(shape, dtype=dtype)
            at = (1, 3) if len(shape) == 2 else (1, 3, 7)
            x.view(integer)[at] = quiet | payload
            x[at] = -x[at] if negative else x[at]
            assert x[at].isnan()
            x.requires_grad_()
            target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
            loss = lossops.cross_entropy(x, target, reduction="none")
            row = (1,) if len(shape) == 2 else (1, 7)
            assert loss[row].isnan()
            assert loss.isnan().sum() == 1
            loss.sum().backward()
            assert x.grad is not None
            assert x.grad.isnan().sum() == shape[1]


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(x)  # a view whose memory holds the opposite sign


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_views_that_negate(loss: str) -> None:
    x = torch.randn(8, 10, requires_grad=True)
    y = torch.randint(0, 10, (8,)) if loss == "cross_entropy" else negated(torch.randn(8, 10))
    values = [getattr(module, loss)(negated(x), y) for module in (lossops, F)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in values))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_upstream_gradients_without_memory(loss: str) -> None:
    x = torch.randn(8, 10, requires_grad=True)
    y = torch.randint(0, 10, (8,)) if loss == "cross_entropy" else torch.randn(8, 10)
    (gradient,) = torch.autograd.grad(
        getattr(lossops, loss)(x, y), x, torch._efficientzerotensor((), device=x.device)
    )
    assert not gradient.any()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_saved_tensor_hooks_may_change_the_layout(loss: str) -> None:
    x = torch.randn(8, 10, requires_grad=True)
    y = torch.randint(0, 10, (8,)) if loss == "cross_entropy" else torch.randn(8, 10)

    def transposed(saved: Tensor) -> Tensor:
        return saved.t().contiguous().t() if saved.dim() == 2 and saved.data_ptr() != y.data_ptr() else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, transposed):
        value = getattr(lossops, loss)(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    (expected,) = torch.autograd.grad(getattr(F, loss)(x, y), x)
    torch.testing.assert_close(gradient, expected)


@cpu_only
def test_meta_tensors_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16)
        target = torch.empty(4, device="meta", dtype=torch.long)
        assert lossops.cross_entropy(x, target).shape == ()


def test_half_gradients_are_rounded_once_when_differentiable() -> None:
    x, y = torch.randn(300_000).half().requires_grad_(), torch.randn(300_000).half()
    value = lossops.mse_loss(x, y)
    (plain,) = torch.autograd.grad(value, x, retain_graph=True)
    (differentiable,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(plain, differentiable, rtol=1e-3, atol=0)
    assert (plain != differentiable).float().mean() < 0.05


def test_many_classes_across_a_tile() -> None:
    """A float sum of 1e5 terms one by one would be off by 1e-5."""
    x = torch.randn(100_000, 16).t()
    target = torch.randint(0, 100_000, (16,))
    loss = lossops.cross_entropy(x, target, reduction="none")
    expected = F.cross_entropy(x.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=2e-6)


@cpu_only
def test_a_bad_isa_is_named_for_large_inputs_too() -> None:
    code = "import torch, lossops; lossops.cross_entropy(torch.randn(4096, 99), torch.zeros(4096).long())"
    environment = {**os.environ, "LOSSOPS_CPU_ISA": "avx1024"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ValueError: lossops: expected the CPU instruction set to be one of" in result.stderr
