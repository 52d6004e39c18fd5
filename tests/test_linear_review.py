"""Linear cross-entropy where ways of computing meet: what torch's own loss of the logits does there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lossops.functional import linear_cross_entropy

each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def gradients(loss: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss.sum(), values)


@each_reduction
def test_the_ignored_class_of_a_narrow_target(reduction: str) -> None:
    """-100 is 156 to a uint8, which torch compares modulo 256: class 156 of a narrow target counts."""
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(200, 8, requires_grad=True)
    target = torch.tensor([156, 3, 156, 4], dtype=torch.uint8)
    loss = linear_cross_entropy(x, w, target, reduction=reduction)
    expected = F.cross_entropy(F.linear(x, w), target.long(), reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_other_targets_are_refused(dtype: torch.dtype) -> None:
    target = torch.zeros(2, dtype=dtype)
    with pytest.raises(RuntimeError, match="Long, Int or Byte"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), target)
