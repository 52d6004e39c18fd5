"""Mean squared error's cases: one batch of a regression, large tensors, a weight or a mask of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _measure import Case, Loss, dtype_name
from torch import Tensor

import lossops

OURS: Loss = lossops.mse_loss
EAGER: Loss = F.mse_loss
PEERS: dict[str, dict[str, Loss]] = {}  # none that fuses this loss is known


def _masked_eager(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """What is written with torch, whose loss takes no mask."""
    return ((input - target).square() * mask).sum() / mask.sum()


def _case(
    elements: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight: bool = False,
    mask: bool = False,
    speedup: float | None = None,
) -> Case:
    tensor_bytes = elements * dtype.itemsize
    mask_bytes = elements if mask else 0
    names = ["input", "target", "weight"] if weight else ["input", "target"]

    def make(device: torch.device) -> dict[str, Tensor]:
        tensors = {name: torch.rand(elements, dtype=dtype, device=device) for name in names}
        if mask:
            tensors["mask"] = torch.rand(elements, device=device) < 0.7
        return tensors

    power = elements.bit_length() - 1
    size = f"2^{power}" if elements == 2**power and power > 10 else str(elements)
    return Case(
        name=" ".join([dtype_name(dtype), size, *names[2:], *["mask"] * mask]),
        dtype=dtype,
        elements=elements,
        # Read every operand.
        forward_bytes=len(names) * tensor_bytes + mask_bytes,
        # Read them again and write the input's gradient; the target needs none.
        backward_bytes=(len(names) + 1) * tensor_bytes + mask_bytes,
        make=make,
        eager=_masked_eager if mask else None,
        speedup=speedup,
    )


CASES = [
    _case(2**26, speedup=4),
    _case(2**26, dtype=torch.bfloat16, speedup=5),
    _case(2**24, weight=True, speedup=5),
    _case(2**24, mask=True, speedup=5),
    _case(1024, speedup=1),
]

QUICK = [
    _case(2**22),
    _case(1024, speedup=1),
]

CUDA_CASES = [
    _case(2**27),
    _case(2**27, dtype=torch.bfloat16),
    _case(2**26, dtype=torch.float64),
    _case(2**26, weight=True),
    _case(2**26, mask=True),
    _case(1024),
]

CUDA_QUICK = [
    _case(2**27),
    _case(1024),
]
